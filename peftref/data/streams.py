r"""Test streams: which shifted image arrives when, under the published protocols of test-time adaptation.

A :class:`Stream` is a fixed sequence of batches, cut from one data split by a *builder* (which domains, in which
segments) and an *order* (which images inside a segment). It is built once and given unchanged to every method, so
their errors are comparable.

===================  ===================================================================================================
builder              protocol
===================  ===================================================================================================
:func:`continual`    CoTTA's main setting: one domain after the other at one severity, never announced
:func:`gradual`      CoTTA's ``cifar10c_gradual.py``: severity rises and falls inside every domain (131 segments for 15)
:func:`mixed`        all domains pooled into one segment
===================  ===================================================================================================

Orders are in :mod:`peftref.data.orders`; any function ``(y, generator) -> indices`` is one. A domain is a
corruption's name, ``"clean"``, or any function ``(x, generator) -> x``. Wang, Fink, Van Gool, Dai, "Continual
Test-Time Domain Adaptation" (CoTTA), CVPR 2022, arXiv 2203.13591. Unlike the published benchmarks, images are
corrupted on the fly from a seed, not read from files.

>>> from peftref.data import load
>>> stream = continual(load("digits").test, ["clean", "contrast"], severity=3, batch_size=100)
>>> stream
Stream(718 images, 2 segments, 8 batches of at most 100, domains clean contrast)
>>> [(len(batch.y), stream.names[int(batch.domain[0])]) for batch in stream][:5]
[(100, 'clean'), (100, 'clean'), (100, 'clean'), (59, 'clean'), (100, 'contrast')]
>>> [len(part) for part in stream.segments()]          # reset a method at each of these to forget between domains
[4, 4]
"""

from __future__ import annotations

import hashlib
import numbers
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._batching import batch_sizes
from . import corruptions
from .domains import Domain, domain_name, domain_names, generator_for, shift
from .orders import Order, as_stored, shuffled
from .sets import Split

__all__ = ["Batch", "ORDERS", "Stream", "continual", "gradual", "mixed"]

#: The ten random orders of the 15 corruptions in CoTTA's experiments (``cfgs/10orders`` of qinenergy/cotta), as names.
ORDERS: tuple[tuple[str, ...], ...] = tuple(
    tuple(corruptions.CORRUPTIONS[int(i)] for i in row.split())
    for row in (
        "10 13 0 5 6 4 2 14 3 12 1 8 7 9 11",
        "14 1 6 8 11 9 3 12 0 10 4 2 13 7 5",
        "11 3 0 1 7 8 4 6 12 14 13 10 2 5 9",
        "1 9 4 13 7 12 10 2 3 8 11 0 5 14 6",
        "13 4 6 7 9 2 10 5 8 14 0 1 11 3 12",
        "5 7 9 1 3 11 6 10 8 12 4 0 13 14 2",
        "8 2 14 11 6 4 13 7 3 5 10 12 1 9 0",
        "4 6 2 9 7 14 0 8 1 10 11 5 13 3 12",
        "3 5 6 1 0 4 14 9 11 13 8 7 10 12 2",
        "11 0 3 6 8 4 14 9 13 12 1 2 7 5 10",
    )
)


class Batch(NamedTuple):
    """What arrives at one step; a method sees ``x`` only, the rest is for the metrics.

    Attributes:
        x: images ``(B, C, H, W)``.
        y: labels ``(B,)``.
        domain: index into ``Stream.names``, ``(B,)``.
        severity: 1 to 5; 0 for domains without severities, ``(B,)``.
    """

    x: Tensor
    y: Tensor
    domain: Tensor
    severity: Tensor


