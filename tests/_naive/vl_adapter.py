"""Bottleneck adapters that tasks share, Kronecker products and the hyper-network, number by number in plain Python."""

from __future__ import annotations

import math
from collections.abc import Sequence

Vector = Sequence[float]
Matrix = Sequence[Sequence[float]]


def gelu(x: float) -> float:
    """The tanh form, "gelu_new" in the official code."""
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def linear(W: Matrix, x: Vector, b: Vector) -> list[float]:
    return [sum(w * v for w, v in zip(row, x, strict=True)) + shift for row, shift in zip(W, b, strict=True)]


def bottleneck(h: Vector, D: Matrix, b: Vector, U: Matrix, c: Vector) -> list[float]:
    """``U gelu(D h + b) + c``."""
    return linear(U, [gelu(z) for z in linear(D, h, b)], c)


def shared(
    rows: Matrix, task: Sequence[int], D: Sequence[Matrix], b: Matrix, U: Sequence[Matrix], c: Matrix
) -> list[list[float]]:
    """Each row with the weights of its task; a list with one entry is shared by all."""
    out = []
    for h, t in zip(rows, task, strict=True):
        down, up = (t if len(D) > 1 else 0), (t if len(U) > 1 else 0)
        out.append(bottleneck(h, D[down], b[down], U[up], c[up]))
    return out


def kron_sum(A: Sequence[Matrix], B: Sequence[Matrix]) -> list[list[float]]:
    """``sum_k A_k (x) B_k``, entry by entry."""
    n, rows, columns = len(A), len(B[0]), len(B[0][0])
    W = [[0.0] * (n * columns) for _ in range(n * rows)]
    for k in range(n):
        for a in range(n):
            for c in range(n):
                for i in range(rows):
                    for j in range(columns):
                        W[a * rows + i][c * columns + j] += A[k][a][c] * B[k][i][j]
    return W


def product(left: Matrix, right: Matrix) -> list[list[float]]:
    columns = list(zip(*right, strict=True))
    return [[sum(x * y for x, y in zip(row, column, strict=True)) for column in columns] for row in left]


def point(
    task: Vector, layer: Vector, W1: Matrix, b1: Vector, W2: Matrix, b2: Vector, gain: Vector, shift: Vector
) -> list[float]:
    """``LN(W2 relu(W1 [task; layer] + b1) + b2)``, with the published epsilon of 1e-6."""
    y = linear(W2, [max(v, 0.0) for v in linear(W1, [*task, *layer], b1)], b2)
    mean = sum(y) / len(y)
    variance = sum((v - mean) ** 2 for v in y) / len(y)
    return [g * (v - mean) / math.sqrt(variance + 1e-6) + s for v, g, s in zip(y, gain, shift, strict=True)]


def written(H: Matrix, h: Vector, e: Vector, rows: int) -> list[list[float]]:
    """``reshape(H e + h)``, row after row."""
    flat = linear(H, e, h)
    width = len(flat) // rows
    return [flat[i * width : (i + 1) * width] for i in range(rows)]
