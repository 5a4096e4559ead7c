"""AdaB2N's experiment, one network at a time: what a network with its normalisation makes of a stream of clothes.

>>> tasks = stream(1, per_class=4, test=10)
>>> [len(task.train.y) for task in tasks], tuple(tasks[0].test.x.shape)
([8, 8, 8, 8, 8], (10, 1, 14, 14))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...data import Split, load
from ..core.streams import Task, class_incremental

__all__ = ["TASKS", "distances", "stream"]

TASKS = 5


def stream(order: int, per_class: int | None, test: int | None, held_out: bool = False) -> list[Task]:
    """Five tasks of two classes, in 14 x 14 pixels; tested on test images, or on images held out from training."""
    tasks = class_incremental(load("fashion8k"), TASKS, seed=order, val=0.2, per_class=per_class)
    pairs = [(task, task.val if held_out else task.test) for task in tasks]
    return [task._replace(train=_halved(task.train, None), test=_halved(part, test)) for task, part in pairs]


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


def _halved(split: Split, first: int | None) -> Split:
    return Split(F.avg_pool2d(split.x[:first], 2), split.y[:first])
