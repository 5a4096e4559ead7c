"""Streams and orders: the published protocols, their naive twins, and what must hold for any labels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peftref.data import CORRUPTIONS, Split, Stream, continual, corrupt, gradual, load, mixed
from peftref.data import orders as o
from peftref.data.streams import ORDERS


@pytest.fixture(scope="module")
def data() -> Split:
    """40 images of each of 10 classes, in random order."""
    full = load("fashion8k").test
    rows = torch.cat([(full.y == k).nonzero().flatten()[:40] for k in range(10)]).sort().values
    return Split(full.x[rows, :, ::2, ::2], full.y[rows])


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def runs(y: Tensor) -> int:
    return len(y.unique_consecutive())


def noise(x: Tensor, generator: torch.Generator) -> Tensor:
    return x + 0.1 * torch.randn(x.shape, generator=generator)


labels = st.lists(st.integers(0, 6), min_size=1, max_size=60).map(torch.tensor)
seeds = st.integers(0, 2**32 - 1)


# The stream object


def test_batches_put_together_are_the_stream_and_never_cross_a_segment(data: Split) -> None:
    stream = continual(data, ["clean", "contrast", noise], batch_size=150)
    batches = list(stream)
    assert [len(b.y) for b in batches] == [150, 150, 100] * 3 and len(stream) == 9
    for name in ("x", "y", "domain", "severity"):
        assert torch.cat([getattr(b, name) for b in batches]).equal(getattr(stream, name))
    assert all(b.domain.unique().numel() == 1 for b in batches)
    assert [b.x.equal(c.x) for b, c in zip(stream, batches, strict=True)] == [True] * 9  # a second pass is the same


def test_segments_are_the_pieces_of_the_stream(data: Split) -> None:
    stream = continual(data, ["fog", "clean"], batch_size=150)
    parts = list(stream.segments())
    assert [len(p) for p in parts] == [3, 3] and [p.names for p in parts] == [stream.names] * 2
    pieces = zip((b for p in parts for b in p), stream, strict=True)
    assert all(a.x.equal(b.x) and a.domain.equal(b.domain) for a, b in pieces)


def test_same_arguments_same_checksum_and_every_argument_counts(data: Split) -> None:
    base = dict(domains=["gaussian_noise", "contrast"], severity=3, seed=1, batch_size=64)
    reference = continual(data, **base).sha256()
    assert continual(data, **base).sha256() == reference
    changes = [
        dict(domains=["contrast", "gaussian_noise"]), dict(severity=4), dict(seed=2), dict(batch_size=65),
        dict(cycles=2), dict(order=o.shuffled), dict(table="imagenet"),
    ]  # fmt: skip
    assert len({continual(data, **{**base, **change}).sha256() for change in changes} | {reference}) == 1 + len(changes)


def test_streams_leave_global_randomness_and_data_alone(data: Split) -> None:
    torch.manual_seed(3), np.random.seed(3)
    state, x, legacy = torch.get_rng_state(), data.x.clone(), np.random.get_state()[1].copy()
    stream = mixed(data, ["clean", "gaussian_noise", noise], order=o.dirichlet(1.0))
    stream.x.zero_()
    assert torch.get_rng_state().equal(state) and (np.random.get_state()[1] == legacy).all() and data.x.equal(x)
    assert stream.to("cpu").sha256() == stream.sha256()


def test_stream_refuses_parts_that_do_not_fit(data: Split) -> None:
    n = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"one positive length, got \[400, 400, 4, 4, 4\]"):
        Stream(data.x, data.y, n, n, n, ("clean",), 2)
    with pytest.raises(ValueError, match="segment: expected numbers that never decrease"):
        Stream(data.x[:4], n, n, n, torch.tensor([0, 1, 0, 1]), ("clean",), 2)


# Builders


def test_continual_is_its_naive_twin_and_clean_is_the_data(data: Split) -> None:
    """Domain after domain, cycle after cycle; one corruption call per segment, and a new one in every cycle."""
    stream = continual(data, ["clean", "gaussian_noise"], 2, cycles=2)
    clean, noisy, clean_again, noisy_again = stream.segments()
    assert clean.x.equal(data.x) and clean_again.x.equal(data.x) and all(s.y.equal(data.y) for s in stream.segments())
    assert stream.severity.unique_consecutive().tolist() == [0, 2, 0, 2]
    assert stream.domain.unique_consecutive().tolist() == [0, 1, 0, 1]
    assert stream.segment.unique(return_counts=True)[1].tolist() == [len(data.y)] * 4
    assert not noisy.x.equal(noisy_again.x)
    exact = corrupt(data.x, "gaussian_noise", 2)  # another seed: the same size of error
    assert math.isclose((noisy.x - data.x).square().mean(), (exact - data.x).square().mean(), rel_tol=0.05)


def test_an_image_looks_the_same_whatever_the_order_of_domains_and_images(data: Split) -> None:
    there = continual(data, ["gaussian_noise", noise])
    back = continual(data, [noise, "gaussian_noise"], order=o.sorted_by_class)
    rows = data.y.argsort(stable=True)
    (a, b), (c, d) = there.segments(), back.segments()
    assert a.x[rows].equal(d.x) and b.x[rows].equal(c.x)


def test_gradual_has_131_segments_that_rise_and_fall(data: Split) -> None:
    few = Split(data.x[:2], data.y[:2])
    stream = gradual(few, ORDERS[0])
    steps = [int(s.severity[0]) for s in stream.segments()]
    assert len(steps) == 131 and steps[:5] == [5, 4, 3, 2, 1]
    assert steps[5:] == [1, 2, 3, 4, 5, 4, 3, 2, 1] * 14
    assert stream.domain[::2].bincount().tolist() == [5] + [9] * 14
    assert stream.names == ORDERS[0]


def test_severity_is_really_applied_in_gradual(data: Split) -> None:
    error = [(s.x - data.x).square().mean() for s in gradual(data, ["contrast", "gaussian_noise"]).segments()]
    assert error[0] > error[1] > error[2] > error[3] > error[4]  # contrast 5 4 3 2 1
    assert error[5] < error[6] < error[7] < error[8] < error[9] > error[10] > error[11] > error[12] > error[13]


def test_mixed_is_the_pool_in_another_order(data: Split) -> None:
    domains = ["clean", "contrast", noise]
    pool, stream = continual(data, domains), mixed(data, domains, batch_size=50)
    assert len(stream) == 24 and stream.segment.unique().tolist() == [0]
    one, other = (
        sorted(zip(s.domain.tolist(), s.x.amax(3).tolist(), s.y.tolist(), strict=True)) for s in (pool, stream)
    )
    assert one == other
    assert runs(stream.domain) > 600  # about 2/3 of 1200 if shuffled
    regrouped = mixed(data, domains, order=o.grouped(torch.arange(3).repeat_interleave(len(data.y))))
    assert runs(regrouped.domain) == 3


def test_published_orders() -> None:
    assert len(ORDERS) == 10 and len(set(ORDERS)) == 10
    assert all(sorted(order) == sorted(CORRUPTIONS) for order in ORDERS)
    assert ORDERS[0][:3] == ("brightness", "pixelate", "gaussian_noise")  # 10 13 0 in the standard order
    assert ORDERS[9][-1] == "brightness"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(domains=["mist"]), ValueError, "domains: .* got 'mist'"),
        (dict(domains=["fog", "fog"]), ValueError, "each once"),
        (dict(domains=[]), ValueError, "at least one"),
        (dict(domains=[3]), TypeError, "a name or a function"),
        (dict(domains=[lambda x, g: x[:, :, 1:]]), ValueError, "expected <lambda> to return"),
        (dict(severity=6), ValueError, "severity: .* got 6"),
        (dict(cycles=0), ValueError, "cycles: expected an integer >= 1, got 0"),
        (dict(batch_size=2.5), ValueError, "batch_size: expected an integer >= 1, got 2.5"),
        (dict(order=lambda y, g: torch.tensor([len(y)])), ValueError, "order: .* from 0 to 399"),
        (dict(order=lambda y, g: y.new_empty(0)), ValueError, "order: expected a non-empty"),
        (dict(data=Split(torch.zeros(2, 4), torch.zeros(2))), ValueError, r"data: .* \(2, 4\)"),
    ],
)
def test_bad_arguments_are_named(data: Split, arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        continual(**{"data": data, "domains": ["clean"], **arguments})


def test_gradual_refuses_domains_without_severities(data: Split) -> None:
    for domain in ("clean", noise):
        with pytest.raises(ValueError, match="five severities"):
            gradual(data, ["fog", domain])


# Orders


@settings(deadline=None)  # timings on a shared machine say nothing
@given(labels, seeds)
def test_every_order_that_only_moves_images_is_a_permutation(y: Tensor, seed: int) -> None:
    for order in (o.as_stored, o.shuffled, o.sorted_by_class, o.grouped(), o.dirichlet(0.5, min_size=0)):
        assert order(y, gen(seed)).sort().values.equal(torch.arange(len(y)))
        assert order(y, gen(seed)).equal(order(y, gen(seed)))


@settings(deadline=None)
@given(labels, seeds)
def test_sorted_and_grouped_have_one_run_per_class(y: Tensor, seed: int) -> None:
    assert y[o.sorted_by_class(y, gen(seed))].equal(y.sort().values)
    assert runs(y[o.grouped()(y, gen(seed))]) == len(y.unique())


@settings(deadline=None)
@given(labels, seeds)
def test_grouped_is_its_naive_twin(y: Tensor, seed: int) -> None:
    perm = torch.randperm(len(y), generator=gen(seed)).tolist()
    groups: dict[int, list[int]] = {}  # a dictionary keeps the order of first appearance
    for i in perm:
        groups.setdefault(int(y[i]), []).append(i)
    assert o.grouped()(y, gen(seed)).tolist() == [i for group in groups.values() for i in group]


def test_grouped_by_something_else_than_the_class() -> None:
    y, video = torch.zeros(6, dtype=torch.int64), torch.tensor([0, 1, 2, 0, 1, 2])
    assert runs(video[o.grouped(video)(y, gen())]) == 3
    with pytest.raises(ValueError, match=r"groups: expected one group per image, \(6,\), got \(2,\)"):
        o.grouped(video[:2])(y, gen())


def naive_dirichlet(y: np.ndarray, delta: float, min_size: int, rng: np.random.Generator) -> list[int]:
    """NOTE's loop: chunk after chunk of Python lists, one class at a time."""
    classes, n = sorted(set(y.tolist())), len(y)
    chunks: list[list[tuple[int, int]]] = []
    while not chunks or min(sum(count for _, count in c) for c in chunks) < min_size:
        chunks = [[] for _ in classes]
        for k in classes:
            share = rng.dirichlet([delta] * len(classes))
            held = [sum(count for _, count in c) for c in chunks]
            share = np.array([s * (h < n / len(classes)) for s, h in zip(share, held, strict=True)])
            cuts = (np.cumsum(share / share.sum()) * (y == k).sum()).astype(int)[:-1]
            for chunk, part in zip(chunks, np.split(np.arange((y == k).sum()), cuts), strict=True):
                chunk.append((k, len(part)))
    perm = rng.permutation(n)
    queue = {k: [i for i in perm.tolist() if y[i] == k] for k in classes}
    members = [{k: [queue[k].pop(0) for _ in range(count)] for k, count in chunk} for chunk in chunks]
    turns = rng.permuted(np.tile(np.arange(len(classes)), (len(classes), 1)), axis=1)
    out = []
    for chunk, turn in zip(members, turns.tolist(), strict=True):
        for t in range(len(classes)):
            out += chunk[classes[turn.index(t)]]
    return out


