"""The pieces of AdaB2N's experiment: a stream of photographs or clothes, an arm, one network that learns it.

>>> [name for name, arm in ARMS.items() if arm.forwards == "each"]
['DER++, BN, three passes', 'ER-ACE, BN, two passes']
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ...at_scale import shifted_crop
from ...data import Dataset, Split, load
from ...models.cnn import SmallCNN
from ..adab2n import AdaB2N, balance, convert
from ..baselines.rehearsal import ERACE, DERpp
from ..core._steps import tensor_of
from ..core.metrics import evaluate
from ..core.replay import Reservoir
from ..core.rule import FineTune
from ..core.streams import Task, class_incremental
from ..core.train import learn
from .adab2n_at_scale import cifar_resnet18
from .normalised_streams import TASKS, stream

__all__ = ["ARMS", "Arm", "learned"]

HELD_OUT = 0.04  # of the photographs of each class: those that the rates are chosen on
TESTED = 500  # photographs of a task
TOUCHED = 10  # those that `learn` looks at on the way; its matrix is not used
RENEWED = 2000  # training images that statistics are made anew from


class Arm(NamedTuple):
    """What is compared.

    Attributes:
        rule: "DER++" or "ER-ACE".
        forwards: passes of a step, see :mod:`peftref.continual.baselines.rehearsal`.
        balanced: every BatchNorm layer an AdaB2N.
        replay: images of each draw from the buffer.
        faster: rate of psi, in rates of the network.
    """

    rule: str
    forwards: Literal["one", "each"] = "one"
    balanced: bool = False
    replay: int = 10
    faster: float = 1.0


ARMS = {
    "DER++, BN, three passes": Arm("DER++", "each"),
    "DER++, BN, one pass": Arm("DER++"),
    "DER++, AdaB2N": Arm("DER++", balanced=True),
    "ER-ACE, BN, two passes": Arm("ER-ACE", "each"),
    "ER-ACE, BN, one pass": Arm("ER-ACE"),
    "ER-ACE, AdaB2N": Arm("ER-ACE", balanced=True),
    "DER++, AdaB2N, fast psi": Arm("DER++", balanced=True, faster=100.0),
}


def tasks_of(images: str, order: int, per_class: int, data: Path | None) -> list[Task]:
    """Five tasks of two classes of photographs, or of clothes at half their size."""
    if images == "fashion8k":
        return stream(order, per_class, 4 * TOUCHED, held_out=order == 0)
    tasks = class_incremental(_read(images, data), TASKS, seed=order, per_class=per_class, val=HELD_OUT)
    return [task._replace(test=_first(task.val if order == 0 else task.test, TESTED)) for task in tasks]


def network(images: str, width: int) -> nn.Module:
    """Three stages of a ResNet-18 behind 64 channels at half the side of photographs, or a small CNN for clothes."""
    if images == "fashion8k":
        return SmallCNN(width=width)
    net = cifar_resnet18(channels=(width, 2 * width, 4 * width, 8 * width), stem_width=width)
    body: Any = net.model
    body.conv1.stride = (2, 2)
    body.layer4 = nn.Identity()
    body.fc = nn.Linear(4 * width, body.fc.out_features)
    return net


def learned(
    arm: Arm,
    rate: float,
    order: int,
    *,
    images: str,
    data: Path | None,
    per_class: int,
    width: int,
    buffer: int,
    kappa: float,
    strength: float,
) -> dict[str, Any]:
    """One network on one stream: accuracy in % on each task at the end, and what the layers want.

    An order is also a seed of the images, the weights, the batches, the buffer and the crops. In order 0 the network is
    tested on images held out from training, in all others on test images.
    """
    tasks = tasks_of(images, order, per_class, data)
    with torch.random.fork_rng():
        torch.manual_seed(order)
        net = network(images, width)
    rule = rule_of(arm, Reservoir(buffer, order), order)
    before: Callable[[int], None] = lambda task: None  # noqa: E731
    if arm.balanced:
        convert(net, TASKS, kappa)
        before = balance(rule, net, tasks, strength)
    brief = [task._replace(test=_first(task.test, TOUCHED)) for task in tasks]
    learn(net, brief, rule, lr=rate, seed=order, optimizer=partial(_sgd, net, arm.faster), before=before)
    psis = [layer.psi.detach() for layer in net.modules() if isinstance(layer, AdaB2N)]
    with torch.no_grad():
        running = evaluate(net, tasks)
        fresh = evaluate(recalibrated(net, tasks, order), tasks) if order else None
    return {"running": running, "fresh": fresh, "psi": torch.stack(psis) if psis else None}


def rule_of(arm: Arm, kept: Reservoir, seed: int) -> FineTune:
    """The rule of an arm, with the published weights of DER++; every image is cropped and mirrored when it is used."""
    crops = torch.Generator().manual_seed(seed)
    rule: FineTune = ERACE(kept, arm.replay, arm.forwards)
    if arm.rule == "DER++":
        rule = DERpp(kept, arm.replay, 0.2, 0.5, arm.forwards)
    rule.forward = lambda model, x, y: tensor_of(model(shifted_crop(x, crops)))
    return rule


@torch.no_grad()
def recalibrated(net: nn.Module, tasks: Sequence[Task], seed: int) -> nn.Module:
    """The network with running statistics made anew, as the mean over training images of all tasks alike."""
    net.train()
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None  # the mean of all batches
            layer.reset_running_stats()
        if isinstance(layer, AdaB2N):
            layer.kappa = 0.0
            layer.num_batches_tracked.zero_()
    x = torch.cat([task.train.x for task in tasks])
    drawn = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:RENEWED]
    for batch in x[drawn].split(500):
        net(batch)
    return net.eval()


@cache
def _read(images: str, data: Path | None) -> Dataset:
    return load(images, data)


def _first(split: Split, count: int) -> Split:
    return Split(split.x[:count], split.y[:count])


def _sgd(net: nn.Module, faster: float, parameters: Iterable[Tensor], lr: float) -> torch.optim.Optimizer:
    """Plain SGD, with a rate of its own for psi."""
    psis = [layer.psi for layer in net.modules() if isinstance(layer, AdaB2N)]
    rest = [p for p in parameters if all(p is not psi for psi in psis)]
    groups: list[dict[str, Any]] = [{"params": rest}]
    groups += [{"params": [psi], "lr": faster * lr} for psi in psis]
    return torch.optim.SGD(groups, lr=lr)