@dataclass(frozen=True, eq=False, repr=False)
class Stream:
    """A fixed sequence of batches; iterate over it as often as needed.

    No batch crosses a segment, so the last batch of a segment may be small; one image alone joins the batch before it,
    since BatchNorm has no statistics of one. ``len()`` counts batches.

    Attributes:
        x: all images in order of arrival, ``(N, C, H, W)``.
        y: their labels, ``(N,)``.
        domain: their index into ``names``, ``(N,)``.
        severity: 1 to 5, or 0 for domains without severities, ``(N,)``.
        segment: number of their segment, never decreasing, ``(N,)``.
        names: name of every domain.
        batch_size: of each batch but perhaps the last of a segment.
    """

    x: Tensor
    y: Tensor
    domain: Tensor
    severity: Tensor
    segment: Tensor
    names: tuple[str, ...]
    batch_size: int

    def __post_init__(self) -> None:
        _positive("batch_size", self.batch_size)
        sizes = [len(t) for t in (self.x, self.y, self.domain, self.severity, self.segment)]
        if len(set(sizes)) > 1 or sizes[0] == 0:
            raise ValueError(f"x, y, domain, severity, segment: expected one positive length, got {sizes}")
        if (self.segment.diff() < 0).any():
            raise ValueError("segment: expected numbers that never decrease along the stream")

    def __len__(self) -> int:
        return len(self._sizes())

    def __iter__(self) -> Iterator[Batch]:
        parts = (t.split(self._sizes()) for t in (self.x, self.y, self.domain, self.severity))
        return map(Batch, *parts)

    def __repr__(self) -> str:
        segments = len(self.segment.unique_consecutive())
        largest = max(self.batch_size, *self._sizes())
        return (
            f"Stream({len(self.y)} images, {segments} segments, {len(self)} batches of at most {largest}, "
            f"domains {' '.join(self.names)})"
        )

    def segments(self) -> Iterator[Stream]:
        """The segments as streams of their own: reset a method before each for the *reset at each shift* protocol."""
        sizes = self.segment.unique_consecutive(return_counts=True)[1].tolist()
        parts = (t.split(sizes) for t in (self.x, self.y, self.domain, self.severity, self.segment))
        for x, y, domain, severity, segment in zip(*parts, strict=True):
            yield replace(self, x=x, y=y, domain=domain, severity=severity, segment=segment)

    def to(self, device: torch.device | str) -> Stream:
        """The same stream with its tensors on ``device``."""
        tensors: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **tensors)

    def sha256(self) -> str:
        """Checksum of everything a method or a metric sees; equal for equal streams, whatever their device."""
        digest = hashlib.sha256(repr((tuple(self.x.shape), self.names, self.batch_size)).encode())
        for tensor in (self.x, self.y, self.domain, self.severity, self.segment):
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _sizes(self) -> list[int]:
        counts = self.segment.unique_consecutive(return_counts=True)[1].tolist()
        return [size for n in counts for size in batch_sizes(n, self.batch_size)]


# Builders: which domains, in which segments.


def continual(
    data: Split,
    domains: Sequence[Domain] = corruptions.CORRUPTIONS,
    severity: int = 5,
    *,
    order: Order | None = None,
    batch_size: int = 200,
    cycles: int = 1,
    seed: int = 0,
    table: str = "cifar",
) -> Stream:
    """One domain after the other, each with all of ``data``; the whole sequence ``cycles`` times.

    The noise of an image depends on domain, severity, seed and cycle, not on the position: two orders of the same
    domains present the same images.

    Args:
        data: images and labels every segment is made from.
        domains: names of corruptions, ``"clean"``, or functions ``(x, generator) -> x`` with a CPU generator;
            for the published random orders ``ORDERS[i]``. Default: the 15 in their standard order.
        severity: 1 to 5 (5: CoTTA).
        order: images of a segment; default :func:`~peftref.data.orders.as_stored`, as in CIFAR-C.
        batch_size: 200 (CoTTA, CIFAR; ImageNet uses 64, LAME 16); a last image alone joins the batch before it.
        cycles: 1; CoTTA's long run repeats the sequence 10 times.
        seed: of the corruptions and the order.
        table: severity constants, ``"cifar"`` (28 to 64 pixels) or ``"imagenet"`` (224 pixels).

    Returns:
        ``cycles * len(domains)`` segments.

    Raises:
        ValueError: an unknown or repeated domain, or a number out of range.
    """
    _positive("cycles", cycles)
    plan = [(domain, severity) for _ in range(cycles) for domain in domains]
    return _sequence(data, domains, plan, order or as_stored, batch_size, seed, table)