@pytest.mark.parametrize("delta", [0.1, 1.0, 20.0])
def test_dirichlet_is_its_naive_twin(delta: float) -> None:
    y = np.random.default_rng(0).choice([1, 3, 4, 8], 300, p=[0.4, 0.3, 0.2, 0.1])
    ours = o.dirichlet(delta)(torch.from_numpy(y), gen(5))
    assert ours.tolist() == naive_dirichlet(y, delta, 10, o._numpy(gen(5)))


def test_dirichlet_goes_from_sorted_to_iid_with_delta(data: Split) -> None:
    y = data.y
    mixing = [runs(y[o.dirichlet(delta)(y, gen())]) for delta in (0.005, 0.1, 1.0)]
    assert 10 <= mixing[0] < 20 < mixing[1] < mixing[2] <= 100  # at most 10 runs in each of 10 chunks


def test_dirichlet_gives_up_with_advice() -> None:
    y = torch.arange(50) % 10
    with pytest.raises(ValueError, match="10 chunks of at least 10 out of 50 images, none of 20 draws"):
        o.dirichlet(0.1, attempts=20)(y, gen())


@settings(deadline=None)
@given(st.integers(2, 30), st.integers(20, 300), seeds)
def test_zipf_never_exceeds_the_data_and_respects_its_head(classes: int, n: int, seed: int) -> None:
    """Below ten classes as well, where the official loop never ends."""
    y = torch.arange(max(n, classes)) % classes
    got = y[o.zipf()(y, gen(seed))]
    assert 0 < len(got) <= len(y)
    top = max(1, int(0.1 * classes))
    assert got.bincount().sort(descending=True).values[:top].sum() < 0.9 * len(y)


