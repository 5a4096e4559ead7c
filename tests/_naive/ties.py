"""TIES entry by entry in plain Python, over one scope; equal magnitudes at the threshold are all kept."""

from __future__ import annotations

from collections.abc import Sequence


def sgn(v: float) -> int:
    return (v > 0) - (v < 0)


def published_ties(
    base: Sequence[float], models: Sequence[Sequence[float]], k: int, scale: float = 1.0,
    weights: Sequence[float] | None = None, elect: str = "mass", combine: str = "mean",
) -> list[float]:  # fmt: skip
    weights = weights or [1.0] * len(models)
    tau = [[w - b for w, b in zip(model, base, strict=True)] for model in models]
    trimmed = []
    for t in tau:
        least = sorted(map(abs, t), reverse=True)[k - 1]
        trimmed.append([v if abs(v) >= least else 0.0 for v in t])
    columns = list(zip(*trimmed, strict=True))
    votes = {
        "mass": lambda column: sum(column),
        "count": lambda column: sum(map(sgn, column)),
        "weighted": lambda column: sum(c * v for c, v in zip(weights, column, strict=True)),
    }[elect]
    signs = [sgn(votes(column)) for column in columns]
    majority = sgn(sum(signs))
    merged = []
    for b, column, sign in zip(base, columns, signs, strict=True):
        sign = sign or majority
        agree = [(c, v) for c, v in zip(weights, column, strict=True) if v and sgn(v) == sign]
        if combine == "max":
            value = sign * max((abs(v) for _, v in agree), default=0.0)
        else:
            value = sum(c * v for c, v in agree)
            if combine == "mean":
                value = value / sum(c for c, _ in agree) if agree else 0.0
        merged.append(b + scale * value)
    return merged
