"""The digits of the experiment on sharing: an encoder that knows them upright, three tasks, and ways to share.

>>> suite = suite_of()
>>> {name: len(task.train.y) for name, task in suite.items()}
{'turned': 600, 'inverted': 600, 'even': 60}
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...data import Split, load
from ..baselines.hyperformer import Hyperformer, HyperNet
from ..core.injection import activate, inject
from ..core.switch import Tasks
from ..vl_adapter import VLAdapter
from .multitask import EVEN, TaskToken, relabelled
from .transfer import Task

__all__ = [
    "CHANGES",
    "METHODS",
    "Build",
    "Encoder",
    "draw_task",
    "hyper",
    "source",
    "start_of",
    "suite_of",
    "token",
    "vl",
]

CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "upright": lambda x: x,
    "turned": lambda x: x.rot90(1, (-2, -1)),
    "inverted": lambda x: 1 - x,
}
Build = Callable[[nn.Module, Tasks], object]


class Encoder(nn.Module):
    """Three layers for pictures of 8 x 8 pixels.

    Args:
        num_features: width.
    """

    def __init__(self, num_features: int = 64) -> None:
        super().__init__()
        self.fc1 = nn.Linear(64, num_features)
        self.fc2 = nn.Linear(num_features, num_features)
        self.head = nn.Linear(num_features, 10)
        self.num_features = num_features

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.fc2(self.fc1(x.flatten(1)).relu()).relu())
        return logits


def vl(targets: Any = ("fc1", "fc2"), **options: Any) -> Build:
    """VL-Adapters on some layers.

    Args:
        targets: names of layers.
        options: of :class:`~peftref.adapters.vl_adapter.VLAdapter`.
    """
    return lambda net, tasks: inject(net, VLAdapter, targets, **{"reduction": 4, "tasks": tasks, **options})


def hyper(net: nn.Module, tasks: Tasks) -> None:
    """A Hyperformer that writes the adapters of all tasks."""
    width: Any = net.num_features
    hyper = HyperNet(width, len(tasks), layers=1, positions=2, reduction=4, p=8, dim=16, hidden=64)
    where = {"fc1": {"position": 0}, "fc2": {"position": 1}}
    inject(net, Hyperformer, ["fc1", "fc2"], tasks=tasks, hyper=hyper, per_layer=where)


def token(net: nn.Module, tasks: Tasks) -> None:
    """The single adapter, and a learned vector that tells it the task."""
    METHODS["single"](net, tasks)
    inject(net, TaskToken, ["fc1"], name="token", tasks=tasks)
    activate(net, "default", "token")  # both: their increments add


METHODS: dict[str, Build] = {
    "heads only": lambda net, tasks: None,
    "single": vl(),
    "multiple": vl(sharing="multiple"),
    "half-up": vl(sharing="half-up"),
    "half-down": vl(sharing="half-down"),
    "PHM": vl(phm=4),
    "Hyperformer": hyper,
}


def source(steps: int = 300, num_features: int = 64) -> Encoder:
    """The encoder, trained on upright digits.

    Args:
        steps: of AdamW, with batches of 64.
        num_features: width.
    """
    digits = load("digits")
    torch.manual_seed(0)
    net = Encoder(num_features)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    for _ in range(steps):
        i = torch.randint(len(digits.train.y), (64,))
        loss = F.cross_entropy(net(digits.train.x[i]), digits.train.y[i])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net


def draw_task(name: str, change: str, n: int, seed: int, labels: tuple[int, ...] = ()) -> Task:
    """A task of ``n`` changed digits, with 200 more to choose the learning rate by.

    Args:
        name: of the task.
        change: one of ``CHANGES``.
        n: training images.
        seed: of the draw.
        labels: new label of each class; none keeps the ten classes.
    """
    digits = load("digits")
    order = torch.randperm(len(digits.train.y), generator=torch.Generator().manual_seed(seed))
    parts = [Split(digits.train.x[k], digits.train.y[k]) for k in (order[:n], order[n : n + 200])] + [digits.test]
    task = Task(name, *(Split(CHANGES[change](part.x), part.y) for part in parts))
    return relabelled(task, labels, name) if labels else task


def suite_of() -> dict[str, Task]:
    """The two tasks with 600 images and the one with 60."""
    return {
        "turned": draw_task("turned", "turned", 600, 0),
        "inverted": draw_task("inverted", "inverted", 600, 1),
        "even": draw_task("even", "turned", 60, 2, EVEN),
    }


def start_of(net: Encoder) -> Callable[[int], nn.Module]:
    """What makes a frozen copy of the encoder with a new head.

    Args:
        net: of :func:`source`.
    """

    def start(num_classes: int) -> nn.Module:
        twin = copy.deepcopy(net).requires_grad_(False)
        twin.head = nn.Linear(twin.num_features, num_classes)
        return twin

    return start
