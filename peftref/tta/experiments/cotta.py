r"""CoTTA on CIFAR-10 under fifteen corruptions, one after the other, with the network never reset.

The source is a published ResNet-20 trained with crops and mirror images. A seed draws 800 test images and an order of
the corruptions. Every arm chooses its learning rate, and the memory :math:`m` of its teacher where it has one, on a
stream of other images under four other corruptions. The arms take CoTTA apart: the views alone (learning rate 0), and
CoTTA without the views, without the average (:math:`m=0`), and without restoration, each with settings of its own.

The long stream returns to each corruption ten times, with other images at every visit. There the arms run at the rates
they chose and at ten times these, to see which of the parts holds what goes wrong.

The sizes ``t4`` and ``gpu`` are ImageNet-C made on the fly with the published ImageNet settings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ...data import ORDERS, load
from ...models import from_timm
from ...results import finding
from ..baselines.bn_adapt import BNAdapt
from ..baselines.tent import Tent
from ..cotta import CoTTA
from ._cotta_arms import ARMS, Setting
from ._cotta_streams import WEIGHTS, Size, clean_errors, measure, rule, tune
from .at_scale import imagenet_folder, run_at_scale

__all__ = ["MINUTES", "NEEDS", "PRESETS", "run"]

PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {
        "seeds": [0, 1],
        "size": Size("shipped", images=20, batch=20, domains=1, visit=20, rounds=2, views=2, jobs=1)._asdict(),
    },
    "cpu": {
        "seeds": [0, 1, 2, 3, 4],
        "size": Size("resnet20", images=800, batch=200, domains=15, visit=100, rounds=10, views=8, jobs=2)._asdict(),
    },
    "t4": {"backbone": "resnet50.tv_in1k", "limit": 1000, "batch": 32, "seeds": [0, 1]},
    "gpu": {"backbone": "resnet50.tv_in1k", "limit": 5000, "batch": 64, "seeds": [0, 1]},
}
MINUTES = {"smoke": 0.1, "cpu": 75, "t4": 10, "gpu": 9}
NEEDS: dict[str, tuple[str, ...]] = {
    "smoke": (),
    "cpu": ("cifar10", WEIGHTS),
    "t4": ("cuda", "vision", "imagenet"),
    "gpu": ("cuda", "vision", "imagenet"),
}
SHORT = [name for name in ARMS if ", without views" not in name]
LONG = ["BN-adapt", "Tent", "all-parameter Tent", "without views"]
LONG += ["without average, without views", "without restoration, without views", "views alone", "CoTTA"]
FASTER = ["Tent", "all-parameter Tent", "without views"]
FASTER += ["without average, without views", "without restoration, without views"]
PLACE = "Table 2: CIFAR-10-C, WRN-28-10"


def run(each: Any, *, data: Path | None = None, **settings: Any) -> dict[str, Any]:
    """The experiment; see :mod:`peftref.results`."""
    return _published(each, data, **settings) if "backbone" in settings else _cifar(each, data, **settings)


def _cifar(each: Any, data: Path | None, seeds: Sequence[int], size: Mapping[str, Any]) -> dict[str, Any]:
    large = Size(**size)
    tuning = {name: each(f"choice, {name}", tune, name, large, data) for name, arm in ARMS.items() if len(arm.grid) > 1}
    chosen = {name: min(found, key=found.get) for name, found in tuning.items()}

    def setting(name: str, factor: float = 1.0) -> Setting:
        lr, m = (float(word) for word in chosen.get(name, "0 0").split())
        return Setting(factor * lr, m)

    short = {name: each(f"one round, {name}", measure, name, setting(name), large, data, seeds) for name in SHORT}
    long = {
        f"{name}{label}": each(
            f"ten rounds, {name}{label}", measure, name, setting(name, factor), large, data, seeds, True
        )
        for factor, label, names in ((1.0, "", LONG), (10.0, ", ten times the rate", FASTER))
        for name in names
    }
    errors = {name: [one["error"] for one in found] for name, found in short.items()}
    return {
        "rows": [*_rows(errors), *_long_rows(long)],
        "arrays": {
            "errors": errors,
            "domains": {name: [one["domains"] for one in found] for name, found in short.items()},
            "rounds": {name: [one["rounds"] for one in found] for name, found in long.items()},
            "drift": _mean_path(long, "drift"),
            "move": _mean_path(long, "move"),
            "tuning": tuning,
            "rule": each("rule", rule, large, data, seeds),
            "clean": each("clean", clean_errors, large, data, seeds),
        },
        "protocol": {
            "data": "CIFAR-10 (JPEG copy)" if large.network == "resnet20" else "fashion8k",
            "sha256": load("fashion8k").sha256 if large.network == "shipped" else load("cifar10", data).sha256,
            "weights": WEIGHTS if large.network == "resnet20" else "pretrained()",
            "severity": 5,
            "order of domains": "ORDERS[seed]",
            "reset": "never",
            "precision": "bfloat16 products, float32 weights" if large.network == "resnet20" else "float32",
            "chosen": chosen,
        },
    }


def _mean_path(long: Mapping[str, Any], key: str) -> dict[str, list[float]]:
    """Of the arms with a student: mean over seeds after every batch."""
    paths = {name: np.array([one[key] for one in found]) for name, found in long.items()}
    return {name: path.mean(0).round(4).tolist() for name, path in paths.items() if path.size}


def _rows(errors: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    pairs: tuple[tuple[str, str, str, float | None], ...] = (
        ("CoTTA", "BN-adapt", PLACE, 4.2),
        ("CoTTA", "Tent", PLACE, 4.5),
        ("CoTTA", "all-parameter Tent", "ours", None),
        ("views alone", "BN-adapt", "ours", None),
        ("CoTTA", "views alone", "ours", None),
        ("CoTTA", "without views", PLACE + ": 18.3 to 17.4", 0.9),
        ("CoTTA", "without average", "ours", None),
        ("CoTTA", "without restoration", PLACE + ": 17.4 to 16.2", 1.2),
        ("without views", "BN-adapt", PLACE + ": 20.4 to 18.3", 2.1),
        ("all-parameter Tent", "Tent", "ours", None),
        ("Tent and views", "CoTTA", "ours", None),
        ("Tent and views", "Tent", "ours", None),
    )
    return [
        _gain(f"one round: gain of {ours} over {other}", errors[ours], errors[other], (ours, other), where, paper)
        for ours, other, where, paper in pairs
    ]


def _long_rows(long: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Gains over ten rounds, and what the last round has lost to the first."""
    errors = {name: [one["error"] for one in found] for name, found in long.items()}
    pairs = [("CoTTA", "views alone")]
    for label in ("", ", ten times the rate"):
        ours = f"without views{label}"
        others = ["Tent", "all-parameter Tent", "without average, without views", "without restoration, without views"]
        pairs += [(ours, f"{other}{label}") for other in others]
    rows = [
        _gain(f"ten rounds: gain of {ours} over {other}", errors[ours], errors[other], (ours, other), "ours", None)
        for ours, other in pairs
    ]
    for name in ("Tent", "all-parameter Tent", "CoTTA", "without views"):
        first = [one["rounds"][0] for one in long[name]]
        last = [one["rounds"][-1] for one in long[name]]
        what = f"ten rounds: error of {name}, first round less last"
        rows.append(_gain(what, last, first, ("last round", "first round"), "ours", None))
    return rows


