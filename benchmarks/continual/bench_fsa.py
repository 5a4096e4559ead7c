"""The discriminant head over a stream of sessions, against scikit-learn and the published code, which fit anew."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor

from benchmarks._timing import Floor, Row, compare, flops_floor
from peftref.continual.core.lda import LDA, moments
from peftref.continual.fsa import cosine_distance
from tests._naive.fsa import published_head, published_logits

SKLEARN = "scikit-learn's LinearDiscriminantAnalysis, refitted to all features after each session"
PUBLISHED = "schedule of the published code (tests/_naive/fsa.py), refitted to all features after each session"


def stream(sessions: int, classes: int, each: int, d: int, dtype: torch.dtype = torch.float64) -> list:
    """Sessions of new classes: features around class means, as many for each class; and 500 to decide on."""
    g = torch.Generator().manual_seed(0)
    k = sessions * classes
    centres, mix = torch.randn(k, d, generator=g), torch.randn(d, 64, generator=g) / 8

    def draw(y: Tensor) -> Tensor:
        low = torch.randn(len(y), 64, generator=g) @ mix.T
        return (centres[y] + 2 * low + 0.5 * torch.randn(len(y), d, generator=g)).to(dtype)

    parts = []
    for t in range(sessions):
        y = torch.arange(t * classes, (t + 1) * classes).repeat(each)
        parts.append((draw(y), y))
    return [parts, draw(torch.randint(k, (500,), generator=g))]


def least(sessions: int, classes: int, each: int, d: int) -> Floor:
    """Half of the symmetric sum of squares of all features, and a Cholesky factor of it after each session."""
    return flops_floor(sessions * (classes * each * d * (d + 1) + d**3 / 3), torch.float64)


def against_scikit_learn(sessions: int, classes: int, each: int, d: int, target: float | None = None) -> Row:
    parts, test = stream(sessions, classes, each, d)

    def ours() -> list[Tensor]:
        head, found = LDA("within", ridge=0.0, ridge_rel=1 / 9), []  # a shrinkage of 0.1, up to scale
        for x, y in parts:
            found.append(head.partial_fit(x, y).predict(test))
        return found

    def peer() -> list[Tensor]:
        found = []
        for t in range(1, sessions + 1):
            x, y = (torch.cat(p).numpy() for p in zip(*parts[:t], strict=True))
            priors = np.full(t * classes, 1 / (t * classes))
            fitted = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.1, priors=priors).fit(x, y)
            found.append(torch.from_numpy(fitted.predict(test.numpy())))
        return found

    for a, b in zip(ours(), peer(), strict=True):
        assert torch.equal(a, b)  # the same decisions after every session
    claim = f"{sessions} sessions of {classes} x {each}, d={d}: head after each"
    work = least(sessions, classes, each, d)
    return compare(claim, ours, peer, peer_name=SKLEARN, target=target, floor=work, warmup=0, repeats=3)


def against_published(sessions: int, classes: int, each: int, d: int, target: float | None = None) -> Row:
    parts, test = stream(sessions, classes, each, d)
    k = sessions * classes

    def ours() -> list[Tensor]:
        head, found = LDA(), []
        for x, y in parts:
            found.append(head.partial_fit(x, y)(test))
        return found

    def peer() -> list[Tensor]:
        found = []
        for t in range(1, sessions + 1):
            x, y = (torch.cat(p) for p in zip(*parts[:t], strict=True))
            found.append(published_logits(test, *published_head(x, y, k))[:, : t * classes])
        return found

    for a, b in zip(ours(), peer(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
    claim = f"{sessions} sessions of {classes} x {each}, d={d}: ridge 1"
    work = least(sessions, classes, each, d)
    return compare(claim, ours, peer, peer_name=PUBLISHED, target=target, floor=work, warmup=0, repeats=3)


def class_sums(n: int, classes: int, d: int, kind: str) -> Row:
    """How to sum the features of each class: one scattered addition, a product with one-hot labels, or a loop."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, d, generator=g, dtype=torch.float64), torch.randint(classes, (n,), generator=g)

    def ours() -> Tensor:
        return x.new_zeros(classes, d).index_add_(0, y, x)

    def product() -> Tensor:
        return torch.nn.functional.one_hot(y, classes).to(x).T @ x

    def loop() -> Tensor:
        return torch.stack([x[y == c].sum(0) for c in range(classes)])

    peer, name = {"product": (product, "product with one-hot labels"), "loop": (loop, "loop over classes")}[kind]
    torch.testing.assert_close(ours(), peer(), rtol=1e-9, atol=1e-9)
    counts = torch.bincount(y, minlength=classes).double().clamp_min(1)
    torch.testing.assert_close(moments(x, y, classes).means, peer() / counts[:, None], rtol=1e-9, atol=1e-9)
    return compare(f"class sums, n={n}, K={classes}, d={d}: {kind}", ours, peer, peer_name=name)


def score(n: int, d: int) -> Row:
    x = torch.rand(n, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def pairs() -> Tensor:
        u = torch.nn.functional.normalize(x, dim=1)
        return 1 - ((u @ u.T).sum() - n) / (n * (n - 1))

    torch.testing.assert_close(cosine_distance(x), pairs(), rtol=1e-9, atol=1e-9)
    return compare(f"mean cosine distance, n={n}, d={d}", lambda: cosine_distance(x), pairs, peer_name="all n^2 pairs")


def rows() -> list[Row]:
    return [
        against_scikit_learn(4, 10, 20, 1280, target=3.0),
        against_scikit_learn(10, 10, 40, 256),
        against_published(4, 10, 20, 1280),
        class_sums(2000, 100, 1280, "product"),
        class_sums(2000, 100, 1280, "loop"),
        score(2000, 64),
    ]
