"""The naive twins of the discriminant head and of first session adaptation.

``loop_*`` is the mathematics on Python lists, one sample at a time: the specification. ``published_head`` is the
schedule of the published code, written from a description of it: the features of all sessions are collected, the head
is fitted anew, columns of classes not yet seen stay zero, and the "bias" is twice what is to be subtracted.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _outer(a: list[float], b: list[float]) -> list[list[float]]:
    return [[p * q for q in b] for p in a]


def _add(a: list[list[float]], b: list[list[float]]) -> list[list[float]]:
    return [[p + q for p, q in zip(r, s, strict=True)] for r, s in zip(a, b, strict=True)]


def _mean(rows: list[list[float]]) -> list[float]:
    return [math.fsum(column) / len(rows) for column in zip(*rows, strict=True)]


def loop_covariance(features: list[list[float]], labels: list[int], scatter: str) -> list[list[float]]:
    """Total: around the mean of all, over n - 1. Within: around the mean of each class, over n - K."""
    classes, d = sorted(set(labels)), len(features[0])
    groups = {c: [f for f, y in zip(features, labels, strict=True) if y == c] for c in classes}
    centre = {c: _mean(features if scatter == "total" else groups[c]) for c in classes}
    s = [[0.0] * d for _ in range(d)]
    for f, y in zip(features, labels, strict=True):
        r = [a - b for a, b in zip(f, centre[y], strict=True)]
        s = _add(s, _outer(r, r))
    free = max(len(features) - (1 if scatter == "total" else len(classes)), 1)
    return [[v / free for v in row] for row in s]


def _solve(a: list[list[float]], b: list[float]) -> list[float]:
    """Gauss with pivoting."""
    rows = [[*row, v] for row, v in zip(a, b, strict=True)]
    n = len(rows)
    for i in range(n):
        best = max(range(i, n), key=lambda r, i=i: abs(rows[r][i]))
        rows[i], rows[best] = rows[best], rows[i]
        for r in range(i + 1, n):
            factor = rows[r][i] / rows[i][i]
            rows[r] = [v - factor * w for v, w in zip(rows[r], rows[i], strict=True)]
    x = [0.0] * n
    for i in reversed(range(n)):
        x[i] = (rows[i][n] - sum(rows[i][j] * x[j] for j in range(i + 1, n))) / rows[i][i]
    return x


def loop_discriminant(
    features: list[list[float]], labels: list[int], scatter: str = "total", ridge: float = 1.0, ridge_rel: float = 0.0,
    prior: str | None = None,
) -> tuple[list[list[float]], list[float]]:  # fmt: skip
    """Weights and biases of the sorted classes."""
    s, d = loop_covariance(features, labels, scatter), len(features[0])
    extra = ridge + ridge_rel * sum(s[i][i] for i in range(d)) / d
    s = [[v + extra * (i == j) for j, v in enumerate(row)] for i, row in enumerate(s)]
    weights, biases = [], []
    for c in sorted(set(labels)):
        mu = _mean([f for f, y in zip(features, labels, strict=True) if y == c])
        weights.append(_solve(s, mu))
        share = labels.count(c) / len(labels)
        bias = -0.5 * sum(a * b for a, b in zip(mu, weights[-1], strict=True))
        biases.append(bias + (math.log(share) if prior == "empirical" else 0.0))
    return weights, biases


def loop_cosine_distance(features: list[list[float]]) -> float:
    """Over all ordered pairs of different samples."""
    total, n = 0.0, len(features)
    for i in range(n):
        for j in range(n):
            if i != j:
                a, b = features[i], features[j]
                norm = math.hypot(*a) * math.hypot(*b)
                total += 1 - (sum(p * q for p, q in zip(a, b, strict=True)) / norm if norm else 0.0)
    return total / (n * (n - 1))


def published_head(features: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Weights ``(d, classes)`` with zero columns for classes without samples, and the un-halved bias."""
    n, d = features.shape
    raw = features.T @ features - torch.outer(features.sum(0), features.sum(0)) / n
    inverse = torch.linalg.cholesky(raw / max(n - 1, 1) + torch.eye(d, dtype=features.dtype))
    weight, bias = features.new_zeros(d, classes), features.new_zeros(classes)
    for c in range(classes):
        if (labels == c).any():
            mu = features[labels == c].mean(0)
            weight[:, c] = torch.cholesky_solve(mu[:, None], inverse)[:, 0]
            bias[c] = mu @ weight[:, c]
    return weight, bias


def published_logits(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The test-time formula: this is where the bias is halved."""
    return features @ weight - 0.5 * bias
