"""Hydra number by number in plain Python, as the official code has it: two bottlenecks, each with both its biases."""

from __future__ import annotations

from collections.abc import Sequence

Vector = Sequence[float]
Matrix = Sequence[Sequence[float]]


def affine(x: Vector, w: Matrix, b: Vector) -> list[float]:
    return [sum(w[o][i] * x[i] for i in range(len(x))) + b[o] for o in range(len(w))]


def matmul(a: Matrix, b: Matrix) -> list[list[float]]:
    return [[sum(row[k] * b[k][j] for k in range(len(b))) for j in range(len(b[0]))] for row in a]


Branch = tuple[Matrix, Vector, Matrix, Vector]  # down, its bias, up, its bias


def hydra(x: Vector, w: Matrix, b: Vector, par: Branch, seq: Branch, s: float) -> list[float]:
    """``f0(x) + s up_p(down_p(x)) + s up_s(down_s(f0(x)))``."""
    z = affine(x, w, b)
    p, q = (affine(affine(v, branch[0], branch[1]), branch[2], branch[3]) for v, branch in ((x, par), (z, seq)))
    return [z[o] + s * p[o] + s * q[o] for o in range(len(z))]


def merged(w: Matrix, b: Vector, par: Branch, seq: Branch, s: float) -> tuple[list[list[float]], list[float]]:
    """``W + s (P + Q W)`` and ``b + s (B_p a_p + beta_p) + s (Q b + B_s a_s + beta_s)``, with P and Q in full."""
    P, Q = matmul(par[2], par[0]), matmul(seq[2], seq[0])
    QW, Qb = matmul(Q, w), affine(b, Q, [0.0] * len(w))
    p, q = affine(par[1], par[2], par[3]), affine(seq[1], seq[2], seq[3])
    weight = [[w[o][i] + s * (P[o][i] + QW[o][i]) for i in range(len(w[0]))] for o in range(len(w))]
    return weight, [b[o] + s * p[o] + s * (Qb[o] + q[o]) for o in range(len(w))]
