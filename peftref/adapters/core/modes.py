"""How a size is split into the modes of a tensor; used by the tensor-network adapters."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["balanced", "modes"]


def balanced(n: int, parts: int) -> tuple[int, ...]:
    """``n`` as a product of ``parts`` factors with the smallest sum, largest first; a prime is ``(n, 1, ..., 1)``.

    >>> balanced(768, 2), balanced(768, 3), balanced(10, 3), balanced(7, 2)
    ((32, 24), (12, 8, 8), (5, 2, 1), (7, 1))
    """
    if parts == 1:
        return (n,)
    small = (d for d in range(1, n + 1) if d**parts <= n and n % d == 0)  # the smallest factor
    return min(((*balanced(n // d, parts - 1), d) for d in small), key=sum)


def modes(label: str, size: int, wanted: int | Sequence[int]) -> tuple[int, ...]:
    """Modes of ``size``: so many, as equal as they can be, those of size 1 left out; or these.

    >>> modes("in_modes", 10, 3), modes("in_modes", 12, [3, 4])
    ((5, 2), (3, 4))

    Raises:
        ValueError: no number of modes, or sizes with another product; it names ``label``.
    """
    if isinstance(wanted, int) and not isinstance(wanted, bool) and wanted >= 1:
        return tuple(m for m in balanced(size, wanted) if m > 1) or (1,)
    sizes = tuple(wanted) if isinstance(wanted, Sequence) and not isinstance(wanted, str) else None
    whole = sizes and all(isinstance(m, int) and not isinstance(m, bool) and m >= 1 for m in sizes)
    if not sizes or not whole or math.prod(sizes) != size:
        raise ValueError(f"{label}: expected a number of modes, or sizes with the product {size}, got {wanted!r}")
    return sizes
