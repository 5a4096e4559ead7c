"""TeRA number by number in plain Python: the elementwise formula, every index and every rank summed in a loop."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import prod

Matrix = Sequence[Sequence[float]]


def tera(core: Matrix, left: Sequence[Matrix], right: Sequence[Matrix], d_left: Sequence[Sequence[float]],
         d_right: Sequence[Sequence[float]]) -> list[list[float]]:  # fmt: skip
    """The update; factor n is indexed ``[r_n][i_n]``, the core by the row-major place of its two groups of ranks."""
    factors, vectors = [*left, *right], [*d_left, *d_right]
    ranks, sizes = [len(f) for f in factors], [len(f[0]) for f in factors]
    k = len(left)
    o, i = prod(sizes[:k]), prod(sizes[k:])
    update = [[0.0] * i for _ in range(o)]
    for index in product(*map(range, sizes)):
        total = 0.0
        for rank in product(*map(range, ranks)):
            term = core[place(rank[:k], ranks[:k])][place(rank[k:], ranks[k:])]
            for r, i_n, factor, d in zip(rank, index, factors, vectors, strict=True):
                term *= d[r] * factor[r][i_n]
            total += term
        update[place(index[:k], sizes[:k])][place(index[k:], sizes[k:])] = total
    return update


def place(digits: Sequence[int], sizes: Sequence[int]) -> int:
    """Row-major."""
    at = 0
    for digit, size in zip(digits, sizes, strict=True):
        at = at * size + digit
    return at