def _gain(
    what: str,
    ours: Sequence[float],
    other: Sequence[float],
    names: tuple[str, str],
    where: str,
    paper: float | None,
) -> dict[str, Any]:
    level = {names[1]: float(np.mean(other)), names[0]: float(np.mean(ours))}
    return finding(what, list(np.subtract(other, ours)), where=where, unit="points", paper=paper, level=level)


def _published(each: Any, data: Path | None, **settings: Any) -> dict[str, Any]:
    """ImageNet-C made on the fly, severity 5, all fifteen corruptions one after the other, never reset."""
    model = from_timm(settings["backbone"], pretrained=True)
    if data is None:
        raise ValueError("data: expected the folder that holds imagenet, one folder of images per class, got None")
    photographs = imagenet_folder(data / "imagenet", limit=settings["limit"])
    sgd = partial(torch.optim.SGD, momentum=0.9, nesterov=True)
    methods: dict[str, Callable[[nn.Module], nn.Module]] = {
        "source": lambda net: net,
        "BN-adapt": BNAdapt,
        "Tent": partial(Tent, lr=2.5e-4, optimizer=sgd),
        "CoTTA": lambda net: CoTTA(net, 0.01, 0.999, 0.001, 0.1, symmetric=True, optimizer=sgd),
    }

    def errors(seed: int) -> dict[str, float]:
        table = run_at_scale(methods, model, photographs, ORDERS[0], 5, settings["batch"], seed=seed)
        return {method: float(table[method].mean()) for method in methods}

    found = [each(f"seed {seed}", errors, seed) for seed in settings["seeds"]]
    mean = {method: [row[method] for row in found] for method in methods}
    level = {method: float(np.mean(values)) for method, values in mean.items()}
    where = "public benchmark, ImageNet-C, ResNet-50"
    rows = [
        finding(
            "CoTTA, ImageNet-C: error", mean["CoTTA"], where=where, unit="%", claim="paper", paper=63.1, level=level
        )
    ]
    return {"rows": rows, "arrays": {"error": mean}, "protocol": {"severity": 5, "reset": "never"}}