def test_zipf_counts_are_the_published_ones() -> None:
    y, rng = torch.arange(2000) % 20, o._numpy(gen(7))
    while True:  # LAME src/data/build.py, with its floor
        p = rng.zipf(2.0, 20).astype(float)
        p /= p.sum()
        counts = [math.floor(2000 * q) for q in p]
        if sum(sorted(counts, reverse=True)[: math.floor(0.1 * 20)]) < 0.9 * 2000:
            break
    assert y[o.zipf()(y, gen(7))].bincount(minlength=20).tolist() == counts


def test_zipf_of_one_class_gives_up() -> None:
    with pytest.raises(ValueError, match="1 of 1 classes to hold less than 0.9"):
        o.zipf()(torch.zeros(50, dtype=torch.int64), gen())


def test_label_shift_has_the_prior_and_draws_all_images_of_a_class(data: Split) -> None:
    prior = o.long_tail_prior(10, 20.0)
    y = data.y.repeat(50)  # 20,000 images
    rows = o.label_shift(prior)(y, gen())
    counts, n = y[rows].bincount(minlength=10), len(y)
    # chi-square with 9 degrees of freedom: 27.9 is the 99.9 % quantile.
    assert ((counts - n * prior) ** 2 / (n * prior)).sum() < 27.9
    of_first = rows[y[rows] == 0]  # about 5,000 draws with replacement among 2,000
    hits = of_first.bincount(minlength=n)[y == 0].float()
    assert abs(hits.var() / hits.mean() - 1) < 0.15  # Poisson: variance equals mean


