r"""A linear head that grows by one block for each task, and the loss of its newest block.

A task brings the classes :math:`\mathcal C_t`, numbered on from those of the tasks before. In the *local* loss
(eq-lae-local) only these compete,

.. math:: L_t=-\log\frac{e^{z_y}}{\sum_{k\in\mathcal C_t}e^{z_k}},

so the blocks of earlier tasks get no gradient: what was learned is not pushed down because it is absent. Used by
:class:`peftref.continual.lae.LAE`.

>>> head = DynamicHead(8)
>>> head.grow(3), head.grow(2)
(range(0, 3), range(3, 5))
>>> local_loss(head(torch.randn(4, 8)), torch.tensor([3, 4, 4, 3]), start=3).backward()
>>> [float(block.bias.grad.abs().sum()) > 0 for block in head.blocks]
[False, True]
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._steps import classes_in

__all__ = ["DynamicHead", "local_loss"]


def local_loss(logits: Tensor, y: Tensor, start: int) -> Tensor:
    """Cross-entropy among the classes from ``start`` on, -log softmax of z over k >= start, at y (eq-lae-local).

    ``(N, K), (N,) -> ()``, or ``(N, K, ...), (N, ...) -> ()``. Of a single class it is 0.

    Args:
        logits: of all classes.
        y: labels among the new classes.
        start: first of these.

    Raises:
        ValueError: a label outside of these classes, or logits of one axis.

    >>> z = torch.tensor([[9.0, 9.0, 0.0, 0.0]])
    >>> local_loss(z, torch.tensor([3]), start=2)               # log 2: the old classes do not compete
    tensor(0.6931)
    """
    check_labels(y, start, classes_in(logits))
    # eq-lae-local:  -log softmax of z over k >= start, at y
    return F.cross_entropy(logits[:, start:], y.long() - start)


class DynamicHead(nn.Module):
    """A linear classifier that grows by one block for each task: ``(N, d) -> (N, K)``.

    >>> head = DynamicHead(8)
    >>> head.grow(3), head.grow(2), head(torch.zeros(1, 8))
    (range(0, 3), range(3, 5), tensor([[0., 0., 0., 0., 0.]], grad_fn=<CatBackward0>))
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features
        self.classes = 0
        self.blocks = nn.ModuleList()

    def grow(self, classes: int, like: Tensor | None = None) -> range:
        """Add a block, weights N(0, 0.001) as in the official code and no bias at first, on the device of ``like``."""
        if isinstance(classes, bool) or not isinstance(classes, int) or classes < 1:
            raise ValueError(f"classes: expected a positive integer, got {classes!r}")
        block = nn.Linear(self.features, classes)
        nn.init.normal_(block.weight, std=0.001)
        nn.init.zeros_(block.bias)
        if like is not None:
            block.to(like.device, torch.promote_types(like.dtype, torch.float32))
        self.blocks.append(block)
        self.classes += classes
        return range(self.classes - classes, self.classes)

    def forward(self, h: Tensor) -> Tensor:
        linears: list[Any] = list(self.blocks)
        return torch.cat([block(h.to(block.weight.dtype)) for block in linears], -1)


def check_labels(y: Tensor, start: int, stop: int) -> None:
    if len(y) and not (start <= int(y.min()) and int(y.max()) < stop):
        raise ValueError(f"y: expected labels of the new block, from {start} to {stop - 1}, got {y.unique().tolist()}")
