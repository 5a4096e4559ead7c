r"""Orders: which images of a segment arrive, and in which sequence, as functions ``(y, generator) -> indices``.

=========================  ========================================================================================
order                      images of a segment
=========================  ========================================================================================
:func:`as_stored`          the order of the split (CIFAR-C)
:func:`shuffled`           a random permutation
:func:`sorted_by_class`    by label: the hardest temporal correlation
:func:`dirichlet`          class-correlated chunks (NOTE): small ``delta``, few classes in each
:func:`grouped`            LAME's non-iid case: whole groups (videos, domains, classes) one after the other
:func:`zipf`               LAME's imbalanced case: random Zipf class frequencies
:func:`label_shift`        a given class prior, for example from :func:`long_tail_prior` and :func:`power_prior`
=========================  ========================================================================================

The first three are orders; the others take their parameters and return one. Gong, Jeong, Kim, Kim, Shin, Lee, "NOTE:
Robust Continual Test-time Adaptation Against Temporal Correlation", NeurIPS 2022, arXiv 2208.05117; Boudiaf, Mueller,
Ben Ayed, Bertinetto, "Parameter-free Online Test-time Adaptation" (LAME), CVPR 2022, arXiv 2201.05718.

Differs from the official code: both rejection loops are bounded, and :func:`zipf` also works below ten classes, where
``floor(0.1 K) = 0`` makes the official loop endless.

>>> y = torch.tensor([1, 0, 1, 0])
>>> y[sorted_by_class(y, torch.Generator())].tolist()
[0, 0, 1, 1]
>>> y[label_shift(torch.tensor([0.0, 1.0]))(y, torch.Generator())].tolist()
[1, 1, 1, 1]
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = [
    "Order",
    "as_stored",
    "dirichlet",
    "grouped",
    "label_shift",
    "long_tail_prior",
    "power_prior",
    "shuffled",
    "sorted_by_class",
    "zipf",
]

Order = Callable[[Tensor, torch.Generator], Tensor]


def as_stored(y: Tensor, generator: torch.Generator) -> Tensor:
    """Every image once, in the order of the split."""
    return torch.arange(len(y), device=y.device)


def shuffled(y: Tensor, generator: torch.Generator) -> Tensor:
    """Every image once, in random order."""
    return torch.randperm(len(y), generator=generator).to(y.device)


def sorted_by_class(y: Tensor, generator: torch.Generator) -> Tensor:
    """Every image once, by label; within a label in the order of the split."""
    return y.argsort(stable=True)


def grouped(groups: Tensor | None = None) -> Order:
    """Shuffle, then bring every group together where its first member stands (LAME's non-iid streams).

    Args:
        groups: group of every image, ``(N,)``: the video or the domain it comes from; default: its class.
    """

    def order(y: Tensor, generator: torch.Generator) -> Tensor:
        ids = (y if groups is None else groups).cpu()
        if ids.shape != y.shape:
            raise ValueError(f"groups: expected one group per image, {tuple(y.shape)}, got {tuple(ids.shape)}")
        perm = torch.randperm(len(y), generator=generator)
        _, group = ids[perm].unique(return_inverse=True)
        first = torch.full((int(group.max()) + 1,), len(y)).scatter_reduce(0, group, torch.arange(len(y)), "amin")
        return perm[first[group].argsort(stable=True)].to(y.device)

    return order


def dirichlet(delta: float, min_size: int = 10, attempts: int = 1000) -> Order:
    r"""Every image once, in :math:`K` chunks whose class proportions follow a Dirichlet law.

    Class after class is dealt, in shares drawn from :math:`\mathrm{Dir}(\delta,\dots,\delta)`, to the chunks that hold
    fewer than :math:`N/K` images yet; all is drawn again until every chunk has ``min_size``. The chunks follow one
    another, and inside a chunk the classes do, in random order.

    Args:
        delta: concentration > 0. Towards 0 a chunk is one class; 0.01 to 0.1 are usual. Large values give
            every chunk all classes, still one after the other: shuffle inside the chunks for a nearly iid stream.
        min_size: smallest chunk (10: NOTE).
        attempts: draws before giving up; the official code goes on for as long as it takes.

    Raises:
        ValueError: by the returned order, if no draw satisfies ``min_size``; few images with many classes cannot.
    """
    if not delta > 0:
        raise ValueError(f"delta: expected a number > 0, got {delta!r}")

    def order(y: Tensor, generator: torch.Generator) -> Tensor:
        _check_labels(y)
        rng = _numpy(generator)
        _, label = np.unique(y.cpu().numpy(), return_inverse=True)
        counts = np.bincount(label)
        draws = (_deal(counts, delta, rng) for _ in range(attempts))
        sizes = next((draw for draw in draws if draw.sum(0).min() >= min_size), None)
        if sizes is None:
            raise ValueError(
                f"dirichlet: expected {len(counts)} chunks of at least {min_size} out of {len(label)} images, none of "
                f"{attempts} draws had them; change delta (now {delta}), lower min_size, or use more images per class"
            )
        perm = rng.permutation(len(label))
        perm = perm[label[perm].argsort(kind="stable")]  # class after class, each shuffled
        chunk = np.concatenate([np.repeat(np.arange(len(counts)), row) for row in sizes])
        turn = rng.permuted(np.tile(np.arange(len(counts)), (len(counts), 1)), axis=1)  # turn[chunk, class]
        rows = perm[np.lexsort((turn[chunk, label[perm]], chunk))]
        return torch.from_numpy(rows).to(y.device)

    return order


def _deal(counts: NDArray[np.int64], delta: float, rng: np.random.Generator) -> NDArray[np.int64]:
    """One draw of how many images of class k go to chunk j, ``(K, K)``; all zero where the draw cannot be completed."""
    classes = len(counts)
    sizes = np.zeros((classes, classes), dtype=np.int64)
    filled = np.zeros(classes, dtype=np.int64)
    for k, n in enumerate(counts):
        share = rng.dirichlet(np.full(classes, delta)) * (filled < counts.sum() / classes)
        if share.sum() == 0:  # delta so small that all mass fell on full chunks
            return np.zeros_like(sizes)
        ends = (np.cumsum(share / share.sum()) * n).astype(np.int64)
        ends[-1] = n
        sizes[k] = np.diff(ends, prepend=0)
        filled += sizes[k]
    return sizes


def zipf(a: float = 2.0, head: float = 0.1, head_share: float = 0.9, attempts: int = 1000) -> Order:
    """Random class frequencies: one Zipf number per class, normalised.

    Images are drawn with replacement inside a class, then shuffled. There are at most as many as given; rare classes
    may be missing altogether. LAME's settings: test (2, 0.1, 0.9), validation (2, 0.2, 0.8).

    Args:
        a: exponent > 1 of the Zipf law.
        head: share of the classes that counts as the head, rounded down but at least one class.
        head_share: a draw is accepted only if the head holds less than this share of the images.
        attempts: draws before giving up.

    Raises:
        ValueError: by the returned order, if no draw is accepted (always so with one class).
    """
    if not a > 1:
        raise ValueError(f"a: expected an exponent > 1, got {a!r}")

    def order(y: Tensor, generator: torch.Generator) -> Tensor:
        _check_labels(y)
        rng = _numpy(generator)
        classes = y.unique()
        top = max(1, int(head * len(classes)))  # the official floor gives 0 below ten classes
        for _ in range(attempts):
            draw = rng.zipf(a, len(classes)).astype(np.float64)
            counts = np.floor(len(y) * draw / draw.sum()).astype(np.int64)
            if counts.max() > 0 and np.sort(counts)[-top:].sum() < head_share * len(y):
                labels = classes.cpu().repeat_interleave(torch.from_numpy(counts))
                return _draw(y, labels[torch.randperm(len(labels), generator=generator)], generator)
        raise ValueError(
            f"zipf: expected {top} of {len(classes)} classes to hold less than {head_share} of the images, no draw in "
            f"{attempts} did; raise a (now {a}) or head_share"
        )

    return order


def label_shift(prior: Tensor) -> Order:
    """As many images as given, with labels drawn iid from ``prior`` and images with replacement inside a class.

    Args:
        prior: weight >= 0 of every class, ``(K,)``; normalised here.

    Raises:
        ValueError: a weight that is negative or not finite, or, by the returned order, a class without images.
    """
    weights = torch.as_tensor(prior, dtype=torch.float64).cpu()
    if weights.ndim != 1 or not weights.isfinite().all() or (weights < 0).any() or weights.sum() <= 0:
        raise ValueError(f"prior: expected a vector of finite weights >= 0, not all 0, got {prior!r}")

    def order(y: Tensor, generator: torch.Generator) -> Tensor:
        missing = [k for k in weights.nonzero().flatten().tolist() if not (y == k).any()]
        if missing:
            raise ValueError(f"prior: expected weight 0 for classes without images, got weight for {missing}")
        labels = weights.multinomial(len(y), replacement=True, generator=generator)
        return _draw(y, labels, generator)

    return order


def _draw(y: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """For each wanted label a random index of ``y`` that has it."""
    stored, by_class = y.cpu().sort(stable=True)
    start = torch.searchsorted(stored, labels)
    end = torch.searchsorted(stored, labels, right=True)
    u = torch.rand(len(labels), generator=generator, dtype=torch.float64)
    return by_class[start + (u * (end - start)).long()].to(y.device)


def long_tail_prior(classes: int, imbalance: float) -> Tensor:
    r"""Long-tailed prior :math:`\pi_k\propto\mathrm{IF}^{-k/(K-1)}`, with ``imbalance`` as IF.

    Class 0 is ``imbalance`` times as frequent as the last.

    >>> long_tail_prior(3, 100.0)
    tensor([0.9009, 0.0901, 0.0090])
    """
    if classes < 2 or not imbalance > 0:
        raise ValueError(f"classes, imbalance: expected at least 2 and a number > 0, got {classes!r} and {imbalance!r}")
    weights = imbalance ** -torch.linspace(0, 1, classes, dtype=torch.float64)
    return (weights / weights.sum()).float()


def power_prior(prior: Tensor, rho: float) -> Tensor:
    r"""Target prior :math:`\pi(\rho)\propto\pi^\rho`: 1 the same ("forward"), 0 uniform, -1 reversed odds ("backward").

    >>> power_prior(torch.tensor([0.8, 0.2]), -1.0)
    tensor([0.2000, 0.8000])
    """
    if not (prior > 0).all():
        raise ValueError(f"prior: expected weights > 0 (a power of 0 may be infinite), got {prior!r}")
    return (rho * prior.log()).softmax(-1)


def _check_labels(y: Tensor) -> None:
    if y.ndim != 1 or not len(y):
        raise ValueError(f"y: expected a class for each of the images, (N,), N >= 1, got shape {tuple(y.shape)}")


def _numpy(generator: torch.Generator) -> np.random.Generator:
    """NumPy has a Zipf law, and a Dirichlet law that survives small parameters; torch has neither with a generator."""
    return np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
