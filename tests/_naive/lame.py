"""The two naive twins of LAME: the specification in plain loops, and the schedule of the published code.

``loop_*`` is the mathematics on Python lists, one number at a time, edge cases included: the specification.
``published_*`` is the schedule of the published code, written from a description of it: an N x N x d broadcast for the
distances, a dense affinity whatever its kind, a monitor brought to the host at every iteration. The benchmark's peer.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


# --- the specification ------------------------------------------------------------------------------------------------
def loop_affinity(features: list[list[float]], kind: str, k: int) -> list[list[float]]:
    n = len(features)
    rows = []
    for f in features:
        norm = math.sqrt(sum(v * v for v in f))
        rows.append([v / max(norm, 1e-12) for v in f])
    w = [[0.0] * n for _ in range(n)]
    alive = [i for i in range(n) if all(math.isfinite(v) for v in features[i])]
    if len(alive) < 2:
        return w
    distance = {(i, j): math.dist(rows[i], rows[j]) for i in alive for j in alive}
    if kind == "knn":
        for i in alive:
            for j in sorted((j for j in alive if j != i), key=lambda j, i=i: distance[i, j])[:k]:
                w[i][j] = 1.0
    elif kind == "rbf":
        kth = [sorted(distance[i, j] for j in alive)[min(k, len(alive)) - 1] for i in alive]
        sigma = max(sum(kth) / len(kth), 1e-6)
        for i in alive:
            for j in alive:
                w[i][j] = math.exp(-(distance[i, j] ** 2) / (2 * sigma**2))
    else:
        for i in alive:
            for j in alive:
                w[i][j] = sum(a * b for a, b in zip(rows[i], rows[j], strict=True))
    return w


def _softmax(a: list[float]) -> list[float]:
    top = max(a)
    e = [math.exp(v - top) for v in a]
    return [v / sum(e) for v in e]


def loop_assign(
    log_q: list[list[float]], w: list[list[float]], strength: float = 1.0, max_iterations: int = 100
) -> tuple[list[list[float]], list[float]]:
    """Assignments and monitored energies, the latter written out as KL minus votes (not as a log-sum-exp)."""
    n, classes = len(log_q), len(log_q[0])
    z = [_softmax(row) for row in log_q]
    energies: list[float] = []
    for step in range(max_iterations):
        votes = [[sum(w[i][j] * z[j][c] for j in range(n)) for c in range(classes)] for i in range(n)]
        z = [_softmax([log_q[i][c] + strength * votes[i][c] for c in range(classes)]) for i in range(n)]
        energies.append(
            sum(
                z[i][c] * (math.log(z[i][c]) - log_q[i][c] - strength * votes[i][c])
                for i in range(n)
                for c in range(classes)
                if z[i][c] > 0
            )
        )
        if step > 1 and abs(energies[-1] - energies[-2]) <= 1e-8 * abs(energies[-2]):
            break
    return z, energies


def loop_energy(z: list[list[float]], log_q: list[list[float]], w: list[list[float]], strength: float = 1.0) -> float:
    n, classes = len(z), range(len(z[0]))
    kl = sum(z[i][c] * (math.log(z[i][c]) - log_q[i][c]) for i in range(n) for c in classes if z[i][c] > 0)
    pair = sum(w[i][j] * sum(a * b for a, b in zip(z[i], z[j], strict=True)) for i in range(n) for j in range(n))
    return kl - strength / 2 * pair


# --- the published schedule -------------------------------------------------------------------------------------------
def published_affinity(features: Tensor, kind: str, k: int) -> Tensor:
    n = features.shape[0]
    phi = F.normalize(features, dim=-1)
    if kind == "linear":
        return phi @ phi.T
    distance = (phi[:, None, :] - phi[None, :, :]).norm(dim=-1)  # N x N x d
    if kind == "rbf":
        sigma = distance.topk(min(k, n), largest=False).values[:, -1].mean()
        return torch.exp(-(distance**2) / (2 * sigma**2))
    nearest = distance.topk(min(k + 1, n), largest=False).indices[:, 1:]  # the first is taken to be the sample itself
    return torch.zeros(n, n, dtype=phi.dtype).scatter_(-1, nearest, 1.0)


def published_assign(
    probs: Tensor, w: Tensor, strength: float = 1.0, max_iterations: int = 100
) -> tuple[Tensor, list[float]]:
    unary = -torch.log(probs + 1e-10)
    z = F.softmax(-unary, dim=-1)
    energies: list[float] = []
    old = math.inf
    for step in range(max_iterations):
        pairwise = strength * w.matmul(z)
        z = F.softmax(-unary + pairwise, dim=-1)
        new = (unary * z - pairwise * z + z * torch.log(z.clip(1e-20))).sum().item()
        energies.append(new)
        if step > 1 and abs(new - old) <= 1e-8 * abs(old):
            break
        old = new
    return z, energies
