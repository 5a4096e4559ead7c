"""Each scheme is what its definition says, on panels of any shape."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peftref.panel.core.folds import SCHEMES, Folds, make_folds
from peftref.panel.core.layout import Layout


def panel(n_units: int, n_periods: int, share: float = 1.0, seed: int = 0) -> Layout:
    unit, time = np.repeat(np.arange(n_units), n_periods), np.tile(np.arange(n_periods), n_units)
    keep = np.random.default_rng(seed).random(len(unit)) <= share
    return Layout.of(unit[keep], time[keep])


@given(
    scheme=st.sampled_from(SCHEMES), k=st.integers(4, 6), n_units=st.integers(12, 30), n_periods=st.integers(12, 20),
    share=st.sampled_from([1.0, 0.9]), seed=st.integers(0, 1000),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_definitions(scheme: str, k: int, n_units: int, n_periods: int, share: float, seed: int) -> None:
    k = 3 if scheme == "product" else k
    layout = panel(n_units, n_periods, share, seed)
    folds = make_folds(layout, k, scheme, repeats=2, seed=seed)
    cells = k * k if scheme == "product" else k
    assert folds.fold.shape == (2, len(layout)) and len(folds) == cells and folds.scheme == scheme
    assert not folds.keep.diagonal().any()
    for r in range(2):
        tested = torch.cat([test for _, test in folds.splits(r)])
        assert tested.sort().values.tolist() == list(range(len(layout)))  # each row is predicted once
        for train, test in folds.splits(r):
            assert len(train) and len(test)
            overlap = {name: set(code[train].tolist()) & set(code[test].tolist())
                       for name, code in (("unit", layout.unit), ("time", layout.time))}  # fmt: skip
            if scheme in ("unit", "product"):
                assert not overlap["unit"]
            if scheme in ("period", "time_block", "nlo", "product"):
                assert not overlap["time"]
            if scheme in ("time_block", "nlo"):
                times = layout.time[test].unique()
                assert times.max() - times.min() + 1 == len(times)  # adjacent
            if scheme != "nlo" and scheme != "product":
                assert len(train) + len(test) == len(layout)


def test_shares_are_as_equal_as_can_be() -> None:
    layout = panel(13, 9)
    for scheme, code in (("unit", layout.unit), ("period", layout.time), ("time_block", layout.time)):
        folds = make_folds(layout, 4, scheme)
        members = [len(code[folds.fold[0] == k].unique()) for k in range(4)]
        assert max(members) - min(members) <= 1
    sizes = make_folds(layout, 5, "random").fold[0].bincount()
    assert sizes.max() - sizes.min() <= 1


def test_neighbours_are_left_out() -> None:
    keep = make_folds(panel(5, 12), 4, "nlo").keep
    assert keep.tolist() == [
        [False, False, True, True], [False, False, False, True], [True, False, False, False], [True, True, False, False]
    ]  # fmt: skip


def test_product_leaves_out_all_rows_of_its_units_and_periods() -> None:
    layout = panel(6, 6)
    folds = make_folds(layout, 2, "product")
    for train, test in folds.splits():
        assert len(test) == 9 and len(train) == 9  # of 36


@given(n_units=st.integers(9, 15), n_periods=st.integers(9, 15), seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_training_rows_of_product_and_of_nlo_row_by_row(n_units: int, n_periods: int, seed: int) -> None:
    layout = panel(n_units, n_periods, 0.9, seed)
    unit, time = layout.unit.tolist(), layout.time.tolist()
    folds = make_folds(layout, 3, "product", seed=seed)
    share = {u: int(f) // 3 for u, f in zip(unit, folds.fold[0], strict=True)}
    when = {t: int(f) % 3 for t, f in zip(time, folds.fold[0], strict=True)}
    for k, (train, test) in enumerate(folds.splits()):
        cells = [(share[u], when[t]) for u, t in zip(unit, time, strict=True)]
        assert train.tolist() == [i for i, (a, b) in enumerate(cells) if a != k // 3 and b != k % 3]
        assert test.tolist() == [i for i, cell in enumerate(cells) if cell == (k // 3, k % 3)]
    folds = make_folds(layout, 5, "nlo")
    for k, (train, test) in enumerate(folds.splits()):
        block = folds.fold[0].tolist()
        assert train.tolist() == [i for i, b in enumerate(block) if abs(b - k) > 1]
        assert max(time[i] for i in test) - min(time[i] for i in test) <= n_periods // 5
        assert all(abs(time[i] - time[j]) > n_periods // 5 for i in train for j in test)


@given(scheme=st.sampled_from(SCHEMES), k=st.integers(4, 9), n=st.integers(9, 40))
@settings(max_examples=40, deadline=None)
def test_shares_of_any_size(scheme: str, k: int, n: int) -> None:
    layout = panel(n, n)
    fold = make_folds(layout, k, scheme, repeats=2).fold
    codes = {"random": torch.arange(n * n), "unit": layout.unit, "product": layout.unit}.get(scheme, layout.time)
    for row in fold // k if scheme == "product" else fold:
        members = [len(codes[row == j].unique()) for j in range(k)]
        assert max(members) - min(members) <= 1 and sum(members) == codes.max() + 1


def test_seeds_and_repeats() -> None:
    layout = panel(20, 10)
    for scheme in SCHEMES:
        once, again = (make_folds(layout, 4, scheme, repeats=2, seed=1).fold for _ in range(2))
        other = make_folds(layout, 4, scheme, repeats=2, seed=2).fold
        fixed = scheme in ("time_block", "nlo")
        assert torch.equal(once, again)
        assert torch.equal(once, other) == fixed and torch.equal(once[0], once[1]) == fixed


def test_some_rows_of_a_split() -> None:
    folds = make_folds(panel(6, 4), 3, "unit")
    rows = torch.arange(24) % 4 > 0
    some = folds.select(rows)
    assert torch.equal(some.fold, folds.fold[:, rows]) and torch.equal(some.keep, folds.keep)
    assert isinstance(some.to("cpu"), Folds) and some.scheme == "unit"


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("^scheme: expected one of random, unit", {"scheme": "none"}),
        ("^folds: expected an integer >= 2", {"folds": 1}),
        ("^folds: expected an integer >= 2", {"folds": 2.0}),
        ("^folds: expected an integer >= 4 for the scheme 'nlo', got 3", {"folds": 3, "scheme": "nlo"}),
        ("^repeats: expected an integer >= 1", {"repeats": 0}),
        ("^seed: expected an integer >= 0, got -1", {"seed": -1}),
        ("^seed: expected an integer >= 0, got None", {"seed": None}),
        ("^folds: expected no more than the 6 units that 'unit' shares out, got 7", {"folds": 7}),
        ("^folds: expected no more than the 4 periods that 'period'", {"folds": 5, "scheme": "period"}),
        ("^folds: expected no more than the 24 rows", {"folds": 25, "scheme": "random"}),
        ("^folds: expected no more than the 4 periods that 'product'", {"folds": 5, "scheme": "product"}),
    ],
)
def test_bad_input(message: str, arguments: dict) -> None:
    with pytest.raises(ValueError, match=message):
        make_folds(panel(6, 4), **arguments)


def test_a_fold_without_rows() -> None:
    layout = Layout.of([0, 0, 1, 1, 2, 2], [0, 1, 2, 3, 4, 5])  # no unit has a row in another's periods
    with pytest.raises(ValueError, match="^folds: expected rows in each fold"):
        make_folds(layout, 3, "product")


def test_training_rows_are_looked_for_too() -> None:
    layout = Layout.of([0, 1, 0, 1], [0, 0, 1, 1])
    assert len(make_folds(layout, 2, "product")) == 4
    blocks = Layout.of([0, 0, 1, 1], [0, 1, 2, 3])
    with pytest.raises(ValueError, match="^folds: expected (training )?rows"):
        make_folds(blocks, 2, "product", seed=0)


def test_numpy_integers_are_integers() -> None:
    layout = panel(6, 4)
    found = make_folds(layout, np.int64(3), repeats=np.int32(2), seed=np.int64(5))
    assert torch.equal(found.fold, make_folds(layout, 3, repeats=2, seed=5).fold)


@pytest.mark.parametrize(
    ("fold", "keep", "message"),
    [
        (torch.zeros(4, dtype=torch.long), torch.ones(1, 1).bool(), r"^fold: expected int64 of shape \(R, n\)"),
        (torch.zeros(1, 4, dtype=torch.int32), torch.ones(1, 1).bool(), "^fold: expected int64 .* got torch.int32"),
        (torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 2).bool(), r"^keep: expected bool of shape \(K, K\)"),
        (torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 1), "^keep: expected bool .* got torch.float32"),
        (torch.tensor([[0, 2]]), ~torch.eye(2).bool(), "^fold: expected 0 to 1, got 0 to 2"),
        (torch.tensor([[0, -1]]), ~torch.eye(2).bool(), "^fold: expected 0 to 1, got -1 to 0"),
    ],
)
def test_bad_folds_of_ones_own(fold: torch.Tensor, keep: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Folds(fold, keep)
