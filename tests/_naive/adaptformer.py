"""AdaptFormer number by number in plain Python: one token, or the whole branch of a block."""

from __future__ import annotations

import math
from collections.abc import Sequence


def linear(x: Sequence[float], w: Sequence[Sequence[float]], b: Sequence[float]) -> list[float]:
    return [sum(w_oi * x_i for w_oi, x_i in zip(row, x, strict=True)) + b_o for row, b_o in zip(w, b, strict=True)]


def normalised(x: Sequence[float], gain: Sequence[float], shift: Sequence[float], eps: float = 1e-5) -> list[float]:
    mean = sum(x) / len(x)
    variance = sum((v - mean) ** 2 for v in x) / len(x)
    return [(v - mean) / math.sqrt(variance + eps) * g + s for v, g, s in zip(x, gain, shift, strict=True)]


def bottleneck(
    u: Sequence[float], down: Sequence[Sequence[float]], down_bias: Sequence[float],
    up: Sequence[Sequence[float]], up_bias: Sequence[float], scale: float,
    norm: tuple[Sequence[float], Sequence[float]] | None = None,
) -> list[float]:  # fmt: skip
    """``s (ReLU(nu(u) W_d^T + b_d) W_u^T + b_u)``."""
    u = u if norm is None else normalised(u, *norm)
    h = [max(0.0, v) for v in linear(u, down, down_bias)]
    return [scale * v for v in linear(h, up, up_bias)]


def dead(us: Sequence[Sequence[float]], down: Sequence[Sequence[float]], down_bias: Sequence[float]) -> float:
    """Share of the units that are off for every token."""
    hs = [linear(u, down, down_bias) for u in us]
    return sum(all(h[k] <= 0 for h in hs) for k in range(len(down))) / len(down)
