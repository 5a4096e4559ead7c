"""How a size is split into the modes of a tensor; used by the tensor-network adapters."""

from __future__ import annotations

__all__ = ["balanced"]


def balanced(n: int, parts: int) -> tuple[int, ...]:
    """``n`` as a product of ``parts`` factors with the smallest sum, largest first; a prime is ``(n, 1, ..., 1)``.

    >>> balanced(768, 2), balanced(768, 3), balanced(10, 3), balanced(7, 2)
    ((32, 24), (12, 8, 8), (5, 2, 1), (7, 1))
    """
    if parts == 1:
        return (n,)
    small = (d for d in range(1, n + 1) if d**parts <= n and n % d == 0)  # the smallest factor
    return min(((*balanced(n // d, parts - 1), d) for d in small), key=sum)
