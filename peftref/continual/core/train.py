"""One loop for every rule: the tasks of a stream one after the other, a row of the accuracy matrix after each.

>>> from peftref.continual.core.metrics import summary
>>> from peftref.continual.core.rule import FineTune
>>> from peftref.continual.core.streams import class_incremental
>>> from peftref.data import load
>>> tasks = class_incremental(load("digits"), 5)
>>> with torch.random.fork_rng():
...     net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
>>> a = learn(net, tasks, FineTune(), lr=0.5, batch_size=10)
>>> a.shape, bool(summary(a)["forgetting"] > 50)  # a linear net forgets as well
(torch.Size([5, 5]), True)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..._checks import number
from ...data import Split
from ...fitting import batches, check_batches
from ._steps import descend, finite_images, refuse_lonely_images
from .metrics import evaluate
from .rule import FineTune
from .streams import Task

__all__ = ["joint", "learn"]

Optimizer = Callable[..., torch.optim.Optimizer]


def learn(
    model: nn.Module,
    tasks: Sequence[Task],
    rule: FineTune,
    *,
    lr: float,
    batch_size: int = 10,
    epochs: int = 1,
    seed: int = 0,
    optimizer: Optimizer = torch.optim.SGD,
    before: Callable[[int], None] = lambda t: None,
    after: Callable[[int], None] = lambda t: None,
) -> Tensor:
    """Train ``model`` in place on one task after the other and test it on all of them after each.

    Args:
        model: images -> logits of all classes; trained in train mode, tested in eval mode, left in eval mode.
        tasks: of a stream, such as :func:`peftref.continual.core.streams.class_incremental` makes.
        rule: what to minimise, for example :class:`peftref.continual.baselines.rehearsal.ER`; a new one for each
            stream, as it carries what it keeps of the tasks.
        lr: of the optimiser.
        batch_size: new samples of a step (10: online protocols). Where the model's BatchNorm cannot train on a rest of
            one image, that image comes with the batch before it.
        epochs: passes over the images of a task (1: the online setting).
        seed: of the order of the batches.
        optimizer: ``optimizer(parameters, lr=lr)``, one for the whole stream (plain SGD: online protocols).
        before: called with the number of the task, from 0, before its first batch.
        after: called with it after the last batch.

    Returns:
        The accuracy matrix in %, ``(T, T)``, filled above the diagonal too.

    Raises:
        TypeError: a model that is no module; before it is touched.
        ValueError: nothing to train, no images, images that are not finite, batches of one image that the model's
            BatchNorm cannot train on, or a number out of range; before the model is touched.
    """
    _check(model, tasks, lr=lr, batch_size=batch_size, epochs=epochs)
    tasks = [task._replace(train=Split(task.train.x, task.train.y.long())) for task in tasks]
    generator = torch.Generator().manual_seed(seed)
    steps = optimizer([p for p in model.parameters() if p.requires_grad], lr=lr)
    rows = []
    classes = 0
    for t, task in enumerate(tasks):
        classes = max(classes, task.classes.stop)
        rule.begin_task(t, classes)
        before(t)
        model.train()
        for x, y in batches(task.train, batch_size, epochs=epochs, generator=generator):
            descend(rule.loss(model, x, y), steps)
            rule.observe(x, y)
        model.eval()
        rule.end_task(model, *task.train)
        after(t)
        rows.append(evaluate(model, tasks))
    return torch.stack(rows)


def joint(
    model: nn.Module,
    tasks: Sequence[Task],
    *,
    lr: float,
    batch_size: int = 10,
    epochs: int = 1,
    seed: int = 0,
    optimizer: Optimizer = torch.optim.SGD,
) -> Tensor:
    """Train ``model`` in place on all tasks mixed: what a stream is held against.

    Args:
        model: see :func:`learn`.
        tasks: see :func:`learn`.
        lr: of the optimiser.
        batch_size: samples of a step.
        epochs: passes over all images.
        seed: of the order of the batches.
        optimizer: see :func:`learn`.

    Returns:
        The accuracy on each task in %, ``(T,)``.

    Raises:
        TypeError: see :func:`learn`.
        ValueError: see :func:`learn`.
    """
    _check(model, tasks, lr=lr, batch_size=batch_size, epochs=epochs)
    x, y = (torch.cat(parts) for parts in zip(*(task.train for task in tasks), strict=True))
    last = tasks[-1]
    classes = range(max(task.classes.stop for task in tasks))
    names = tuple(itertools.chain.from_iterable(task.names for task in tasks))
    whole = Task(names, classes, Split(x, y), last.val, last.test)
    learn(model, [whole], FineTune(), lr=lr, batch_size=batch_size, epochs=epochs, seed=seed, optimizer=optimizer)
    return evaluate(model, tasks)


def _check(model: nn.Module, tasks: Sequence[Task], *, lr: float, batch_size: int, epochs: int) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("model: expected trainable weights, got none that requires a gradient")
    if not tasks or any(len(split.y) == 0 for task in tasks for split in (task.train, task.test)):
        sizes = [(len(task.train.y), len(task.test.y)) for task in tasks]
        raise ValueError(f"tasks: expected some, each with images to train and to test on, got {sizes}")
    number("lr", lr, 0.0)
    check_batches(batch_size, epochs)
    for t, task in enumerate(tasks):
        finite_images(task.train.x, f"tasks[{t}].train.x")
    refuse_lonely_images(model, [len(task.train.y) for task in tasks], batch_size, tasks[0].train.x[:1])
