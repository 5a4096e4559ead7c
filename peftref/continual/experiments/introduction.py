r"""Five ways to learn from a stream, each with its own rate, beside joint training on all tasks at once.

Clothes in five tasks of two classes, each image seen once in batches of ten. Every method chooses its learning rate,
EWC its strength and DER++ its beta, by the average incremental accuracy on held-out training images of a class order
that is not reported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...data import Dataset, Split, load
from ...results import finding
from ..baselines.ewc import EWC, diagonal_fisher
from ..baselines.rehearsal import ER, ERACE, DERpp
from ..core.metrics import evaluate, summary
from ..core.replay import Reservoir
from ..core.rule import FineTune
from ..core.streams import Task, class_incremental
from ..core.train import joint, learn

__all__ = ["MINUTES", "NEEDS", "PRESETS", "clothes", "fresh", "run"]

TASKS = 5
HELD_OUT = 4  # the class order on which settings are chosen
NAMES = ("fine-tune", "EWC", "ER", "DER++", "ER-ACE")
REHEARSAL: dict[str, Callable[..., FineTune]] = {"ER": ER, "DER++": DERpp, "ER-ACE": ERACE}
PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {
        "seeds": [1, 2],
        "rates": [0.1],
        "strengths": [1.0],
        "betas": [0.5],
        "sizes": [20],
        "size": 20,
        "passes": 2,
        "per_class": 20,
    },
    "cpu": {
        "seeds": [1, 2, 3, 5, 6],
        "rates": [0.01, 0.03, 0.1, 0.3],
        "strengths": [1.0, 10.0, 100.0, 1000.0],
        "betas": [0.5, 1.0],
        "sizes": [20, 200, 1000],
        "size": 200,
        "passes": 10,
    },
}
MINUTES = {"smoke": 0.05, "cpu": 4}
NEEDS: dict[str, tuple[str, ...]] = {"smoke": (), "cpu": ()}


def run(
    each: Callable[..., Any],
    *,
    data: Path | None = None,
    seeds: Sequence[int],
    rates: Sequence[float],
    strengths: Sequence[float],
    betas: Sequence[float],
    sizes: Sequence[int],
    size: int,
    passes: int,
    per_class: int | None = None,
) -> dict[str, Any]:
    """All networks, one after the other; see :mod:`peftref.results`."""
    many = f"joint, {passes} passes"
    second = {"EWC": strengths, "DER++": betas}
    trials = {
        name: {
            (lr, s): each(f"tune {name}, {lr}, {s}", trained, name, lr, s, HELD_OUT, size, per_class, tune=True)
            for lr in rates
            for s in second.get(name, (0.0,))
        }
        for name in (*NAMES, "joint", many)
    }
    best = {name: max(points, key=lambda p: points[p]["score"] or 0.0) for name, points in trials.items()}
    found = {
        name: [each(f"{name}, {s}", trained, name, *best[name], s, size, per_class) for s in seeds] for name in trials
    }
    buffers = {
        name: [[each(f"{name}, {s}, {n}", trained, name, *best[name], s, n, per_class) for s in seeds] for n in sizes]
        for name in REHEARSAL
    }
    return {
        "rows": rows(found, many),
        "arrays": {
            "matrices": [[one["matrix"] for one in found[name]] for name in NAMES],
            "own": [[one["own"] for one in found[name]] for name in NAMES],
            "joint": [[one["last"] for one in found[name]] for name in ("joint", many)],
            "swept": [[trials["EWC"][lr, s]["score"] for lr in rates] for s in strengths],
            "told": [
                [max(trials[name][lr, s]["own"] or 0.0 for s in second.get(name, (0.0,))) for lr in rates]
                for name in ("fine-tune", "EWC")
            ],
            "tuned": [max(one["score"] or 0.0 for one in trials[name].values()) for name in NAMES],
            "stiffest": [each(f"stiffest, {lr}", stiffest, lr, per_class) for lr in rates],
            "buffers": [[[one["matrix"] for one in runs] for runs in of_size] for of_size in buffers.values()],
        },
        "protocol": {
            "data": "fashion8k",
            "sha256": load("fashion8k").sha256,
            "network": "two hidden layers of 100, images of 14 x 14 pixels",
            "training": "SGD, one epoch, batches of 10 new images and 10 replayed ones",
            "names": list(NAMES),
            "chosen": {name: list(point) for name, point in best.items()},
        },
    }


def rows(found: Mapping[str, Sequence[Mapping[str, Any]]], many: str) -> list[dict[str, Any]]:
    """The claims, all of them ours: differences of the last accuracy, the same orders."""
    asked = [(name, "fine-tune") for name in ("EWC", "ER", "DER++", "ER-ACE")]
    asked += [("DER++", "ER"), ("ER-ACE", "ER"), ("joint", "DER++"), (many, "DER++")]
    lasts = {name: [one["last"] for one in runs] for name, runs in found.items()}
    return [
        finding(
            f"{name} over {other}",
            [a - b for a, b in zip(lasts[name], lasts[other], strict=True)],
            where="ours",
            unit="points",
            level={arm: sum(lasts[arm]) / len(lasts[arm]) for arm in (name, other)},
        )
        for name, other in asked
    ]


@cache
def clothes() -> Dataset:
    """Fashion-MNIST at 14 x 14 pixels."""
    full = load("fashion8k")
    train, test = (Split(F.avg_pool2d(part.x, 2), part.y) for part in (full.train, full.test))
    return dataclasses.replace(full, train=train, test=test)


def fresh(seed: int) -> nn.Sequential:
    """Two hidden layers of 100 units, untrained."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        hidden = [nn.Flatten(), nn.Linear(196, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU()]
        return nn.Sequential(*hidden, nn.Linear(100, 10))


