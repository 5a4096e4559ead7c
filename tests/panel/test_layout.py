"""Rows of a panel in one order; means, demeaning and differences against pandas and least squares."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peftref.panel.layout import Layout, group_sums, means, within


def unbalanced(seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame({"unit": np.repeat(np.arange(12), 6), "time": np.tile(np.arange(6), 12)})
    frame["a"] = rng.normal(3, 2, size=72)
    return frame[rng.random(72) < 0.7].sample(frac=1, random_state=seed).reset_index(drop=True)


def of(frame: pd.DataFrame) -> tuple[Layout, torch.Tensor]:
    layout = Layout.of(frame["unit"], frame["time"])
    return layout, torch.from_numpy(frame["a"].to_numpy()[layout.order.numpy()])


@pytest.mark.parametrize(
    ("unit", "time"),
    [
        (["b", "a", "b", "a"], [2, 2, 1, 1]),
        ([-3, -7, -3, -7], [0.5, 0.5, -0.5, -0.5]),
        (pd.Series(["b", "a", "b", "a"], dtype="category"), pd.to_datetime(["2021", "2021", "2020", "2020"])),
        (pd.Series([2, 1, 2, 1], index=[9, 9, 9, 9]), np.array([2, 2, 1, 1], dtype=np.uint8)),
    ],
)
def test_labels_of_any_sortable_type(unit, time) -> None:
    layout = Layout.of(unit, time)
    assert layout.order.tolist() == [3, 1, 2, 0]
    assert layout.unit.tolist() == [0, 0, 1, 1] and layout.time.tolist() == [0, 1, 0, 1]
    assert layout.balanced and (layout.n_units, layout.n_periods) == (2, 2) and layout.counts().tolist() == [2, 2]


@pytest.mark.parametrize(
    ("unit", "time", "message"),
    [
        ([1, 1], [1], "^unit, time: expected equal, positive lengths, got 2 and 1"),
        ([], [], "^unit, time: expected equal, positive lengths"),
        ([1, None], [1, 2], "^unit: expected no missing labels, got 1"),
        ([1, 1], [1, np.nan], "^time: expected no missing labels, got 1"),
        (["a", "b", "a"], [1, 1, 1], "got several for unit 'a', period 1"),
    ],
)
def test_bad_labels(unit, time, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Layout.of(unit, time)


def test_a_table_to_check_by_eye() -> None:
    layout = Layout.of([1, 1, 2, 2], [1, 2, 1, 2])
    a = torch.tensor([1.0, 3.0, 10.0, 40.0], dtype=torch.float64)
    assert within(a, layout).tolist() == [-1, 1, -15, 15]
    assert within(a, layout, twoway=True).tolist() == [7, -7, -7, 7]
    assert group_sums(a, layout.unit, 2).tolist() == [4, 50]
    assert means(a, layout.time).tolist() == [5.5, 21.5, 5.5, 21.5]


def test_within_is_that_of_pandas() -> None:
    frame = unbalanced()
    layout, a = of(frame)
    expected = (frame["a"] - frame.groupby("unit")["a"].transform("mean")).to_numpy()[layout.order.numpy()]
    assert np.allclose(within(a, layout), expected, rtol=0, atol=1e-12)
    both = torch.stack((a, 2 * a)).expand(3, 2, -1)
    assert torch.allclose(within(both, layout)[1, 1], 2 * within(a, layout))
    columns = within(torch.stack((a, a**2), -1), layout, dim=-2)
    assert torch.allclose(columns[:, 1], within(a**2, layout))


@pytest.mark.parametrize("seed", range(3))
def test_two_ways_are_least_squares_on_dummies(seed: int) -> None:
    frame = unbalanced(seed)
    layout, a = of(frame)
    assert not layout.balanced
    dummies = np.hstack([np.eye(12)[layout.unit], np.eye(6)[layout.time]])
    expected = a.numpy() - dummies @ np.linalg.lstsq(dummies, a.numpy(), rcond=None)[0]
    found = within(a, layout, twoway=True)
    assert np.allclose(found, expected, rtol=0, atol=1e-9)
    assert means(found, layout.unit).abs().max() < 1e-9 and means(found, layout.time).abs().max() < 1e-9


def test_two_ways_of_a_balanced_panel_in_closed_form() -> None:
    layout = Layout.of(np.repeat(np.arange(5), 4), np.tile(np.arange(4), 5))
    a = torch.from_numpy(np.random.default_rng(0).normal(size=20))
    closed = a - means(a, layout.unit) - means(a, layout.time) + a.mean()
    assert torch.allclose(within(a, layout, twoway=True), closed, rtol=0, atol=1e-12)


def test_nothing_to_demean() -> None:
    frame = unbalanced()
    layout, a = of(frame)
    assert within(torch.empty(1, 0, len(a), dtype=torch.float64), layout, twoway=True).shape == (1, 0, len(a))


@given(seed=st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_differences_do_not_cross_gaps(seed: int) -> None:
    """As pandas on the full grid of units and periods."""
    frame = unbalanced(seed)
    layout, a = of(frame)
    now, before = layout.consecutive()
    times = np.sort(frame["time"].unique())
    grid = frame.set_index(["unit", "time"]).reindex(pd.MultiIndex.from_product([frame["unit"].unique(), times]))
    expected = grid["a"].groupby(level=0).diff().dropna().sort_index()
    assert np.allclose(a[now] - a[before], expected, rtol=0, atol=1e-12) and len(now) == len(expected)


def test_select_renumbers() -> None:
    layout = Layout.of([5, 5, 6, 7, 7], [1, 2, 3, 1, 2])
    some = layout.select(layout.unit != 1)
    assert some.unit.tolist() == [0, 0, 1, 1] and some.time.tolist() == [0, 1, 0, 1]
    assert some.order.tolist() == [0, 1, 3, 4] and (some.n_units, some.n_periods) == (2, 2)
    assert len(layout) == 5 and layout.n_units == 3  # as it was
