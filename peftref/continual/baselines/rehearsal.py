r"""What to minimise on a stream: fine-tuning, and rehearsal by ER, DER++ and ER-ACE.

A *rule* turns a new batch :math:`(x,y)` into a loss; :func:`peftref.continual.core.train.learn` descends in it. With
:math:`\mathrm{CE}` the mean cross-entropy, :math:`f` the logits and :math:`(x',y',z'),(x'',y'')` draws from the buffer,

.. math::
   L_{\mathrm{ER}}&=\mathrm{CE}(f(x),y)+\mathrm{CE}(f(x'),y') \\
   L_{\mathrm{DER++}}&=\mathrm{CE}(f(x),y)+\alpha\,\overline{\|f(x')-z'\|^2}+\beta\,\mathrm{CE}(f(x''),y'') \\
   L_{\mathrm{ER\text{-}ACE}}&=\mathrm{CE}(f(x)_{\text{classes of the batch and not yet seen}},y)+\mathrm{CE}(f(x'),y')

(eq-continual-er, eq-continual-derpp, eq-continual-erace), where the overline is the mean over samples and classes and
:math:`z'` are the logits the network gave when the sample entered the buffer. Sources: ER: Chaudhry et al., "On Tiny
Episodic Memories in Continual Learning", 2019, arXiv 1902.10486; DER++: Buzzega et al., "Dark Experience for General
Continual Learning", NeurIPS 2020, arXiv 2004.07211; ER-ACE: Caccia et al., "New Insights on Reducing Abrupt
Representation Change in Online Continual Learning", ICLR 2022, arXiv 2104.05025.

All parts of a batch go through the network in *one* forward pass of the concatenation (``forwards="one"``): a third of
the calls, and BatchNorm sees old and new samples together. The published codes of DER++ and ER-ACE call the network
once for each part (``"each"``; ``lvyilin/AdaB2N@9aaba7e:models/derpp.py#L47-L60``, and ``models/er_ace.py#L54-L73``, of
which the mask is in lines 51 to 60). The published mask of ER-ACE counts the classes seen batch by batch and also lets
the largest of them compete; the two masks agree whenever a batch has the last class of its task in it.

>>> z = torch.tensor([[2.0, 1.0, 0.0, 0.0]])
>>> ace_mask(z, torch.tensor([0]), seen=2)  # class 1 is old and not in this batch; 2 and 3 are yet to come
tensor([[ True, False,  True,  True]])
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..._checks import at_least_float32, integer, number
from ..core._steps import classes_in
from ..core.replay import Reservoir
from ..core.rule import FineTune

__all__ = ["DERpp", "ER", "ERACE", "ace_mask", "derpp_loss", "er_ace_loss", "er_loss"]


def er_loss(new: Tensor, y: Tensor, old: Tensor, y_old: Tensor) -> Tensor:
    """Loss CE(f(x), y) + CE(f(x'), y') of the new and of the replayed batch (eq-continual-er).

    Args:
        new: logits of the new batch.
        y: its labels.
        old: logits of the replayed batch.
        y_old: its labels.
    """
    # eq-continual-er:  CE(f(x), y) + CE(f(x'), y')
    return F.cross_entropy(new, y) + F.cross_entropy(old, y_old)


def derpp_loss(
    new: Tensor,
    y: Tensor,
    first: Tensor,
    stored: Tensor,
    second: Tensor,
    y_second: Tensor,
    alpha: float = 0.1,
    beta: float = 0.5,
) -> Tensor:
    """Loss CE(f(x), y) + alpha mean (f(x') - z')^2 + beta CE(f(x''), y'') (eq-continual-derpp).

    Args:
        new: logits of the new batch.
        y: its labels.
        first: logits of the first draw.
        stored: those that the network gave when the samples of the first draw were new.
        second: logits of the second draw.
        y_second: its labels.
        alpha: weight of the stored logits.
        beta: weight of the labels.
    """
    if first.shape != stored.shape:  # which mean((f - z)^2) would broadcast
        raise ValueError(f"first, stored: expected one shape, got {tuple(first.shape)} and {tuple(stored.shape)}")
    first, stored = at_least_float32(first), at_least_float32(stored)  # squares of half precision vanish
    # eq-continual-derpp:  CE(f(x), y) + alpha mean (f(x') - z')^2 + beta CE(f(x''), y'')
    return F.cross_entropy(new, y) + alpha * F.mse_loss(first, stored) + beta * F.cross_entropy(second, y_second)


def ace_mask(logits: Tensor, y: Tensor, seen: int) -> Tensor:
    """Classes that compete for a new batch: its own, and those not yet seen; as the logits, all rows alike.

    Args:
        logits: ``(N, K)``, or ``(N, K, ...)`` of each pixel.
        y: labels of the batch.
        seen: number of classes of this and all earlier tasks, which come first.

    Raises:
        ValueError: logits of one axis.
    """
    k = torch.arange(classes_in(logits), device=logits.device)
    return (torch.isin(k, y) | (k >= seen)).view(-1, *[1] * (logits.ndim - 2)).expand_as(logits)


def er_ace_loss(new: Tensor, y: Tensor, seen: int, old: Tensor | None = None, y_old: Tensor | None = None) -> Tensor:
    """ER whose new batch does not push down the old classes: those are left out of its softmax.

    Raises:
        ValueError: replayed logits without their labels, or labels without logits.
    """
    if (old is None) != (y_old is None):
        raise ValueError("old, y_old: expected both or neither, got " + ("y_old" if old is None else "old") + " alone")
    # The most negative finite number, not -inf: 0 times infinity would poison the gradient.
    masked = new.masked_fill(~ace_mask(new, y, seen), torch.finfo(new.dtype).min)
    # eq-continual-erace
    loss = F.cross_entropy(masked, y)
    return loss if old is None or y_old is None else loss + F.cross_entropy(old, y_old)


class Rehearsal(FineTune):
    """What the three rules share: a buffer, and forward passes of several batches at once."""

    def __init__(self, buffer: Reservoir, batch_size: int = 10, forwards: Literal["one", "each"] = "one") -> None:
        super().__init__()
        if forwards not in ("one", "each"):
            raise ValueError(f'forwards: expected "one" or "each", got {forwards!r}')
        if not isinstance(buffer, Reservoir):
            raise TypeError(f"buffer: expected a Reservoir, got {type(buffer).__name__}")
        integer("batch_size", batch_size, 1)
        self.buffer = buffer
        self.batch_size = batch_size
        self.forwards = forwards

    def observe(self, x: Tensor, y: Tensor) -> None:
        self.buffer.add(x, y)

    def forward_parts(self, model: nn.Module, *parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Logits of each part ``(x, y, ...)``."""
        if self.forwards == "each":
            return tuple(self.forward(model, x, y) for x, y, *_ in parts)
        x, y = (torch.cat([part[i] for part in parts]) for i in (0, 1))
        logits: tuple[Tensor, ...] = self.forward(model, x, y).split([len(part[1]) for part in parts])
        return logits


class ER(Rehearsal):
    """Experience replay.

    Args:
        buffer: of images and labels.
        batch_size: replayed samples of a step.
        forwards: see the module.
    """

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if not len(self.buffer):
            return super().loss(model, x, y)
        x_old, y_old = self.buffer.draw(self.batch_size)
        new, old = self.forward_parts(model, (x, y), (x_old, y_old))
        return er_loss(new, y, old, y_old) + self.regulariser(model)


class DERpp(Rehearsal):
    """DER++: replays the logits of one draw and the labels of another.

    Args:
        buffer: of images, labels and logits.
        batch_size: replayed samples of each draw.
        alpha: weight of the stored logits (0.1: found best online, mammoth's issue 6).
        beta: weight of the labels (0.5: found best online, mammoth's issue 6).
        forwards: see the module.
    """

    def __init__(
        self,
        buffer: Reservoir,
        batch_size: int = 10,
        alpha: float = 0.1,
        beta: float = 0.5,
        forwards: Literal["one", "each"] = "one",
    ) -> None:
        super().__init__(buffer, batch_size, forwards)
        number("alpha", alpha, 0.0)
        number("beta", beta, 0.0)
        self.alpha = alpha
        self.beta = beta

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if not len(self.buffer):
            new = self.forward(model, x, y)
            loss = F.cross_entropy(new, y)
        else:
            first, second = (self.buffer.draw(self.batch_size) for _ in range(2))
            new, z1, z2 = self.forward_parts(model, (x, y), first, second)
            loss = derpp_loss(new, y, z1, first[2], z2, second[1], self.alpha, self.beta)
        self.logits = new.detach()
        return loss + self.regulariser(model)

    def observe(self, x: Tensor, y: Tensor) -> None:
        self.buffer.add(x, y, self.logits)


class ERACE(Rehearsal):
    """ER-ACE; replays from the second task on, as the published code does.

    Args:
        buffer: of images and labels.
        batch_size: replayed samples of a step.
        forwards: see the module.
    """

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if self.task == 0:
            loss = er_ace_loss(self.forward(model, x, y), y, self.classes)
        else:
            x_old, y_old = self.buffer.draw(self.batch_size)
            new, old = self.forward_parts(model, (x, y), (x_old, y_old))
            loss = er_ace_loss(new, y, self.classes, old, y_old)
        return loss + self.regulariser(model)
