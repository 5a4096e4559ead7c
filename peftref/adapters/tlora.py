r"""TLoRA: first a dense transform of the frozen weight, then a compact residual.

Tao, Takida, Murata, Zhao, Mitsufuji, "Transformed Low-rank Adaptation via Tensor Decomposition and Its Applications to
Text-to-image Models", ICCV 2025, arXiv 2501.08727.

The frozen :math:`W\in\mathbb R^{o\times i}` is moved by a trained :math:`T\in\mathbb R^{i\times i}`, and what that
leaves undone is learned beside it (eq-tlora-update):

.. math:: y = x\,(WT+\Delta)^\top + b, \qquad \Delta W = W(T-I)+\Delta .

Both are tensor rings. With :math:`i=I_1\cdots I_D` and row-major indices :math:`\bar\imath=(i_1,\dots,i_D)`, the
transform (eq-tlora-ring) and the residual (eq-tlora-residual) are traces of products of small matrices, one from each
core:

.. math::
    T[\bar\imath,\bar\jmath] &= \operatorname{tr}\big(A^1[i_1,j_1]\cdots A^D[i_D,j_D]\big),
    \qquad A^d[i,j]\in\mathbb R^{R\times R},\\
    \Delta[\bar\imath,\bar\jmath] &= \operatorname{tr}\big(B^1[i_1]\cdots B^D[i_D]\;C^1[j_1]\cdots C^D[j_D]\big),
    \qquad B^d[i], C^d[j]\in\mathbb R^{R'\times R'} .

:math:`T` has :math:`R^2\sum_dI_d^2` parameters and is dense and of full rank; :math:`\Delta` has
:math:`R'^2(\sum_dO_d+\sum_dI_d)` and rank at most :math:`R'^2`: cut the ring between B and C, and it is LoRA's
product of two thin matrices.

==================  ====================  =====================  ==========================
argument            here                  paper                  shape
==================  ====================  =====================  ==========================
``transform_rank``  :math:`R`             :math:`R`              integer; 0: no transform
``residual_rank``   :math:`R'`            :math:`R'`             integer; 0: no residual
``order``           :math:`D`             :math:`D`              integer
``A[d]``            :math:`A^d`           :math:`\mathcal A^d`   ``(I_d, I_d, R, R)``
``B[d]``            :math:`B^d`           :math:`\mathcal B^d`   ``(O_d, R', R')``
``C[d]``            :math:`C^d`           :math:`\mathcal C^d`   ``(I_d, R', R')``
==================  ====================  =====================  ==========================

Differs from the paper:

- **The start.** Proposition 1 of the paper (``init="paper"``, eq-tlora-start) sets every slice :math:`A^d[:,:,r,r']` to
  :math:`I/R`. Equal slices have equal gradients, so they stay equal for ever, and :math:`T` stays one Kronecker product
  whatever :math:`R` is. The default ``init="slot"`` starts at :math:`T=I` too, exactly, and has no such symmetry.
- Indices are row-major, where the paper's run the other way: the order of the cores is reversed.
- The width of the residual's random cores is our reading of the paper's rule :math:`\Theta(\sqrt{n_{out}}/n_{in})`.
- :func:`identity_distance` measures :math:`\|T-I\|_F^2` itself from the cores; the paper's penalties are surrogates.
- Several active adapters: each transforms the *frozen* weight, so two of them give :math:`W(T_1+T_2-I)`, not
  :math:`WT_1T_2` (see :mod:`peftref.adapters.core.adapter`).

>>> import torch
>>> from torch import nn
>>> from peftref.adapters.core.injection import adapters, inject, merge
>>> _ = torch.manual_seed(0)
>>> cores = identity_cores((3, 2), rank=2)
>>> torch.equal(ring_matrix(cores), torch.eye(6))              # T = I at the start, to the bit
True
>>> cores = [torch.randn_like(core) for core in cores]
>>> x = torch.randn(5, 6)
>>> torch.allclose(transform(cores, x), x @ ring_matrix(cores).T, atol=1e-5)   # without forming T
True
>>> net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
>>> before = net(x)
>>> inject(net, TLoRA, ["0", "2"], transform_rank=2, residual_rank=2)
['0', '2']
>>> torch.equal(net(x), before)
True
>>> for p in adapters(net)["0"].parameters():
...     _ = nn.init.normal_(p, std=0.5)
>>> y = net(x)
>>> merge(net)                                                 # W T + Delta
>>> torch.allclose(net(x), y, atol=1e-4)
True
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import integer, one_of
from .core.adapter import Adapter
from .core.layers import Layer
from .core.modes import balanced, modes

__all__ = [
    "TLoRA",
    "identity_cores",
    "identity_distance",
    "identity_penalty",
    "orthogonal_penalty",
    "product",
    "ring_factors",
    "ring_matrix",
    "transform",
]

INITS = ("slot", "paper")
RESIDUALS = ("tr", "lora")


def ring_matrix(cores: Sequence[Tensor]) -> Tensor:
    """The dense matrix of a ring, ``T[i, j] = tr(A^1[i_1, j_1] ... A^D[i_D, j_D])`` (eq-tlora-ring).

    Args:
        cores: ``(I_d, J_d, R, R)`` each.

    >>> a, b = torch.randn(2, 3, 1, 1), torch.randn(4, 2, 1, 1)          # R = 1: a Kronecker product
    >>> torch.allclose(ring_matrix([a, b]), torch.kron(a[..., 0, 0], b[..., 0, 0]))
    True
    """
    *rest, last = cores
    if not rest:
        return last.diagonal(dim1=-2, dim2=-1).sum(-1)
    path = rest[0]
    for core in rest[1:]:
        path = torch.einsum("ijab,klbc->ikjlac", path, core).flatten(0, 1).flatten(1, 2)  # (I, J, R, R)
    # eq-tlora-ring:  T = tr(A^1 ... A^D), entry by entry
    return torch.einsum("ijab,klba->ikjl", path, last).flatten(0, 1).flatten(1, 2)


def transform(cores: Sequence[Tensor], x: Tensor) -> Tensor:
    """``T x`` for each row of ``x``, ``(..., i)``: mode by mode, or with the dense ``T`` where that is faster.

    A mode takes ``n i I_d R^2`` multiplications. The dense product takes ``n i^2`` in one large call, after ``i^2 R^2``
    that form ``T``; the factor 4 between the two is measured.
    """
    i = x.shape[-1]
    first, *rest = cores
    n = math.prod(x.shape[:-1])
    bonds = first.shape[-1] ** 2
    if not rest or i * (n + bonds) <= 4 * n * bonds * sum(core.shape[1] for core in cores):
        return F.linear(x, ring_matrix(cores))
    x_modes = x.reshape(n, first.shape[1], i // first.shape[1])
    z = torch.einsum("njm,ijab->nmiab", x_modes, first)  # (n, modes to do, modes done, R, R)
    for core in rest[:-1]:
        z = z.unflatten(1, (core.shape[1], -1))
        z = torch.einsum("njmkab,ijbc->nmkiac", z, core).flatten(2, 3)
    # eq-tlora-ring:  the last core closes the ring
    return torch.einsum("njkab,ijba->nki", z, rest[-1]).reshape(*x.shape[:-1], math.prod(len(core) for core in cores))


def ring_factors(up: Sequence[Tensor], down: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The residual's ring, cut in two: ``(o, R'^2)`` and ``(R'^2, i)``, whose product is the residual."""

    def chain(cores: Sequence[Tensor]) -> Tensor:
        path, *rest = cores  # a slice of a ParameterList would make new parameters of tensors put in its place
        for core in rest:
            path = torch.einsum("iab,jbc->ijac", path, core).flatten(0, 1)
        return path

    # eq-tlora-residual:  tr(B[i] C[j]) is the inner product of B[i] and C[j]^T
    return chain(up).flatten(1), chain(down).mT.flatten(1).T


