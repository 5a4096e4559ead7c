"""LoRA number by number in plain Python."""

from __future__ import annotations

from collections.abc import Sequence


def matmul(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> list[list[float]]:
    return [[sum(x * y for x, y in zip(row, column, strict=True)) for column in zip(*b, strict=True)] for row in a]


def lora(
    x: Sequence[float], w: Sequence[Sequence[float]], b: Sequence[float],
    down: Sequence[Sequence[float]], up: Sequence[Sequence[float]], alpha: float,
) -> list[float]:  # fmt: skip
    """``(W + alpha / r * up down) x + b``, for ``down`` of r rows."""
    update = matmul(up, down)
    return [
        sum((w[o][i] + alpha / len(down) * update[o][i]) * x[i] for i in range(len(x))) + b[o] for o in range(len(w))
    ]
