"""What must not change an estimate, of any estimator: labels, order, types and units of measurement of the columns."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from numpy.testing import assert_allclose
from sklearn.linear_model import LinearRegression

from peftref.panel.baselines.linear import LINEAR, panel_ols
from peftref.panel.core.ridge import PolynomialRidge
from peftref.panel.dml_panel import ESTIMATORS, PanelDML

LINE = PolynomialRidge(1, 0.0)
EXACT = 1e-12
ROUNDED = 1e-7
LEARNING = tuple(name for name in ESTIMATORS if name not in LINEAR)


def table(n_units: int = 24, n_periods: int = 6, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    unit, time = np.repeat(np.arange(n_units), n_periods), np.tile(np.arange(n_periods), n_units)
    x = rng.normal(size=(unit.size, 2)) + rng.normal(size=(n_units, 2))[unit]
    own = rng.normal(size=n_units)[unit]
    w = x[:, 0] ** 2 / 2 + x[:, 1] + own + rng.normal(size=unit.size)
    y = 0.7 * w + np.sin(x[:, 0]) + own + rng.normal(size=unit.size)
    data = pd.DataFrame({"unit": unit, "time": time, "y": y, "w": w, "x1": x[:, 0], "x2": x[:, 1]})
    return data[(rng.random(len(data)) < 0.8) | (time < 2)].reset_index(drop=True)


def numbers(
    data: pd.DataFrame, estimator: str, learner: object = None, x: object = None, **more: object
) -> list[float]:
    scheme = "random" if estimator == "dummies" else "unit"
    model = PanelDML(estimator, learner, **({"scheme": scheme, "folds": 4} | more))
    x = data[["x1", "x2"]] if x is None else x
    model.fit(data["y"], data["w"], x, data["unit"], data["time"])
    return [model.coef_, model.se_]


def nullable(d: pd.DataFrame) -> pd.DataFrame:
    return d.astype(
        {"y": "Float64", "w": "Float64", "x1": "Float64", "x2": "Float64", "unit": "Int32", "time": "Int64"}
    )


NAMES = [f"u{i:02d}" for i in range(24)]
MONTHS = ["March", "April", "May", "June", "July", "August"]
SAME: dict[str, Callable[[pd.DataFrame], pd.DataFrame]] = {
    "reordered rows": lambda d: d.sample(frac=1, random_state=3),
    "another index": lambda d: d.set_index(np.arange(len(d))[::-1] * 2),
    "calendar years": lambda d: d.assign(time=d["time"] + 1999),
    "dates": lambda d: d.assign(time=pd.to_datetime("2001-03-01") + pd.to_timedelta(31 * d["time"], "D")),
    "ordered months": lambda d: d.assign(time=pd.Categorical.from_codes(d["time"], MONTHS, ordered=True)),
    "years as a category": lambda d: d.assign(time=pd.Categorical(d["time"] + 1999, categories=range(2004, 1998, -1))),
    "named units": lambda d: d.assign(unit=d["unit"].map(NAMES.__getitem__)),
    "units as a category": lambda d: d.assign(unit=pd.Categorical.from_codes(d["unit"], NAMES)),
    "nullable": nullable,
    "level of the treatment": lambda d: d.assign(w=d["w"] + 1000),
    "level of the outcome": lambda d: d.assign(y=d["y"] - 5000),
    "covariates in other units": lambda d: d.assign(x1=15_000 * d["x1"] + 40_000, x2=1e-4 * d["x2"]),
}


@pytest.mark.parametrize("score", ["partialling out", "IV-type"])
@pytest.mark.parametrize("change", SAME)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_what_means_the_same(estimator: str, change: str, score: str) -> None:
    data = table()
    learner = None if score == "partialling out" else LINE
    plain = numbers(data, estimator, learner, score=score)
    assert_allclose(numbers(SAME[change](data), estimator, learner, score=score), plain, rtol=ROUNDED)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_arrays_and_narrow_numbers(estimator: str) -> None:
    data = table()
    narrow = data.astype({name: "float32" for name in ("y", "w", "x1", "x2")})
    plain = numbers(narrow.astype({name: "float64" for name in ("y", "w", "x1", "x2")}), estimator)
    assert_allclose(numbers(narrow, estimator), plain, rtol=EXACT)
    columns = [narrow[name].to_numpy() for name in ("y", "w")]
    labels = [data[name].to_numpy() for name in ("unit", "time")]
    model = PanelDML(estimator, scheme="random" if estimator == "dummies" else "unit", folds=4)
    model.fit(*columns, narrow[["x1", "x2"]].to_numpy(), *labels)
    assert_allclose([model.coef_, model.se_], plain, rtol=EXACT)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_scaled_treatment(estimator: str) -> None:
    data = table()
    plain = np.array(numbers(data, estimator, PolynomialRidge(2)))
    scaled = numbers(data.assign(w=1000 + 1e3 * data["w"]), estimator, PolynomialRidge(2))
    assert_allclose(scaled, plain / 1e3, rtol=ROUNDED)


@pytest.mark.parametrize("estimator", [name for name in ESTIMATORS if name not in ("early", "fe")])
def test_a_constant_covariate_says_nothing(estimator: str) -> None:
    data = table()
    x = data[["x1", "x2"]].assign(one=7.3)
    assert_allclose(numbers(data, estimator, LINE, x), numbers(data, estimator, LINE), rtol=ROUNDED)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_text_is_no_time_for_any_estimator(estimator: str) -> None:
    data = table()
    for time in (
        data["time"].astype(str),
        pd.Categorical(data["time"].astype(str)),
        data["time"].map(MONTHS.__getitem__),
    ):
        with pytest.raises(TypeError, match="^time: expected numbers, dates, periods or an ordered category, got text"):
            numbers(data.assign(time=time), estimator)
    with pytest.raises(TypeError, match="^time: expected"):
        panel_ols(data["y"], data[["x1"]], data["unit"], data["time"].astype(str))


# -- columns that nearly determine each other


def powers(data: pd.DataFrame, first: float) -> pd.DataFrame:
    year = data["time"] + first
    return pd.DataFrame({f"year{k}": year**k for k in (1, 2, 3)}) * 1.0


def curved(seed: int = 0) -> pd.DataFrame:
    data = table(seed=seed)
    late = data["time"] - 2.5
    return data.assign(w=data["w"] + 0.2 * late**3, y=data["y"] + 0.1 * late**3 - 0.3 * late**2)


@pytest.mark.parametrize("learner", [LINE, LinearRegression()], ids=["ours", "scikit-learn"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_powers_of_calendar_years(estimator: str, learner: object) -> None:
    """The same columns span the same space, whichever year is called 0."""
    data = curved()
    expected = numbers(data, estimator, learner, powers(data, -2.5))
    assert_allclose(numbers(data, estimator, learner, powers(data, 2000)), expected, rtol=1e-6)


@pytest.mark.parametrize("effects", ["pooled", "random", "fixed"])
def test_powers_of_calendar_years_in_least_squares(effects: str) -> None:
    data = curved()
    near, far = (
        panel_ols(data["y"], powers(data, first).assign(w=data["w"]), data["unit"], data["time"], effects=effects)
        for first in (-2.5, 2000)
    )
    assert_allclose(far.loc["w"], near.loc["w"], rtol=1e-7)
    assert_allclose(far.loc["year3", "coef"], near.loc["year3", "coef"], rtol=1e-6)
    dummies = pd.get_dummies(data["unit"]).to_numpy(float) if effects == "fixed" else np.ones((len(data), 1))
    if effects != "random":
        design = np.column_stack([data["w"], powers(data, -2.5), dummies])
        assert_allclose(far.loc["w", "coef"], np.linalg.lstsq(design, data["y"], rcond=None)[0][0], rtol=1e-8)


def test_intercept_of_regressors_far_from_zero() -> None:
    data = curved()
    x = powers(data, 2000)[["year1"]]
    found = panel_ols(data["y"], x, data["unit"], data["time"])
    line = np.polyfit(data["time"], data["y"], 1)
    assert_allclose(found["coef"], [line[1] - 2000 * line[0], line[0]], rtol=1e-8)


@pytest.mark.parametrize("effects", ["pooled", "random", "fixed"])
def test_regressors_that_determine_each_other(effects: str) -> None:
    data = curved()
    for x in (
        data[["x1", "x2"]].assign(sum=data["x1"] + data["x2"]),
        data[["x1"]].assign(again=1e9 + 1e3 * data["x1"]),
        powers(data, 2000).assign(next=(data["time"] + 2001.0) ** 2),
    ):
        with pytest.raises(ValueError, match="^x: expected regressors that do not determine each other"):
            panel_ols(data["y"], x, data["unit"], data["time"], effects=effects)


# -- clusters


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_one_unit_has_no_clustered_error(estimator: str) -> None:
    data = table()
    one = data.assign(unit=0, time=np.arange(len(data)))
    with pytest.raises(ValueError, match="^unit: expected two clusters or more for clustered standard errors, got 1"):
        numbers(one, estimator, LINE)
    if estimator in ("pooled", "pols", "simple_ols"):
        assert numbers(one, estimator, LINE, cluster=None, scheme="random")[1] > 0
    with pytest.raises(ValueError, match="^unit: expected two clusters or more"):
        panel_ols(one["y"], one[["x1"]], one["unit"], one["time"])
    if estimator in LINEAR:
        with pytest.raises(ValueError, match="^time: expected two clusters or more"):
            flat = data.drop_duplicates("unit").assign(time=0)
            numbers(flat, "pols", LINE, cluster="twoway")


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_few_units_are_warned_of(estimator: str) -> None:
    few = table(19)
    with pytest.warns(UserWarning, match="^unit: 19 clusters are few: standard errors are too small") as caught:
        numbers(few, estimator, LINE)
    assert len(caught) == 1 and caught[0].filename == __file__
    with pytest.warns(UserWarning, match="^unit: 19 clusters are few") as caught:
        panel_ols(few["y"], few[["x1"]], few["unit"], few["time"])
    assert len(caught) == 1 and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        numbers(table(20), estimator, LINE)
        numbers(few, estimator, LINE, cluster=None)


# -- the learner that is taken if none is given


@pytest.mark.parametrize("estimator", ["cre_general", "cre", "fd"])
def test_many_covariates_do_not_bias_the_default(estimator: str) -> None:
    """A straight world of 50 units, 10 periods and 8 covariates, ten times: the old cubic missed by 0.2."""
    estimates = []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        unit, time = np.repeat(np.arange(50), 10), np.tile(np.arange(10), 50)
        x = rng.normal(size=(500, 8))
        own = rng.normal(size=50)[unit]
        w = x.sum(1) / 2 + own + rng.normal(size=500)
        y = 0.5 * w + x.sum(1) / 2 + own + rng.normal(size=500)
        estimates.append(PanelDML(estimator).fit(y, w, x, unit, time).coef_)
    assert abs(np.mean(estimates) - 0.5) < 0.05


@pytest.mark.parametrize("folds", [2, 3, 5])
@pytest.mark.parametrize("scheme", ["unit", "random", "time_block"])
def test_the_default_needs_no_folds_to_choose_by(scheme: str, folds: int) -> None:
    assert np.isfinite(numbers(table(), "cre_general", scheme=scheme, folds=folds)).all()
