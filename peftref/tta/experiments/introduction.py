"""The hook of the part's introduction: one method, the same photographs, two orders.

A published ResNet-20 meets test images of CIFAR-10 under fifteen corruptions, one after the other. A seed draws its
images and an order of the corruptions; the classes of a batch are mixed, or one follows the other. No labels, no reset.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ...data import ORDERS, Split, continual, load
from ...data.orders import as_stored, sorted_by_class
from ...results import finding
from ..baselines.bn_adapt import BNAdapt
from ..baselines.tent import Tent
from . import evaluate
from ._cotta_streams import WEIGHTS, Size, images, source

__all__ = ["MINUTES", "NEEDS", "PRESETS", "run"]

PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {"network": "shipped", "images": 20, "batch": 10, "domains": 2, "seeds": [0, 1]},
    "cpu": {"network": "resnet20", "images": 400, "batch": 50, "domains": 15, "seeds": [0, 1, 2, 3, 4]},
}
MINUTES = {"smoke": 0.05, "cpu": 6}
NEEDS: dict[str, tuple[str, ...]] = {"smoke": (), "cpu": ("cifar10", WEIGHTS)}
ORDER = {"mixed classes": as_stored, "one class after the other": sorted_by_class}
METHODS: dict[str, Callable[[nn.Module], nn.Module]] = {"source": lambda net: net, "BN-adapt": BNAdapt, "Tent": Tent}


def run(each: Any, *, data: Path | None = None, seeds: Sequence[int], **settings: Any) -> dict[str, Any]:
    """The experiment; see :mod:`peftref.results`."""
    size = _sizes(settings)
    errors = {
        order: {method: each(f"{order}, {method}", _measured, method, order, size, data, seeds) for method in METHODS}
        for order in ORDER
    }
    photographs = settings["network"] == "resnet20"
    protocol = {
        "data": "CIFAR-10 (JPEG copy)" if photographs else "fashion8k",
        "sha256": load("cifar10", data).sha256 if photographs else load("fashion8k").sha256,
        "weights": WEIGHTS if photographs else "pretrained()",
        "severity": 5,
        "reset": "never",
        "Tent's learning rate": 1e-3,
    }
    return {"rows": _rows(errors), "arrays": {"errors": errors}, "protocol": protocol}


def _measured(method: str, order: str, size: Size, data: Path | None, seeds: Sequence[int]) -> list[float]:
    """Mean error in % over the corruptions, one value a seed.

    Args:
        method: name of the method.
        order: name of the order.
        size: network, images of a seed, batch and number of corruptions.
        data: the reader's folder.
        seeds: which.
    """
    torch.set_num_threads(1)
    x, y = images(size, data)
    found = []
    for seed in seeds:
        rows = slice(size.images * seed, size.images * (seed + 1))
        domains = ORDERS[seed][: size.domains]
        stream = continual(Split(x[rows], y[rows]), domains, order=ORDER[order], batch_size=size.batch, seed=seed)
        found.append(evaluate.mean_error(evaluate.run(METHODS[method](source(size, data)), stream)))
    return found


def _rows(errors: Mapping[str, Mapping[str, Sequence[float]]]) -> list[dict[str, Any]]:
    rows = []
    for order, found in errors.items():
        for method in ("BN-adapt", "Tent"):
            level = {name: float(np.mean(found[name])) for name in ("source", method)}
            gain = list(np.subtract(found["source"], found[method]))
            rows.append(
                finding(f"{order}: gain of {method} over the source", gain, where="ours", unit="points", level=level)
            )
    return rows


def _sizes(settings: Mapping[str, Any]) -> Size:
    parts = {name: settings[name] for name in ("network", "images", "batch", "domains")}
    return Size(**parts, visit=1, rounds=1, views=1, jobs=1)
