r"""AdaptFormer: a small ReLU bottleneck beside the MLP of every transformer block.

Chen, Ge, Tong, Wang, Song, Wang, Luo, "AdaptFormer: Adapting Vision Transformers for Scalable Visual Recognition",
NeurIPS 2022, arXiv 2205.13535; official code: https://github.com/ShoufaChen/AdaptFormer/tree/6967d67.

In a frozen pre-norm block, :math:`x'=x+\mathrm{MSA}(\mathrm{LN}_1(x))` is the residual stream after attention and
:math:`z=\mathrm{MLP}(\mathrm{LN}_2(x'))`. A bottleneck (eq-adaptformer-branch) is added beside the MLP
(eq-adaptformer-parallel) or, as in Houlsby et al. (2019), behind it (eq-adaptformer-sequential):

.. math::
    f(u) = s\,\bigl(\mathrm{ReLU}(\nu(u)W_d^\top+b_d)\,W_u^\top+b_u\bigr),\qquad
    x^{out} = x'+z+f(x') \quad\text{or}\quad x^{out} = x'+z+f(z).

:math:`W_u, b_u, b_d` start at zero, so the model starts as it was. The ReLU makes it no linear map: nothing to merge.

======================  =====================  ==========================  ==========
argument                here                   paper                       shape
======================  =====================  ==========================  ==========
``bottleneck``          :math:`r`              :math:`\hat d`              integer
``scale``               :math:`s`              :math:`s`                   number
``down_proj.weight``    :math:`W_d`            :math:`W_{down}^\top`       ``(r, d)``
``up_proj.weight``      :math:`W_u`            :math:`W_{up}^\top`         ``(d, r)``
``layernorm``           :math:`\nu`            LN                          ``(d,)``
======================  =====================  ==========================  ==========

Differs from the paper: :math:`\nu` is the identity unless ``layernorm=True``, as in the released configurations.
Differs from the authors' code: it sits on blocks as they are, whatever their attention, LayerScale and DropPath (as
there, the bottleneck's output passes through neither); what is trained follows from what was put in, where that code
asks which keys a checkpoint lacked, a list that it does not have with ``--eval``
(https://github.com/ShoufaChen/AdaptFormer/blob/6967d67/main_image.py#L208-L235). Its third place for
the LayerNorm, behind the scale (``"out"``), is left out: it divides :math:`s` away again.

The chapter also writes the whole block (eq-adaptformer-block), counts its parameters (eq-adaptformer-size) and follows
what the scale does to the gradients (eq-adaptformer-gradients).

>>> import torch
>>> from peftref.adapters.core.injection import adapters, inject
>>> from peftref.models.vit import ViT
>>> net, x = ViT(embed_dim=32, depth=2).eval(), torch.rand(3, 1, 28, 28)
>>> before = net(x)
>>> inject(net, AdaptFormer, r"blocks\.\d+", bottleneck=4)          # whole blocks
['blocks.0', 'blocks.1']
>>> torch.equal(net(x), before)                                     # W_u = 0: nothing has changed
True
>>> sum(p.numel() for p in net.parameters() if p.requires_grad)     # 2 blocks x (2 d r + r + d), d = 32
584
>>> _ = torch.nn.init.normal_(adapters(net)["blocks.1"].up_proj.weight)
>>> torch.equal(net(x), before)
False
>>> list(dead_share(net, x))                                        # ReLUs that no token of x switches on
['blocks.0', 'blocks.1']
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import integer, number, one_of
from .core.activations import record_inputs
from .core.adapter import Adapter
from .core.injection import adapters
from .core.layers import Layer, width

__all__ = ["AdaptFormer", "branch", "dead_share", "head"]

PLACEMENTS = ("parallel", "sequential")


def branch(
    u: Tensor,
    down: Tensor,
    down_bias: Tensor,
    up: Tensor,
    up_bias: Tensor,
    scale: float | Tensor = 1.0,
    dropout: float = 0.0,
) -> Tensor:
    """The bottleneck on each row, ``f(u) = s (ReLU(u W_d^T + b_d) W_u^T + b_u)`` (eq-adaptformer-branch).

    Args:
        u: rows, ``(..., d)``.
        down: W_d, ``(r, d)``.
        down_bias: b_d, ``(r,)``.
        up: W_u, ``(d, r)``.
        up_bias: b_u, ``(d,)``.
        scale: s.
        dropout: share of the hidden units that are dropped.

    >>> u, down, up = torch.tensor([[1.0, -2.0]]), torch.eye(2), torch.tensor([[1.0, 5.0], [3.0, 7.0]])
    >>> branch(u, down, torch.zeros(2), up, torch.zeros(2), scale=0.5)   # the ReLU drops the second number
    tensor([[0.5000, 1.5000]])
    """
    # eq-adaptformer-branch:  h = ReLU(u W_d^T + b_d)
    h = F.dropout(F.relu(F.linear(u, down, down_bias)), dropout)  # (..., r)
    # eq-adaptformer-branch:  f = s (h W_u^T + b_u), scaled where it is small: in the weights
    return F.linear(h, scale * up, scale * up_bias)


class AdaptFormer(Adapter):
    """One bottleneck on one block, ``x' + z + f(x')`` (eq-adaptformer-parallel) or ``x' + z + f(z)``
    (eq-adaptformer-sequential).

    Put it on whole blocks, ``inject(model, AdaptFormer, r"blocks\\.\\d+")``, of any model whose blocks add an MLP to
    their stream and return a tensor.

    Args:
        base: the frozen block.
        bottleneck: ``r`` (64: official ``--ffn_num``). It may be larger than the block is wide.
        scale: ``s`` (0.1: official scripts).
        dropout: share of the bottleneck dropped in training (0.1: official ``models/custom_modules.py``, for images;
            for video it is 0).
        placement: ``"parallel"`` (official scripts) or ``"sequential"``.
        layernorm: normalise the bottleneck's input, with weights of its own (False: official scripts, ``"none"``; the
            paper's equation has it).
        learn_scale: train ``s`` too, starting from ``scale`` (False: official scripts; their ``"learnable_scalar"``
            starts from 1).
        tap: the child whose input is the stream after attention: ``"norm2"`` in timm and here, ``"layernorm_after"`` in
            transformers' ViT. With ``"mlp"`` the bottleneck reads what the MLP reads.

    Raises:
        ValueError: an option out of its range, or no such child.
    """

    kind = "adaptformer"
    options = ("bottleneck", "scale", "dropout", "placement", "layernorm", "learn_scale", "tap")
    mergeable = False
    any_module = True

    def __init__(
        self,
        base: Layer,
        bottleneck: int = 64,
        scale: float = 0.1,
        dropout: float = 0.1,
        placement: str = "parallel",
        layernorm: bool = False,
        learn_scale: bool = False,
        tap: str = "norm2",
    ) -> None:
        super().__init__()
        integer("bottleneck", bottleneck, 1)
        number("scale", scale)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: expected a number in [0, 1), got {dropout!r}")
        one_of("placement", placement, PLACEMENTS)
        children = dict(base.module.named_children())
        if tap not in children:
            raise ValueError(f"tap: expected a child of the block, one of {list(children)}, got {tap!r}")
        d = width(children[tap])
        self.bottleneck = bottleneck
        self.scale = scale
        self.dropout = dropout
        self.placement = placement
        self.layernorm = layernorm
        self.learn_scale = learn_scale
        self.tap = tap
        self.norm = nn.LayerNorm(d) if layernorm else nn.Identity()  # eps 1e-5, where timm's blocks have 1e-6
        self.down_proj = nn.Linear(d, bottleneck)
        self.up_proj = nn.Linear(bottleneck, d)
        self.s = nn.Parameter(torch.tensor([float(scale)])) if learn_scale else scale
        for zero in (self.down_proj.bias, self.up_proj.weight, self.up_proj.bias):  # W_d: as Linear draws it
            nn.init.zeros_(zero)

    def forward(self, x: Tensor, y0: Tensor, base: Layer) -> Tensor:
        # eq-adaptformer-parallel:    x' + z + f(x'), where x' is the input of the tap and y0 = x' + z
        # eq-adaptformer-sequential:  x' + z + f(z),  z = y0 - x'
        u = x if self.placement == "parallel" else y0 - x
        down = self.down_proj
        up = self.up_proj
        dropout = self.dropout if self.training else 0.0
        return branch(self.norm(u), down.weight, down.bias, up.weight, up.bias, self.s, dropout)


def dead_share(model: nn.Module, x: Tensor, name: str = "default") -> dict[str, float]:
    """Share of each bottleneck's ReLUs that no token of ``x`` switches on, by block, in eval mode; nothing changes.

    A unit that no input switches on is dead: neither its row of :math:`W_d` nor its column of :math:`W_u` gets a
    gradient.

    Raises:
        ValueError: no adapter of that name, it is not active, or it is no AdaptFormer.
    """
    given = adapters(model, name)
    shares = {}
    found = {n: a for n, a in given.items() if isinstance(a, AdaptFormer)}
    wrong = [n for n in given if n not in found]
    if wrong:
        raise ValueError(f"name: expected an AdaptFormer, got another adapter on {wrong}")

    def count(n: str, u: Tensor) -> None:
        a = found[n]
        off = F.linear(a.norm.forward(u), a.down_proj.weight, a.down_proj.bias) <= 0  # by a call this would be seen too
        shares[n] = off.view(-1, a.bottleneck).all(0).double().mean().item()

    with record_inputs(model, {n: a.norm for n, a in found.items()}, count):
        model(x)
    if not shares:
        raise ValueError(f"name: expected an adapter that is active, got {name!r}")
    return shares


def head(features: int, classes: int) -> nn.Sequential:
    """The classifier of the official image script: BatchNorm without weights, then a linear layer.

    >>> [type(layer).__name__ for layer in head(8, 3)]
    ['BatchNorm1d', 'Linear']
    """
    linear = nn.Linear(features, classes)
    nn.init.trunc_normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.BatchNorm1d(features, eps=1e-6, affine=False), linear)
