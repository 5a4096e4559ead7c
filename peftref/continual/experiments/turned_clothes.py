"""LAE's experiment, one network at a time: a stream of turned clothes, and what each copy makes of it.

>>> data = lying(load("fashion8k"))
>>> bool((data.test.x[0].rot90(-1, (-2, -1)) == load("fashion8k").test.x[0]).all())
True
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from ...adapters.core.injection import adapters, inject
from ...data import Dataset, Split, load
from ...models.vit import pretrained_vit
from ..core.prefix import inject_prefix
from ..core.small_modules import KVLoRA, ParallelAdapter
from ..core.streams import Task, class_incremental
from ..lae import LAE, alpha_for, vote

__all__ = ["learned", "lying", "put"]

TASKS = 5
FIRST = 5  # epochs of the first task, all with the module
KEPT = 0.9  # of the offline copy in a task, as in the official configuration


def lying(data: Dataset) -> Dataset:
    """The same images turned by 90 degrees."""
    train, test = (Split(split.x.rot90(1, (-2, -1)), split.y) for split in (data.train, data.test))
    return Dataset(f"{data.name}, turned", train, test, data.classes, data.sha256)


def put(pet: str, net: nn.Module) -> nn.Module:
    """Put a small module into every attention, under the name that LAE expects.

    Args:
        pet: "Adapter", "LoRA", "Prefix" or "Prefix, not calibrated".
        net: a vision transformer, changed in place.
    """
    attentions = r"blocks\.\d+\.attn"
    if pet == "Adapter":
        inject(net, ParallelAdapter, attentions, name="online")
    elif pet == "LoRA":
        inject(net, KVLoRA, attentions + r"\.qkv", name="online")
    else:
        inject_prefix(net, attentions, name="online", compensate=pet == "Prefix")
    return net


def online(net: nn.Module) -> list[nn.Parameter]:
    """The parameters of the online copy."""
    return [p for adapter in adapters(net, "online").values() for p in adapter.parameters()]


class Watched(LAE):
    """Also keeps the online copy after every step, and for how many steps it stood still."""

    path: tuple[tuple[int, Tensor], ...] = ()

    def accumulate(self, n: int) -> None:
        super().accumulate(n)
        self.path = (*self.path, (n, parameters_to_vector(online(self.model)).detach()))


def learned(
    pet: str,
    seed: int,
    lr: float,
    *,
    per_class: int,
    every: int,
    frozen: int,
    epochs: int,
    steps: int,
    local: bool = True,
    train: bool = True,
    part: str = "test",
    tasks: int = TASKS,
    digits: bool = False,
    kept: Sequence[float] = (),
) -> dict[str, Any]:
    """One stream: accuracy of each copy on all, old and new classes after each task.

    Args:
        pet: see :func:`put`.
        seed: of the order of the classes, the module, the head and the batches.
        lr: learning rate.
        per_class: training images of each class.
        every: test on every so many images.
        frozen: epochs of each task but the first in which the head alone is trained.
        epochs: further epochs, in which the module is trained too.
        steps: of a task, for the memory of the offline copy.
        local: let only the new classes compete in the loss.
        train: False: the module never learns.
        part: of each task that is tested on, "test" or "val".
        tasks: of the stream that are learned.
        digits: handwritten digits in place of the clothes.
        kept: also say, for each of these, what offline copies with another memory would have been.
    """
    data = load("mnist5k") if digits else lying(load("fashion8k"))
    stream = class_incremental(data, TASKS, seed=seed, per_class=per_class, val=0.1)[:tasks]
    shown = [_thinned(stream[: t + 1], part, every) for t in range(tasks)]
    generator = torch.Generator().manual_seed(seed)
    found = []
    ends = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        learner = Watched(put(pet, pretrained_vit()), alpha=alpha_for(KEPT, steps), lr=lr, local=local)
        for t, task in enumerate(stream):
            learner.begin_task(len(task.classes))
            still, moving = (frozen, epochs) if t else (0, FIRST)
            if not train:
                still = frozen + FIRST
                moving = 0
            learner.learn(task.train, epochs=still + moving, frozen_epochs=still, generator=generator)
            found.append(scores(learner.experts(shown[t].x), shown[t].y, t))
            ends.append(len(learner.path))
    result: dict[str, Any] = {c: {side: [row[c][side] for row in found] for side in found[0][c]} for c in found[0]}
    result["kept"] = [memory(learner, ends, share, shown) for share in kept]
    return result


@torch.no_grad()
def scores(logits: Tensor, y: Tensor, task: int) -> dict[str, dict[str, float]]:
    """Accuracy in % of each copy and of both votes on all, old and new classes; of no old class it is 0."""
    who = {
        "online": logits[0],
        "offline": logits[-1],
        "ensemble": vote(logits),
        "mean vote": vote(logits, "mean"),
    }
    new = y >= 2 * task
    found = {}
    for name, z in who.items():
        right = 100 * (z.argmax(-1) == y).double()
        old = right[~new].mean().item() if task else 0.0
        found[name] = {"all": right.mean().item(), "old": old, "new": right[new].mean().item()}
    return found


def memory(learner: Watched, ends: Sequence[int], kept: float, shown: Sequence[Split]) -> dict[str, list[float]]:
    """Accuracy of copies and vote on old, new and all classes over tasks 2 to 5, had a task kept this of the old copy.

    The online copy does not depend on alpha, so its path gives any offline copy (eq-lae-ema, eq-lae-memory).
    """
    path = learner.path
    steps = sum(n for n, _ in path[ends[0] : ends[1]])  # of one task
    alpha = alpha_for(kept, steps)
    slow = path[ends[0] - 1][1]
    states = []
    for i, (n, theta) in enumerate(path[ends[0] :], ends[0] + 1):
        # eq-lae-memory:  while theta stands still, n steps are one step with alpha^n
        slow = alpha**n * slow + (1 - alpha**n) * theta
        if i in ends:
            states.append((theta, slow))
    net = copy.deepcopy(learner)
    found = []
    for t, (fast, slow) in enumerate(states, 1):
        pair = torch.stack([_logits(net, state, shown[t].x)[:, : 2 * t + 2] for state in (fast, slow)])
        found.append(scores(pair, shown[t].y, t))
    sides = ("old", "new", "all")
    return {c: [sum(one[c][side] for one in found) / len(found) for side in sides] for c in found[0]}


@torch.no_grad()
def _logits(learner: LAE, state: Tensor, x: Tensor) -> Tensor:
    vector_to_parameters(state, online(learner.model))
    logits: Tensor = learner.head(learner.features(x))
    return logits


def _thinned(tasks: Sequence[Task], part: str, every: int) -> Split:
    """Every so many images of what the tasks hold out."""
    splits = [getattr(task, part) for task in tasks]
    return Split(torch.cat([s.x[::every] for s in splits]), torch.cat([s.y[::every] for s in splits]))
