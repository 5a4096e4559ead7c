"""TLoRA number by number in plain Python: rings as traces of products of small matrices."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product as pairs
from math import prod

from tests._naive.lora import matmul

Matrix = Sequence[Sequence[float]]


def digits(index: int, sizes: Sequence[int]) -> list[int]:
    """The row-major digits of an index: the last one runs fastest."""
    found = []
    for size in reversed(sizes):
        found.append(index % size)
        index //= size
    return found[::-1]


def trace_of_product(matrices: Sequence[Matrix]) -> float:
    result = matrices[0]
    for matrix in matrices[1:]:
        result = matmul(result, matrix)
    return sum(result[k][k] for k in range(len(result)))


def ring_matrix(cores: Sequence) -> list[list[float]]:
    """``T[i][j] = tr(A^1[i_1][j_1] ... A^D[i_D][j_D])``; a core is indexed ``[i][j]`` and gives a matrix."""
    sizes = [len(core) for core in cores]
    columns = [len(core[0]) for core in cores]
    return [
        [
            trace_of_product(
                [core[a][b] for core, a, b in zip(cores, digits(i, sizes), digits(j, columns), strict=True)]
            )
            for j in range(prod(columns))
        ]
        for i in range(prod(sizes))
    ]


def residual(up: Sequence, down: Sequence) -> list[list[float]]:
    """``Delta[i][j] = tr(B^1[i_1] ... B^D[i_D] C^1[j_1] ... C^D[j_D])``."""
    rows, columns = [len(core) for core in up], [len(core) for core in down]
    return [
        [
            trace_of_product(
                [core[a] for core, a in zip(up, digits(i, rows), strict=True)]
                + [core[a] for core, a in zip(down, digits(j, columns), strict=True)]
            )
            for j in range(prod(columns))
        ]
        for i in range(prod(rows))
    ]


def tlora(
    x: Sequence[float], w: Matrix, b: Sequence[float], cores: Sequence, up: Sequence, down: Sequence
) -> list[float]:
    """``(W T + Delta) x + b``; without cores T is the identity, without ``up`` there is no residual."""
    moved = matmul(w, ring_matrix(cores)) if cores else w
    added = residual(up, down) if up else [[0.0] * len(x)] * len(w)
    return [sum((moved[o][i] + added[o][i]) * x[i] for i in range(len(x))) + b[o] for o in range(len(w))]


def identity_penalty(cores: Sequence) -> float:
    """The distances of all slices to ``I / R``, added up."""
    total = 0.0
    for core in cores:
        size, rank = len(core), len(core[0][0])
        for r, s in pairs(range(rank), repeat=2):
            square = 0.0
            for i, j in pairs(range(size), repeat=2):
                square += (core[i][j][r][s] - (i == j) / rank) ** 2
            total += square**0.5
    return total
