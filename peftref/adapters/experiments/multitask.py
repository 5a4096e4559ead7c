"""Several tasks at once on one frozen network: the shared experiment of :mod:`peftref.adapters.experiments.transfer`,
task by task.

Each task has a head of its own. A batch holds images of all tasks, drawn from the union of their training images, so
that a task counts as much as it has data (as in Sung, Cho, Bansal, CVPR 2022, where a batch has one task and tasks
are drawn by size). Adapters and heads read the task of each image from one
:class:`~peftref.adapters.core.switch.Tasks`.

>>> from peftref.adapters.core.injection import inject
>>> from peftref.adapters.experiments.transfer import shifted
>>> from peftref.adapters.vl_adapter import VLAdapter
>>> suite = {"digits": shifted("digits", 64, 16), "even": relabelled(shifted("digits", 8, 8), EVEN, "even")}
>>> def multiple(net, tasks):
...     inject(net, VLAdapter, SUBLAYERS, sharing="multiple", tasks=tasks)
>>> run = learn(multiple, suite, lr=3e-3, steps=2)
>>> list(run.test), run.losses.shape
(['digits', 'even'], torch.Size([2]))
>>> conflict(run, suite).shape
torch.Size([2, 2])
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...data import Split
from ...fitting import accuracy, best_rate, minimise
from ..core.adapter import Adapter
from ..core.layers import Layer
from ..core.switch import Tasks, agreed_names
from .transfer import TUNING_SEED, Task, fresh, trainable

__all__ = ["EVEN", "SUBLAYERS", "Heads", "MultiRun", "TaskToken", "compare_sharing", "conflict", "learn", "relabelled"]

SUBLAYERS = r"(.*\.)?blocks\.\d+\.(attn\.proj|mlp\.fc2)"  # where the paper puts adapters: after each sub-layer
EVEN = (1, 0) * 5  # of the digits: is it even?


def relabelled(task: Task, labels: Sequence[int], name: str) -> Task:
    """The same images, with ``labels[c]`` for class ``c``."""
    new = torch.tensor(labels)
    top = max(int(part.y.max()) for part in (task.train, task.val, task.test))
    if new.ndim != 1 or len(new) <= top:
        raise ValueError(f"labels: expected one for each class from 0 to {top}, got {labels}")
    return Task(name, *(Split(part.x, new[part.y]) for part in (task.train, task.val, task.test)))


class Heads(nn.Linear):
    """A head for every task, side by side in one matrix; the classes of other tasks are out of reach.

    Args:
        d: features.
        classes: number of classes of each task.
        tasks: the object that knows the task.
    """

    start: Tensor
    mask: Tensor

    def __init__(self, d: int, classes: Sequence[int], tasks: Tasks) -> None:
        super().__init__(d, sum(classes))
        nn.init.trunc_normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)
        self.tasks = tasks
        ends = torch.tensor(classes).cumsum(0)
        self.register_buffer("start", ends - torch.tensor(classes), persistent=False)  # first class of each task
        column = torch.arange(sum(classes))
        own = (column >= self.start[:, None]) & (column < ends[:, None])  # (T, classes in all)
        self.register_buffer("mask", torch.where(own, 0.0, -torch.inf), persistent=False)

    def forward(self, h: Tensor) -> Tensor:
        return super().forward(h) + self.tasks.pick(self.mask)


class TaskToken(Adapter):
    """What tells a single adapter the task: a learned vector that is added to every token, as a prompt word is read.

    Put it on the patch embedding.
    """

    kind = "multitask"
    options = ("task_names",)
    mergeable = False

    def __init__(self, base: Layer, task_names: Sequence[str] | None = None, *, tasks: Tasks) -> None:
        super().__init__()
        self.tasks = tasks
        self.task_names = agreed_names(tasks, task_names)
        self.token = nn.Parameter(torch.zeros(len(tasks), base.out_features))

    def forward(self, x: Tensor, y0: Tensor, base: Layer) -> Tensor:
        token = self.tasks.pick(self.token)  # (o,) or (N, o)
        if token.ndim == 2:
            token = token.unflatten(0, (len(token), *(1,) * (y0.ndim - 2)))  # (N, 1, ..., o)
        return token.expand_as(y0)


@dataclass
class MultiRun:
    """One adaptation to several tasks.

    Attributes:
        model: in eval mode.
        tasks: what to tell the task to.
        frozen: how many of the first blocks nothing was put into.
        losses: mean over the batch at each step, ``(steps,)``.
        val: accuracy on the validation images in %, by task.
        test: accuracy on the test images in %, by task.
        val_loss: mean cross-entropy over tasks.
    """

    model: nn.Module
    tasks: Tasks
    frozen: int
    losses: Tensor
    val: dict[str, float]
    test: dict[str, float]
    val_loss: float


def learn(
    build: Callable[[nn.Module, Tasks], object],
    suite: Mapping[str, Task],
    *,
    lr: float,
    seed: int = 0,
    steps: int = 150,
    batch_size: int = 64,
    common_head: bool = False,
    start: Callable[[int], nn.Module] = fresh,
) -> MultiRun:
    """Train what ``build`` leaves trainable, and the heads, on all tasks together, as
    :func:`peftref.adapters.experiments.transfer.adapt` trains on one. Blocks before the first that has something to
    train are computed once for each image.

    Args:
        build: gets a :func:`~peftref.adapters.experiments.transfer.fresh` network and the :class:`Tasks`; changes it
            in place.
        suite: name -> task.
        lr: peak of the schedule.
        seed: of heads, adapters and batches; the global generator stays as it was.
        steps: updates.
        batch_size: images of an update.
        common_head: one head for all tasks, which must have the same classes.
        start: makes another frozen network for a number of classes, with ``head`` and ``num_features``.

    Raises:
        ValueError: a common head for tasks with different classes.
    """
    y = {name: torch.cat([part.y for part in task[1:]]) for name, task in suite.items()}
    classes = [int(labels.max()) + 1 for labels in y.values()]
    if common_head and len(set(classes)) > 1:
        raise ValueError(f"common_head: expected tasks with the same number of classes, got {classes}")
    tasks = Tasks(list(suite))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = start(classes[0])  # with a head, of which nn.Module says nothing
        build(model, tasks)
        if not common_head:
            model.head = Heads(model.num_features, classes, tasks)
        model.head.requires_grad_(True)
        frozen = _frozen(model)
        x, labels, task = _pooled(suite, model, frozen)

        def loss() -> Tensor:
            i = torch.randint(len(labels), (batch_size,))
            tasks.use(task[i])
            return F.cross_entropy(_rest(model, x[i], frozen), labels[i])

        model.train()
        losses = minimise(loss, model.parameters(), lr=lr, steps=steps)
    model.eval()
    val = {}
    test = {}
    val_loss = []
    for name, part in suite.items():
        tasks.use(name)
        first = _first(model, tasks)
        with torch.inference_mode():
            ours, others = (_rest(model, _start(model, p.x, frozen), frozen) for p in (part.val, part.test))
        val[name] = accuracy(ours, part.val.y + first)
        test[name] = accuracy(others, part.test.y + first)
        val_loss.append(F.cross_entropy(ours, part.val.y + first))
    return MultiRun(model, tasks, frozen, losses, val, test, float(torch.stack(val_loss).mean()))


def compare_sharing(
    methods: Mapping[str, Callable[[nn.Module, Tasks], object]],
    suite: Mapping[str, Task],
    *,
    seeds: Sequence[int] = (0, 1, 2),
    lrs: Sequence[float] = (3e-3, 1e-2),
    **options: Any,
) -> pd.DataFrame:
    """Each method at the rate that was best for it on the validation images of all tasks, once for every seed.

    Returns:
        One row per method and seed: the rate, the parameters trained outside of the heads, test accuracy by task in %.
    """
    rows = []
    for name, build in methods.items():

        def score(rate: float, build: Callable[[nn.Module, Tasks], object] = build) -> tuple[float, float]:
            run = learn(build, suite, lr=rate, seed=TUNING_SEED, **options)
            return sum(run.val.values()), -run.val_loss

        best = best_rate(lrs, score)
        for seed in seeds:
            run = learn(build, suite, lr=best, seed=seed, **options)
            rows.append({"method": name, "seed": seed, "lr": best, "trainable": trainable(run.model), **run.test})
    return pd.DataFrame(rows)


def conflict(run: MultiRun, suite: Mapping[str, Task], params: Sequence[Tensor] | None = None) -> Tensor:
    """Cosines between the gradients of the tasks' training losses: ``(T, T)``.

    Args:
        run: of :func:`learn`.
        suite: the tasks.
        params: with respect to which; by default to all that is trained but the heads.
    """
    body = [p for n, p in run.model.named_parameters() if p.requires_grad and not n.startswith("head.")]
    chosen = body if params is None else list(params)
    rows = []
    for name, part in suite.items():
        run.tasks.use(name)
        logits = _rest(run.model, _start(run.model, part.train.x, run.frozen), run.frozen)
        loss = F.cross_entropy(logits, part.train.y + _first(run.model, run.tasks))
        gradients = torch.autograd.grad(loss, chosen, allow_unused=True, materialize_grads=True)
        rows.append(F.normalize(torch.cat([g.flatten() for g in gradients]), dim=0))
    return torch.stack(rows) @ torch.stack(rows).T


def _first(model: nn.Module, tasks: Tasks) -> Tensor | int:
    """Number of the task's first class in the model's outputs."""
    return tasks.pick(model.head.start) if isinstance(model.head, Heads) else 0


def _frozen(model: nn.Module) -> int:
    """Number of the first blocks that, with all before them, have nothing to train."""
    blocks = getattr(model, "blocks", ())
    busy = [i for i, block in enumerate(blocks) if any(p.requires_grad for p in block.parameters())]
    named = model.named_parameters()
    before = any(p.requires_grad for n, p in named if not n.startswith(("blocks.", "norm.", "head.")))
    return 0 if before else min(busy, default=len(blocks))


@torch.no_grad()
def _embed(model: Any, x: Tensor, frozen: int) -> Tensor:
    """What the first blocks make of images, ``(N, T, d)``."""
    head = copy.copy(model)  # shares all weights
    head._modules = {**model._modules, "blocks": model.blocks[:frozen], "norm": nn.Identity()}
    return torch.cat([head.forward_features(part) for part in x.split(500)])


def _start(model: nn.Module, x: Tensor, frozen: int) -> Tensor:
    """Input of :func:`_rest`: images, or where blocks are frozen, tokens after them."""
    return _embed(model, x, frozen) if frozen else x


def _rest(model: Any, h: Tensor, frozen: int) -> Tensor:
    """Logits from there on."""
    logits: Tensor = model.forward_head(model.norm(model.blocks[frozen:](h))) if frozen else model(h)
    return logits


def _pooled(suite: Mapping[str, Task], model: nn.Module, frozen: int) -> tuple[Tensor, Tensor, Tensor]:
    """All training images up to where training starts, their labels as the model counts classes, and their tasks."""
    starts = model.head.start if isinstance(model.head, Heads) else torch.zeros(len(suite), dtype=torch.long)
    sizes = torch.tensor([len(part.train.y) for part in suite.values()])
    task = torch.arange(len(suite)).repeat_interleave(sizes)
    x, y = (torch.cat([part.train[k] for part in suite.values()]) for k in (0, 1))
    return _start(model, x, frozen), y + starts[task], task
