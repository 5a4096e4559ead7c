r"""What every rule of a stream has: a loss for a new batch, and what it is told of the stream.

A *rule* turns a new batch :math:`(x,y)` into a loss; :func:`peftref.continual.core.train.learn` descends in it. The
simplest is fine-tuning, the mean cross-entropy of what arrives. Rules that keep images or weights of earlier tasks are
in :mod:`peftref.continual.baselines.rehearsal` and :mod:`peftref.continual.baselines.ewc`.

Two things can be put around any rule without changing it: :meth:`FineTune.wrap` takes a forward pass that is told more
than the images, and a term that is added to the loss.

>>> import torch
>>> rule = FineTune()
>>> net = nn.Linear(2, 2)
>>> x, y = torch.ones(1, 2), torch.tensor([1])
>>> loss = rule.loss(net, x, y)
>>> rule.wrap(lambda forward: lambda model, x, y: forward(model, 0 * x, y), penalty=lambda model: 1.0)
>>> bool(rule.loss(net, x, y) == F.cross_entropy(net.bias[None], y) + 1)
True
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from ._steps import tensor_of

__all__ = ["FineTune"]

Forward = Callable[[nn.Module, Tensor, Tensor], Tensor]
Penalty = Callable[[nn.Module], Tensor | float]


def _images_only(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return tensor_of(model(x))


def _nothing(model: nn.Module) -> float:
    return 0.0


def _sum_of(first: Penalty, second: Penalty) -> Penalty:
    return lambda model: first(model) + second(model)


class FineTune:
    """Cross-entropy CE(f(x), y) on what arrives: the lower bound, and the frame of all other rules.

    Attributes:
        forward: ``(model, x, y) -> logits`` of one concatenated batch; replace it to give the network more than images.
        regulariser: ``model -> scalar`` added to the loss after the forward pass.
        task: number of the present task, from 0.
        classes: number of the classes of all tasks so far.
    """

    def __init__(self) -> None:
        self.forward: Forward = _images_only
        self.regulariser: Penalty = _nothing
        self.task = 0
        self.classes = 0

    def wrap(self, forward: Callable[[Forward], Forward], penalty: Penalty = _nothing) -> None:
        """Put something around the forward pass, and add something to the loss.

        Args:
            forward: takes the present forward pass, returns the one that takes its place.
            penalty: ``model -> scalar``, added to the present regulariser.
        """
        self.forward = forward(self.forward)
        self.regulariser = _sum_of(self.regulariser, penalty)

    def begin_task(self, task: int, classes: int) -> None:
        """Take note that a task begins, before its first batch.

        Args:
            task: its number, from 0.
            classes: number of the classes of all tasks so far, this one included.
        """
        self.task = task
        self.classes = classes

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Loss of a new batch."""
        return F.cross_entropy(self.forward(model, x, y), y) + self.regulariser(model)

    def observe(self, x: Tensor, y: Tensor) -> None:
        """Take note of a batch, after the step on it."""

    def end_task(self, model: nn.Module, x: Tensor, y: Tensor) -> None:
        """Take note that a task is over; ``x, y`` are all its training images."""
