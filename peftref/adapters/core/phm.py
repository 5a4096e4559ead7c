r"""A matrix that is a sum of Kronecker products: PHM, and Compacter's thin form of it.

Zhang, Tay, Zhang, Chan, Luu, Hui, Fu, "Beyond Fully-Connected Layers with Quaternions: Parameterization of
Hypercomplex Multiplications with 1/n Parameters", ICLR 2021, arXiv 2102.08597. Karimi Mahabadi, Henderson, Ruder,
"Compacter: Efficient Low-Rank Hypercomplex Adapter Layers", NeurIPS 2021, arXiv 2106.04647.

For :math:`y = xW` with :math:`W\in\mathbb R^{i\times o}` and an :math:`n` that divides both (eq-vl_adapter-phm):

.. math:: W=\sum_{k=1}^{n}A_k\otimes B_k,\quad A_k\in\mathbb R^{n\times n},\ B_k\in\mathbb R^{\frac in\times\frac on};
   \qquad B_k=s_kt_k,\ s_k\in\mathbb R^{\frac in\times\rho},\ t_k\in\mathbb R^{\rho\times\frac on}\ \text{(Compacter)} .

That is :math:`n^3+io/n` parameters instead of :math:`io`, or :math:`n^3+\rho(i+o)`. With the input cut into :math:`n`
rows, :math:`X\in\mathbb R^{n\times i/n}`, the product needs no :math:`W` (eq-vl_adapter-mixed):

.. math:: xW=\sum_k\operatorname{vec}(A_k^\top XB_k) .

==================  ==================  ===================  ==============================
argument            here                paper                shape
==================  ==================  ===================  ==============================
``A``               :math:`A_k`         :math:`A_i`          ``(..., n, n, n)``
``B``               :math:`B_k`         :math:`B_i`          ``(..., n, i / n, o / n)``
``left``            :math:`s_k`         :math:`s_i`          ``(..., n, i / n, rank)``
``right``           :math:`t_k`         :math:`t_i`          ``(..., n, rank, o / n)``
==================  ==================  ===================  ==============================

Complex numbers are the case :math:`n=2` with the two :math:`A` that stand for :math:`1` and :math:`\mathrm i`:

>>> import torch
>>> A = torch.tensor([[[1., 0.], [0., 1.]], [[0., 1.], [-1., 0.]]])
>>> B = torch.tensor([[[3.]], [[4.]]])                        # 3 + 4i
>>> phm_linear(torch.tensor([1., 2.]), A, B)                  # (1 + 2i)(3 + 4i) = -5 + 10i
tensor([-5., 10.])
>>> torch.equal(phm_weight(A, B), torch.kron(A[0], B[0]) + torch.kron(A[1], B[1]))
True
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["PHM", "Rule", "phm_linear", "phm_weight"]


def phm_weight(A: Tensor, B: Tensor) -> Tensor:
    """The matrix ``W = sum_k A_k (x) B_k`` (eq-vl_adapter-phm), ``(..., i, o)``: pays as soon as a batch has more rows
    than ``n``.
    """
    # eq-vl_adapter-phm:  W[(a, i), (b, j)] = sum_k A_k[a, b] B_k[i, j]
    W = torch.einsum("...kab,...kij->...aibj", A, B)
    return W.flatten(-4, -3).flatten(-2)  # (..., n, i / n, n, o / n) -> (..., i, o)


def phm_linear(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """``x @ phm_weight(A, B)`` for rows ``(..., i)``, without the matrix (eq-vl_adapter-mixed)."""
    X = x.unflatten(-1, (A.shape[-1], -1))  # (..., i) -> (..., n, i / n)
    # eq-vl_adapter-mixed:  y[b, j] = sum_k sum_a A_k[a, b] (X B_k)[a, j]
    y = torch.einsum("kab,...akj->...bj", A, torch.einsum("...ai,kij->...akj", X, B))
    return y.flatten(-2)


class Rule(nn.Module):
    """The matrices :math:`A_k`, to be shared: give the same object to all layers.

    Args:
        n: of them, each ``(n, n)``.
        std: of their normal start (0.01: the official command line). At 1e-4, the value in its configuration file, the
            products start at zero for all practical purposes, and so do the gradients of both factors.
        copies: ``(copies, n, n, n)``, for a rule that is not shared over tasks.
    """

    def __init__(self, n: int, std: float = 0.01, copies: int | None = None) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.randn(*(() if copies is None else (copies,)), n, n, n) * std)


class PHM(nn.Module):
    """A stack of ``copies`` matrices with biases, one for each task or one for all.

    Args:
        copies: T, the matrices.
        i: inputs of a row.
        o: outputs of a row.
        n: of the Kronecker products.
        rank: rho of Compacter's factors; 0 keeps each ``B_k`` whole.
        rule: shared matrices ``A``; by default every matrix has its own.
        zero: start at the zero matrix, with all factors but the last one random.

    Raises:
        ValueError: an ``n`` that does not divide both sizes or is not the shared rule's, or a negative rank.
    """

    def __init__(
        self, copies: int, i: int, o: int, n: int, rank: int = 0, rule: Rule | None = None, zero: bool = False
    ) -> None:
        super().__init__()
        if n < 1 or i % n or o % n:
            raise ValueError(f"n: expected a divisor of both sizes, {i} and {o}, got {n}")
        if rule is not None and rule.A.shape != (n, n, n):
            raise ValueError(f"rule: expected one of shape {(n, n, n)}, got {tuple(rule.A.shape)}")
        if rank < 0:
            raise ValueError(f"rank: expected a positive integer, or 0 for whole matrices, got {rank}")
        self.rule = Rule(n, copies=copies) if rule is None else rule
        if rank:
            self.left = nn.Parameter(_glorot(copies, n, i // n, rank))
            last = _glorot(copies, n, rank, o // n)
        else:
            last = _glorot(copies, n, i // n, o // n)
        self.right = nn.Parameter(torch.zeros_like(last) if zero else last)
        self.bias = nn.Parameter(torch.zeros(copies, o))

    def forward(self, one: int | None = None) -> tuple[Tensor, Tensor]:
        """``(T, o, i)``, as ``nn.Linear`` keeps them, and ``(T, o)``; of one task only where it is named."""
        part = slice(None) if one is None or len(self.bias) == 1 else slice(one, one + 1)
        A = self.rule.A
        B = self.right[part]
        if hasattr(self, "left"):
            # eq-vl_adapter-phm:  B_k = s_k t_k
            B = self.left[part] @ B  # (T, n, i / n, o / n)
        return phm_weight(A if A.ndim == 3 else A[part], B).mT, self.bias[part]


def _glorot(copies: int, n: int, i: int, o: int) -> Tensor:
    """Uniform with the standard deviation sqrt(2) sqrt(2 / (i + o)), as the official code draws each factor."""
    bound = math.sqrt(2) * math.sqrt(6 / (i + o))
    return torch.empty(copies, n, i, o).uniform_(-bound, bound)
