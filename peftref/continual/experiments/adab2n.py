r"""AdaB2N on photographs: Split CIFAR-10 in five tasks of two classes, each image seen once, DER++ and ER-ACE.

Three differences, paired over the same orders of the classes: what AdaB2N gains over BatchNorm as the published codes
compare them, where the network with BatchNorm takes three forward passes a step under DER++ (new images, and two draws
from the buffer) and two under ER-ACE, and that with AdaB2N one; what the one pass gains alone; and what AdaB2N gains
where both take one. The first is the sum of the other two. The paper has the first alone
(``lvyilin/AdaB2N@9aaba7e:models/derpp.py#L47-L60``, three passes, ``models/derpp_ada.py#L78-L82``, one), and its 7.68
is the largest gain of those it reports.

Every arm has its own learning rate, the best of several on images held out from training, in an order of the classes
that is not among those reported. A further arm makes psi move, by a rate for it a hundred times larger; the network's
rate is that of the arm it varies. The sizes ``t4`` and ``gpu`` are the published protocol, all images and a ResNet-18
of full width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...data import load
from ...results import finding
from ..core.streams import class_incremental
from ._adab2n_pieces import ARMS, learned
from .adab2n_at_scale import adab2n, batch_norm, cifar_resnet18, run_at_scale, three_passes
from .normalised_streams import TASKS

__all__ = ["MINUTES", "NEEDS", "PRESETS", "run"]

SETTING = {"kappa": 0.4, "strength": 0.1}  # in the middle of the published grid, which has no default
PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {
        "images": "fashion8k",
        "orders": [1, 2],
        "per_class": 6,
        "width": 2,
        "buffer": 20,
        "rates": [0.03],
        **SETTING,
    },
    "cpu": {
        "images": "cifar10",
        "orders": [1, 2, 3, 4, 5],
        "per_class": 500,
        "width": 16,
        "buffer": 500,
        "rates": [0.03, 0.1, 0.3],
        **SETTING,
    },
    "t4": {"orders": [0, 1], "large": True},
    "gpu": {"orders": [0, 1, 2], "large": True},
}
MINUTES = {"smoke": 0.05, "cpu": 20, "t4": 15, "gpu": 9}
NEEDS: dict[str, tuple[str, ...]] = {
    "smoke": (),
    "cpu": ("vision", "cifar10"),
    "t4": ("cuda", "vision", "cifar10"),
    "gpu": ("cuda", "vision", "cifar10"),
}
PAPER = {"where": "abstract, up to", "paper": 7.68}  # the largest of the paper, on Split CIFAR-10
OURS: dict[str, Any] = {"where": "ours"}


def run(each: Callable[..., Any], *, data: Path | None = None, large: bool = False, **settings: Any) -> dict[str, Any]:
    """All networks, one after the other; see :mod:`peftref.results`."""
    return _large(each, data, **settings) if large else _photographs(each, data, **settings)


def _photographs(
    each: Callable[..., Any], data: Path | None, *, orders: Sequence[int], rates: Sequence[float], **size: Any
) -> dict[str, Any]:
    torch.set_num_threads(1)
    chosen: dict[str, float] = {}
    tuning: dict[str, list[float]] = {}
    found: dict[str, list[dict[str, Any]]] = {}
    for name, arm in ARMS.items():
        shared = SAME_RATE.get(name)
        if shared:
            chosen[name] = chosen[shared]
        else:
            tried = [each(f"tune {name}, {r:g}", learned, arm, r, 0, data=data, **size) for r in rates]
            tuning[name] = [float(np.mean(one["running"])) for one in tried]
            chosen[name] = rates[int(np.argmax(tuning[name]))]
        rate = chosen[name]
        found[name] = [each(f"{name}, {rate:g}, order {o}", learned, arm, rate, o, data=data, **size) for o in orders]
    last = {name: [float(np.mean(one["running"])) for one in ones] for name, ones in found.items()}
    fresh = {name: [float(np.mean(one["fresh"])) for one in ones] for name, ones in found.items()}
    return {
        "rows": _rows(last, fresh),
        "arrays": {
            "last": last,
            "tasks": {name: [one["running"] for one in ones] for name, ones in found.items()},
            "fresh": fresh,
            "psi": {name: [one["psi"] for one in ones] for name, ones in found.items() if ARMS[name].balanced},
            "tuning": tuning,
        },
        "protocol": {
            "sha256": load(size["images"], data).sha256,
            "network": "three stages of a ResNet-18" if size["images"] == "cifar10" else "SmallCNN",
            "optimiser": "SGD",
            "batch": "10 new; twice 10 replayed under DER++, 10 under ER-ACE",
            "epochs": 1,
            "chosen rates": chosen,
        },
    }


SAME_RATE = {"DER++, AdaB2N, fast psi": "DER++, AdaB2N"}  # only the rate of psi differs


def _rows(last: Mapping[str, Sequence[float]], fresh: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """The claims, from the last accuracy of each order under each arm; ``fresh``: with statistics made anew."""

    def renewed(name: str) -> dict[str, Any]:
        pairs = [a - b for a, b in zip(fresh[name], last[name], strict=True)]
        level = {"running": float(np.mean(last[name])), "made anew": float(np.mean(fresh[name]))}
        return finding(f"statistics made anew, over running ones, {name}", pairs, unit="points", level=level, **OURS)

    fast, plain = "DER++, AdaB2N, fast psi", "DER++, AdaB2N"
    return [
        *_decomposed("DER++", "three", last),
        *_decomposed("ER-ACE", "two", last),
        _row("a rate of psi 100 times larger, over AdaB2N, DER++", fast, plain, last, **OURS),
        *(renewed(name) for name in ("DER++, BN, three passes", "DER++, BN, one pass", "DER++, AdaB2N")),
    ]


def _decomposed(rule: str, passes: str, last: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """As published, and the two differences that it is the sum of."""
    several, one, ours = f"{rule}, BN, {passes} passes", f"{rule}, BN, one pass", f"{rule}, AdaB2N"
    return [
        _row(f"AdaB2N with one pass over BatchNorm with {passes}, {rule}", ours, several, last, **PAPER),
        _row(f"one pass over {passes}, BatchNorm, {rule}", one, several, last, **OURS),
        _row(f"AdaB2N over BatchNorm, both with one pass, {rule}", ours, one, last, **OURS),
    ]


def _row(claim: str, ours: str, rival: str, last: Mapping[str, Sequence[float]], **where: Any) -> dict[str, Any]:
    pairs = [a - b for a, b in zip(last[ours], last[rival], strict=True)]
    level = {name: float(np.mean(last[name])) for name in (rival, ours)}
    return finding(claim, pairs, unit="points", level=level, **where)


def _large(each: Callable[..., Any], data: Path | None, *, orders: Sequence[int]) -> dict[str, Any]:
    """Split CIFAR-10, a ResNet-18 of full width, DER++ at the published rate: the same orders of batches and crops."""
    arms = {
        "DER++, BN, three passes": three_passes,
        "DER++, BN, one pass": batch_norm,
        "DER++, AdaB2N": adab2n(SETTING["kappa"], SETTING["strength"]),
    }

    def one(arm: str, order: int) -> float:
        tasks = class_incremental(load("cifar10", data), TASKS)
        table = run_at_scale(cifar_resnet18, tasks, {"": arms[arm]}, seeds=[order])
        return float(table["last"].iloc[0])

    last = {arm: [each(f"{arm}, {order}", one, arm, order) for order in orders] for arm in arms}
    protocol = {"images": "cifar10", **SETTING}
    return {"rows": _decomposed("DER++", "three", last), "arrays": {"last": last}, "protocol": protocol}
