"""The theory: quadrature against SciPy and closed forms, margins against models written out, counting against both."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import multivariate_normal, norm
from torch.testing import assert_close

from peftref.merging.experiments.spurious import (
    imbalance_gain,
    margin_ose,
    margin_single,
    margin_wse,
    simulate,
    spurious_accuracy,
)
from tests._naive.bang import Models, quad_accuracy

shares = st.floats(0.01, 1.0)
scales = st.sampled_from([0.1, 0.5, 1.0, 3.0, 10.0])


@st.composite
def pairs(draw: st.DrawFn, most: int = 40) -> dict[str, int]:
    """Two models with at least one spurious feature each, some shared."""
    n_v, n_v2 = draw(st.integers(0, most)), draw(st.integers(0, most))
    n_s, n_s2 = draw(st.integers(1, most)), draw(st.integers(1, most))
    n_vo, n_so = draw(st.integers(0, min(n_v, n_v2))), draw(st.integers(0, min(n_s, n_s2)))
    return {"n_v": n_v, "n_s": n_s, "n_v2": n_v2, "n_s2": n_s2, "n_vo": n_vo, "n_so": n_so}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- F_p --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("classes", [3, 4])
@pytest.mark.parametrize("p", [0.05, 0.9])
def test_accuracy_is_the_orthant_of_the_margins(classes, p):
    own, common = p * (classes + 2 - p * classes) / classes, p * (classes + 1 - p * classes) / classes
    cov = np.full((classes - 1, classes - 1), common) + (own - common) * np.eye(classes - 1)
    x = torch.linspace(-1, 2, 7)
    # xi + x > 0; xi is symmetric, so this is xi < x
    at = [[v] * (classes - 1) for v in x.tolist()]
    expected = [multivariate_normal.cdf(v, cov=cov, abseps=1e-6, releps=1e-6) for v in at]
    assert_close(spurious_accuracy(x, p, classes), torch.tensor(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("classes", "error"), [(2, 1e-11), (10, 1e-11), (100, 1e-8), (1000, 1e-5)])
def test_accuracy_by_adaptive_quadrature(classes, error):
    x, p = torch.tensor([-0.5, 0.0, 0.3, 1.0, 2.5]), torch.tensor([0.001, 0.3, 0.9, 1.0])
    grid = spurious_accuracy(x[:, None], p, classes)
    expected = [[quad_accuracy(v, q, classes) for q in p.double().tolist()] for v in x.double().tolist()]
    assert_close(grid, torch.tensor(expected, dtype=torch.double), rtol=0, atol=error)


@settings(max_examples=50, deadline=None)
@given(x=st.floats(-3, 3), p=shares)
def test_accuracy_of_two_classes(x, p):
    assert spurious_accuracy(x, p, 2).item() == pytest.approx(norm.cdf(x / math.sqrt(p * (4 - 2 * p) / 2)), abs=1e-12)


@settings(max_examples=50, deadline=None)
@given(p=shares)
def test_accuracy_without_margin_is_an_orthant_in_closed_form(p):
    for classes, orthant in (
        (3, lambda r: 1 / 4 + math.asin(r) / (2 * math.pi)),
        (4, lambda r: 1 / 8 + 3 * math.asin(r) / (4 * math.pi)),
    ):
        correlation = (classes + 1 - p * classes) / (classes + 2 - p * classes)
        assert spurious_accuracy(0.0, p, classes).item() == pytest.approx(orthant(correlation), abs=1e-12)


def test_limits_of_accuracy():
    classes = torch.tensor([2, 5, 10, 100])
    assert_close(spurious_accuracy(0.0, 1.0, classes), 1 / classes.double())  # every feature drawn anew: chance
    assert_close(spurious_accuracy(math.inf, 0.7, 10).item(), 1.0)
    assert spurious_accuracy(-math.inf, 0.7, 10) == 0
    # nothing fails, or all ties
    assert spurious_accuracy(torch.tensor([-1.0, 0.0, 1e-9]), 0.0, 4).tolist() == [0.0, 0.25, 1.0]
    assert spurious_accuracy(0.5, 1e-12, 10) == pytest.approx(1)


@settings(max_examples=50, deadline=None)
@given(x=st.floats(-2, 3), dx=st.floats(0.01, 1), p=shares, classes=st.integers(2, 200))
def test_accuracy_rises_with_the_margin(x, dx, p, classes):
    low, high = spurious_accuracy(torch.tensor([x, x + dx]), p, classes)
    assert 0 <= low <= 1 and 0 <= high <= 1
    assert high > low or low > 1 - 1e-6 or high < 1e-6  # but for the error of the quadrature at 200 classes


# --- the margins ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("numbers", "p", "a", "b"),
    [
        ((1, 2, 2, 3, 1, 1), 0.6, 1.0, 1.0),
        ((0, 3, 1, 2, 0, 2), 0.9, 2.0, 1.0),
        ((2, 2, 3, 2, 2, 1), 0.3, 0.5, 3.0),
        ((1, 2, 0, 2, 0, 0), 1.0, 3.0, 3.0),
    ],
)
def test_margins_of_models_written_out(numbers, p, a, b):
    """Means and covariances over every outcome give the margins, and the covariance behind F_p."""
    names = ("n_v", "n_s", "n_v2", "n_s2", "n_vo", "n_so")
    pair, classes = dict(zip(names, numbers, strict=True)), 4
    first, second, ose, wse = Models(**pair, classes=classes, a=a, b=b).moments(p)
    own, common = p * (classes + 2 - p * classes) / classes, p * (classes + 1 - p * classes) / classes
    unit = np.full((3, 3), common) + (own - common) * np.eye(3)
    for (mean, cov), margin in (
        (first, margin_single(p, pair["n_v"], pair["n_s"])),
        (second, margin_single(p, pair["n_v2"], pair["n_s2"])),
        (ose, margin_ose(p, **pair, scale=a * b)),
        (wse, margin_wse(p, **pair, scale=a, feature_scale=b)),
    ):
        weight = cov[0, 0] / own  # sum of the squared weights of the spurious features
        np.testing.assert_allclose(cov, weight * unit, atol=1e-9)
        assert margin.item() == pytest.approx(mean / math.sqrt(weight), abs=1e-9)


@settings(max_examples=50, deadline=None)
@given(p=shares, n_v=st.integers(0, 50), n_s=st.integers(1, 50))
def test_no_overlap_and_full_overlap(p, n_v, n_s):
    single = margin_single(p, n_v, n_s)
    for margin in (margin_ose, margin_wse):
        assert_close(margin(p, n_v, n_s), math.sqrt(2) * single)  # strangers
        assert_close(margin(p, n_v, n_s, n_vo=n_v, n_so=n_s), single)  # the same model twice
        assert_close(margin(p, n_v, n_s, n_vo=n_v, n_so=n_s, scale=7.0), single)  # however loud


@settings(max_examples=50, deadline=None)
@given(p=shares, pair=pairs(), scale=scales, feature_scale=scales)
def test_margins_do_not_depend_on_who_is_first(p, pair, scale, feature_scale):
    other = {"n_v": "n_v2", "n_v2": "n_v", "n_s": "n_s2", "n_s2": "n_s", "n_vo": "n_vo", "n_so": "n_so"}
    swapped = {name: pair[o] for name, o in other.items()}
    assert_close(margin_ose(p, **pair, scale=scale), margin_ose(p, **swapped, scale=1 / scale))
    assert_close(
        margin_wse(p, **pair, scale=scale, feature_scale=feature_scale),
        margin_wse(p, **swapped, scale=1 / scale, feature_scale=1 / feature_scale),
    )


@settings(max_examples=50, deadline=None)
@given(p=shares, n_v=st.integers(0, 50), n_s=st.integers(1, 50), scale=scales)
def test_gain_of_a_louder_stranger(p, n_v, n_s, scale):
    expected = imbalance_gain(scale) * margin_single(p, n_v, n_s)
    assert_close(margin_ose(p, n_v, n_s, scale=scale), expected)
    assert_close(margin_wse(p, n_v, n_s, scale=scale), expected)
    root = math.sqrt(scale)  # head and features both
    assert_close(margin_wse(p, n_v, n_s, scale=root, feature_scale=root), expected)


def test_gain_is_largest_between_equals():
    scale = torch.logspace(-3, 3, 601, dtype=torch.double)
    gain = imbalance_gain(scale)
    assert_close(gain, gain.flip(0))
    assert gain.argmax() == 300 and gain[300] == pytest.approx(math.sqrt(2))
    assert gain[0] == pytest.approx(1, abs=2e-3)


def test_without_spurious_features_nothing_fails():
    x = margin_single(torch.tensor([0.0, 0.9]), n_v=3, n_s=0)
    assert x.isinf().all()
    assert_close(spurious_accuracy(x, torch.tensor([0.0, 0.9]), 10), torch.ones(2, dtype=torch.double))
    assert margin_ose(0.9, 3, 0, n_vo=1).isinf() and margin_wse(0.9, 3, 0, n_vo=1).isinf()


def test_grids_broadcast():
    p, n = torch.linspace(0, 1, 5)[:, None], torch.tensor([5.0, 10.0, 20.0])
    x = margin_wse(p, 1, n, n_so=n / 5)
    grid = spurious_accuracy(x, p, torch.tensor([3, 5, 10]))
    assert grid.shape == (5, 3) and grid.dtype == torch.double
    for i in range(5):
        for j, classes in enumerate((3, 5, 10)):
            margin = margin_wse(p[i, 0].item(), 1, n[j].item(), n_so=n[j].item() / 5)
            alone = spurious_accuracy(margin, p[i, 0].item(), classes)
            assert_close(grid[i, j], alone, atol=1e-7, rtol=0)  # p came in float32


# --- counting ---------------------------------------------------------------------------------------------------------
def within(share: float, expected: float, draws: int, errors: float = 4.0) -> bool:
    return abs(share - expected) <= errors * math.sqrt(max(expected * (1 - expected), 1e-4) / draws)


@pytest.mark.parametrize(
    ("numbers", "p", "a", "b"),
    [
        ((1, 2, 1, 2, 0, 0), 0.9, 1.0, 1.0),
        ((1, 3, 0, 3, 0, 1), 0.8, 1.0, 1.0),
        ((0, 3, 1, 2, 0, 2), 1.0, 3.0, 1.0),
        ((1, 2, 2, 3, 1, 1), 0.95, 0.7, 1.3),
    ],
)
def test_counting_by_enumerating_every_outcome(numbers, p, a, b):
    names = ("n_v", "n_s", "n_v2", "n_s2", "n_vo", "n_so")
    pair = dict(zip(names, numbers, strict=True))
    got = simulate(p, **pair, classes=3, scale=a, feature_scale=b, generator=generator(), draws=200_000)
    for share, expected in zip(got[:4], Models(**pair, classes=3, a=a, b=b).exact(p), strict=True):
        assert within(share, expected, 200_000)


def test_counting_rescues_as_often_as_models_written_out():
    pair = {"n_v": 1, "n_s": 6, "n_v2": 1, "n_s2": 6, "n_vo": 1, "n_so": 2}
    got = simulate(0.9, **pair, classes=4, generator=generator(), draws=200_000)
    naive = Models(**pair, classes=4).sample(0.9, draws=8000, seed=0)
    for share, expected in zip(got, naive, strict=True):
        assert within(share, expected, 8000)
    assert got.fft_ose > 0.01 and got.fft_wse > got.fft_ose  # the shared invariant feature counts 4 of 4 + 10


@pytest.mark.parametrize("overlap", [0, 150])
def test_theory_holds_for_many_features(overlap):
    pair, p, classes = {"n_v": 10, "n_s": 600, "n_so": overlap, "n_vo": 5}, 0.97, 4
    draws = 60_000
    got = simulate(p, **pair, classes=classes, generator=generator(1), draws=draws)
    theory = (margin_single(p, 10, 600), margin_single(p, 10, 600), margin_ose(p, **pair), margin_wse(p, **pair))
    for share, margin in zip(got[:4], theory, strict=True):
        expected = spurious_accuracy(margin, p, classes).item()
        assert abs(share - expected) < 3 * math.sqrt(expected * (1 - expected) / draws) + 0.005


def test_a_model_averaged_with_itself_rescues_nothing():
    got = simulate(0.9, 1, 8, classes=5, n_vo=1, n_so=8, scale=2.5, generator=generator(), draws=20_000)
    assert got.first == got.second == got.ose == got.wse and got.fft_ose == got.fft_wse == 0
    assert 0.3 < got.first < 0.9


def test_counting_limits():
    assert simulate(0.0, 0, 4, classes=10, generator=generator(), draws=500)[:4] == (1, 1, 1, 1)
    assert simulate(0.9, 2, 0, classes=10, generator=generator(), draws=500)[:4] == (1, 1, 1, 1)
    chance = simulate(1.0, 0, 5, classes=10, generator=generator(), draws=100_000)
    assert all(within(share, 0.1, 100_000) for share in chance[:4])


def test_counting_in_chunks_and_seeds(monkeypatch):
    def run(seed: int):
        return simulate(0.9, 2, 10, classes=5, n_so=3, generator=generator(seed), draws=20_000)

    whole = run(0)
    assert run(0) == whole and run(1) != whole
    monkeypatch.setattr("peftref.merging.experiments.spurious.CHUNK", 5 * 3000)  # the last chunk is smaller
    assert within(run(0).ose, whole.ose, 20_000, 6) and run(0) != whole


def test_every_setting_of_counting_matters():
    base = {"p": 0.9, "n_v": 2, "n_s": 10, "n_v2": 2, "n_s2": 10, "n_vo": 0, "n_so": 0, "classes": 5}
    run = [
        simulate(**{**base, **change}, generator=generator(), draws=20_000)
        for change in (
            {}, {"p": 0.7}, {"n_v": 4}, {"n_s": 20}, {"n_v2": 4}, {"n_s2": 20}, {"n_vo": 1}, {"n_so": 5},
            {"classes": 10}, {"scale": 4.0}, {"feature_scale": 4.0},
        )
    ]  # fmt: skip
    for other in run[1:]:
        assert max(abs(a - b) for a, b in zip(run[0], other, strict=True)) > 0.01


# --- bad input --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: spurious_accuracy(1.0, 1.1, 3), "p: expected"),
        (lambda: spurious_accuracy(1.0, math.nan, 3), "p: expected"),
        (lambda: spurious_accuracy(1.0, 0.5, 1), "classes: expected integers >= 2, got 1"),
        (lambda: spurious_accuracy(1.0, 0.5, torch.tensor([3.0, 2.5])), "classes: expected integers"),
        (lambda: margin_single(-0.1, 1, 1), "p: expected"),
        (lambda: margin_single(0.5, -1, 1), "n_v: expected"),
        (lambda: margin_single(0.5, torch.tensor([1.0, 0.0]), 0), "at least one feature"),
        (lambda: margin_ose(0.5, 1, 1, 0, 0), "at least one feature"),
        (lambda: margin_ose(0.5, 1, 4, n_s2=2, n_so=3), "n_so: expected no more than each model has"),
        (lambda: margin_wse(0.5, 1, 4, n_v2=0, n_vo=1), "n_vo: expected no more"),
        (lambda: margin_wse(0.5, 1, 4, scale=0), "scale: expected positive"),
        (lambda: margin_wse(0.5, 1, 4, feature_scale=-1), "feature_scale: expected positive"),
        (lambda: imbalance_gain(torch.tensor([1.0, math.inf])), "scale: expected positive"),
        (lambda: simulate(0.5, 1, 2.5, classes=3, generator=generator()), "features: expected whole"),
        (lambda: simulate(0.5, 1, 2, classes=1, generator=generator()), "classes: expected"),
        (lambda: simulate(0.5, 1, 2, classes=3, generator=generator(), draws=0), "draws: expected an integer >= 1"),
        (lambda: simulate(0.5, 1, 2, classes=3, generator=generator(), n_so=3), "n_so: expected"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_bad_input_draws_nothing():
    g = generator()
    before = g.get_state()
    with pytest.raises(ValueError, match="scale"):
        simulate(0.5, 1, 2, classes=3, generator=g, scale=-1.0)
    assert torch.equal(g.get_state(), before)
