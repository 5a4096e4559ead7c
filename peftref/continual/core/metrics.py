r"""What is kept and what is lost: the accuracy matrix of a stream and the numbers read off it.

:math:`a_{t,i}` is the accuracy in % on the test images of task i after learning task t (both counted from 1); the
prediction is the largest of *all* logits (class-incremental), or of the task's own (task-incremental). Entries above
the diagonal, tasks not yet learned, are only read by :func:`forward_transfer` and may be NaN.

>>> a = torch.tensor([[90.0, 0, 0], [70, 80, 0], [60, 75, 85]])
>>> {name: round(value, 2) for name, value in summary(a).items()}
{'last': 73.33, 'incremental': 79.44, 'forgetting': 17.5, 'bwt': -17.5, 'plasticity': 85.0}
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ._steps import tensor_of
from .streams import Task

__all__ = [
    "average_accuracy",
    "average_incremental",
    "backward_transfer",
    "evaluate",
    "forgetting",
    "forward_transfer",
    "last_accuracy",
    "plasticity",
    "summary",
]


@torch.no_grad()
def evaluate(
    predict: Callable[[Tensor], Tensor], tasks: Sequence[Task], *, own_classes: bool = False, batch_size: int = 1000
) -> Tensor:
    """Accuracy in % on the test images of each task: a row of the matrix, ``(T,)``.

    Args:
        predict: images -> logits of all classes ``(N, K)``, or ``(N, K, ...)`` with a label for each pixel; a module is
            used in the mode it is in.
        own_classes: let only the classes of the image's own task compete (task-incremental).
        batch_size: images of a call.

    Raises:
        TypeError: predictions that are no tensor.
        ValueError: no tasks, a batch of less than one image, or logits that do not fit the labels.
    """
    if not tasks or batch_size < 1:
        raise ValueError(f"tasks, batch_size: expected at least one of each, got {len(tasks)} and {batch_size}")
    row = []
    for task in tasks:
        logits = torch.cat([tensor_of(predict(x)) for x in task.test.x.split(batch_size)])
        if logits.ndim < 2 or logits[:, 0].shape != task.test.y.shape:
            shapes = f"{tuple(logits.shape)} for labels {tuple(task.test.y.shape)}"
            raise ValueError(f"predict: expected logits (N, K) for labels (N,), got {shapes}")
        if own_classes:
            logits = logits[:, task.classes.start : task.classes.stop]
        right = logits.argmax(1) + (task.classes.start if own_classes else 0) == task.test.y
        row.append(100 * right.cpu().double().mean())  # not every accelerator has float64
    return torch.stack(row)


def average_accuracy(a: Tensor, counts: Tensor | None = None) -> Tensor:
    r"""Average accuracy A_t = 1/t sum_{i <= t} a_ti after each task (eq-continual-average), ``(T, T) -> (T,)``.

    Args:
        a: accuracy matrix.
        counts: test images of each task, to weigh by images instead (LAE, FSA); the same where tasks are equal.
    """
    a = _matrix(a).tril()
    n = torch.ones(len(a), dtype=a.dtype) if counts is None else _of_each(a, counts=counts)
    if not bool((n > 0).all()):
        raise ValueError(f"counts: expected positive numbers of images, got {n.tolist()}")
    # eq-continual-average:  A_t = 1/t sum_{i <= t} a_ti
    return (a * n).sum(1) / n.cumsum(0)


def last_accuracy(a: Tensor) -> float:
    """Last accuracy A_T, the average accuracy after the last task."""
    return average_accuracy(a)[-1].item()


def average_incremental(a: Tensor) -> float:
    """Average incremental accuracy 1/T sum_t A_t."""
    return average_accuracy(a).mean().item()


def forgetting(a: Tensor, *, with_last: bool = True) -> float:
    r"""Forgetting F = 1/(T-1) sum_{i < T} (max_t a_ti - a_Ti), in points (eq-continual-forgetting).

    Args:
        a: accuracy matrix.
        with_last: the maximum runs over all rows from i to T, so F is never negative (mammoth); else over rows before
            the last (Chaudhry et al., 2018), where learning on may show as negative forgetting.
    """
    a = _several(a)
    upto = len(a) if with_last else len(a) - 1
    rows = torch.arange(len(a))
    learned = a[:upto].masked_fill(rows[:upto, None] < rows, -torch.inf)
    # eq-continual-forgetting:  F = 1/(T-1) sum_{i < T} (max_t a_ti - a_Ti)
    return (learned.amax(0) - a[-1])[:-1].mean().item()


def backward_transfer(a: Tensor) -> float:
    """Backward transfer 1/(T-1) sum_{i < T} (a_Ti - a_ii), in points (eq-continual-bwt); negative: forgotten."""
    a = _several(a)
    # eq-continual-bwt:  BWT = 1/(T-1) sum_{i < T} (a_Ti - a_ii)
    return (a[-1] - a.diagonal())[:-1].mean().item()


def forward_transfer(a: Tensor, untrained: Tensor) -> float:
    r"""Forward transfer 1/(T-1) sum_{i > 1} (a_{i-1,i} - r_i), in points (eq-continual-fwt).

    Args:
        a: accuracy matrix, with the entries above the diagonal.
        untrained: r, the accuracies of the network before the first task, ``(T,)``.
    """
    a = _several(a)
    above = a.diagonal(1)
    if above.isnan().any():
        raise ValueError("a: expected the accuracy on each task before it was learned, got NaN above the diagonal")
    # eq-continual-fwt:  FWT = 1/(T-1) sum_{i > 1} (a_{i-1,i} - r_i)
    return (above - _of_each(a, untrained=untrained)[1:]).mean().item()


def plasticity(a: Tensor) -> float:
    """Plasticity 1/T sum_i a_ii (eq-continual-plasticity): how well each task was learned when it was new."""
    return _matrix(a).diagonal().mean().item()


def summary(a: Tensor) -> dict[str, float]:
    """All numbers that need nothing but the matrix; forgetting and transfer only where there are two tasks."""
    numbers = {"last": last_accuracy(a), "incremental": average_incremental(a)}
    if len(a) > 1:
        numbers |= {"forgetting": forgetting(a), "bwt": backward_transfer(a)}
    return numbers | {"plasticity": plasticity(a)}


def _matrix(a: Tensor) -> Tensor:
    a = torch.as_tensor(a, dtype=torch.float64).clone()
    if a.ndim != 2 or a.shape[0] != a.shape[1] or not len(a):
        raise ValueError(f"a: expected a square matrix, tasks learned by tasks tested, got shape {tuple(a.shape)}")
    if a.tril().isnan().any():
        raise ValueError("a: expected an accuracy for every task learned so far, got NaN on or below the diagonal")
    return a


def _of_each(a: Tensor, **named: Tensor) -> Tensor:
    ((name, value),) = named.items()
    value = torch.as_tensor(value, dtype=a.dtype)
    if value.shape != a.shape[:1]:  # of length 1 it would broadcast
        raise ValueError(f"{name}: expected a number for each of {len(a)} tasks, got shape {tuple(value.shape)}")
    return value


def _several(a: Tensor) -> Tensor:
    a = _matrix(a)
    if len(a) < 2:
        raise ValueError("a: expected two tasks or more, got one, which nothing can be forgotten after")
    return a
