r"""Bone: one trained block per group of outputs, guided by the frozen weight.

Kang, "Bone: Block-Affine Adaptation of Large Language Models", 2024, arXiv 2409.15371. The method of its first
versions, with the guide, is called Bat since, and "Bone" is what is left without it; the paper is now called MiSS.
PEFT's form of it: https://github.com/huggingface/peft/tree/51c2ff666/src/peft/tuners/miss.

Cut the frozen :math:`W\in\mathbb R^{o\times i}` into tiles :math:`W_{ab}` of :math:`r\times r`. Each group :math:`a`
of :math:`r` outputs has one trained block :math:`B_a`, which starts at zero (eq-bone-bat, eq-bone-gradient):

.. math::

    \Delta W_{ab} = W_{ab}B_a + B_a = (W_{ab}+I)\,B_a, \qquad
    \frac{\partial L}{\partial B_a} = \sum_b (W_{ab}+I)^\top G_{ab}, \quad G=\frac{\partial L}{\partial\Delta W} .

Without the guide :math:`W_{ab}B_a` all tiles of a row are alike, and pooling the input says it all. With
:math:`S=[I_r\,I_r\cdots]` (eq-bone-tiles) of :math:`i` columns and :math:`D\in\mathbb R^{r\times o}` (eq-bone-pooled):

.. math:: \Delta W = D^\top S, \qquad \Delta y = (xS^\top)D, \qquad (xS^\top)_k = x_k + x_{k+r} + x_{k+2r} + \dots

==================  ===========================  ===================================  ===================
argument            here                         paper; PEFT's ``MissConfig``         shape
==================  ===========================  ===================================  ===================
``r``               :math:`r`                    block size, rank; ``r``              integer
``variant``         ``"bat"``: guided            Bone in v1 to v3, then Bat; "bat"    a name
..                  ``"bone"``: pooled           Bone, MiSS; ``init_weights=True``    a name
..                  ``"mini"``: tied columns     MiSS mini; "mini"                    a name
``mini_r``          :math:`m`                    ``mini_r``                           integer
``miss_block``      :math:`B` of ``"bat"``       ``miss_block``                       ``(o / r, r, r)``
..                  :math:`D` of ``"bone"``      ``miss_block``                       ``(r, o)``
..                  :math:`\tilde D` of "mini"   ``miss_block``                       ``(r, m)``
==================  ===========================  ===================================  ===================

In ``"mini"``, :math:`D=[\tilde D\,\tilde D\cdots]`, whole copies beside each other.

Differs from PEFT: several adapters on a layer all read the frozen weight, so they add in any order; the guided update
is one batched product on the weight as it lies, and keeps nothing of the size of the weight for the backward pass.
PEFT's dropout of the pooled forms is not here. Files of both names, ``MISS`` and the older ``BONE``, open here.

The chapter also says how large the guide is beside the translation (eq-bone-strength).

>>> import torch
>>> from torch import nn
>>> bat(torch.zeros(2, 4), torch.tensor([[[1., 2.], [3., 4.]]]))          # no weight, no guide: every tile is B
tensor([[1., 2., 1., 2.],
        [3., 4., 3., 4.]])
>>> pool(torch.arange(5.), 2)                                             # 0 + 2 + 4, 1 + 3
tensor([6., 4.])
>>> from peftref.adapters.core.injection import adapters, inject, merge
>>> net, x = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)), torch.randn(5, 8)
>>> before = net(x)
>>> inject(net, Bone, ["0", "2"], r=2)
['0', '2']
>>> torch.equal(net(x), before)                                           # B = 0: nothing has changed
True
>>> _ = nn.init.normal_(adapters(net)["0"].miss_block)
>>> torch.linalg.matrix_rank(adapters(net)["0"].delta(nn.Linear(8, 8))[0]).item()  # r = 2, and yet full rank
8
>>> y = net(x)
>>> merge(net)
>>> torch.allclose(net(x), y, atol=1e-5)
True
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import integer, one_of
from .core.adapter import Adapter, PeftFormat
from .core.layers import Layer, view

__all__ = ["Bone", "bat", "pool", "pooled", "tiles"]

VARIANTS = {"bat": "bat", "bone": True, "mini": "mini"}  # ours -> PEFT's init_weights


def bat(weight: Tensor, block: Tensor) -> Tensor:
    r"""The guided update ``dW_ab = W_ab B_a + B_a`` (eq-bone-bat), ``(o, i)``.

    In memory a weight is a stack of rows of :math:`r` entries, ``(a, p, b)`` of them: all of group ``a`` meet the same
    :math:`B_a`, so one batched product does it, without moving an entry.

    Args:
        weight: the frozen W, ``(o, i)``.
        block: the blocks B, ``(o / r, r, r)``.
    """
    o, i = weight.shape
    groups, r, _ = block.shape
    rows = weight.reshape(groups, i, r)  # (o, i) -> (a, p b, q): r rows of i entries are i rows of r
    # eq-bone-bat:  dW_ab = W_ab B_a + B_a
    update = (rows @ block).view(groups, r, i // r, r) + block[:, :, None]
    return update.view(o, i)


def tiles(r: int, i: int) -> Tensor:
    """The matrix S, ``(r, i)``: identities side by side, the last one cut where r does not divide i.

    >>> tiles(2, 5).int().tolist()
    [[1, 0, 1, 0, 1], [0, 1, 0, 1, 0]]
    """
    # eq-bone-tiles:  S = [I_r I_r ...]
    return torch.eye(r).repeat(1, -(-i // r))[:, :i]


def pool(x: Tensor, r: int) -> Tensor:
    """What S lets through, ``x S^T`` (eq-bone-pooled), the sums of every r-th input: ``(..., i) -> (..., r)``."""
    shards, rest = divmod(int(x.shape[-1]), r)  # while a model is traced, sizes are tensors
    if rest:  # zeros fill the last shard up
        x = F.pad(x, (0, r - rest))
        shards = shards + 1
    # eq-bone-pooled:  (x S^T)_k = x_k + x_{k + r} + ...
    cut: Tensor = x.unflatten(-1, (shards, r))
    return cut.sum(-2)


def pooled(block: Tensor, i: int) -> Tensor:
    """The update without a guide, ``dW = D^T S`` (eq-bone-pooled): ``(o, i)`` from D, ``(r, o)``."""
    # eq-bone-pooled:  dW = D^T S
    return block.T.repeat(1, -(-i // len(block)))[:, :i]


def _write(options: Mapping[str, Any]) -> dict[str, Any]:
    rest = {name: value for name, value in options.items() if name != "variant"}
    return {"peft_type": "MISS", "init_weights": VARIANTS[options.get("variant", "bat")], **rest}


def _read(config: Mapping[str, Any]) -> dict[str, Any]:
    start = config.get("init_weights", True)
    variant = start if start in ("bat", "mini") else "bone"  # False: the pooled form from a random start
    return {"variant": variant, **{name: config[name] for name in ("r", "mini_r") if name in config}}


class Bone(Adapter):
    r"""One block-affine update, ``dW_ab = W_ab B_a + B_a`` (eq-bone-bat), or pooled, ``dW = D^T S`` (eq-bone-pooled).

    Args:
        base: the frozen layer.
        r: size of a block (64: PEFT's and the authors' default); :math:`o\,r` weights in either form.
        variant: ``"bat"``, the method of the paper's abstract; ``"bone"`` or ``"mini"``: the pooled forms.
        mini_r: columns of :math:`\tilde D`, for ``"mini"`` alone (1: PEFT's default); :math:`r\,m` weights.

    Raises:
        ValueError: an unknown variant; an ``r`` that is no integer from 1 to ``i``, or, for ``"bat"``, no divisor of
            both ``o`` and ``i``; a ``mini_r`` that does not divide ``o``.
    """

    kind = "bone"
    options = ("r", "variant", "mini_r")
    peft = PeftFormat(
        ignored={"miss_dropout": ...},  # for training alone
        renamed={".bone_block": ".miss_block"},  # PEFT before 0.19
        write=_write,
        read=_read,
    )

    def __init__(self, base: Layer, r: int = 64, variant: str = "bat", mini_r: int = 1) -> None:
        super().__init__()
        o = base.out_features
        i = base.in_features
        one_of("variant", variant, VARIANTS)
        integer("r", r, 1, i)
        if variant == "bat" and (o % r or i % r):
            raise ValueError(
                f"r: expected a divisor of {o} outputs and {i} inputs for variant 'bat', got {r}; give this layer "
                "another by per_layer, or leave it out by exclude"
            )
        integer("mini_r", mini_r, 1)
        if variant == "mini" and o % mini_r:
            raise ValueError(f"mini_r: expected a divisor of {o}, the layer's outputs, got {mini_r!r}")
        self.r = r
        self.variant = variant
        self.mini_r = mini_r
        shape = {"bat": (o // r, r, r), "bone": (r, o), "mini": (r, mini_r)}[variant]
        self.miss_block = nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor, y0: Tensor, base: Layer) -> Tensor:
        windows = len(base.window) > 1  # a convolution
        if self.variant == "bat":
            if windows or base.module.weight.requires_grad:  # trained too, it gets its gradient
                return base.linear(x, bat(base.weight, self.miss_block))
            weight = view(base.module, base.module.weight.dtype).weight
            return _through_bat(x, weight, self.miss_block, False, None)
        D = self._columns(base)
        # eq-bone-pooled:  dy = (x S^T) D
        S_x = base.linear(x, tiles(self.r, base.in_features).to(D)) if windows else pool(x, self.r)
        return F.linear(S_x, D.T)

    def whole(self, x: Tensor, base: Layer) -> Tensor | None:
        if self.variant != "bat":
            return None
        return _through_bat(x, base.weight, self.miss_block, True, base.bias)

    def delta(self, base: Layer) -> tuple[Tensor, Tensor | None]:
        if self.variant == "bat":
            return bat(base.weight, self.miss_block), None
        return pooled(self._columns(base), base.in_features), None

    def _columns(self, base: Layer) -> Tensor:
        times = base.out_features // self.mini_r if self.variant == "mini" else 1
        return self.miss_block.repeat(1, times)  # (r, o)


class _Bat(torch.autograd.Function):
    """``x @ bat(W, B).T``, or with W and the bias in it the whole layer's output.

    Nothing is kept but x, W and B: the update is made again in the backward pass.
    """

    generate_vmap_rule = True  # for the gradients of single samples

    @staticmethod
    def forward(x: Tensor, weight: Tensor, block: Tensor, whole: bool, bias: Tensor | None) -> Tensor:
        return F.linear(x, _bat(weight.to(block.dtype), block, whole), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, block, ctx.whole, _ = inputs
        ctx.save_for_backward(x, weight, block)
        ctx.save_for_forward(x, weight, block)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, block = ctx.saved_tensors
        weight = weight.to(block.dtype)
        dx = None
        dB = None
        if ctx.needs_input_grad[0]:
            dx = (grad @ _bat(weight, block, ctx.whole).to(grad.dtype)).to(x.dtype)
        if ctx.needs_input_grad[2]:
            groups, r, _ = block.shape
            flat_grad, flat_x = (t.reshape(-1, t.shape[-1]) for t in (grad, x))
            G = (flat_grad.mT @ flat_x.to(grad.dtype)).to(block.dtype)  # (o, i)
            rows = weight.reshape(groups, -1, r)
            rows_of_G = G.view(groups, -1, r)
            # eq-bone-gradient:  dB_a = sum_b W_ab^T G_ab + sum_b G_ab
            dB = torch.baddbmm(G.view(groups, r, -1, r).sum(2), rows.mT, rows_of_G)
        return dx, None, dB, None, None


class _BatBothWays(_Bat):
    """With derivatives in forward mode too, of which a compiler wants to know nothing."""

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, _: None, dB: Tensor | None, *__: None) -> Tensor:
        x, weight, block = ctx.saved_tensors
        weight = weight.to(block.dtype)
        parts = [] if dx is None else [F.linear(dx, _bat(weight, block, ctx.whole))]
        parts += [] if dB is None else [F.linear(x, bat(weight, dB))]  # bat is linear in B
        return sum(parts[1:], parts[0])


def _through_bat(x: Tensor, weight: Tensor, block: Tensor, whole: bool, bias: Tensor | None) -> Tensor:
    product = _Bat if torch.compiler.is_compiling() else _BatBothWays
    y: Tensor = product.apply(x, weight, block, whole, bias)
    return y


def _bat(weight: Tensor, block: Tensor, whole: bool) -> Tensor:
    return bat(weight, block).add_(weight) if whole else bat(weight, block)