def product(left: Sequence[Tensor], right: Sequence[Tensor]) -> list[Tensor]:
    """Cores, of rank ``R S``, of the matrix of ``left`` times the transposed matrix of ``right`` (Proposition 2)."""
    # eq-tlora-product:  C^d[i, j] = sum_l A^d[i, l] (x) B^d[j, l]
    return [
        torch.einsum("ilab,jlcd->ijacbd", a, b).flatten(2, 3).flatten(3, 4) for a, b in zip(left, right, strict=True)
    ]


def identity_penalty(cores: Sequence[Tensor]) -> Tensor:
    """The paper's surrogate for the distance of ``T`` to the identity: of every slice to ``I / R``, not squared.

    It depends on how ``T`` is written, and is zero at the paper's start only.
    """
    # eq-tlora-identity:  sum_d sum_rs ||A^d[:, :, r, s] - I / R||
    excess = [core - torch.eye(len(core)).to(core)[..., None, None] / core.shape[-1] for core in cores]
    return torch.stack([torch.linalg.vector_norm(slices, dim=(0, 1)).sum() for slices in excess]).sum()


def orthogonal_penalty(cores: Sequence[Tensor]) -> Tensor:
    """The identity penalty of ``T T^T``, whose cores are known: the paper's surrogate for the distance to an orthogonal
    ``T``.
    """
    # eq-tlora-orthogonal:  the identity penalty of the product's cores, of rank R^2
    return identity_penalty(product(cores, cores))