def gradual(
    data: Split,
    domains: Sequence[str] = corruptions.CORRUPTIONS,
    *,
    order: Order | None = None,
    batch_size: int = 200,
    seed: int = 0,
    table: str = "cifar",
) -> Stream:
    """Severities 5 4 3 2 1 of the first domain, then 1 2 3 4 5 4 3 2 1 of each later one (CoTTA).

    Arguments as for :func:`continual`. Report the mean over all ``5 + 9 (D - 1)`` segments.

    Raises:
        ValueError: also for a domain without severities (``"clean"`` or a function).
    """
    names = domain_names(domains)
    if bad := [name for name, d in zip(names, domains, strict=True) if callable(d) or d == "clean"]:
        raise ValueError(f"domains: expected corruptions with five severities, got {bad[0]!r}")
    up = [1, 2, 3, 4, 5, 4, 3, 2, 1]
    plan = [(domain, s) for i, domain in enumerate(domains) for s in (up if i else up[4:])]
    return _sequence(data, domains, plan, order or as_stored, batch_size, seed, table)


def mixed(
    data: Split,
    domains: Sequence[Domain] = corruptions.CORRUPTIONS,
    severity: int = 5,
    *,
    order: Order | None = None,
    batch_size: int = 200,
    seed: int = 0,
    table: str = "cifar",
) -> Stream:
    """All domains pooled into one segment, by default shuffled.

    Arguments as for :func:`continual`. Report the error per domain and over all. The pool given to ``order`` is
    domain after domain: ``grouped(torch.arange(D).repeat_interleave(len(data.y)))`` groups it by domain again.
    """
    plan = [(domain, severity) for domain in domains]
    pool = _sequence(data, domains, plan, as_stored, batch_size, seed, table)
    rows = _rows(order or shuffled, pool.y, generator_for("order", seed, 0))
    return replace(
        pool,
        x=pool.x[rows],
        y=pool.y[rows],
        domain=pool.domain[rows],
        severity=pool.severity[rows],
        segment=torch.zeros_like(rows),
    )


def _sequence(
    data: Split,
    domains: Sequence[Domain],
    plan: Sequence[tuple[Domain, int]],
    order: Order,
    batch_size: int,
    seed: int,
    table: str,
) -> Stream:
    """One segment per ``(domain, severity)`` of the plan."""
    x, y = data
    if x.ndim != 4 or not x.is_floating_point() or y.shape != x.shape[:1]:
        raise ValueError(
            f"data: expected float images (N, C, H, W) and N labels, "
            f"got {x.dtype} {tuple(x.shape)} and {tuple(y.shape)}"
        )
    _positive("batch_size", batch_size)
    names = domain_names(domains)
    if any(s not in (1, 2, 3, 4, 5) for _, s in plan):
        raise ValueError(f"severity: expected an integer from 1 to 5, got {plan[0][1]!r}")
    visits: Counter[tuple[str, int]] = Counter()
    segments = []
    for i, (domain, severity) in enumerate(plan):
        name = domain_name(domain)
        # Shift all images, then choose: whatever the order, an image looks the same.
        generator = generator_for(name, severity, seed, visits[name, severity])
        visits[name, severity] += 1
        shifted = shift(x, domain, severity, generator, table)
        rows = _rows(order, y, generator_for("order", seed, i))
        graded = 0 if callable(domain) or domain == "clean" else severity
        segments.append((shifted[rows], y[rows], *(torch.full_like(rows, v) for v in (names.index(name), graded, i))))
    x, y, domain_of, severity_of, segment_of = (torch.cat(part) for part in zip(*segments, strict=True))
    return Stream(x, y, domain_of, severity_of, segment_of, names, batch_size)


def _rows(order: Order, y: Tensor, generator: torch.Generator) -> Tensor:
    rows = order(y, generator)
    if rows.ndim != 1 or rows.dtype != torch.int64 or len(rows) == 0 or rows.min() < 0 or rows.max() >= len(y):
        raise ValueError(
            f"order: expected a non-empty vector of int64 from 0 to {len(y) - 1}, got {rows.dtype} {tuple(rows.shape)}"
        )
    return rows.to(y.device)


def _positive(name: str, value: int) -> None:
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: expected an integer >= 1, got {value!r}")
