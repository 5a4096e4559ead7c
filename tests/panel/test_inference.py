"""From scores to coefficients and standard errors: sums in loops, limits, and scales that must not matter."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from peftref.panel.core.folds import Folds, make_folds
from peftref.panel.core.inference import over_repeats, row_weights, solve, standard_error
from peftref.panel.core.layout import Layout

CLUSTERS = ("unit", "twoway", None)


def layout_of(n_units: int = 11, n_periods: int = 7, balanced: bool = True, seed: int = 0) -> Layout:
    rows = list(product(range(n_units), range(n_periods)))
    if not balanced:
        kept = torch.rand(len(rows), generator=torch.Generator().manual_seed(seed)) < 0.75
        rows = [row for row, k in zip(rows, kept.tolist(), strict=True) if k or row[1] < 2]
    return Layout.of(*map(list, zip(*rows, strict=True)))


def scores(n: int, repeats: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    v, u = (torch.randn(repeats, n, generator=g, dtype=torch.float64) for _ in range(2))
    return -v.square(), v * u


def scheme_of(cluster: str | None, by_unit: bool = True) -> str:
    return "product" if cluster == "twoway" else "unit" if by_unit else "random"


def loops(a: Tensor, b: Tensor, layout: Layout, folds: Folds, cluster: str | None) -> tuple[float, float]:
    """Coefficient and standard error of one split, as the formulas are read aloud."""
    unit, time, fold = layout.unit.tolist(), layout.time.tolist(), folds.fold[0].tolist()
    a, b, k = a[0].tolist(), b[0].tolist(), len(folds)
    inside = [[i for i in range(len(a)) if fold[i] == j] for j in range(k)]
    side = round(math.sqrt(k))
    if cluster == "twoway":  # a fold is a block: units that some fold of its row has, periods that its column has
        units = [{unit[i] for i in range(len(a)) if fold[i] // side == j // side} for j in range(k)]
        times = [{time[i] for i in range(len(a)) if fold[i] % side == j % side} for j in range(k)]
        say = [1 / (len(units[j]) * len(times[j])) for j in range(k)]
    elif cluster == "unit" and folds.scheme == "unit":
        units = [{unit[i] for i in rows} for rows in inside]
        say = [1 / len(own) for own in units]
    else:
        say = [k / (layout.n_units if cluster else len(a))] * k
    slope = math.fsum(say[j] * a[i] for j in range(k) for i in inside[j])
    theta = -math.fsum(say[j] * b[i] for j in range(k) for i in inside[j]) / slope
    psi = [p * theta + q for p, q in zip(a, b, strict=True)]
    if cluster is None:
        return theta, math.sqrt(sum(p * p for p in psi) / len(a) / len(a)) / abs(slope / k)
    gamma = 0.0
    if cluster == "unit" and folds.scheme == "unit":
        for j in range(k):
            gamma += sum(sum(psi[i] for i in inside[j] if unit[i] == c) ** 2 for c in units[j]) / len(units[j]) / k
        size = layout.n_units
    elif cluster == "unit":
        size = layout.n_units
        gamma = sum(sum(p for p, c in zip(psi, unit, strict=True) if c == own) ** 2 for own in range(size)) / size
    else:
        size = min(layout.n_units, layout.n_periods)
        for j in range(k):
            factor = min(len(units[j]), len(times[j])) / (len(units[j]) * len(times[j])) ** 2
            squares = sum(sum(psi[i] for i in inside[j] if unit[i] == c) ** 2 for c in units[j])
            squares += sum(sum(psi[i] for i in inside[j] if time[i] == c) ** 2 for c in times[j])
            gamma += factor * squares / k
    return theta, math.sqrt(gamma / size) / abs(slope / k)


def estimate(a: Tensor, b: Tensor, layout: Layout, folds: Folds, cluster: str | None) -> tuple[Tensor, Tensor]:
    theta = solve(a, b, row_weights(layout, folds, cluster), folds)
    return theta, standard_error(a * theta.unsqueeze(1) + b, a, layout, folds, cluster)


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("by_unit", [True, False])
@pytest.mark.parametrize("cluster", CLUSTERS)
def test_equals_the_loops(cluster: str | None, by_unit: bool, balanced: bool) -> None:
    layout = layout_of(balanced=balanced)
    folds = make_folds(layout, 3, scheme_of(cluster, by_unit), seed=2)
    a, b = scores(len(layout))
    theta, se = estimate(a, b, layout, folds, cluster)
    assert_close((theta.item(), se.item()), loops(a, b, layout, folds, cluster), rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_repeats_are_solved_one_by_one(cluster: str | None) -> None:
    layout = layout_of(balanced=False)
    folds = make_folds(layout, 3, scheme_of(cluster), repeats=4)
    a, b = scores(len(layout), 4)
    together = estimate(a, b, layout, folds, cluster)
    for r in range(4):
        alone = estimate(a[r : r + 1], b[r : r + 1], layout, Folds(folds.fold[r : r + 1], folds.keep, folds.scheme),
                         cluster)  # fmt: skip
        assert_close([t[r : r + 1] for t in together], list(alone), rtol=1e-13, atol=0.0)


def test_dml1_is_the_mean_over_folds() -> None:
    layout = layout_of(balanced=False)
    folds = make_folds(layout, 4, repeats=3)
    a, b = scores(len(layout), 3)
    found = solve(a, b, row_weights(layout, folds, "unit"), folds, "dml1")
    for r in range(3):
        ratios = [-(b[r][folds.fold[r] == k].sum() / a[r][folds.fold[r] == k].sum()).item() for k in range(4)]
        assert_close(found[r].item(), sum(ratios) / 4, rtol=1e-12, atol=0.0)
    one = Folds(torch.zeros_like(folds.fold), torch.ones(1, 1, dtype=torch.bool))
    assert_close(solve(a, b, row_weights(layout, one, "unit"), one, "dml1"),
                 solve(a, b, row_weights(layout, one, "unit"), one), rtol=1e-13, atol=0.0)  # fmt: skip


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_score_is_zero_at_the_estimate(cluster: str | None) -> None:
    layout = layout_of(balanced=False)
    folds = make_folds(layout, 3, scheme_of(cluster))
    a, b = scores(len(layout))
    weights = row_weights(layout, folds, cluster)
    theta = solve(a, b, weights, folds)
    assert abs((weights * (a * theta + b)).sum()) < 1e-12


@settings(max_examples=15, deadline=None)
@given(scale=st.floats(1e-3, 1e3), shift=st.floats(-10, 10), cluster=st.sampled_from(CLUSTERS))
def test_units_of_measurement(scale: float, shift: float, cluster: str | None) -> None:
    layout = layout_of(balanced=False)
    folds = make_folds(layout, 3, scheme_of(cluster))
    a, b = scores(len(layout))
    theta, se = estimate(a, b, layout, folds, cluster)
    assert_close(estimate(a, scale * b, layout, folds, cluster), (scale * theta, scale * se))
    assert_close(estimate(scale * a, scale * b, layout, folds, cluster), (theta, se))
    assert_close(estimate(a, b - shift * a, layout, folds, cluster), (theta + shift, se))


def test_weights() -> None:
    layout = layout_of(n_units=5, n_periods=2)
    fold = torch.tensor([[0, 0, 0, 0, 0, 0, 1, 1, 1, 1]])
    folds = Folds(fold, ~torch.eye(2, dtype=torch.bool), "unit")
    expected = torch.tensor([[1 / 3] * 6 + [1 / 2] * 4], dtype=torch.float64)
    assert_close(row_weights(layout, folds, "unit"), expected)
    for given_folds, cluster in ((folds, None), (Folds(fold, folds.keep), "unit"), (Folds(fold, folds.keep), None)):
        weights = row_weights(layout, given_folds, cluster)
        assert weights.shape == fold.shape and weights.unique().numel() == 1
    equal = make_folds(layout_of(10, 3), 5)
    assert row_weights(layout_of(10, 3), equal, "unit").unique().tolist() == [0.5]


def test_one_row_in_each_cluster_is_no_clustering() -> None:
    layout = Layout.of(range(20), [0] * 20)
    folds = make_folds(layout, 5)
    a, b = scores(20)
    assert_close(estimate(a, b, layout, folds, "unit"), estimate(a, b, layout, folds, None), rtol=1e-12, atol=0.0)


def test_a_unit_written_down_twice_adds_no_knowledge() -> None:
    once, twice = Layout.of(range(20), [0] * 20), Layout.of([i // 2 for i in range(40)], [0, 1] * 20)
    a, b = scores(20)
    folds = make_folds(once, 5)
    copied = Folds(folds.fold.repeat_interleave(2, 1), folds.keep, "unit")
    doubled = [t.repeat_interleave(2, 1) for t in (a, b)]
    one, two = estimate(a, b, once, folds, "unit"), estimate(*doubled, twice, copied, "unit")
    assert_close(two, one, rtol=1e-12, atol=0.0)
    plain = estimate(*doubled, twice, copied, None)
    assert_close(plain[1] * 2**0.5, one[1], rtol=1e-12, atol=0.0)  # without clusters the copies count


def test_without_folds_it_is_the_sandwich() -> None:
    layout = layout_of(balanced=False)
    folds = Folds(torch.zeros(1, len(layout), dtype=torch.long), torch.ones(1, 1, dtype=torch.bool))
    a, b = scores(len(layout))
    theta, se = estimate(a, b, layout, folds, "unit")
    psi = (a * theta + b)[0]
    sums = torch.zeros(layout.n_units, dtype=torch.float64).index_add_(0, layout.unit, psi)
    assert_close(se.item(), (sums.square().sum().sqrt() / a.sum().abs()).item(), rtol=1e-12, atol=0.0)
    assert_close(theta, -b.sum(1) / a.sum(1), rtol=1e-12, atol=0.0)


def test_folds_that_cut_what_their_scheme_keeps_together() -> None:
    layout = layout_of(10, 4)
    row, unit = torch.arange(40)[None], layout.unit[None]
    a, b = scores(40)
    for cluster, scheme, fold, k in (
        ("unit", "unit", row % 5, 5),
        ("unit", "unit", torch.cat((unit % 5, torch.where(row == 7, (unit + 1) % 5, unit % 5))), 5),  # a row astray
        ("twoway", "product", row % 4, 4),
        ("twoway", "product", unit % 5, 5),  # not K x K
    ):
        folds = Folds(fold, ~torch.eye(k, dtype=torch.bool), scheme)
        with pytest.raises(ValueError, match="^folds: expected"):
            row_weights(layout, folds, cluster)
        with pytest.raises(ValueError, match="^folds: expected"):
            standard_error(a, a, layout, folds, cluster)
        assert torch.isfinite(row_weights(layout, folds, None)).all()


# -- repeated splits


def test_one_split_is_itself() -> None:
    assert_close(over_repeats(torch.tensor([0.7]).double(), torch.tensor([0.2]).double()), (0.7, 0.2))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(0.01, 5)), min_size=1, max_size=7))
def test_medians(pairs: list[tuple[float, float]]) -> None:
    def median(values: list[float]) -> float:
        values, half = sorted(values), len(values) // 2
        return values[half] if len(values) % 2 else (values[half - 1] + values[half]) / 2

    coefs, ses = (torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True))
    theta = median([c for c, _ in pairs])
    expected = theta, (median([c + 1.96 * s for c, s in pairs]) - theta) / 1.96
    assert_close(over_repeats(coefs, ses), expected, rtol=1e-9, atol=1e-9)
    order = torch.randperm(len(coefs))
    assert over_repeats(coefs[order], ses[order]) == over_repeats(coefs, ses)


def test_the_median_end_of_the_intervals_not_the_median_error() -> None:
    coefs, ses = (torch.tensor(t, dtype=torch.float64) for t in ([0.0, 0.5, 1.0], [0.5, 0.1, 0.1]))
    theta, se = over_repeats(coefs, ses)  # the intervals end at 0.98, 0.696 and 1.196
    assert theta == 0.5 and se == pytest.approx(0.48 / 1.96)
