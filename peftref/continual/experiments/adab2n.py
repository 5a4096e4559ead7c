r"""AdaB2N and its rivals on clothes: five tasks of two classes, each image seen once, DER++ with a buffer.

Three questions, each a paired difference over the same orders of the classes: what AdaB2N gains over BatchNorm as the
published codes compare them, where the network with BatchNorm takes three forward passes a step (new images, and two
draws from the buffer) and that with AdaB2N one; what it gains where both take one; and what the one pass gains alone.

The setting is chosen from a grid on images held out from training, in an order that is not among those reported. The
sizes ``t4`` and ``gpu`` are the published protocol: Split CIFAR-10, a ResNet-18, the setting in the middle of the grid.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...data import Split, load
from ...models.cnn import SmallCNN
from ...results import finding
from ..adab2n import AdaB2N, convert
from ..baselines.norms import continual_norm, group_norm, replace_batch_norms
from ..baselines.rehearsal import ERACE, DERpp
from ..core.metrics import evaluate, summary
from ..core.replay import Reservoir
from ..core.rule import FineTune
from ..core.streams import Task, class_incremental
from ..core.train import learn
from .adab2n_at_scale import Method, adab2n, batch_norm, cifar_resnet18, exchange, run_at_scale, three_passes

__all__ = ["MINUTES", "NEEDS", "PRESETS", "run"]

TASKS = 5
PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {
        "orders": [1, 2],
        "per_class": 6,
        "test": 20,
        "width": 2,
        "buffer": 20,
        "kappas": [0.1, 1.0],
        "strengths": [1.0],
        "momenta": [0.1],
        "jitters": 1,
    },
    "cpu": {
        "orders": [1, 2, 3, 4, 5],
        "per_class": None,
        "test": None,
        "width": 8,
        "buffer": 200,
        "kappas": [0.1, 0.4, 1.0],
        "strengths": [0.1, 1.0, 10.0],
        "momenta": [0.1, 0.03, 0.01],
        "jitters": 2,
    },
    "t4": {"orders": [0, 1], "large": True},
    "gpu": {"orders": [0, 1, 2], "large": True},
}
MINUTES = {"smoke": 0.05, "cpu": 8, "t4": 15, "gpu": 9}
NEEDS: dict[str, tuple[str, ...]] = {
    "smoke": (),
    "cpu": (),
    "t4": ("cuda", "vision", "cifar10"),
    "gpu": ("cuda", "vision", "cifar10"),
}
RATE = 0.03  # of plain SGD: published
NORMS = ("BN", "CMA", "GN", "CN", "AdaB2N", "only kappa", "only psi", "no loss")
CELLS = (
    *(("DER++", name) for name in NORMS),
    ("DER++, three passes", "BN"),
    ("ER-ACE", "BN"),
    ("ER-ACE", "AdaB2N"),
    ("fine-tuning", "BN"),
)
RULES: dict[str, Callable[[Reservoir], FineTune]] = {
    "DER++": partial(DERpp, alpha=0.2, beta=0.5),
    "DER++, three passes": partial(DERpp, alpha=0.2, beta=0.5, forwards="each"),
    "ER-ACE": ERACE,
    "fine-tuning": lambda buffer: FineTune(),
}


def run(each: Callable[..., Any], *, data: Path | None = None, large: bool = False, **settings: Any) -> dict[str, Any]:
    """All networks, one after the other; see :mod:`peftref.results`."""
    return _large(each, data, **settings) if large else _small(each, **settings)


def _small(
    each: Callable[..., Any],
    *,
    orders: Sequence[int],
    kappas: Sequence[float],
    strengths: Sequence[float],
    momenta: Sequence[float],
    jitters: int,
    **size: Any,
) -> dict[str, Any]:
    tune = partial(learned, order=0, held_out=True, **size)
    grid = {(k, s): each(f"tune {k} {s}", tune, adab2n(k, s)) for k, s in product(kappas, strengths)}
    plain = {m: each(f"tune BN {m}", tune, momentum(m)) for m in momenta}
    kappa, strength = max(grid, key=lambda point: last(grid[point]))
    kinds = methods(kappa, strength)
    again = {
        name: [each(f"jitter {name} {j}", tune, kinds[name], jitter=j) for j in range(1, jitters + 1)]
        for name in ("BN", "AdaB2N")
    }
    found = {
        (rule, name): [each(f"{rule}, {name}, {o}", learned, kinds[name], rule=rule, order=o, **size) for o in orders]
        for rule, name in CELLS
    }
    scores = [[summary(torch.tensor(one["matrix"])) for one in found[cell]] for cell in CELLS]
    kept = [[[score[key] for score in row] for row in scores] for key in ("last", "incremental", "forgetting")]
    return {
        "rows": rows({cell: [last(one) for one in runs] for cell, runs in found.items()}),
        "arrays": {
            "last": kept[0],
            "incremental": kept[1],
            "forgetting": kept[2],
            "away": [[one["away"] for one in found[cell]] for cell in AWAY],
            "recalibrated": [[one["recalibrated"] for one in found[cell]] for cell in RECALIBRATED],
            "pseudo_samples": [one["pseudo_samples"] for one in found["DER++", "AdaB2N"]],
            "grid": [[grid[k, s]["matrix"][-1] for s in strengths] for k in kappas],
            "plain": [plain[m]["matrix"][-1] for m in momenta],
            "jitter": [
                [last(one) for one in [first, *again[name]]]
                for name, first in (("BN", plain[momenta[0]]), ("AdaB2N", grid[kappa, strength]))
            ],
        },
        "protocol": {
            "data": "fashion8k",
            "sha256": load("fashion8k").sha256,
            "pixels": 14,
            "network": f"SmallCNN(width={size['width']})",
            "optimiser": f"SGD, {RATE}",
            "batch": "10 new, twice 10 replayed",
            "epochs": 1,
            "chosen": {"kappa": kappa, "strength": strength},
            "cells": [list(cell) for cell in CELLS],
            "away": [list(cell) for cell in AWAY],
            "recalibrated": [list(cell) for cell in RECALIBRATED],
        },
    }


AWAY = (("fine-tuning", "BN"), ("DER++", "BN"), ("DER++", "AdaB2N"))
RECALIBRATED = (*AWAY, ("DER++", "CMA"))


def rows(values: Mapping[tuple[str, str], Sequence[float]]) -> list[dict[str, Any]]:
    """The claims, from the last accuracy of each order under each rule and normalisation."""
    asked = [
        ("AdaB2N with one pass over BatchNorm with three, DER++", "AdaB2N", "DER++, three passes", "abstract"),
        ("AdaB2N over BatchNorm, both with one pass, DER++", "AdaB2N", "DER++", "abstract"),
        ("AdaB2N over BatchNorm, both with one pass, ER-ACE", "AdaB2N", "ER-ACE", "abstract"),
        ("one pass over three, BatchNorm, DER++", "BN", "DER++, three passes", "ours"),
        ("CMA over BatchNorm, DER++", "CMA", "DER++", "ours"),
        ("GN over BatchNorm, DER++", "GN", "DER++", "ours"),
        ("CN over BatchNorm, DER++", "CN", "DER++", "ours"),
        ("without the loss, over AdaB2N, DER++", "no loss", "AdaB2N", "ours"),
        ("slower average alone, over BatchNorm, DER++", "only kappa", "DER++", "ours"),
        ("balanced statistics alone, over BatchNorm, DER++", "only psi", "DER++", "ours"),
    ]
    found = []
    for claim, name, other, where in asked:
        rule = other if other == "ER-ACE" else "DER++"
        rival = ("DER++", "AdaB2N") if other == "AdaB2N" else (other, "BN")
        pair = {" ".join((rule, name)): values[rule, name], " ".join(rival): values[rival]}
        ours, theirs = pair.values()
        found.append(
            finding(
                claim,
                [a - b for a, b in zip(ours, theirs, strict=True)],
                where=where,
                unit="points",
                paper=None if where == "ours" else 7.68,  # the largest, on Split CIFAR-10
                level={arm: sum(v) / len(v) for arm, v in pair.items()},
            )
        )
    return found


def methods(kappa: float, strength: float) -> dict[str, Method]:
    """What is done to the network before training, by name."""
    four = partial(group_norm, groups=4)  # the usual 32 would leave one channel in each, in layers this thin
    return {
        "BN": batch_norm,
        "CMA": exchange(partial(convert, tasks=TASKS, kappa=0.0)),
        "GN": exchange(partial(replace_batch_norms, make=four)),
        "CN": exchange(partial(replace_batch_norms, make=partial(continual_norm, groups=4))),
        "AdaB2N": adab2n(kappa, strength),
        "only kappa": exchange(partial(convert, tasks=TASKS, kappa=kappa)),
        "only psi": adab2n(1.0, 0.0),
        "no loss": adab2n(kappa, 0.0),
    }


def momentum(share: float) -> Method:
    """BatchNorm whose running average takes this share of each batch."""

    def replace(net: nn.Module) -> None:
        for layer in net.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.momentum = share

    return exchange(replace)


def stream(order: int, per_class: int | None, test: int | None, held_out: bool = False) -> list[Task]:
    """Five tasks of two classes, in 14 x 14 pixels; tested on test images, or on images held out from training."""
    tasks = class_incremental(load("fashion8k"), TASKS, seed=order, val=0.2, per_class=per_class)
    pairs = [(task, task.val if held_out else task.test) for task in tasks]
    return [task._replace(train=_halved(task.train, None), test=_halved(part, test)) for task, part in pairs]


def learned(
    method: Method,
    *,
    order: int,
    per_class: int | None,
    test: int | None,
    width: int,
    buffer: int,
    rule: str = "DER++",
    held_out: bool = False,
    jitter: int = 0,
) -> dict[str, Any]:
    """One network on one stream: its accuracy matrix, and what its layers have become."""
    tasks = stream(order, per_class, test, held_out)
    with torch.random.fork_rng():
        torch.manual_seed(order)
        net = SmallCNN(width=width)
    if jitter:  # everything the same but for the seventh digit of the weights
        generator = torch.Generator().manual_seed(jitter)
        with torch.no_grad():
            for p in net.parameters():
                p.mul_(1 + 1e-6 * torch.randn(p.shape, generator=generator))
    steps = RULES[rule](Reservoir(buffer, order))
    matrix = learn(net, tasks, steps, lr=RATE, seed=order, before=method(net, steps, tasks))
    psis = [layer.psi.detach().exp() for layer in net.modules() if isinstance(layer, AdaB2N)]
    running = any(hasattr(layer, "running_mean") for layer in net.modules())
    return {
        "matrix": matrix,
        "away": distances(net, tasks) if running else None,
        "recalibrated": recalibrated(net, tasks, order) if running else None,
        "pseudo_samples": torch.stack(psis) if psis else None,
    }


def last(one: Mapping[str, Any]) -> float:
    """Accuracy in % over all tasks at the end."""
    return summary(torch.tensor(one["matrix"]))["last"]


@torch.no_grad()
def distances(net: nn.Module, tasks: Sequence[Task]) -> torch.Tensor:
    """From the running mean to the mean of each task's test images, ``(T,)``: in standard deviations, over all layers.

    Means over the channels of a layer, then over the layers.
    """
    layers = [m for m in net.modules() if hasattr(m, "running_mean")]
    seen: dict[nn.Module, list[torch.Tensor]] = {layer: [] for layer in layers}
    hooks = [m.register_forward_pre_hook(lambda m, args: seen[m].append(args[0])) for m in layers]
    for task in tasks:
        net.eval()(task.test.x)
    for hook in hooks:
        hook.remove()
    found = []
    for layer, inputs in seen.items():
        mean: Any = layer.running_mean
        sd = torch.cat(inputs).std((0, 2, 3)) + 1e-6
        found.append(torch.stack([((h.mean((0, 2, 3)) - mean).abs() / sd).mean() for h in inputs]))
    return torch.stack(found).mean(0)


@torch.no_grad()
def recalibrated(net: nn.Module, tasks: Sequence[Task], order: int) -> float:
    """Accuracy in % after the running statistics were made anew, from training images of all tasks alike."""
    net.train()
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None  # the mean of all batches
            layer.reset_running_stats()
        if isinstance(layer, AdaB2N):
            layer.kappa = 0.0
            layer.num_batches_tracked.zero_()
    x = torch.cat([task.train.x for task in tasks])
    for batch in x[torch.randperm(len(x), generator=torch.Generator().manual_seed(order))].split(500):
        net(batch)
    return float(evaluate(net.eval(), tasks).mean())


def _halved(split: Split, first: int | None) -> Split:
    return Split(F.avg_pool2d(split.x[:first], 2), split.y[:first])


def _large(each: Callable[..., Any], data: Path | None, *, orders: Sequence[int]) -> dict[str, Any]:
    """Split CIFAR-10, a ResNet-18: three arms, the same orders of batches and crops."""
    arms = {"BN, three passes": three_passes, "BN": batch_norm, "AdaB2N": adab2n(0.4, 0.1)}

    def one(name: str, order: int) -> float:
        tasks = class_incremental(load("cifar10", data), TASKS)
        table = run_at_scale(cifar_resnet18, tasks, {name: arms[name]}, seeds=[order])
        return float(table["last"].iloc[0])

    ends = {name: [each(f"{name}, {order}", one, name, order) for order in orders] for name in arms}
    three, both, ours = ends.values()
    asked = [
        ("AdaB2N with one pass over BatchNorm with three, DER++", ours, three, "abstract"),
        ("AdaB2N over BatchNorm, both with one pass, DER++", ours, both, "abstract"),
        ("one pass over three, BatchNorm, DER++", both, three, "ours"),
    ]
    found = [
        finding(
            claim,
            [a - b for a, b in zip(left, right, strict=True)],
            where=where,
            unit="points",
            paper=None if where == "ours" else 7.68,
        )
        for claim, left, right, where in asked
    ]
    chosen = {"kappa": 0.4, "strength": 0.1}
    return {"rows": found, "arrays": {"last": [*ends.values()]}, "protocol": {"data": "cifar10", "chosen": chosen}}
