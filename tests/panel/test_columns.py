"""A user's columns: any order, any index, any labels; and what is refused."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from peftref.panel.core.columns import read_panel


def frame() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    unit, time = np.repeat(["b", "a", "c"], 4), np.tile([2003, 2001, 2002, 2004], 3)
    data = {"unit": unit, "time": time, "y": rng.normal(size=12), "w": rng.normal(size=12), "x": rng.normal(size=12)}
    return pd.DataFrame(data, index=np.arange(100, 112)[::-1])


def read(data: pd.DataFrame, estimator: str = "cre", twoway: bool = False, **other):
    columns = {"y": data["y"], "w": data["w"], "x": data[["x"]], "unit": data["unit"], "time": data["time"]} | other
    return read_panel(**columns, estimator=estimator, twoway=twoway)


def test_sorted_by_unit_and_period_and_back_again() -> None:
    data = frame()
    panel, back = read(data)
    ordered = data.sort_values(["unit", "time"])
    assert panel.y.dtype == torch.float64 and panel.x.shape == (1, 1, 12)
    assert np.allclose(panel.y[0], ordered["y"]) and np.allclose(panel.x[0, 0], ordered["x"])
    returned = back.align({"y": panel.y, "w": panel.w}, panel.layout)
    assert returned.index.equals(data.index) and back.name == "w"
    assert np.allclose(returned["y", 0], data["y"]) and np.allclose(returned["w", 0], data["w"])


def test_inputs_are_left_alone() -> None:
    data = frame()
    before = data.copy(deep=True)
    panel, _ = read(data)
    panel.y.zero_()
    panel.x.zero_()
    pd.testing.assert_frame_equal(data, before)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.astype("float32"), lambda c: (c * 10).round().astype(int), lambda c: (c > 0),
        lambda c: c.astype("Float64"), lambda c: (c * 10).round().astype("Int64"),
    ],
)  # fmt: skip
def test_types_of_numbers(change) -> None:
    data = frame()
    panel, _ = read(data, w=change(data["w"]))
    expected = change(data["w"]).astype(float)[data.sort_values(["unit", "time"]).index]
    assert np.allclose(panel.w[0], expected)


def test_arrays_lists_and_categories() -> None:
    data = frame()
    panel, _ = read(data)
    other = {name: data[name].to_numpy() for name in ("y", "w", "time")}
    plain, back = read(data, **other, x=data[["x"]].to_numpy(), unit=data["unit"].tolist())
    assert torch.equal(plain.y, panel.y) and torch.equal(plain.x, panel.x) and back.name == "w"
    assert torch.equal(read(data, unit=data["unit"].astype("category"))[0].y, panel.y)


def test_units_with_one_row() -> None:
    data = frame().iloc[:9]  # c has one row
    with pytest.warns(UserWarning, match="^unit: 1 units have one row"):
        panel, back = read(data)
    assert len(panel.layout) == 8 and panel.layout.n_units == 2
    assert back.align({"y": panel.y}, panel.layout)["y", 0].isna().tolist() == [False] * 8 + [True]
    assert len(read(data, "pooled")[0].layout) == 9  # compares units with each other
    with (
        pytest.warns(UserWarning, match="one row"),
        pytest.raises(ValueError, match="^unit: expected units with several"),
    ):
        read(data.iloc[[0, 4, 8]])


@pytest.mark.parametrize("column", ["y", "w", "x"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_missing_and_infinite(column: str, value: float) -> None:
    data = frame()
    data.loc[105, column] = value
    name = "x['x']" if column == "x" else column
    with pytest.raises(ValueError, match=rf"^{name.replace('[', chr(92) + '[')}: expected finite numbers, got 1"):
        read(data)


def test_missing_values_of_nullable_columns() -> None:
    data = frame()
    missing = int((data["w"] <= 0).sum())
    for column in (data["w"].astype("Float64"), (data["w"] * 9).round().astype("Int64"), data["w"].astype(object)):
        with pytest.raises(ValueError, match=f"^w: expected finite numbers, got {missing} that"):
            read(data, w=column.where(data["w"] > 0, None))


@pytest.mark.parametrize("kind", ["category", "digits", "mixed", "string"])
def test_codes_are_not_amounts(kind: str) -> None:
    data = frame()
    code = pd.Series(np.arange(12) % 4, index=data.index)
    column = {
        "category": code.astype("category"), "digits": code.astype(str), "string": code.astype("string"),
        "mixed": code.astype(object).where(code > 0, "0"),
    }[kind]  # fmt: skip
    with pytest.raises(TypeError, match="^w: expected numbers"):
        read(data, w=column)
    with pytest.raises(TypeError, match=r"^x\['region'\]: expected numbers"):
        read(data, x=data[["x"]].assign(region=column))
    read(data, w=code)


def test_name_of_the_treatment() -> None:
    data = frame()
    for name, shown in ((None, "w"), ("dose", "dose"), (0, "0")):
        assert read(data, w=data["w"].rename(name))[1].name == shown


@pytest.mark.parametrize(
    ("error", "message", "other"),
    [
        (TypeError, "^x: expected covariates", {"x": None}),
        (TypeError, "^time: expected a column", {"time": None}),
        (TypeError, "^y: expected a column, got 'y'", {"y": "y"}),
        (TypeError, "^w: expected a column, got 3.0", {"w": 3.0}),
        (TypeError, "^w: expected numbers", {"w": pd.Series(list("abcdefghijkl"), index=frame().index)}),
        (ValueError, "expected equal, positive lengths", {"y": frame()["y"].iloc[:5]}),
        (ValueError, "^time: expected the index of the other", {"time": frame()["time"].reset_index(drop=True)}),
        (ValueError, "^unit: expected no missing labels", {"unit": frame()["unit"].where(frame()["unit"] != "a")}),
        (ValueError, "^unit, time: expected one row for each", {"time": frame()["time"] * 0}),
        (ValueError, "^w: expected a treatment that varies within units", {"w": (frame()["unit"] == "a") * 1.0}),
        (ValueError, "^y: expected one column", {"y": frame()[["y", "w"]].to_numpy()}),
    ],
)
def test_bad_columns(error: type, message: str, other: dict) -> None:
    with pytest.raises(error, match=message):
        read(frame(), **other)


@pytest.mark.parametrize("estimator", ["fe", "early"])
def test_covariates_that_do_not_vary_within_units_are_named(estimator: str) -> None:
    data = frame()
    data["old"] = (data["unit"] == "a") * 40.0
    with pytest.raises(ValueError, match=r"^x: expected covariates that vary within units .* got x\['old'\]"):
        read(data, estimator, x=data[["x", "old"]])
    read(data, "cre", x=data[["x", "old"]])  # there it is of use
    data["year"] = data["time"] * 1.0
    read(data, estimator, x=data[["x", "year"]])
    with pytest.raises(ValueError, match=r"and periods for .* got x\['year'\]"):
        read(data, estimator, twoway=True, x=data[["x", "year"]])


def test_treatment_of_units_serves_those_who_compare_units() -> None:
    data = frame()
    read(data, "pooled", w=(data["unit"] == "a") * 1.0)
    with pytest.raises(ValueError, match="^w: expected a treatment that varies, got"):
        read(data, "pooled", w=data["w"] * 0)
    with pytest.raises(ValueError, match="within units and periods"):
        read(data, "cre", twoway=True, w=data["time"] * 1.0)
