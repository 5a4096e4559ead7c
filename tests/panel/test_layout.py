"""Rows of a panel in one order; means, demeaning and differences against pandas and least squares."""

from __future__ import annotations

import datetime
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peftref.panel.core.layout import Layout, group_sums, means, within


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
        (torch.tensor([8, 3, 8, 3]), [pd.Timestamp("2021")] * 2 + [pd.Timestamp("2020")] * 2),
        ((("b", 1), ("a", 2), ("b", 1), ("a", 2)), (2, 2, 1, 1)),
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
        (["a", float("nan")], [1, 2], "^unit: expected no missing labels, got 1"),
        ([1, 1], [pd.Timestamp("2020"), pd.NaT], "^time: expected no missing labels, got 1"),
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


def on_dummies(a: torch.Tensor, layout: Layout) -> np.ndarray:
    dummies = np.hstack([np.eye(layout.n_units)[layout.unit], np.eye(layout.n_periods)[layout.time]])
    return a.numpy() - (dummies @ np.linalg.lstsq(dummies, a.numpy().T, rcond=None)[0]).T


def test_two_ways_where_units_hardly_overlap() -> None:
    """Each unit is seen three times, in a row: projecting in turn is far from done after thousands of rounds."""
    unit = np.repeat(np.arange(150), 3)
    layout = Layout.of(unit, unit + np.tile([0, 1, 2], 150))
    a = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 450)))
    a[1] = 1e6 * (layout.time + layout.unit)  # effects and nothing else
    found, expected = within(a, layout, twoway=True), on_dummies(a, layout)
    assert np.allclose(found[0], expected[0], rtol=0, atol=1e-10) and found[1].abs().max() < 1e-4
    assert np.allclose(within(a[0], layout, twoway=True), expected[0], rtol=0, atol=1e-10)
    columns = within(torch.stack((a[0], torch.zeros(450).double()), -1), layout, twoway=True, dim=-2)
    assert np.allclose(columns[:, 0], expected[0], rtol=0, atol=1e-10) and (columns[:, 1] == 0).all()
    turns = a[0]
    for _ in range(2000):
        turns = turns - means(turns, layout.unit)
        turns = turns - means(turns, layout.time)
    assert np.abs(turns.numpy() - expected[0]).max() > 1e-3
    assert not np.allclose(within(a[0], layout, twoway=True, tol=0.1), expected[0], rtol=0, atol=1e-3)


def test_two_ways_of_panels_that_fall_apart() -> None:
    layout = Layout.of([0, 0, 1, 1, 1, 2, 3, 3, 4], [0, 1, 0, 1, 2, 7, 7, 8, 9])  # two parts and a row by itself
    a = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 9)))
    assert np.allclose(within(a, layout, twoway=True), on_dummies(a, layout), rtol=0, atol=1e-12)
    single = Layout.of([0, 0, 0], [1, 2, 3])
    assert within(a[:, :3], single, twoway=True).abs().max() < 1e-15
    assert within(torch.full((1, 9), torch.nan), layout, twoway=True).isnan().all()  # and comes to an end


@pytest.mark.parametrize("share", [0.2, 0.7])
@pytest.mark.parametrize("level", [1e4, 1e6, 1e9])
def test_two_ways_far_from_zero(level: float, share: float) -> None:
    """Unit means are rounded to the digits of the level, and no period effect can undo that."""
    for seed in range(4):
        rng = np.random.default_rng(seed)
        keep = rng.random(120) < share
        layout = Layout.of(np.repeat(np.arange(15), 8)[keep], np.tile(np.arange(8), 15)[keep])
        a = torch.from_numpy(level + rng.normal(size=(1, len(layout))))
        assert np.allclose(within(a, layout, twoway=True), on_dummies(a - level, layout), rtol=0, atol=1e-10)


@given(seed=st.integers(0, 10_000), twoway=st.booleans())
@settings(max_examples=20, deadline=None)
def test_the_order_of_rows_does_not_matter(seed: int, twoway: bool) -> None:
    frame = unbalanced()
    moved = frame.sample(frac=1, random_state=seed)
    made = {}
    for name, rows in (("here", frame), ("there", moved)):
        layout, a = of(rows)
        made[name] = pd.Series(within(a, layout, twoway).numpy(), index=rows.index[layout.order.numpy()])
    pd.testing.assert_series_equal(made["here"].sort_index(), made["there"].sort_index(), rtol=0, atol=1e-12)


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
    back = layout.select(torch.tensor([False, True, False, True, True]))
    assert back.unit.tolist() == [0, 1, 1] and back.time.tolist() == [1, 0, 1]


