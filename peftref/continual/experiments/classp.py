r"""CLASSP and its rivals: digits, then clothes, with the same ten outputs; what is kept against what is learned.

Every method starts from the same networks, which plain SGD has taught the digits, and learns the clothes with several
step sizes, so that it has a curve: accuracy on digits against accuracy on clothes. Methods are compared where the
*mean* curve first reaches a level of accuracy on clothes (:func:`kept_at`): one step size for all networks, with no
choice of the luckiest point of a network's own curve. Differences are paired, over the networks.

The sizes ``t4`` and ``gpu`` are the published experiment: all of MNIST, then all of Fashion-MNIST, the full network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...data import load
from ...results import finding
from ..baselines.ewc import EWC
from ..classp import CLASSP
from ..core.streams import Task, domain_incremental
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
RIVALS = {
    "SGD": "SGD",
    "Adam": "Adam",
    "CLASSP p=2": "AdaGrad that keeps its sums",
    "p=1, erased": "with its memory erased",
    "p=1, shuffled": "with its memory shuffled",
    "p=1, averaged": "with one number for each tensor",
    "gate only, 1/4": "the gate alone",
}
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


def kept_at(curves: Tensor, level: float) -> Tensor | None:
    """Accuracy on the first task of each network, at the step size where the mean network first reaches a level.

    Between neighbouring step sizes the curves are straight lines.

    Args:
        curves: accuracies on first and second task by step size, from small to large: ``(networks, rates, 2)``.
        level: accuracy on the second task.

    Returns:
        ``(networks,)``; None where the mean of the networks never reaches the level.

    >>> curves = torch.tensor([[[90.0, 20.0], [70.0, 60.0]], [[80.0, 20.0], [60.0, 60.0]]])
    >>> kept_at(curves, 40.0)
    tensor([80., 70.])
    """
    mean = curves[..., 1].mean(0)
    reached = (mean >= level).nonzero()
    if not len(reached):
        return None
    right = int(reached[0])
    if right == 0:
        return curves[:, 0, 0]
    left = right - 1
    share = (level - mean[left]) / (mean[right] - mean[left])
    return torch.lerp(curves[:, left, 0], curves[:, right, 0], share)


def choice(curves: Mapping[str, Tensor], names: Sequence[str], level: float) -> str:
    """The setting that keeps most at a level, judged by validation images."""

    def score(name: str) -> float:
        kept = kept_at(curves[name][:, :, 0], level)
        return -math.inf if kept is None else float(kept.mean())

    return max(names, key=score)


def rows(
    curves: Mapping[str, Tensor], levels: Sequence[float], chosen: Mapping[float, Mapping[str, str]]
) -> list[dict[str, Any]]:
    """The claims: accuracy on digits kept by one method beyond another, at each level of accuracy on clothes."""
    found = []
    for level in levels:
        best = chosen[level]
        pairs = [("CLASSP keeps more than EWC", best["CLASSP"], best["EWC"], "abstract")]
        pairs += [(f"CLASSP keeps more than {other}", "CLASSP p=1", name, "ours") for name, other in RIVALS.items()]
        for claim, name, other, where in pairs:
            ours = kept_at(curves[name][:, :, 1], level)
            theirs = kept_at(curves[other][:, :, 1], level)
            if ours is not None and theirs is not None:
                level_of = {name: float(ours.mean()), other: float(theirs.mean())}
                values = (ours - theirs).tolist()
                claim = f"{claim}, {level:g} % on clothes"
                found.append(finding(claim, values, where=where, unit="points", level=level_of))
    return found


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


def published_rows(values: Mapping[str, Sequence[Sequence[float]]]) -> list[dict[str, Any]]:
    """What the published protocol keeps and learns beyond SGD at the same rate, on test images."""
    found = []
    for claim, column in (("keeps", 1), ("learns", 2)):
        ours = [row[column] for row in values["published protocol"]]
        theirs = [row[column] for row in values["SGD"]]
        level = {"published protocol": sum(ours) / len(ours), "SGD": sum(theirs) / len(theirs)}
        pairs = [a - b for a, b in zip(ours, theirs, strict=True)]
        what = f"the published protocol {claim} more than SGD, the same step size"
        found.append(finding(what, pairs, where="ours", unit="points", level=level))
    return found


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
