"""The naive twins of CLASSP: the specification on single numbers, and the published code's form.

``loop_step`` is the mathematics, one weight at a time, edge cases included: the specification.
``published_step`` is the form of the published code, written from a description of it: one tensor after the other, with
its gate on truth values and its lost power. ``published_paper_step`` is that form with the paper's gate, by boolean
indexing. The benchmark's peers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor


# --- the specification ------------------------------------------------------------------------------------------------
def loop_step(
    w: list[float],
    g: list[float],
    s: list[float],
    lr: float,
    power: float,
    threshold: float,
    eps: float,
    suppress: bool = True,
) -> tuple[list[float], list[float]]:
    """One tensor, as lists of its numbers."""
    w, s = list(w), list(s)
    for i, gradient in enumerate(g):
        if not math.isfinite(gradient) or not abs(gradient) > math.sqrt(threshold):
            continue
        s[i] += abs(gradient) ** power
        w[i] -= lr * gradient / ((eps + s[i]) ** (1 / power) if suppress else 1.0)
    return w, s


def loop_official_step(
    w: list[float],
    g: list[float],
    s: list[float],
    lr: float,
    power: float,
    threshold: float,
    eps: float,
    suppress: bool = True,
) -> tuple[list[float], list[float]]:
    """The published code's rule for one tensor."""
    w, s = list(w), list(s)
    if int(any(gradient != 0 for gradient in g)) > threshold:
        for i, gradient in enumerate(g):
            s[i] += abs(gradient)
            w[i] -= lr * gradient / ((eps + s[i]) ** (1 / power) if suppress else 1.0)
    return w, s


# --- the published schedule -------------------------------------------------------------------------------------------
def published_step(
    w: Sequence[Tensor],
    g: Sequence[Tensor],
    s: Sequence[Tensor],
    lr: float = 0.2,
    power: float = 1.0,
    threshold: float = 0.5,
    eps: float = 1e-5,
    suppress: bool = True,
) -> None:
    """In place, one tensor after the other; the test of each gate waits for the device."""
    for p, gradient, total in zip(w, g, s, strict=True):
        if (gradient**2).any() > threshold:
            total.add_(gradient.abs())
            rate = lr / (total + eps).pow(1 / power) if suppress else lr
            p.add_(-rate * gradient)


def published_paper_step(
    w: Sequence[Tensor],
    g: Sequence[Tensor],
    s: Sequence[Tensor],
    lr: float = 0.2,
    power: float = 1.0,
    threshold: float = 0.5,
    eps: float = 1e-5,
    suppress: bool = True,
) -> None:
    """In place, with the paper's gate: the weights to move are picked out by a boolean index."""
    for p, gradient, total in zip(w, g, s, strict=True):
        open_ = gradient**2 > threshold
        total[open_] += gradient[open_].abs() ** power
        rate = lr / (total[open_] + eps).pow(1 / power) if suppress else lr
        p[open_] -= rate * gradient[open_]