def test_label_shift_needs_images_for_its_classes() -> None:
    y = torch.tensor([0, 2, 2])
    assert set(y[o.label_shift(torch.tensor([1.0, 0.0, 3.0]))(y, gen())].tolist()) <= {0, 2}
    with pytest.raises(ValueError, match=r"weight for \[1\]"):
        o.label_shift(torch.ones(3))(y, gen())
    for bad in ([-1.0, 2.0], [0.0, 0.0], [math.nan, 1.0], [[1.0]]):
        with pytest.raises(ValueError, match="prior: expected a vector of finite weights"):
            o.label_shift(torch.tensor(bad))


@settings(deadline=None)
@given(st.integers(2, 20), st.floats(1.0, 1000.0))
def test_priors_are_a_family(classes: int, imbalance: float) -> None:
    prior = o.long_tail_prior(classes, imbalance)
    assert math.isclose(prior[0] / prior[-1], imbalance, rel_tol=1e-3)
    torch.testing.assert_close(prior[1:] / prior[:-1], torch.full((classes - 1,), imbalance ** (-1 / (classes - 1))))
    torch.testing.assert_close(o.power_prior(prior, 1.0), prior)
    torch.testing.assert_close(o.power_prior(prior, 0.0), torch.full((classes,), 1 / classes))
    torch.testing.assert_close(o.power_prior(prior, -1.0), prior.flip(0))


def test_parameters_of_orders_are_checked() -> None:
    for make, message in (
        (lambda: o.dirichlet(0.0), "delta: expected a number > 0, got 0.0"),
        (lambda: o.zipf(1.0), "a: expected an exponent > 1, got 1.0"),
        (lambda: o.long_tail_prior(1, 10.0), "classes, imbalance"),
        (lambda: o.power_prior(torch.tensor([0.0, 1.0]), -1.0), "prior: expected weights > 0"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


@pytest.mark.parametrize("order", [o.sorted_by_class, o.dirichlet(0.1), o.zipf(), o.label_shift(torch.ones(10))])
def test_orders_work_inside_every_segment(data: Split, order: o.Order) -> None:
    stream = continual(data, ["clean", noise], order=order)
    first, second = stream.segments()
    if order is o.sorted_by_class:
        assert runs(first.y) == runs(second.y) == 10
    else:
        assert not (len(first.y) == len(second.y) and first.y.equal(second.y))  # drawn anew in every segment
    assert first.y.unique().numel() > 1


@pytest.mark.parametrize(
    ("n", "size", "sizes"), [(41, 40, [41]), (81, 40, [40, 41]), (42, 40, [40, 2]), (3, 1, [1] * 3)]
)
def test_a_last_image_alone_joins_the_batch_before(n, size, sizes):
    """For every builder: BatchNorm has no statistics of one image, and would say so at the end of a segment."""
    data = Split(torch.rand(n, 1, 8, 8, generator=gen()), torch.arange(n) % 3)
    whole = mixed(data, ["clean"], batch_size=size)
    for stream in (continual(data, ["clean", "contrast"], batch_size=size), gradual(data, ["fog"], batch_size=size)):
        parts = list(stream.segments())
        assert all([len(batch.y) for batch in part] == sizes for part in parts)
        assert len(stream) == len(parts) * len(sizes) and torch.equal(torch.cat([b.x for b in stream]), stream.x)
    assert [len(batch.y) for batch in whole] == sizes
    assert f"batches of at most {max(*sizes, size)}, " in repr(whole)