def test_a_gap_stays_a_gap_when_a_period_is_left_out() -> None:
    """The second unit alone shows that there was a second period."""
    layout = Layout.of([0, 0, 1, 2, 2], [1, 3, 2, 1, 2])
    some = layout.select(layout.unit == 0)
    assert some.n_periods == 2 and some.time.tolist() == [0, 1]
    for each in (some, some.to("cpu"), some.select(torch.tensor([True, True]))):
        assert len(each.consecutive()[0]) == 0
    assert layout.select(layout.unit == 2).consecutive()[0].tolist() == [1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_results_keep_the_type_and_inputs_stay(dtype: torch.dtype) -> None:
    layout, a = of(unbalanced())
    a = a.to(dtype)
    before = a.clone()
    made = [within(a, layout), within(a, layout, twoway=True, tol=1e-6), means(a, layout.time),
            group_sums(a, layout.unit, 12)]  # fmt: skip
    assert all(t.dtype == dtype for t in made) and torch.equal(a, before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu() -> None:
    layout, a = of(unbalanced())
    there = layout.to("cuda")
    for twoway in (False, True):
        found = within(a.cuda(), there, twoway)
        assert found.is_cuda and torch.allclose(found.cpu(), within(a, layout, twoway), rtol=0, atol=1e-10)
    assert there.consecutive()[0].is_cuda and there.select(there.unit > 3).time.is_cuda


def test_columns_that_are_done_early_wait_unharmed() -> None:
    """Beside slow columns, one without variation over periods, one already free of them, and copies of each size."""
    for seed in range(30):
        layout, a = of(unbalanced(seed))
        quick = within(a, layout, True)
        columns = torch.stack([a, quick, layout.unit.double(), layout.time.double(), 1e8 * a, a + 1e8])
        done = within(columns, layout, True)
        dummies = torch.cat([torch.nn.functional.one_hot(g).double() for g in (layout.unit, layout.time)], 1)
        exact = columns - (dummies @ torch.linalg.lstsq(dummies, columns.T, driver="gelsd").solution).T
        scale = columns.abs().amax(-1, keepdim=True)
        torch.testing.assert_close(done / scale, exact / scale, rtol=0, atol=1e-11)


# -- labels

NUMBERS = [9, 10, 11] * 2
ORDERED = {
    "whole": NUMBERS,
    "floats": np.array(NUMBERS, float),
    "objects": pd.Series(NUMBERS, dtype=object),
    "nullable": pd.Series(NUMBERS, dtype="Int64"),
    "dates": pd.to_datetime(["1999-09-01", "1999-10-01", "1999-11-01"] * 2),
    "days": [datetime.date(1999, m, 1) for m in NUMBERS],
    "periods": pd.PeriodIndex(["1999-09", "1999-10", "1999-11"] * 2, freq="M"),
    "ordered text": pd.Categorical(["Sep", "Oct", "Nov"] * 2, categories=["Sep", "Oct", "Nov"], ordered=True),
    "numbers as a category": pd.Categorical(NUMBERS, categories=[11, 9, 10]),
    "pairs": pd.Series([(1999, m) for m in NUMBERS]),
    "intervals": pd.cut(np.array(NUMBERS), [8, 9, 10, 11]),
    "tensor": torch.tensor(NUMBERS),
}
UNORDERED = {
    "digits": ["9", "10", "11"] * 2,
    "array of digits": np.array(["9", "10", "11"] * 2),
    "bytes": np.array([b"9", b"10", b"11"] * 2),
    "strings": pd.Series(["9", "10", "11"] * 2, dtype="string"),
    "months": ["Sep", "Oct", "Nov"] * 2,
    "category of text": pd.Categorical(["t9", "t10", "t11"] * 2),
    "mixed": pd.Series([9, "10", 11] * 2, dtype=object),
    "pairs of text": pd.Series([(1999, "9"), (1999, "10"), (1999, "11")] * 2),
    "complex": np.array(NUMBERS) + 0j,
    "days and moments": [datetime.date(1999, 9, 1), datetime.datetime(1999, 10, 1), datetime.date(1999, 11, 1)] * 2,
}


@pytest.mark.parametrize("kind", ORDERED)
def test_periods_are_in_the_order_of_time(kind: str) -> None:
    assert Layout.of([0, 0, 0, 1, 1, 1], ORDERED[kind]).time.tolist() == [0, 1, 2] * 2
    assert Layout.of([0, 0, 0, 1, 1, 1], ORDERED[kind]).order.tolist() == list(range(6))


@pytest.mark.parametrize("kind", UNORDERED)
def test_periods_without_an_order_in_time(kind: str) -> None:
    with pytest.raises(TypeError, match="^time: expected "):
        Layout.of([0, 0, 0, 1, 1, 1], UNORDERED[kind])


def test_units_may_be_text_of_one_kind() -> None:
    for units in (["b"] * 3 + ["a"] * 3, pd.Categorical(["10"] * 3 + ["9"] * 3), [b"b"] * 3 + [b"a"] * 3):
        assert Layout.of(units, NUMBERS).n_units == 2
    with pytest.raises(TypeError, match="^unit: expected labels of one kind, got int and str mixed"):
        Layout.of([1, 1, 1, "1", "1", "1"], NUMBERS)
    with pytest.raises(ValueError, match=r"^unit: expected one column, got shape \(6, 1\)"):
        Layout.of(np.zeros((6, 1)), NUMBERS)


def test_demeaning_keeps_the_digits_of_what_varies() -> None:
    layout = Layout.of(np.repeat(np.arange(4), 10), np.tile(np.arange(10), 4))
    years = 2000.0 + layout.time.double()
    exact = [Fraction(int(v) ** 4) - sum(Fraction(2000 + i) ** 4 for i in range(10)) / 10 for v in years.tolist()]
    expected = torch.tensor([float(v) for v in exact], dtype=torch.float64)
    assert torch.allclose(within(years**4, layout), expected, rtol=1e-12, atol=1e-5)
