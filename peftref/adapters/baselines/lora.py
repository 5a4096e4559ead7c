r"""LoRA: a low-rank update beside a frozen matrix.

Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen, "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022,
arXiv 2106.09685.

Beside the frozen :math:`W\in\mathbb R^{o\times i}` two thin matrices are trained (eq-lora-update):

.. math:: y = xW^\top + s\,(xA^\top)B^\top, \qquad \Delta W = s\,BA, \qquad s = \alpha / r .

:math:`B` starts at zero, so the model starts as it was; :math:`A` is random, or no gradient would ever flow.

==================  ==================  ==================  ==========
argument            here                paper               shape
==================  ==================  ==================  ==========
``r``               :math:`r`           :math:`r`           integer
``lora_alpha``      :math:`\alpha`      :math:`\alpha`      number
``lora_A.weight``   :math:`A`           :math:`A`           ``(r, i)``
``lora_B.weight``   :math:`B`           :math:`B`           ``(o, r)``
==================  ==================  ==================  ==========

Differs from the paper: :math:`A` is drawn as in the authors' code, uniform in :math:`\pm 1/\sqrt i`, where the paper
says Gaussian. Names, shapes and defaults are those of Hugging Face PEFT, whose files open here and which opens ours.
On a convolution :math:`A` has the layer's window, ``(r, c, h, w)``, and :math:`B` is ``(o, r, 1, 1)``; the update reads
the input padded as the layer pads it, where PEFT's pads with zeros until it is merged.

>>> import torch
>>> from torch import nn
>>> from peftref.adapters.core.injection import adapters, inject, merge
>>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
>>> x = torch.randn(5, 4)
>>> before = net(x)
>>> inject(net, LoRA, ["0", "2"], r=2)
['0', '2']
>>> torch.equal(net(x), before)                    # B = 0: nothing has changed
True
>>> [name for name, p in net.named_parameters() if p.requires_grad][:2]
['0.adapters.default.lora_A.weight', '0.adapters.default.lora_B.weight']
>>> _ = nn.init.normal_(adapters(net)["2"].lora_B.weight)
>>> y = net(x)
>>> merge(net)                                     # W + s B A: as fast as the original
>>> torch.allclose(net(x), y, atol=1e-5)
True
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..._checks import integer, number
from ..core.adapter import Adapter, PeftFormat
from ..core.layers import Layer

__all__ = ["LoRA", "scaling"]


def scaling(r: int, lora_alpha: float, use_rslora: bool = False) -> float:
    r"""The factor :math:`s`: :math:`\alpha/r`, or :math:`\alpha/\sqrt r`, which keeps large ranks learning.

    >>> scaling(16, 8), scaling(16, 8, use_rslora=True)
    (0.5, 2.0)
    """
    return lora_alpha / (math.sqrt(r) if use_rslora else r)


class LoRA(Adapter):
    """One low-rank update, ``dW = s B A`` (eq-lora-update).

    Args:
        base: the frozen layer.
        r: rank (8: PEFT's default). Above ``min(o, i)`` it adds weights and no freedom, but is allowed.
        lora_alpha: the update is scaled by ``lora_alpha / r`` (8: PEFT's default, a scale of one).
        lora_dropout: share of the layer's inputs that the update does not see in training (0: off).
        use_rslora: scale by ``lora_alpha / sqrt(r)`` (Kalajdzievski, 2023, arXiv 2312.03732).

    Raises:
        ValueError: a rank that is no positive integer, an ``lora_alpha`` that is not finite, a dropout outside [0, 1).
    """

    kind = "lora"
    options = ("r", "lora_alpha", "lora_dropout", "use_rslora")
    # How A and B were first drawn says nothing about a finished adapter, unless drawing them changed the base too.
    peft = PeftFormat(
        patterns={"r": "rank_pattern", "lora_alpha": "alpha_pattern"},
        ignored={
            "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
            "eva_config": ...,
            "qalora_group_size": ...,
        },
    )

    def __init__(
        self, base: Layer, r: int = 8, lora_alpha: float = 8, lora_dropout: float = 0.0, use_rslora: bool = False
    ) -> None:
        super().__init__()
        integer("r", r, 1)
        number("lora_alpha", lora_alpha)
        if not 0 <= lora_dropout < 1:
            raise ValueError(f"lora_dropout: expected a number in [0, 1), got {lora_dropout!r}")
        self.r = r
        self.lora_alpha = lora_alpha
        self.lora_dropout = lora_dropout
        self.use_rslora = use_rslora
        self.scale = scaling(r, lora_alpha, use_rslora)
        bound = 1 / math.sqrt(base.in_features)
        ones = (1,) * (len(base.window) - 1)
        self.lora_A = _Weight(torch.empty(r, *base.window).uniform_(-bound, bound))
        self.lora_B = _Weight(torch.zeros(base.out_features, r, *ones))

    def forward(self, x: Tensor, y0: Tensor, base: Layer) -> Tensor:
        A = self.lora_A.weight.flatten(1)  # (r, i)
        B = self.lora_B.weight.flatten(1)  # (o, r)
        x = F.dropout(x, self.lora_dropout, self.training)
        # eq-lora-update:  dy = s (x A^T) B^T, scaled where it is thin
        return F.linear(self.scale * base.linear(x, A), B)

    def delta(self, base: Layer) -> tuple[Tensor, Tensor | None]:
        # eq-lora-update:  dW = s B A
        return (self.scale * self.lora_B.weight.flatten(1)) @ self.lora_A.weight.flatten(1), None


class _Weight(nn.Module):
    """Holds one tensor under the name that PEFT's files have for it."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
