"""How many samples each batch gets, wherever the package cuts data into batches in order."""

from __future__ import annotations


def batch_sizes(n: int, batch_size: int) -> list[int]:
    """Full batches and the rest; a rest of ONE sample joins the batch before it.

    BatchNorm has no statistics of one sample: a loop would learn it at its end, with all else lost.

    >>> batch_sizes(10, 4), batch_sizes(9, 4), batch_sizes(1, 4), batch_sizes(2, 1)
    ([4, 4, 2], [4, 5], [1], [1, 1])
    """
    full, rest = divmod(n, batch_size)
    if rest == 1 and full and batch_size > 1:
        return [batch_size] * (full - 1) + [batch_size + 1]
    return [batch_size] * full + [rest] * (rest > 0)
