"""LAME against the schedule of its published code: N x N x d distances, dense affinity, one host sync per iteration."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks._timing import Row, compare, flops_floor
from peftref.tta import affinity, laplacian_assign
from tests._naive.lame import published_affinity, published_assign

PEER = "schedule of the published code (tests/_naive/lame.py)"


def batch(n: int, d: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Post-ReLU features around class centres, with logits that mostly agree; at most 40 of the classes occur."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(min(40, classes), (n,), generator=g)
    centres = torch.randn(40, d, generator=g)
    features = (centres[y] + 1.5 * torch.randn(n, d, generator=g)).relu()
    logits = torch.randn(n, classes, generator=g)
    logits[torch.arange(n), y] += 4.0
    return features, logits


def row(n: int, d: int, classes: int, kind: str, *, streams: int = 1, target: float | None = None) -> Row:
    batches = [batch(n, d, classes, seed) for seed in range(streams)]
    features, logits = (torch.stack(t) for t in zip(*batches, strict=True))

    def ours() -> Tensor:
        return laplacian_assign(logits.log_softmax(-1), affinity(features, kind)).z

    def peer() -> Tensor:
        each = [published_assign(q.softmax(-1), published_affinity(f, kind, 5))[0] for f, q in batches]
        return torch.stack(each)

    # float32, and the two stop within a few iterations of each other: a relative 1e-8 of E is below its rounding
    torch.testing.assert_close(ours(), peer(), rtol=0, atol=1e-4)
    claim = f"{kind}, N={n}, d={d}, K={classes}" + (f", {streams} streams at once" if streams > 1 else "")
    least = flops_floor(streams * n * (n + 1) * d)  # the inner products of all pairs, each pair once
    return compare(claim, ours, peer, peer_name=PEER, target=target, floor=least)


def rows() -> list[Row]:
    return [
        row(512, 1280, 1000, "knn", target=15.0),
        row(512, 1280, 1000, "rbf"),
        row(64, 2048, 1000, "knn"),
        row(64, 2048, 1000, "rbf"),
        row(64, 512, 100, "knn", streams=16),
        row(64, 64, 10, "knn", streams=32),
    ]
