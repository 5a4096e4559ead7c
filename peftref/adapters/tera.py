r"""TeRA: a high-rank update from a frozen random tensor network and a few trained vectors.

Gu, Zhou, Iacovides, Mandic, "TeRA: Vector-based Random Tensor Network for High-Rank Adaptation of LLMs", 2025,
arXiv 2509.03234.

The update :math:`\Delta W\in\mathbb R^{o\times i}` is folded, row-major, into a tensor with :math:`o=I_1\cdots I_k` and
:math:`i=I_{k+1}\cdots I_N`, and written as a Tucker network (eq-tera-tensor)

.. math::
    \Delta\mathcal W(i_1,\dots,i_N)=\sum_{r_1,\dots,r_N}\mathcal G(r_1,\dots,r_N)\prod_n d^{(n)}(r_n)\,A^{(n)}(r_n,i_n),

of which the core and the factors are random, frozen, and shared by all layers of one shape, in a
:class:`~peftref.adapters.core.bank.Bank`. Each layer trains the vectors :math:`d^{(n)}` between them, :math:`\sum_nR_n`
parameters. As matrices (eq-tera-update):

.. math::
    \Delta W = L\,\mathrm{diag}(u)\,G\,\mathrm{diag}(v)\,M,\qquad
    L=\Big(\bigotimes_{n\le k}A^{(n)}\Big)^{\!\top},\; M=\bigotimes_{n>k}A^{(n)},\;
    u=\bigotimes_{n\le k}d^{(n)},\; v=\bigotimes_{n>k}d^{(n)} .

Its rank is at most :math:`\min(\prod_{n\le k}R_n,\prod_{n>k}R_n)` (eq-tera-rank): with :math:`R_n=I_n` it can be full.

================  =========================  =========================  ====================
argument          here                       paper                      shape
================  =========================  =========================  ====================
``core``          :math:`G`                  :math:`\mathcal G`         ``(prod R, prod R)``
``left[n]``       :math:`A^{(n)}, n\le k`    :math:`A^{(n)}`            ``(R_n, I_n)``
``right[n]``      :math:`A^{(n)}, n>k`       :math:`A^{(n)}`            ``(R_n, I_n)``
``d_left[n]``     :math:`d^{(n)}, n\le k`    :math:`d^{(n)}`            ``(R_n,)``
``d_right[n]``    :math:`d^{(n)}, n>k`       :math:`d^{(n)}`            ``(R_n,)``
================  =========================  =========================  ====================

Read was the main text of the paper's first version, not its appendix, its code, or the revision of ACL 2026. Where that
text is silent, this is our reading:

- the distribution of the bank: Gaussian, of variance :math:`1/R_n` for :math:`A^{(n)}` and :math:`1/\prod_{n>k}R_n` for
  the core, so that with all vectors one the entries of :math:`\Delta W` have the core's variance;
- which side of the layer stays one mode (here the output's), and which vector starts at zero (here :math:`d^{(1)}`, on
  that side). With two zero vectors nothing would ever learn; weight decay pulls there, so train without.

What a token costs: the core and the factors are frozen, but not small. With one mode on the output's side ``L`` is a
dense ``(o, o)`` matrix and ``G`` a dense ``(o, i)`` one, and the trained diagonal between them forbids to fold them
into one: ``o (o + i)`` multiplications beside the layer's own ``o i``, whatever the number of parameters. A layer that
widens (o = 4 i) takes six times its own. ``out_modes=2`` makes ``L`` cheap, at the price in accuracy that the paper
reports for splitting both sides. Merged, the update costs nothing.

Differs from the paper: in its Theorem 3, whose two terms are in :func:`error_terms`, the largest entry of the core is
squared, as it must be (eq-tera-bound).

>>> import torch
>>> from torch import nn
>>> from peftref.adapters.core.bank import Bank
>>> from peftref.adapters.core.injection import adapters, inject, merge
>>> net = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).double()
>>> x = torch.randn(5, 12).double()
>>> before = net(x)
>>> inject(net, TeRA, ["0", "2", "4"], bank=Bank(seed=0))          # one bank, kept once for each shape
['0', '2', '4']
>>> torch.equal(net(x), before)
True
>>> a, b = adapters(net)["2"], adapters(net)["4"]
>>> [tuple(d.shape) for d in a.parameters()], a.network is b.network
([(8,), (4,), (2,)], True)
>>> for d in a.parameters():
...     _ = nn.init.normal_(d)
>>> y = net(x)
>>> merge(net)
>>> torch.allclose(net(x), y), int(torch.linalg.matrix_rank(a.delta(None)[0])), rank_bound([8], [4, 2])
(True, 8, 8)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import integer, one_of
from .core.adapter import Adapter
from .core.bank import Bank
from .core.layers import Layer
from .core.modes import modes

__all__ = ["TeRA", "error_terms", "expand", "multiply", "rank_bound", "rank_one", "update"]

FACTORS = ("random", "identity", "given")


def expand(vectors: Sequence[Tensor]) -> Tensor:
    """The Kronecker product of vectors.

    >>> expand([torch.tensor([1., 2.]), torch.tensor([1., 10.])]).tolist()
    [1.0, 10.0, 2.0, 20.0]
    """
    return functools.reduce(torch.kron, vectors)


def multiply(x: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """Rows ``(..., prod I)`` times the transposed Kronecker product of ``(R_n, I_n)``, one mode after the other."""
    done = x.shape[:-1]
    for factor in factors:  # the first of the modes to do becomes the last of those done, so all come round in order
        x = x.reshape(*done, factor.shape[1], x.shape[-1] // factor.shape[1])
        x = (x.mT @ factor.T).flatten(-2)
    return x


def update(
    core: Tensor, left: Sequence[Tensor], right: Sequence[Tensor], d_left: Sequence[Tensor], d_right: Sequence[Tensor]
) -> Tensor:
    """The dense update ``dW = L diag(u) G diag(v) M`` (eq-tera-update), ``(o, i)``.

    Args:
        core: G, ``(prod R, prod R)``.
        left: factors of the output's modes, ``(R_n, I_n)`` each.
        right: factors of the input's modes, ``(R_n, I_n)`` each.
        d_left: trained vectors of the output's modes, ``(R_n,)`` each.
        d_right: trained vectors of the input's modes, ``(R_n,)`` each.
    """
    # eq-tera-update:  dW = L diag(u) G diag(v) M
    scaled = expand(d_left)[:, None] * core * expand(d_right)
    half = multiply(scaled, [factor.T for factor in right])  # (prod R, i): rows times M
    return multiply(half.T, [factor.T for factor in left]).T


def rank_bound(left: Sequence[int], right: Sequence[int]) -> int:
    """The largest rank of an update with these ``R_n`` on either side; a Gaussian bank with ``R_n <= I_n`` reaches it.

    >>> rank_bound([4096], [16, 16, 16]), rank_bound([8, 8], [4, 4])
    (4096, 16)
    """
    # eq-tera-rank:  min(prod_{n <= k} R_n, prod_{n > k} R_n)
    return min(math.prod(left), math.prod(right))


def rank_one(tensor: Tensor, steps: int = 50) -> tuple[Tensor, list[Tensor]]:
    """The best rank-one tensor that power iteration finds: its length, and a unit vector for each mode.

    The length is at most the tensor's spectral norm, and equal to it for matrices and in most small cases.
    """
    unfolded = [tensor.movedim(n, 0).flatten(1) for n in range(tensor.ndim)]
    vectors = [torch.linalg.svd(matrix, full_matrices=False).U[:, 0] for matrix in unfolded]
    length = tensor.new_zeros(())
    for _ in range(steps):
        for n in range(tensor.ndim):
            v = unfolded[n] @ expand([*vectors[:n], *vectors[n + 1 :], tensor.new_ones(1)])
            length = torch.linalg.vector_norm(v)
            vectors[n] = v / length.clamp_min(torch.finfo(v.dtype).tiny)
    return length, vectors


def error_terms(
    target: Tensor, core: Tensor, left: Sequence[Tensor], right: Sequence[Tensor]
) -> tuple[Tensor, Tensor, tuple[list[Tensor], list[Tensor]]]:
    r"""Theorem 3: how well any vectors can make the update equal to ``target``, ``(o, i)``.

    Returns:
        The two terms of the bound on the squared error: what the factors cannot reach, and what the vectors, being few,
        cannot; and vectors, left and right, with which the error is within the bound.
    """
    L, M = (functools.reduce(torch.kron, factors) for factors in (left, right))  # L here as its transpose
    pull = torch.linalg.pinv(L).T @ target @ torch.linalg.pinv(M)
    reached = L.T @ pull @ M
    Z = (pull / core).reshape([len(factor) for factor in (*left, *right)])
    length, vectors = rank_one(Z)
    spread = Z.square().sum() - length.square()
    # eq-tera-bound:  ||W - L L^+ W M^+ M||^2 + g^2 (||Z||^2 - ||Z||_s^2) ||L||^2 ||M||^2
    few = core.abs().max().square() * spread.clamp_min(0) * L.square().sum() * M.square().sum()
    vectors[0] = length * vectors[0]
    return (target - reached).square().sum(), few, (vectors[: len(left)], vectors[len(left) :])


class TeRA(Adapter):
    """Trained vectors u, v in a frozen network, ``dW = L diag(u) G diag(v) M`` (eq-tera-update).

    Args:
        base: the frozen layer.
        out_modes: how the output is split: into so many factors, as equal as they can be (a prime stays whole), or into
            these (1: in the paper accuracy falls when both sides are split).
        in_modes: how the input is split, likewise (2: in the paper it hardly matters how one side is split).
        r: largest ``R_n``, or each of them, the output's first; None: ``R_n = I_n``, the paper's advice.
        factors: "random"; "identity" for the paper's ablation, the core alone; or "given", the tensors of ``bank``.
        seed: of the bank; None: that of ``bank``, or 0.
        save_bank: keep the bank in files too, once. It is large, and comes back from the seed unless torch's generator
            should change.
        bank: that the layers share; never in a file by itself. None: one of its own, with the same entries.

    Raises:
        ValueError: modes that do not give the layer's size, a rank below one, another number of ranks than of modes,
            unknown factors, another seed than the bank's, or a bank without the tensors that it was to be given.
    """

    kind = "tera"
    options = ("out_modes", "in_modes", "r", "factors", "seed", "save_bank")

    def __init__(
        self,
        base: Layer,
        out_modes: int | Sequence[int] = 1,
        in_modes: int | Sequence[int] = 2,
        r: int | Sequence[int] | None = None,
        factors: str = "random",
        seed: int | None = None,
        save_bank: bool = False,
        bank: Bank | None = None,
    ) -> None:
        super().__init__()
        left = modes("out_modes", base.out_features, out_modes)
        right = modes("in_modes", base.in_features, in_modes)
        ranks = _ranks((*left, *right), r)
        one_of("factors", factors, FACTORS)
        if bank is not None and seed not in (None, bank.seed):
            raise ValueError(f"seed: expected that of the bank, {bank.seed}, or None, got {seed!r}")
        if factors == "given" and bank is None and not save_bank:
            raise ValueError(
                "bank: expected the bank that was given the tensors, got None; with save_bank files keep it"
            )
        bank = bank or Bank(seed or 0)
        self.out_modes, self.in_modes = (m if isinstance(m, int) else list(m) for m in (out_modes, in_modes))
        self.r = list(r) if isinstance(r, Sequence) else r
        self.factors = factors
        self.seed = bank.seed
        self.save_bank = save_bank
        both = list(zip(ranks, (*left, *right), strict=True))
        sides = both[: len(left)], both[len(left) :]
        self.network = bank.network(sides[0], sides[1], factors, save_bank)
        self.d_left = nn.ParameterList(torch.ones(rank) for rank, _ in sides[0])
        self.d_right = nn.ParameterList(torch.ones(rank) for rank, _ in sides[1])
        nn.init.zeros_(self.d_left[0])  # one vector alone: with two zeros no gradient would ever flow

    def forward(self, x: Tensor, y0: Tensor, base: Layer) -> Tensor:
        if self._dense(y0.numel() // base.out_features, base):
            return base.linear(x, self.delta(base)[0])
        core, left, right = self.network.parts(y0)
        # eq-tera-update:  dy = L (u * G (v * M x))
        z = multiply(base.rows(x), right) * expand(list(self.d_right))
        z = F.linear(z, core) * expand(list(self.d_left))
        return multiply(z, [factor.T for factor in left])

    def whole(self, x: Tensor, base: Layer) -> Tensor | None:
        if self._dense(x.numel() // base.in_features, base):
            return F.linear(x, base.weight + self.delta(base)[0], base.bias)
        return None

    def _dense(self, n: int, base: Layer) -> bool:
        """With many rows it is less to form dW first; compared are the multiplications."""
        core, left, right = self.network.parts(self.d_left[0])
        o = base.out_features
        i = base.in_features
        P, Q = core.shape
        out, into = (sum(f.shape[1] for f in side) for side in (left, right))
        return n * (P * (Q + out) + Q * into) >= P * Q * into + P * i * out + n * o * i

    def delta(self, base: Layer) -> tuple[Tensor, Tensor | None]:
        parts = self.network.parts(self.d_left[0])
        return update(*parts, list(self.d_left), list(self.d_right)), None


def _ranks(sizes: Sequence[int], r: int | Sequence[int] | None) -> list[int]:
    if isinstance(r, Sequence) and not isinstance(r, str):
        if len(r) != len(sizes):
            raise ValueError(f"r: expected a rank for each of the modes {list(sizes)}, got {r!r}")
        return [integer("r", one, 1) for one in r]
    if r is None:
        return list(sizes)
    most = integer("r", r, 1)
    return [min(size, most) for size in sizes]