def identity_distance(cores: Sequence[Tensor]) -> Tensor:
    """The squared distance of ``T`` to the identity, exactly and without forming ``T``.

    It is a difference of large terms: near the identity expect an error of ``i`` times the precision.

    >>> cores = [torch.randn(3, 3, 2, 2), torch.randn(4, 4, 2, 2)]
    >>> torch.allclose(identity_distance(cores), (ring_matrix(cores) - torch.eye(12)).square().sum())
    True
    """
    square, trace = (torch.eye(r).to(cores[0]) for r in (cores[0].shape[-1] ** 2, cores[0].shape[-1]))
    for core in cores:
        square = square @ torch.einsum("ijab,ijcd->acbd", core, core).flatten(0, 1).flatten(1, 2)
        trace = trace @ core.diagonal(dim1=0, dim2=1).sum(-1)
    # eq-tlora-distance:  ||T||^2 - 2 tr T + i, each a trace of a product of D small matrices
    return square.trace() - 2 * trace.trace() + math.prod(len(core) for core in cores)


def identity_cores(dims: Sequence[int], rank: int, init: str = "slot") -> list[Tensor]:
    """Cores of the identity (eq-tlora-start).

    Args:
        dims: ``I_1, ..., I_D``.
        rank: R.
        init: "slot": slice (0, 0) of each core is the identity, the last core's others are zero, all other slices are
            random with variance ``1 / I_d``, but for those that would leave (0, 0) and come back (D of three or more).
            "paper": every slice is ``I / R``; exact where R is a power of two.
    """
    one_of("init", init, INITS)
    eyes = [torch.eye(size)[..., None, None] for size in dims]
    if init == "paper":
        return [(eye / rank).repeat(1, 1, rank, rank) for eye in eyes]
    cores = []
    for d, (size, eye) in enumerate(zip(dims, eyes, strict=True), 1):
        core = torch.randn(size, size, rank, rank) / math.sqrt(size) * (d < len(dims))
        if d <= len(dims) - 2:
            core[:, :, 0] = 0
        # eq-tlora-start:  of all paths round the ring only 0 -> 0 -> ... -> 0 is open
        core[:, :, :1, :1] = eye
        cores.append(core)
    return cores


