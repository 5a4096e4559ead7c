r"""Task streams: one data set cut into tasks that arrive one after the other.

===========================  ===========================================================================================
:func:`class_incremental`    every task brings new classes; one head over all of them, no task identity at test time
:func:`domain_incremental`   every task brings all classes anew, in other images (MNIST, then Fashion-MNIST)
===========================  ===========================================================================================

Classes are renumbered in their order of arrival, so a task's classes are consecutive: class k of the head belongs to
the task t with ``k in tasks[t].classes``, and :func:`task_of` is that map as a tensor.

>>> from peftref.data import load
>>> tasks = class_incremental(load("digits"), [4, 2, 2, 2])
>>> [task.classes for task in tasks]
[range(0, 4), range(4, 6), range(6, 8), range(8, 10)]
>>> task_of(tasks)
tensor([0, 0, 0, 0, 1, 1, 2, 2, 3, 3])
>>> from peftref.fitting import batches
>>> [len(y) for x, y in batches(tasks[1].train, 100, generator=torch.Generator().manual_seed(0))]
[100, 100, 91]
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...data import Dataset, Split

__all__ = ["Task", "class_incremental", "domain_incremental", "task_of"]


class Task(NamedTuple):
    """One task of a stream.

    Attributes:
        names: of its classes.
        classes: their labels, consecutive.
        train: images in [0, 1] and labels.
        val: images and labels held out from training, empty unless asked for.
        test: images and labels.
    """

    names: tuple[str, ...]
    classes: range
    train: Split
    val: Split
    test: Split

    def to(self, device: torch.device | str) -> Task:
        """The same task with its tensors on ``device``."""
        moved = (Split(*(t.to(device) for t in split)) for split in (self.train, self.val, self.test))
        return Task(self.names, self.classes, *moved)


def class_incremental(
    data: Dataset, tasks: int | Sequence[int] = 5, *, seed: int = 0, per_class: int | None = None, val: float = 0.0
) -> list[Task]:
    """Cut ``data`` into tasks of new classes.

    Args:
        data: of :func:`peftref.data.load`.
        tasks: how many of equal size, or the number of classes of each (a larger first session: ``[4, 2, 2, 2]``).
        seed: of the order of classes, as in AdaB2N's code: 0 keeps the stored order, any other takes
            ``numpy.random.default_rng(42 + seed).permutation(K)``. Also draws the images of ``per_class`` and ``val``.
        per_class: training images of each class (few shots); default: all.
        val: share of the training images held out for choosing settings; they leave ``train``.

    Raises:
        ValueError: tasks that do not use up the classes, or a number out of range.
    """
    k = len(data.classes)
    tasks = int(tasks) if isinstance(tasks, Integral) else tasks
    if isinstance(tasks, int) and (tasks < 1 or k % tasks):
        raise ValueError(f"tasks: expected a divisor of the {k} classes, or the sizes of all tasks, got {tasks}")
    sizes = [k // tasks] * tasks if isinstance(tasks, int) else list(tasks)
    if min(sizes, default=0) < 1 or sum(sizes) != k:
        raise ValueError(f"tasks: expected positive sizes that sum to the {k} classes, got {sizes}")
    if per_class is not None and per_class < 1:
        raise ValueError(f"per_class: expected None or a positive number, got {per_class}")
    if not 0 <= val < 1:
        raise ValueError(f"val: expected a share in [0, 1), got {val}")
    order = np.arange(k) if seed == 0 else np.random.default_rng(42 + seed).permutation(k)
    label = torch.from_numpy(np.argsort(order))  # stored class -> place of arrival
    generator = torch.Generator().manual_seed(seed)
    train, held = _split(Split(data.train.x, label[data.train.y.long()]), k, per_class, val, generator)
    test = Split(data.test.x, label[data.test.y.long()])
    ends = np.cumsum(sizes).tolist()
    found = []
    for end, size in zip(ends, sizes, strict=True):
        parts = (_of(split, end - size, end) for split in (train, held, test))
        found.append(Task(tuple(data.classes[i] for i in order[end - size : end]), range(end - size, end), *parts))
    return found


def domain_incremental(*data: Dataset) -> list[Task]:
    """Each data set a task, over the same labels: what a class looks like changes.

    Raises:
        ValueError: none, or sets of different shapes or numbers of classes.
    """
    kinds = {(len(d.classes), tuple(d.train.x.shape[1:])) for d in data}
    if len(kinds) != 1:
        raise ValueError(f"data: expected sets of one shape and number of classes, got {sorted(kinds)}")
    return [Task(d.classes, range(len(d.classes)), d.train, _of(d.train, 0, 0), d.test) for d in data]


def task_of(tasks: Sequence[Task], *, apart: bool = False) -> Tensor:
    """Class -> the first task that brings it, ``(K,)``.

    Args:
        tasks: of a stream, from its first task on.
        apart: refuse a class that several tasks bring, which does not tell the task of a sample.

    Raises:
        ValueError: a class below the largest that no task brings, or, with ``apart``, one that several bring.
    """
    owner: dict[int, int] = {}
    for t, task in enumerate(tasks):
        for k in task.classes:
            owner.setdefault(k, t)
    if sorted(owner) != list(range(len(owner))):
        raise ValueError(f"tasks: expected classes from 0 on without a gap, got {sorted(owner)}")
    if apart and sum(len(task.classes) for task in tasks) > len(owner):
        raise ValueError(f"tasks: expected new classes in each, got {[task.classes for task in tasks]}")
    return torch.tensor([owner[k] for k in sorted(owner)])


def _split(data: Split, k: int, per_class: int | None, val: float, generator: torch.Generator) -> tuple[Split, Split]:
    """The same share of every class held out, then the first ``per_class`` of the rest."""
    kept = []
    held = []
    for c in range(k):
        rows = (data.y == c).nonzero()[:, 0]
        if per_class is not None or val:
            rows = rows[torch.randperm(len(rows), generator=generator)]
        n = round(val * len(rows))
        if n == len(rows):
            raise ValueError(f"val: expected a share that leaves images of class {c} to train on, got {val}")
        if per_class is not None and per_class > len(rows) - n:
            raise ValueError(f"per_class: expected at most {len(rows) - n} images of class {c}, got {per_class}")
        held.append(rows[:n])
        kept.append(rows[n:][:per_class])
    train, out = (torch.cat(parts).sort().values for parts in (kept, held))  # in stored order, as without a choice
    return Split(data.x[train], data.y[train]), Split(data.x[out], data.y[out])


def _of(data: Split, start: int, end: int) -> Split:
    rows = (data.y >= start) & (data.y < end)
    return Split(data.x[rows], data.y[rows])
