"""EVA number by number in plain Python: principal axes by Jacobi rotations, ranks by sorting."""

from __future__ import annotations

import math
from collections.abc import Sequence

Rows = Sequence[Sequence[float]]


def scatter(x: Rows, center: bool = True) -> list[list[float]]:
    """Sum over rows of the products of two entries, of their deviations from the mean if ``center``."""
    i = len(x[0])
    mean = [sum(row[a] for row in x) / len(x) if center else 0.0 for a in range(i)]
    return [[sum((row[a] - mean[a]) * (row[b] - mean[b]) for row in x) for b in range(i)] for a in range(i)]


def eigen(matrix: Rows, sweeps: int = 60) -> list[tuple[float, list[float]]]:
    """Eigenvalues and eigenvectors of a symmetric matrix, largest first; the entry of largest size is positive."""
    s, n = [list(row) for row in matrix], len(matrix)
    v = [[float(a == b) for b in range(n)] for a in range(n)]
    for _ in range(sweeps):
        for p in range(n):
            for q in range(p + 1, n):
                if s[p][q] == 0:
                    continue
                angle = 0.5 * math.atan2(2 * s[p][q], s[q][q] - s[p][p])
                c, d = math.cos(angle), math.sin(angle)
                for rows in (s, v):  # columns p and q
                    for row in rows:
                        row[p], row[q] = c * row[p] - d * row[q], d * row[p] + c * row[q]
                s[p], s[q] = (
                    [c * a - d * b for a, b in zip(s[p], s[q], strict=True)],
                    [d * a + c * b for a, b in zip(s[p], s[q], strict=True)],
                )
    pairs = sorted(((s[a][a], [row[a] for row in v]) for a in range(n)), reverse=True)
    return [(max(value, 0.0), [x * math.copysign(1, max(axis, key=abs)) for x in axis]) for value, axis in pairs]


def ratios(x: Rows, k: int) -> list[float]:
    values = [value for value, _ in eigen(scatter(x))]
    return [value / sum(values) if sum(values) > 0 else 0.0 for value in values[:k]]


def redistribute(xi: dict[str, list[float]], budget: int) -> dict[str, int]:
    """One rank after the other to the layer whose next ratio is largest."""
    dealt = dict.fromkeys(xi, 0)
    for _ in range(budget):
        left = {name: of[dealt[name]] for name, of in xi.items() if dealt[name] < len(of)}
        if not left:
            break
        dealt[max(left, key=left.__getitem__)] += 1
    return dealt


def agreement(new: Rows, old: Rows, r: int, subspace: bool) -> float:
    dots = [[sum(x * y for x, y in zip(a, b, strict=True)) for b in old[:r]] for a in new[:r]]
    return sum(d * d for row in dots for d in row) / r if subspace else min(dots[j][j] for j in range(r))
