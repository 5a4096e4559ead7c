r"""CLASSP and its rivals: digits, then clothes, with the same ten outputs; what is kept against what is learned.

Every method starts from the same networks, which plain SGD has taught the digits, and learns the clothes with several
step sizes, so that it has a curve: accuracy on digits against accuracy on clothes. Methods are compared where the
*mean* curve first reaches a level of accuracy on clothes (:func:`kept_at`): one step size for all networks, with no
choice of the luckiest point of a network's own curve. Differences are paired, over the networks.

The sizes ``t4`` and ``gpu`` are the published experiment: all of MNIST, then all of Fashion-MNIST, the full network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...data import load
from ...results import finding
from ..baselines.ewc import EWC
from ..classp import CLASSP
from ..core.streams import Task, domain_incremental
from ._classp_claims import choice, kept_at, published_rows, rows
from .classp_at_scale import Method, PaperCNN, full_mnist, published_switch, run_at_scale
from .digits_then_clothes import GATES, Study

__all__ = ["MINUTES", "NEEDS", "PRESETS", "kept_at", "run"]

ONE = (0.1, 0.2, 0.4, 0.7)
PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {
        "seeds": [0, 1],
        "digits_per_class": 96,
        "clothes_per_class": 40,
        "test": 100,
        "width": 8,
        "rates": 2,
        "levels": [0.0],
    },
    "cpu": {
        "seeds": [0, 1, 2, 3, 4],
        "digits_per_class": None,
        "clothes_per_class": 240,
        "test": None,
        "width": 8,
        "rates": 4,
        "levels": [50.0, 58.0],
    },
    "t4": {"seeds": [0, 1], "large": True},
    "gpu": {"seeds": [0, 1, 2, 3, 4], "large": True},
}
MINUTES = {"smoke": 0.05, "cpu": 5, "t4": 10, "gpu": 9}
NEEDS: dict[str, tuple[str, ...]] = {
    "smoke": (),
    "cpu": (),
    "t4": ("cuda", "mnist", "fashion_mnist"),
    "gpu": ("cuda", "mnist", "fashion_mnist"),
}
RATES: dict[str, tuple[float, ...]] = {
    "SGD": (0.05, 0.1, 0.2, 0.4),
    "Adam": (1e-3, 2e-3, 4e-3, 8e-3),
    "CLASSP p=2": (0.01, 0.03, 0.06, 0.12),
    "CLASSP p=1": ONE,
    "CLASSP p=1, gate 1/4": ONE,
    "CLASSP p=1, gate 1/10": ONE,
    "official p=2": ONE,
    "EWC 10": (0.05, 0.1, 0.2, 0.3),
    "EWC 30": (0.05, 0.1, 0.2, 0.3),
    "EWC 100": (0.05, 0.1, 0.2, 0.3),
    "gate only, 1/4": (0.05, 0.1, 0.2, 0.4),
    "p=1, erased": (0.01, 0.02, 0.04, 0.08),
    "p=1, shuffled": (0.04, 0.08, 0.15, 0.3),
    "p=1, averaged": ONE,
}
PLAYED = {f"p=2, gate {share}": RATES["CLASSP p=2"] for share in ("1/4", "1/10")}  # for the widget, one network
EWCS = ("EWC 10", "EWC 30", "EWC 100")
CLASSPS = ("CLASSP p=1", "CLASSP p=1, gate 1/4", "CLASSP p=1, gate 1/10")


def run(each: Callable[..., Any], *, data: Path | None = None, large: bool = False, **settings: Any) -> dict[str, Any]:
    """All networks, one after the other; see :mod:`peftref.results`."""
    return _large(each, data, **settings) if large else _small(each, **settings)


def _small(
    each: Callable[..., Any], *, seeds: Sequence[int], rates: int, levels: Sequence[float], **size: Any
) -> dict[str, Any]:
    study = Study(seeds, **size)
    wanted = {name: values[:rates] for name, values in RATES.items()}
    points = {
        name: [[each(f"{name}, {lr}, {s}", study.both, name, lr, s) for lr in values] for s in seeds]
        for name, values in wanted.items()
    }
    curves = {name: torch.tensor(found) for name, found in points.items()}  # (seeds, rates, val or test, 2)
    played = [
        [each(f"{name}, {lr}", study.both, name, lr, seeds[0])[1] for lr in values] for name, values in PLAYED.items()
    ]
    taus = {"no threshold": 0.0, "gate 1/4": study.tau(GATES[0]), "gate 1/10": study.tau(GATES[1])}
    active = [each(f"active, {name}", study.activity, seeds[0], tau) for name, tau in taus.items()]
    model = partial(PaperCNN, size["width"], 14)
    published = _published(each, [study.digits, study.clothes], methods(0.2), seeds, model=model, epochs=(1, 1))
    chosen = {level: {kind[0].split()[0]: choice(curves, kind, level) for kind in (CLASSPS, EWCS)} for level in levels}
    return {
        "rows": [*rows(curves, levels, chosen), *published_rows(published)],
        "arrays": {
            "curves": [c[:, :, 1] for c in curves.values()],
            "validation": [c[:, :, 0] for c in curves.values()],
            "before": [each(f"before, {s}", study.accuracy, study.first(s)[0], "test")[0] for s in seeds],
            "sums": [each(f"sums, {s}", study.sums, s) for s in seeds],
            "stiffness": [each(f"stiffness, {s}", study.like_stiffness, s) for s in seeds],
            "active": [a["share"] for a in active],
            "ever": [a["ever"] for a in active],
            "moved": [[each(f"moved, {name}, {s}", study.moved, s, tau) for s in seeds] for name, tau in taus.items()],
            "played": played,
            "published": [*published.values()],
        },
        "protocol": {
            "data": ["mnist5k", "fashion8k"],
            "sha256": [load("mnist5k").sha256, load("fashion8k").sha256],
            "pixels": 14,
            "network": f"PaperCNN({size['width']})",
            "first task": "SGD, 0.3, two epochs",
            "second task": "one epoch, batches of 32, the step size falls linearly to zero",
            "methods": {name: list(values) for name, values in wanted.items()},
            "chosen": {f"{level:g}": names for level, names in chosen.items()},
            "thresholds": taus,
        },
    }


def methods(lr: float) -> dict[str, Method]:
    """SGD, and the published protocol with the published code's gate and with the paper's."""
    steps = partial(CLASSP, lr=lr, threshold=0.5, apply_decay=False)  # the published settings for the first task
    return {
        "SGD": Method(partial(torch.optim.SGD, lr=lr)),
        "published protocol": Method(partial(steps, mode="official"), published_switch),
        "the same with the paper's gate": Method(steps, published_switch),
    }


def _published(
    each: Callable[..., Any],
    tasks: Sequence[Task],
    kinds: Mapping[str, Method],
    seeds: Sequence[int],
    *,
    model: Callable[[], nn.Module],
    epochs: Sequence[int],
) -> dict[str, list[list[float]]]:
    """The five accuracies of :func:`peftref.continual.experiments.classp_at_scale.run_at_scale`, by method and seed."""

    def one(name: str, seed: int) -> list[float]:
        found = run_at_scale(tasks, {name: kinds[name]}, model=model, epochs=epochs, seeds=[seed])
        return [float(v) for v in found.iloc[0]]

    return {name: [each(f"published, {name}, {s}", one, name, s) for s in seeds] for name in kinds}


def _large(each: Callable[..., Any], data: Path | None, *, seeds: Sequence[int]) -> dict[str, Any]:
    """The published experiment at its own size; EWC as in its own paper, its best strength by both test accuracies."""
    assert data is not None
    tasks = domain_incremental(full_mnist(data), load("fashion_mnist", data))
    kinds = methods(0.2) | {"AdaGrad": Method(partial(torch.optim.Adagrad, lr=0.01))}
    springs = {
        f"EWC {v:g}": Method(partial(torch.optim.SGD, lr=0.1), rule=partial(EWC, v)) for v in (10.0, 30.0, 100.0)
    }
    values = _published(each, tasks, kinds | springs, seeds, model=PaperCNN, epochs=(4, 1))
    both = {name: [(row[1] + row[2]) / 2 for row in found] for name, found in values.items()}
    rival = max(springs, key=lambda name: sum(both[name]))
    pairs = [a - b for a, b in zip(both["published protocol"], both[rival], strict=True)]
    claim = finding(
        "the published protocol is more accurate than EWC, mean of both", pairs, where="abstract", unit="points"
    )
    return {
        "rows": [claim, *published_rows(values)],
        "arrays": {"published": [*values.values()]},
        "protocol": {"data": ["mnist", "fashion_mnist"], "epochs": [4, 1], "methods": [*values], "rival": rival},
    }
