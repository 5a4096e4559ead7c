r"""Tent: test-time entropy minimisation over normalisation parameters.

Wang, Shelhamer, Liu, Olshausen, Darrell, "Tent: Fully Test-Time Adaptation by Entropy Minimization", ICLR 2021,
arXiv 2006.10726.

For logits :math:`z\in\mathbb R^{N\times K}` and :math:`p=\mathrm{softmax}(z)`, each batch takes one gradient step on
(eq-tent-loss)

.. math:: L(\gamma,\beta) = -\tfrac1N\sum_{i=1}^N\sum_{k=1}^K p_{ik}\log p_{ik}

over the scales and shifts of the normalisation layers; BatchNorm layers use the statistics of the *test* batch.

=================  ======================  ================  ==========
argument           here                    paper             shape
=================  ======================  ================  ==========
``logits``         :math:`z`               :math:`\hat y`    ``(N, K)``
(adapted)          :math:`\gamma,\beta`    same              ``(C,)``
=================  ======================  ================  ==========

Differs from the official code: the entropy comes from ``log_softmax``, so a vanishing probability contributes 0 and
never NaN; a batch whose loss is not finite is predicted but not learned from; group and layer normalisation are adapted
too (they have no batch statistics to swap), so that the method runs on any modern backbone.

>>> import torch
>>> entropy(torch.zeros(1, 4))                     # uniform: log 4
tensor([1.3863])
>>> net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2))
>>> Tent(net)(torch.randn(5, 3)).shape
torch.Size([5, 2])
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ..._checks import at_least_float32, class_scores, number
from ..core.adapted import (
    Learning,
    OptimizerFactory,
    adapting,
    batch_norms,
    freeze,
    gradient_step,
    norm_affine,
    use_batch_statistics,
)

__all__ = ["Tent", "entropy"]


def entropy(logits: Tensor) -> Tensor:
    """Entropy of each row in nats, H_i = -sum_k p_ik log p_ik: ``(N, K) -> (N,)``; finite for finite logits.

    Args:
        logits: ``(N, K)``.

    Raises:
        TypeError: no floating-point tensor.
        ValueError: another shape, as the dense logits ``(N, K, H, W)`` of a segmentation network have.
    """
    log_p = at_least_float32(class_scores("logits", logits)).log_softmax(-1)
    # eq-tent-loss:  H_i = -sum_k p_ik log p_ik
    return -(log_p.exp() * log_p).sum(-1)


class Tent(Learning):
    """Steps down the entropy -1/N sum_ik p_ik log p_ik of each batch, over the normalisation layers' scales and shifts.

    ``forward(x)`` returns the logits of ``x``, then takes one step on them; ``reset()`` restores the source exactly.

    Args:
        model: any classifier with normalisation layers; copied, never changed.
        lr: step size (1e-3, with Adam and batches of 200: the setting of the CIFAR-10-C benchmarks).
        optimizer: called as ``optimizer(parameters, lr=lr)``
            (ImageNet-C benchmarks: ``functools.partial(torch.optim.SGD, momentum=0.9, nesterov=True)``, lr 2.5e-4).

    Shape:
        ``x``: ``(N, ...)`` with N >= 2 where the model has BatchNorm; returns ``(N, K)``.

    Raises:
        TypeError: a model that returns no tensor.
        ValueError: no normalisation layer with a scale or shift to adapt; a batch of one; a negative ``lr``; a model
            that returns other than logits ``(N, K)``.
    """

    def __init__(self, model: nn.Module, lr: float = 1e-3, optimizer: OptimizerFactory = torch.optim.Adam) -> None:
        super().__init__(model)
        if not norm_affine(model):
            raise ValueError(
                "model: expected at least one normalisation layer with a scale or shift to adapt, got none"
            )
        self.lr = number("lr", lr, 0)
        self.optimizer_factory = optimizer
        self.smallest = 2 if batch_norms(self.source) else 1
        self.reset()

    @torch.inference_mode(False)  # copies made in a caller's inference mode could never learn
    def reset(self) -> None:
        self.model = use_batch_statistics(copy.deepcopy(self.source))
        affine = norm_affine(self.model)
        freeze(self.model.parameters(), trainable=affine)
        self.optimizer = self.optimizer_factory(affine, lr=self.lr)

    @adapting
    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        if len(x) == 0:
            return self.empty(self.model, x)
        logits = self.logits(self.model, x)  # (N, K): the answer is given BEFORE the step
        gradient_step(entropy(logits).mean(), self.optimizer)
        return logits.detach()
