"""Bone tile by tile in plain Python: the update of one frozen matrix, and the sums that its gradient is."""

from __future__ import annotations

from collections.abc import Sequence

Matrix = Sequence[Sequence[float]]


def bat(w: Matrix, blocks: Sequence[Matrix]) -> list[list[float]]:
    """``W_ab B_a + B_a`` for the tiles of every output group ``a``."""
    r = len(blocks[0])
    update = [[0.0] * len(w[0]) for _ in w]
    for o in range(len(w)):
        a, p = divmod(o, r)
        for i in range(len(w[0])):
            b, s = divmod(i, r)
            update[o][i] = blocks[a][p][s] + sum(w[o][b * r + q] * blocks[a][q][s] for q in range(r))
    return update


def bat_row(w: Matrix, blocks: Sequence[Matrix]) -> list[list[float]]:
    """The other sharing: ``W_ab B_b + B_b``, one block for every input group ``b``."""
    r = len(blocks[0])
    update = [[0.0] * len(w[0]) for _ in w]
    for o in range(len(w)):
        for i in range(len(w[0])):
            b, s = divmod(i, r)
            update[o][i] = blocks[b][o % r][s] + sum(w[o][b * r + q] * blocks[b][q][s] for q in range(r))
    return update


def bat_gradient(w: Matrix, g: Matrix, r: int) -> list[list[list[float]]]:
    """``dL/dB_a = sum_b (W_ab + I)^T G_ab`` where ``g`` is ``dL/dW``."""
    groups, shards = len(w) // r, len(w[0]) // r
    return [
        [
            [
                sum(
                    (w[a * r + p][b * r + q] + (p == q)) * g[a * r + p][b * r + s]
                    for b in range(shards)
                    for p in range(r)
                )
                for s in range(r)
            ]
            for q in range(r)
        ]
        for a in range(groups)
    ]


def pooled(block: Matrix, n_out: int, n_in: int) -> list[list[float]]:
    """Entry ``(o, i)`` is that of the block at row ``i mod r`` and column ``o mod m``: m is all of o, or "mini"."""
    return [[block[i % len(block)][o % len(block[0])] for i in range(n_in)] for o in range(n_out)]