def rule_of(name: str, second: float, buffer: Reservoir) -> FineTune:
    """The rule of a name; its second setting is EWC's strength or DER++'s beta."""
    if name in REHEARSAL:
        return REHEARSAL[name](buffer, **({"beta": second} if name == "DER++" else {}))
    return EWC(second) if name == "EWC" else FineTune()


def trained(
    name: str, lr: float, second: float, seed: int, size: int, per_class: int | None, tune: bool = False
) -> dict[str, Any]:
    """Accuracy matrix, accuracy among own classes, last accuracy and score; all None where the network breaks."""
    stream = class_incremental(clothes(), TASKS, seed=seed, val=0.1 if tune else 0.0, per_class=per_class)
    if tune:
        stream = [task._replace(test=task.val) for task in stream]
    model = fresh(seed)
    if name.startswith("joint"):
        row = joint(model, stream, lr=lr, seed=seed, epochs=1 if name == "joint" else int(name.split()[1]))
        return {"matrix": None, "own": None, "last": row.mean(), "score": row.mean()}
    matrix = _learned(model, stream, rule_of(name, second, Reservoir(size, seed)), lr, seed)
    if matrix is None:
        return {"matrix": None, "own": None, "last": None, "score": None}
    numbers = summary(matrix)
    found = {"last": numbers["last"], "score": numbers["incremental"]}
    return found | {"matrix": matrix, "own": evaluate(model, stream, own_classes=True).mean()}


def _learned(model: nn.Module, stream: Sequence[Task], rule: FineTune, lr: float, seed: int) -> Tensor | None:
    """The accuracy matrix; None for a network whose weights are not finite any more."""

    def broken() -> bool:
        return not all(p.isfinite().all() for p in model.parameters())

    try:
        matrix = learn(model, stream, rule, lr=lr, seed=seed)
    except ValueError:  # of a broken network no stiffness can be measured
        if not broken():
            raise
        return None
    return None if broken() else matrix


def stiffest(lr: float, per_class: int | None) -> float:
    """The largest stiffness after the first task of the order on which settings are chosen."""
    first = class_incremental(clothes(), TASKS, seed=HELD_OUT, val=0.1, per_class=per_class)[:1]
    model = fresh(HELD_OUT)
    learn(model, first, FineTune(), lr=lr, seed=HELD_OUT)
    return max(float(f.max()) for f in diagonal_fisher(model, *first[0].train).values())