class TLoRA(Adapter):
    """A tensor-ring transform and a residual, ``dW = W (T - I) + Delta`` (eq-tlora-update).

    Args:
        base: the frozen layer.
        transform_rank: R (2: of the paper's TLoRA(2, 6)); 0 for a residual alone.
        residual_rank: R' (6), which allows ``R'^2`` ranks in a ring and R' in LoRA's form; 0 for a transform alone.
        order: D, the number of modes of either side of the layer, chosen as equal as they can be.
        out_modes: O_1, ..., O_D of the outputs, or their number, instead of ``order``.
        in_modes: I_1, ..., I_D of the inputs, likewise.
        init: "slot" (ours) or "paper", see :func:`identity_cores`.
        residual: "tr" for a tensor ring, "lora" for two thin matrices (the paper's TLoRA*: its parameter counts agree).

    Raises:
        ValueError: an option that is not one of these; both ranks zero; modes whose product is not the layer's size; or
            a number of inputs, such as a large prime, of which the factors make a transform as large as a dense one.
    """

    kind = "tlora"
    options = ("transform_rank", "residual_rank", "order", "init", "residual", "out_modes", "in_modes")

    def __init__(
        self,
        base: Layer,
        transform_rank: int = 2,
        residual_rank: int = 6,
        order: int = 2,
        init: str = "slot",
        residual: str = "tr",
        out_modes: int | Sequence[int] | None = None,
        in_modes: int | Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        integer("transform_rank", transform_rank, 0)
        integer("residual_rank", residual_rank, 0)
        integer("order", order, 1)
        if not transform_rank and not residual_rank:
            raise ValueError("transform_rank, residual_rank: expected one of them above 0, got 0 and 0")
        one_of("init", init, INITS)
        one_of("residual", residual, RESIDUALS)
        o = base.out_features
        i = base.in_features
        out_dims = balanced(o, order) if out_modes is None else modes("out_modes", o, out_modes)
        dims = balanced(i, order) if in_modes is None else modes("in_modes", i, in_modes)
        if len(dims) > 1 and i > 64 and transform_rank**2 * sum(d * d for d in dims) >= i * i:
            raise ValueError(
                f"base: expected factors of in_features for which the transform has fewer parameters than a dense one, "
                f"{i * i}, got {dims} at transform_rank={transform_rank}; order=1 is a dense one"
            )
        self.transform_rank = transform_rank
        self.residual_rank = residual_rank
        self.order = order
        self.init = init
        self.residual = residual
        self.out_modes = None if out_modes is None else list(out_dims)
        self.in_modes = None if in_modes is None else list(dims)
        self.A = nn.ParameterList()
        self.B = nn.ParameterList()
        self.C = nn.ParameterList()
        if transform_rank:
            self.A.extend(identity_cores(dims, transform_rank, init))
        if residual_rank and residual == "tr":
            shape = (residual_rank, residual_rank)
            for side, sizes in ((self.B, out_dims), (self.C, dims)):
                side.extend(torch.randn(d, *shape) / (d * math.sqrt(residual_rank)) for d in sizes)
            nn.init.zeros_(self.B[0])
        elif residual_rank:
            self.B.append(torch.zeros(o, residual_rank))
            self.C.append(torch.empty(residual_rank, i).uniform_(-1, 1) / math.sqrt(i))

    def factors(self) -> tuple[Tensor, Tensor]:
        """The residual as two thin matrices, ``(o, r)`` and ``(r, i)``."""
        return ring_factors(list(self.B), list(self.C)) if self.residual == "tr" else (self.B[0], self.C[0])

    def forward(self, x: Tensor, y0: Tensor, base: Layer) -> Tensor:
        # eq-tlora-update:  dy = W (T x - x) + Delta x
        if self._dense(y0.numel() // base.out_features, base):
            return base.linear(x, self.delta(base)[0])
        dy = torch.zeros_like(y0)
        if self.transform_rank:
            rows = base.rows(x)
            dy = F.linear(transform(list(self.A), rows) - rows, base.weight)
        return dy + self._residual(x, base) if self.residual_rank else dy

    def whole(self, x: Tensor, base: Layer) -> Tensor | None:
        if self._dense(x.numel() // base.in_features, base):
            return F.linear(x, base.weight + self.delta(base)[0], base.bias)
        if not self.transform_rank:
            return None
        # eq-tlora-update:  y = W T x + Delta x: one product with W, where an increment would take a second
        y = F.linear(transform(list(self.A), x), base.weight, base.bias)
        return y + self._residual(x, base) if self.residual_rank else y

    def _residual(self, x: Tensor, base: Layer) -> Tensor:
        up, down = self.factors()
        return F.linear(base.linear(x, down), up)

    def _dense(self, n: int, base: Layer) -> bool:
        """With more rows than the weight has it is less to form dW first."""
        return bool(self.transform_rank) and n > base.out_features

    def delta(self, base: Layer) -> tuple[Tensor, Tensor | None]:
        dW = torch.zeros_like(base.weight)
        # eq-tlora-update:  dW = W (T - I) + Delta, where T goes to the rows of the weight, transposed
        if self.transform_rank:
            dW = transform([core.transpose(0, 1) for core in self.A], base.weight) - base.weight
        if self.residual_rank:
            up, down = self.factors()
            dW = dW + up @ down
        return dW, None
