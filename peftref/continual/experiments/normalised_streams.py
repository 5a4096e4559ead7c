"""AdaB2N's experiment, one network at a time: what a network with its normalisation makes of a stream of clothes.

>>> tasks = stream(1, per_class=4, test=10)
>>> [len(task.train.y) for task in tasks], tuple(tasks[0].test.x.shape)
([8, 8, 8, 8, 8], (10, 1, 14, 14))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...data import Split, load
from ...models.cnn import SmallCNN
from ..adab2n import AdaB2N, convert
from ..baselines.norms import continual_norm, group_norm, replace_batch_norms
from ..baselines.rehearsal import ERACE, DERpp
from ..core.metrics import evaluate, summary
from ..core.replay import Reservoir
from ..core.rule import FineTune
from ..core.streams import Task, class_incremental
from ..core.train import learn
from .adab2n_at_scale import Method, adab2n, batch_norm, exchange

__all__ = ["distances", "last", "learned", "methods", "momentum", "recalibrated", "stream"]

TASKS = 5


RATE = 0.03  # of plain SGD: published


RULES: dict[str, Callable[[Reservoir], FineTune]] = {
    "DER++": partial(DERpp, alpha=0.2, beta=0.5),
    "DER++, three passes": partial(DERpp, alpha=0.2, beta=0.5, forwards="each"),
    "ER-ACE": ERACE,
    "fine-tuning": lambda buffer: FineTune(),
}


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
