"""Estimators: a twin in loops, limits that have closed forms, invariances, truth recovered, refusals."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge
from sklearn.tree import DecisionTreeRegressor
from torch import Tensor

from peftref.panel.baselines.linear import LINEAR
from peftref.panel.core.crossfit import crossfit
from peftref.panel.core.estimators import SETS, partial_out
from peftref.panel.core.folds import Folds, make_folds
from peftref.panel.core.inference import row_weights, solve, standard_error
from peftref.panel.core.layout import Layout
from peftref.panel.core.ridge import PolynomialRidge
from peftref.panel.dml_panel import ESTIMATORS, PanelDML, aipw_score, plr_score
from peftref.panel.experiments.dgp import dgp_fuhr_papies_2024
from peftref.results import recorded
from tests._naive import dml_panel as naive

OLS = PolynomialRidge(1, 0.0)
LEARNING = tuple(SETS)
SCORES = ("partialling out", "IV-type")


def table(n_units: int = 20, n_periods: int = 5, *, balanced: bool = True, binary: bool = False, seed: int = 0):
    rng = np.random.default_rng(seed)
    unit, time = (a.ravel() for a in np.meshgrid(np.arange(n_units), np.arange(n_periods), indexing="ij"))
    x = rng.normal(size=(unit.size, 2)) + rng.normal(size=(n_units, 2))[unit]
    own = rng.normal(size=n_units)[unit]
    w = x[:, 0] ** 2 / 2 + x[:, 1] + own + rng.normal(size=unit.size)
    w = (w > np.median(w)).astype(float) if binary else w
    y = 0.7 * w + np.sin(x[:, 0]) + own + rng.normal(size=unit.size)
    df = pd.DataFrame({"unit": unit, "time": time, "y": y, "w": w, "x1": x[:, 0], "x2": x[:, 1]})
    return df if balanced else df[(rng.random(len(df)) < 0.7) | (df["time"] < 2)].reset_index(drop=True)


def fit(df: pd.DataFrame, estimator: str = "cre", learner: object = OLS, **more: object) -> PanelDML:
    model = PanelDML(estimator, learner, **more)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "scheme: 'unit' leaves the units")
        return model.fit(df["y"], df["w"], df[["x1", "x2"]], df["unit"], df["time"])


def numbers(model: PanelDML) -> list[float]:
    return [model.coef_, model.se_]


def no_split(n: int) -> Folds:
    return Folds(torch.zeros(1, n, dtype=torch.int64), torch.ones(1, 1, dtype=torch.bool))


# -- the twin


# not dummies by unit: a unit whose column was never trained has no one prediction without a penalty
@pytest.mark.parametrize(
    ("estimator", "by"), [(e, by) for e in LEARNING for by in ("unit", "row") if (e, by) != ("dummies", "unit")]
)
def test_equals_the_loops(estimator: str, by: str) -> None:
    df = table(10, 4, balanced=False, seed=3)
    fold = df["unit"] % 3 if by == "unit" else df.groupby("unit").cumcount() % 2
    rows = [
        {"unit": r.unit, "time": r.time, "y": r.y, "w": r.w, "x": [r.x1, r.x2], "fold": k}
        for r, k in zip(df.itertuples(), fold, strict=True)
    ]
    used = torch.tensor([[r["fold"] for r in naive.features(rows, estimator)[0]]])
    folds = Folds(used, ~torch.eye(int(used.max()) + 1, dtype=torch.bool), "unit" if by == "unit" else "custom")
    for score in SCORES:
        for agg in ("dml2", "dml1"):
            for cluster in ("unit", None):
                found = fit(df, estimator, score=score, agg=agg, cluster=cluster, folds=folds)
                expected = naive.effect(rows, estimator, score, agg, cluster, by == "unit")
                assert_allclose(numbers(found), expected, rtol=1e-8, err_msg=f"{score} {agg} {cluster}")


def as_rows(df: pd.DataFrame, folds: list) -> list[dict]:
    rows = zip(df.itertuples(), folds, strict=True)
    return [{"unit": r.unit, "time": r.time, "y": r.y, "w": r.w, "x": [r.x1, r.x2], "fold": k} for r, k in rows]


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("estimator", ["pooled", "cre", "late", "cre_general", "early"])
def test_equals_the_loops_clustered_by_unit_and_period(estimator: str, score: str) -> None:
    df = table(12, 6, balanced=False, seed=3)
    folds = make_folds(Layout.of(df["unit"], df["time"]), 2, "product", seed=1)
    rows = as_rows(df, [(k // 2, k % 2) for k in folds.fold[0].tolist()])
    found = fit(df, estimator, score=score, folds=folds, cluster="twoway")
    assert_allclose(numbers(found), naive.effect(rows, estimator, score, "dml2", "twoway"), rtol=1e-8)


def test_equals_the_loops_over_splits() -> None:
    df = table(10, 4, balanced=False)
    folds = make_folds(Layout.of(df["unit"], df["time"]), 3, repeats=4)
    pairs = [naive.effect(as_rows(df, fold.tolist()), "cre") for fold in folds.fold]
    found = fit(df, folds=folds)
    assert_allclose(torch.stack((found.coefs_, found.ses_), 1), pairs, rtol=1e-8)
    assert_allclose(numbers(found), naive.over_splits(pairs), rtol=1e-8)


@pytest.mark.parametrize("estimator", ["pooled", "cre", "cre_normal"])
def test_equals_the_loops_of_the_interactive_model(estimator: str) -> None:
    df = table(24, 5, binary=True)
    folds = make_folds(Layout.of(df["unit"], df["time"]), 3)
    settings_ = {"learner": LinearRegression(), "learner_w": LogisticRegression(C=2.0, tol=1e-12, max_iter=10_000)}
    for clip in (0.01, 0.3):
        found = fit(df, estimator, model="irm", folds=folds, clip=clip, **settings_)
        expected = naive.average_effect(as_rows(df, folds.fold[0].tolist()), estimator, clip, 2.0)
        assert_allclose(numbers(found), expected, rtol=1e-5)


# -- what must be equal


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("score", SCORES)
def test_four_estimators_are_one_with_a_linear_learner(score: str, balanced: bool) -> None:
    df = table(23, balanced=balanced)
    expected = numbers(fit(df, "early", score=score))
    for estimator in ("cre", "cre_general", "cre_normal"):
        assert_allclose(numbers(fit(df, estimator, score=score)), expected, rtol=1e-10, err_msg=estimator)
    for estimator in ("pooled", "late", "fd"):
        assert abs(fit(df, estimator, score=score).coef_ - expected[0]) > 1e-4, estimator


@pytest.mark.parametrize("learner", [OLS, PolynomialRidge(2, 1.0)], ids=["linear", "quadratic"])
@pytest.mark.parametrize("estimator", ["pooled", "early", "late", "cre", "cre_general", "fd"])
def test_scores_agree_for_equal_folds(estimator: str, learner: PolynomialRidge) -> None:
    by_score = [fit(table(20), estimator, learner, score=score).coef_ for score in SCORES]
    assert_allclose(*by_score, rtol=1e-9)
    uneven = [fit(table(23), "pooled", learner, score=score).coef_ for score in SCORES]  # folds of 4 and of 5 units
    assert abs(uneven[0] - uneven[1]) > 1e-9


@pytest.mark.parametrize("estimator", ["pooled", "cre", "cre_normal", "early", "fd", "late", "cre_general"])
def test_any_learner_gives_what_ours_gives_in_one_go(estimator: str) -> None:
    df = table(balanced=False)
    for score in SCORES:
        expected = numbers(fit(df, estimator, score=score, repeats=2))
        found = fit(df, estimator, LinearRegression(), score=score, repeats=2)
        assert_allclose(numbers(found), expected, rtol=1e-9)


def test_differences_over_two_periods_are_a_within_regression() -> None:
    # x_t and x_{t-1} have slopes of their own, so within units each period must have its own slope and mean too
    df = table(30, 2)
    first = df["time"] == 0
    split = pd.DataFrame({f"{name}_{t}": df[name] * (df["time"] == t) for name in ("x1", "x2") for t in (0, 1)})
    fd = fit(df, "fd", folds=no_split(30), cluster=None)
    same = PanelDML("early", OLS, twoway=True, folds=no_split(60)).fit(df["y"], df["w"], split, df["unit"], df["time"])
    assert_allclose(fd.coef_, same.coef_, rtol=1e-10)
    assert fd.n_rows_ == 30 and fd.residuals_[first].isna().all().all() and not fd.residuals_[~first].isna().any().any()


@pytest.mark.parametrize("estimator", LINEAR)
def test_without_learning_no_setting_of_the_split_counts(estimator: str) -> None:
    df = table(23)
    plain = numbers(fit(df, estimator))
    for more in ({"folds": 3}, {"agg": "dml1"}, {"repeats": 3}, {"scheme": "random"}, {"seed": 4}, {"folds": 200}):
        assert_allclose(numbers(fit(df, estimator, **more)), plain, rtol=1e-12)
    model = fit(df, estimator)
    psi = df.assign(psi=model.residuals_["w", 0] * (model.residuals_["y", 0] - model.coef_ * model.residuals_["w", 0]))
    squares = {key: psi.groupby(key)["psi"].sum().pow(2).sum() for key in ("unit", "time")}
    below = model.residuals_["w", 0].pow(2).sum()
    assert_allclose(model.se_, squares["unit"] ** 0.5 / below, rtol=1e-10)
    both = fit(df, estimator, cluster="twoway")
    own = psi["psi"].pow(2).sum()  # Cameron, Gelbach and Miller: what rows share with themselves is counted once
    assert_allclose(both.se_, (squares["unit"] + squares["time"] - own) ** 0.5 / below, rtol=1e-10)


# -- invariances


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 1000), balanced=st.booleans())
def test_constants_of_units(seed: int, balanced: bool) -> None:
    df = table(balanced=balanced, seed=seed)
    moved = df.assign(y=df["y"] + 3 * np.random.default_rng(seed).normal(size=20)[df["unit"]])
    for estimator in ("early", "fd", "fe", "fe_only"):
        assert_allclose(numbers(fit(moved, estimator, PolynomialRidge(2))),
                        numbers(fit(df, estimator, PolynomialRidge(2))), rtol=1e-8)  # fmt: skip
    for estimator in ("cre", "cre_general", "cre_normal", "dummies"):
        folds = no_split(len(df))
        assert_allclose(fit(moved, estimator, folds=folds).coef_, fit(df, estimator, folds=folds).coef_, rtol=1e-7)
    for estimator in ("pooled", "late"):
        assert abs(fit(moved, estimator).coef_ - fit(df, estimator).coef_) > 1e-6


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_more_effect_is_more_effect(estimator: str, score: str) -> None:
    df = table(balanced=False)
    scheme = "random" if estimator == "dummies" else "unit"
    # cre_normal knows more for W than for Y, and only without a penalty does that not matter
    learner = OLS if estimator == "cre_normal" else PolynomialRidge(2, 0.5)
    more = {"learner": learner, "score": score, "scheme": scheme}
    before, after = (fit(d, estimator, **more) for d in (df, df.assign(y=df["y"] + 2.5 * df["w"])))
    assert_allclose(after.coef_, before.coef_ + 2.5, rtol=1e-9)
    if score == "partialling out":
        assert_allclose(after.se_, before.se_, rtol=1e-7)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_units_of_measurement(estimator: str, score: str) -> None:
    df = table(balanced=False)
    more = {
        "learner": PolynomialRidge(2, 0.5),
        "score": score,
        "scheme": "random" if estimator == "dummies" else "unit",
    }
    plain = np.array(numbers(fit(df, estimator, **more)))
    assert_allclose(numbers(fit(df.assign(y=df["y"] * -1e4), estimator, **more)), plain * [-1e4, 1e4], rtol=1e-7)
    assert_allclose(numbers(fit(df.assign(w=df["w"] * 1e-3), estimator, **more)), plain * 1e3, rtol=1e-7)
    scaled = df.assign(x1=df["x1"] * 1e5 + 3, x2=-df["x2"])  # what a learner knows does not depend on its units
    assert_allclose(numbers(fit(scaled, estimator, **more)), plain, rtol=1e-7)


@pytest.mark.parametrize("estimator", ["early", "fe", "fe_only", "fd"])
def test_units_that_differ_widely(estimator: str) -> None:
    df = table(balanced=False)
    far = df.assign(w=df["w"] + 1e7 * np.random.default_rng(0).normal(size=20)[df["unit"]])
    assert_allclose(numbers(fit(far, estimator)), numbers(fit(df, estimator)), rtol=1e-6)


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 1000), estimator=st.sampled_from(LEARNING))
def test_order_of_rows(seed: int, estimator: str) -> None:
    df = table(balanced=False)
    shuffled = df.sample(frac=1, random_state=seed)
    one, two = fit(df, estimator, scheme="random"), fit(shuffled, estimator, scheme="random")
    assert numbers(one) == numbers(two)
    pd.testing.assert_frame_equal(one.residuals_, two.residuals_.loc[df.index])
    assert two.residuals_.index.equals(shuffled.index)


@pytest.mark.parametrize("estimator", ["pooled", "early", "cre", "late", "fd", "dummies"])
def test_names_of_units(estimator: str) -> None:
    df = table(balanced=False)
    named = df.assign(unit=df["unit"].map(lambda u: f"unit {u:03d}"), time=df["time"] + 1990)
    assert numbers(fit(named, estimator)) == numbers(fit(df, estimator))
    backwards = df.assign(unit=19 - df["unit"])  # another order of the units, with their folds carried along
    n = len(fit(df, estimator).residuals_.dropna())
    folds = make_folds(Layout.of(df["unit"], df["time"]), 5)
    of_unit = dict(zip(df["unit"], folds.fold[0].tolist(), strict=True))

    def carried(unit: pd.Series, names: dict) -> Folds:
        kept = fit(df.assign(unit=unit), estimator).residuals_.notna().all(axis=1)
        labels = sorted(zip(unit[kept], df["time"][kept], strict=True))
        assert len(labels) == n
        return Folds(torch.tensor([[names[u] for u, _ in labels]]), folds.keep, "unit")

    one = fit(df, estimator, folds=carried(df["unit"], of_unit))
    two = fit(backwards, estimator, folds=carried(backwards["unit"], {19 - u: k for u, k in of_unit.items()}))
    assert_allclose(numbers(two), numbers(one), rtol=1e-9)


# -- truth


@pytest.mark.parametrize(("structure", "bias"), [("B", lambda d: d / (1 + d)), ("C", lambda d: d / (1 + 2 * d))])
@pytest.mark.parametrize("delta", [0.7, 1.5])
def test_bias_of_pooled(structure: str, bias: object, delta: float) -> None:
    data = dgp_fuhr_papies_2024(
        structure, "linear", n_units=2000, n_periods=5, gamma=1.0, delta=delta, seeds=range(8)
    ).panel
    found = batched(data, ("pooled", "cre"), make_folds(data.layout, 5, repeats=8))
    assert abs(found["pooled"][0].mean() - 1 - bias(delta**2)) < 0.03
    assert abs(found["cre"][0].mean() - 1) < 0.015


def batched(panel: object, estimators: tuple[str, ...], folds: Folds) -> dict[str, tuple[Tensor, Tensor]]:
    """Coefficients and standard errors of many datasets, with the parts that PanelDML is made of."""
    made = partial_out(estimators, panel, folds, lambda z, t, f, **more: crossfit(z, t, f, OLS, **more))
    weights, found = row_weights(panel.layout, folds, "unit"), {}
    for name, (u, v) in made.items():
        a, b = plr_score(v, u)
        theta = solve(a, b, weights, folds)
        found[name] = theta, standard_error(a * theta.unsqueeze(1) + b, a, panel.layout, folds)
    return found


def test_interval_covers() -> None:
    n = 1000
    panel = dgp_fuhr_papies_2024("C", "linear", n_units=80, n_periods=5, gamma=1.0, delta=1.0, seeds=range(n)).panel
    folds = make_folds(panel.layout, 5, repeats=n, seed=1)
    coef, se = batched(panel, ("cre",), folds)["cre"]
    one = dgp_fuhr_papies_2024("C", "linear", n_units=80, n_periods=5, gamma=1.0, delta=1.0, seeds=[7]).frame()
    own = PanelDML("cre", OLS, folds=Folds(folds.fold[7:8], folds.keep, "unit")).fit(
        one["y"], one["w"], one[["x1"]], one["unit"], one["time"]
    )
    assert_allclose([own.coef_, own.se_], [coef[7], se[7]], rtol=1e-9)
    covered = ((coef - 1).abs() <= 1.959964 * se).double().mean()
    assert abs(covered - 0.95) < 3.3 * (0.95 * 0.05 / n) ** 0.5
    assert abs(se.mean() / coef.std() - 1) < 0.08


@pytest.mark.parametrize("estimator", ["pooled", "cre", "cre_normal"])
def test_interactive_model_finds_the_average_effect(estimator: str) -> None:
    rng = np.random.default_rng(0)
    n, t = 600, 5
    unit, time = np.repeat(np.arange(n), t), np.tile(np.arange(t), n)
    x = rng.normal(size=n * t)
    w = (rng.random(n * t) < 1 / (1 + np.exp(-1 - x))).astype(float)
    y = x**2 + 2 * x + w * (1 + x) + rng.normal(size=n * t)  # the effect is 1 on average, and larger for the treated
    columns = y, w, x[:, None], unit, time
    model = PanelDML(estimator, PolynomialRidge(2), model="irm").fit(*columns)
    assert abs(model.coef_ - 1) < 3 * model.se_ < 0.25
    linear = PanelDML(estimator, OLS).fit(*columns)
    assert abs(linear.coef_ - 1) > 3 * linear.se_


# -- orthogonality


def test_errors_of_learning_enter_squared() -> None:
    df = table(40)
    n = len(df)
    layout = Layout.of(df["unit"], df["time"])
    model = fit(df, "pooled", folds=no_split(n))
    u, v = (torch.tensor(model.residuals_[name, 0].to_numpy()) for name in ("y", "w"))
    h1, h2 = torch.tensor(df["x1"].to_numpy()), torch.tensor((df["x2"] + 0.5).to_numpy())
    folds = no_split(n)
    weights = row_weights(layout, folds, "unit")

    def theta(of_u: Tensor, of_v: Tensor) -> float:
        a, b = plr_score(of_v[None], of_u[None])
        return solve(a, b, weights, folds).item()

    def change(eps: float) -> float:
        return abs(theta(u - eps * h1, v - eps * h2) - theta(u, v))

    assert_allclose(theta(u, v), model.coef_, rtol=1e-10)
    assert 90 < change(1e-2) / change(1e-3) < 110
    y, w = torch.tensor(df["y"].to_numpy()), torch.tensor(df["w"].to_numpy())
    naive_score = [abs(((w * (u - e * h1)).sum() - (w * u).sum()).item()) for e in (1e-2, 1e-3)]  # W for v: not so
    assert 9 < naive_score[0] / naive_score[1] < 11 and y.shape == u.shape


def test_errors_of_learning_enter_squared_in_the_interactive_model() -> None:
    rng = np.random.default_rng(0)
    # two cells in which shares of treated and means are exact: the best g and m of the sample are known
    z = np.repeat([0, 1], 400)
    w = np.concatenate([np.arange(400) < 100, np.arange(400) < 200]).astype(float)
    y = rng.normal(size=800) + 2 * w + z
    g0, g1 = (np.array([y[(z == c) & (w == k)].mean() for c in (0, 1)])[z] for k in (0, 1))
    m = np.array([0.25, 0.5])[z]
    y, w, g0, g1, m, h = (torch.from_numpy(a.astype(float)) for a in (y, w, g0, g1, m, 0.5 + z))

    def theta(eps: float) -> float:
        return aipw_score(y, w, g0 + eps * h, g1 - 2 * eps * h, m + 0.1 * eps * h)[1].mean().item()

    assert 80 < abs(theta(1e-2) - theta(0)) / abs(theta(1e-3) - theta(0)) < 120
    bounded = aipw_score(y, w, g0, g1, torch.full_like(m, 1e-9), clip=0.2)[1]
    assert torch.equal(bounded, aipw_score(y, w, g0, g1, torch.full_like(m, 0.2))[1])


# -- settings


def test_each_setting_counts() -> None:
    df = table(23, 9, balanced=False)
    base = numbers(fit(df, learner=PolynomialRidge(2)))
    for more in (
        {"estimator": "late"}, {"learner": OLS}, {"learner_w": OLS}, {"score": "IV-type"}, {"agg": "dml1"},
        {"folds": 3}, {"scheme": "random"}, {"scheme": "period"}, {"scheme": "time_block"}, {"repeats": 3},
        {"twoway": True}, {"seed": 1}, {"scheme": "product", "folds": 2, "cluster": "twoway"},
    ):  # fmt: skip
        assert fit(df, **({"learner": PolynomialRidge(2)} | more)).coef_ != base[0], more
    assert fit(df, learner=PolynomialRidge(2), cluster=None).se_ != base[1]
    assert numbers(fit(df, learner=PolynomialRidge(2), n_jobs=2)) == base
    binary = table(60, 9, binary=True)
    irm = {"model": "irm", "learner": PolynomialRidge(2)}
    found = {
        name: fit(binary, **irm | more).coef_
        for name, more in (("", {}), ("clip", {"clip": 0.3}), ("m", {"learner_w": LogisticRegression(C=1e-3)}))
    }
    assert len({*found.values(), fit(binary, learner=PolynomialRidge(2)).coef_}) == 4


def test_default_learner_chooses_degree_and_penalty() -> None:
    df = table(30)
    for n_units, degree in ((30, 3), (9, 2)):  # 9 features for 120 rows, or 36
        few = df[df["unit"] < n_units]
        expected = numbers(fit(few, "pooled", PolynomialRidge(degree, [0.01, 0.1, 1.0])))
        assert numbers(fit(few, "pooled", None)) == expected


def test_the_default_is_cre_general() -> None:
    assert PanelDML().estimator == "cre_general"
    df = table(30)
    found = PanelDML().fit(df["y"], df["w"], df[["x1", "x2"]], df["unit"], df["time"])
    assert numbers(found) == numbers(fit(df, "cre_general", None))


@pytest.mark.parametrize("estimator", ["cre", "early", "fd", "fe"])
def test_predictions_are_kept(estimator: str) -> None:
    df = table(30, balanced=False)
    model = fit(df, estimator, repeats=1 if estimator == "fe" else 2)
    learned = df[["y", "w"]]
    if estimator in ("early", "fe"):
        learned = learned - learned.groupby(df["unit"]).transform("mean")
    elif estimator == "fd":
        learned = learned.groupby(df["unit"]).diff()[df.groupby("unit")["time"].diff() == 1].reindex(df.index)
    for name, r in model.residuals_:
        assert_allclose(model.predictions_[name, r], learned[name] - model.residuals_[name, r], atol=1e-12)


def test_nuisances_of_the_interactive_model_are_kept() -> None:
    df = table(40, binary=True)
    model = fit(df, "cre", model="irm", repeats=2, clip=0.2)
    for r in range(2):
        g0, g1, m = (model.predictions_[name, r] for name in ("g0", "g1", "m"))
        assert_allclose(model.residuals_["y", r], df["y"] - np.where(df["w"] == 1, g1, g0), atol=1e-12)
        assert_allclose(model.residuals_["w", r], df["w"] - m, atol=1e-12)
        m = m.clip(0.2, 0.8)
        psi = g1 - g0 + df["w"] * (df["y"] - g1) / m - (1 - df["w"]) * (df["y"] - g0) / (1 - m)
        assert_allclose(model.coefs_[r], psi.mean(), rtol=1e-9)
    assert not model.predictions_["m", 0].between(0.2, 0.8).all()


def test_own_folds_are_on_the_rows_used() -> None:
    df = table(20)
    folds = make_folds(Layout.of(df["unit"], df["time"]), 5)
    with pytest.raises(ValueError, match="^folds: expected folds of 80 differences, one for each row .* got .* 100$"):
        fit(df, "fd", folds=folds)
    fit(df, "fd", folds=make_folds(Layout.of(*naive_labels(df, "fd")), 5))
    single = df[df["unit"].ne(4) | df["time"].eq(0)]
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="^folds: expected folds of 95 rows used, without"):
        fit(single, "cre", folds=make_folds(Layout.of(single["unit"], single["time"]), 5))


def test_a_classifier_for_the_treatment() -> None:
    df = table(60, binary=True)
    model = fit(df, learner_w=LogisticRegression())
    w = model.residuals_["w", 0]
    assert w.abs().max() < 1 and (np.sign(w) == np.where(df["w"] == 1, 1, -1)).all()  # W less a probability
    assert 0 < model.coef_ < 1.5 and model.coef_ != fit(df).coef_
    shifted = fit(df, "cre_general", learner_w=LogisticRegression()).residuals_["w", 0]
    assert_allclose(shifted.groupby(df["unit"]).mean(), 0, atol=1e-12)
    assert not (df["w"] - shifted).between(0, 1).all()  # the shifted prediction is not clipped


def test_interval_and_summary() -> None:
    model = fit(table())
    row, ends = model.summary().loc["w"], model.confint(0.9).loc["w"]
    assert list(model.summary()) == ["coef", "std err", "t", "P>|t|", "2.5 %", "97.5 %"]
    assert list(model.confint(0.9)) == ["5 %", "95 %"]
    assert_allclose(row[["2.5 %", "97.5 %"]], model.coef_ + np.array([-1, 1]) * 1.959963985 * model.se_, rtol=1e-9)
    assert_allclose(ends, model.coef_ + np.array([-1, 1]) * 1.644853627 * model.se_, rtol=1e-9)
    assert_allclose(row["t"], row["coef"] / row["std err"])
    assert_allclose(row["P>|t|"], math.erfc(abs(row["t"]) / math.sqrt(2)), rtol=1e-9)  # both tails
    assert list(model.confint(0.999)) == ["0.05 %", "99.95 %"]
    for level in (0, 1, 95):
        with pytest.raises(ValueError, match="level"):
            model.confint(level)


# -- rows


def test_single_rows_are_dropped_with_a_warning() -> None:
    df = table(21)
    single = df["unit"].eq(4) & df["time"].gt(0)
    df = df[~single].sample(frac=1, random_state=0)
    with pytest.warns(UserWarning, match="1 units have one row"):
        model = fit(df)
    lost = model.residuals_.isna().all(axis=1)
    assert lost.sum() == 1 and (df["unit"][lost] == 4).all() and model.n_units_ == 20 and model.n_rows_ == len(df) - 1
    expected = fit(df[df["unit"] != 4])
    assert numbers(model) == numbers(expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fit(df, "pooled").n_units_ == 21
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="several rows"):
        fit(df.drop_duplicates("unit"))


def test_no_difference_across_a_gap() -> None:
    df = table(20, 6)
    gap = df[~(df["unit"].lt(10) & df["time"].eq(3))]
    model = fit(gap, "fd")
    assert model.n_rows_ == 10 * 3 + 10 * 5
    missing = model.residuals_["y", 0].isna()
    assert (missing == (gap["time"].eq(0) | (gap["unit"].lt(10) & gap["time"].eq(4)))).all()


def test_a_unit_without_differences_is_not_a_cluster() -> None:
    df = table(21, 6)
    alternating = df[~(df["unit"].eq(0) & df["time"].isin([1, 3, 5]))]
    assert fit(alternating, "fd").n_units_ == 20
    assert_allclose(numbers(fit(alternating, "fd")), numbers(fit(df[df["unit"] > 0], "fd")), rtol=1e-12)
    with pytest.raises(ValueError, match="consecutive"):
        fit(df[df["time"] % 2 == df["unit"] % 2], "fd")


def test_arrays_and_lists() -> None:
    df = table()
    columns = df["y"].tolist(), df["w"].to_numpy(), df[["x1", "x2"]].to_numpy(), df["unit"].tolist(), df["time"]
    model = PanelDML("cre", OLS).fit(*columns)
    assert numbers(model) == numbers(fit(df)) and list(model.summary().index) == ["w"]
    named = PanelDML("cre", OLS).fit(df["y"], df["w"].rename("dose"), *columns[2:])
    assert list(named.summary().index) == ["dose"]


@pytest.mark.parametrize("kind", ["float32", "nullable", "whole"])
@pytest.mark.parametrize("estimator", ["cre", "fe", "late", "fd"])
def test_types_of_columns(estimator: str, kind: str) -> None:
    df = table(balanced=False)
    values = ["y", "w", "x1", "x2"]
    if kind == "float32":
        given_, plain = df.astype(dict.fromkeys(values, "float32")), df.astype(dict.fromkeys(values, "float32"))
        plain = plain.astype(dict.fromkeys(values, "float64"))
        given_[["unit", "time"]] = df[["unit", "time"]].astype("float32")
    elif kind == "nullable":
        given_, plain = df.convert_dtypes(), df
        given_["unit"] = given_["unit"].astype("string").str.zfill(2).astype("category")
    else:  # integers and truth values
        plain = df.assign(w=(2 * df["w"]).round(), x1=(df["x1"] > 0) * 1.0, x2=(3 * df["x2"]).round())
        given_ = plain.astype({"w": "int16", "x1": "bool", "x2": "Int64"})
    assert numbers(fit(given_, estimator)) == numbers(fit(plain, estimator))


def test_covariates_of_one_name_are_two_covariates() -> None:
    df = table()
    x = df[["x1", "x2"]]
    twins = PanelDML("cre", OLS).fit(df["y"], df["w"], x.set_axis(["x", "x"], axis=1), df["unit"], df["time"])
    assert numbers(twins) == numbers(fit(df))


def test_nothing_given_is_changed() -> None:
    df, learner = table(), Ridge(alpha=2.0)
    kept, settings_ = df.copy(deep=True), dict(learner.get_params())
    folds = make_folds(Layout.of(df["unit"], df["time"]), 4)
    fold = folds.fold.clone()
    for estimator in ESTIMATORS:
        for given_learner in (learner, OLS):
            fit(df, estimator, given_learner, folds=make_folds(Layout.of(*naive_labels(df, estimator)), 4))
    pd.testing.assert_frame_equal(df, kept)
    assert learner.get_params() == settings_ and not hasattr(learner, "coef_") and not hasattr(OLS, "coef_")
    assert torch.equal(folds.fold, fold)
    rows = [t.clone() for t in (torch.randn(3, 4), torch.randn(3, 4))]
    copies = [t.clone() for t in rows]
    plr_score(*rows)
    assert all(map(torch.equal, rows, copies))


def naive_labels(df: pd.DataFrame, estimator: str) -> tuple[pd.Series, pd.Series]:
    used = df[df["time"] > 0] if estimator == "fd" else df
    return used["unit"], used["time"]


# -- scikit-learn


def test_it_is_a_scikit_learn_estimator() -> None:
    model = PanelDML("late", Ridge(), agg="dml1", seed=3)
    assert model.get_params(deep=False)["agg"] == "dml1" and model.get_params()["learner__alpha"] == 1.0
    copy = clone(model).set_params(learner__alpha=5.0, estimator="pooled")
    assert copy.estimator == "pooled" and copy.learner.alpha == 5.0 and model.learner.alpha == 1.0
    df = table()
    assert numbers(fit_model(clone(model), df)) == numbers(fit_model(model, df)) == numbers(fit_model(model, df))
    assert "late" in repr(model)


def fit_model(model: PanelDML, df: pd.DataFrame) -> PanelDML:
    return model.fit(df["y"], df["w"], df[["x1", "x2"]], df["unit"], df["time"])


@pytest.mark.parametrize("bad", ["missing", "zero residuals", "setting", "learner"])
def test_a_failed_fit_leaves_what_was_fitted(bad: str) -> None:
    df = table()
    model = fit(df)
    before = {name: value for name, value in vars(model).items() if name.endswith("_")}
    broken = df.assign(y=np.nan) if bad == "missing" else df.assign(w=df["x1"] * 2) if "zero" in bad else df
    if bad == "setting":
        model.set_params(folds=99)
    if bad == "learner":
        model.set_params(learner=Broken())
    with pytest.raises(ValueError):
        fit_model(model, broken)
    after = {name: value for name, value in vars(model).items() if name.endswith("_")}
    assert after.keys() == before.keys() and all(after[name] is before[name] for name in before)


class Broken(LinearRegression):
    def predict(self, X: np.ndarray) -> np.ndarray:  # noqa: N803
        return np.full(len(X), np.nan)


# -- refusals


def test_a_treatment_without_variation_of_its_own() -> None:
    df = table()
    constant = df.assign(w=df["unit"] % 3)
    for estimator in ("cre", "early", "late", "dummies", "fe", "fd", "cre_general"):
        with pytest.raises(ValueError, match="w: .*varies within units"):
            fit(constant, estimator)
    with pytest.raises(ValueError, match="w: .*varies"):
        fit(df.assign(w=1.0), "pooled")
    for learner in (OLS, LinearRegression()):
        for estimator in ("pooled", "cre", "early", "late"):
            with pytest.raises(ValueError, match="w: .*residuals of zero"):
                fit(df.assign(w=df["x1"] - 3 * df["x2"]), estimator, learner)
    for estimator in LINEAR[1::2]:
        with pytest.raises(ValueError, match="w: .*residuals of zero"):
            fit(df.assign(w=df["x1"] - 3 * df["x2"]), estimator)
    gap = df[(df["time"] != 2) | (df["unit"] == 0)]
    in_the_gap = gap.assign(w=gap["unit"] * 0.3 + 1.7 * ((gap["time"] > 2) & (gap["unit"] > 0)))
    for useless in (in_the_gap, df.assign(w=1e5 + df["time"] * 0.1 + df["unit"])):
        with pytest.raises(ValueError, match="w: .*differences"):
            fit(useless, "fd")
    with pytest.raises(ValueError, match="w: .*and periods"):
        fit(df.assign(w=df["time"] * 1.0 + df["unit"]), "early", twoway=True)


def test_covariates_that_do_not_vary_in_time() -> None:
    df = table(balanced=False).assign(x2=lambda d: d["unit"] % 4 * 1.0)
    for estimator in ("fe", "early"):
        with pytest.raises(ValueError, match=r"x: .*x\['x2'\]"):
            fit(df, estimator)
    one = PanelDML("cre", OLS).fit(df["y"], df["w"], df[["x1"]], df["unit"], df["time"])
    for estimator in ("cre", "cre_general", "cre_normal"):  # its mean is the column again
        assert np.isfinite(numbers(fit(df, estimator))).all()
        assert abs(fit(df, estimator).coef_ - one.coef_) < 0.1
    same = [fit(df, "cre", learner).coef_ for learner in (OLS, LinearRegression())]
    assert_allclose(*same, rtol=1e-8)


@pytest.mark.parametrize("column", ["y", "w", "x1", "x2"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_missing(column: str, value: float) -> None:
    df = table()
    df.loc[3, column] = value
    with pytest.raises(ValueError, match=f"{column}.*1 that are missing or infinite"):
        fit(df)


def test_columns_that_do_not_fit() -> None:
    df = table()
    y, w, x, unit, time = df["y"], df["w"], df[["x1"]], df["unit"], df["time"]
    model = PanelDML("cre", OLS)
    for columns in ((y[::-1], w, x, unit, time), (y, w, x.set_index(x.index + 1), unit, time)):
        with pytest.raises(ValueError, match="index"):
            model.fit(*columns)
    with pytest.raises(ValueError, match="lengths"):
        model.fit(y[:-1], w, x, unit, time)
    for columns in ((y, w, None, unit, time), (y, w, x, None, time), (y, w, x, unit), (y, None, x, unit, time)):
        with pytest.raises(TypeError):
            model.fit(*columns)
    with pytest.raises(ValueError, match="several for unit .*0.*period .*0"):
        model.fit(y, w, x, unit, time.replace(1, 0))
    with pytest.raises(TypeError, match="w: expected numbers"):
        model.fit(y, w.astype(str) + "a", x, unit, time)
    with pytest.raises(ValueError, match="time"):
        model.fit(y, w, x, unit, time.where(time > 0))


@pytest.mark.parametrize(
    "setting",
    [
        {"estimator": "within"}, {"model": "ate"}, {"score": "iv"}, {"agg": "dml3"}, {"cluster": "time"},
        {"scheme": "blocks"}, {"folds": 1}, {"folds": 21}, {"folds": 2.5}, {"repeats": 0}, {"clip": 0.0}, {"clip": 0.5},
        {"learner": OLS, "folds": no_split(7)}, {"cluster": "twoway"}, {"estimator": "fd", "twoway": True},
        {"scheme": "period", "folds": 6},
        {"model": "irm"}, {"model": "irm", "estimator": "early"}, {"model": "irm", "estimator": "fe"},
        {"model": "irm", "score": "IV-type"},
        {"folds": Folds(torch.arange(100)[None] % 2, ~torch.eye(3, dtype=torch.bool))},
    ],
)  # fmt: skip
def test_settings_that_do_not_exist(setting: dict) -> None:
    name = next(reversed(setting))
    with pytest.raises(ValueError, match="w: " if setting == {"model": "irm"} else f"{name}|{next(iter(setting))}"):
        fit(table(), **({"learner": OLS} | setting))


def test_folds_that_are_not_what_they_say() -> None:
    df = table()
    row = torch.arange(100)[None]
    for k, scheme, cluster in ((5, "unit", "unit"), (4, "product", "twoway"), (5, "product", "twoway")):
        with pytest.raises(ValueError, match="folds: expected"):
            fit(df, folds=Folds(row % k, ~torch.eye(k, dtype=torch.bool), scheme), cluster=cluster, learner=Broken())
    fit(df, folds=Folds(row % 5, ~torch.eye(5, dtype=torch.bool)))  # these claim nothing


def test_a_learner_made_from_ours_learns_in_its_own_way() -> None:
    class Half(PolynomialRidge):
        def predict(self, X: np.ndarray) -> np.ndarray:  # noqa: N803
            return super().predict(X) / 2

    df = table()
    assert fit(df, "pooled", Half(1, 0.0)).coef_ != fit(df, "pooled", OLS).coef_
    assert_allclose(fit(df, "pooled", Half(1, 0.0)).residuals_["y", 0],
                    (fit(df, "pooled", OLS).residuals_["y", 0] + df["y"]) / 2, rtol=1e-9)  # fmt: skip


def test_what_is_not_a_number() -> None:
    df = table()
    for x in (df[["x1"]].assign(x2=pd.Categorical(df["time"])), df[["x1"]].assign(x2=df["time"].astype(str))):
        with pytest.raises(TypeError, match=r"x\['x2'\]: expected numbers"):
            PanelDML("cre", OLS).fit(df["y"], df["w"], x, df["unit"], df["time"])
    dates = pd.Series(pd.to_datetime("2020-01-01") + pd.to_timedelta(df["time"] + df["unit"], "D"))
    for w in (dates, dates - dates[0], df["w"] + 1j):
        with pytest.raises(TypeError, match="w: expected numbers"):
            fit(df.assign(w=w))
    for estimator in ("pooled", "cre", "fe"):
        with pytest.raises(ValueError, match="x: expected at least one"):
            PanelDML(estimator, OLS).fit(df["y"], df["w"], df[[]], df["unit"], df["time"])


def test_nothing_to_report() -> None:
    for report in (PanelDML().summary, PanelDML().confint):
        with pytest.raises(NotFittedError):
            report()
    df = table()
    exact = fit(df.assign(y=-2 * df["w"]), "simple_ols")
    assert_allclose(numbers(exact), [-2, 0], atol=1e-12)
    exact.se_ = 0.0
    assert exact.summary()["t"].item() == -np.inf and exact.summary()["P>|t|"].item() == 0


def test_a_learner_must_learn() -> None:
    with pytest.raises(TypeError, match="learner_w: expected a classifier"):
        fit(table(binary=True), model="irm", learner_w=OLS)
    for name in ("learner", "learner_w"):
        with pytest.raises(TypeError, match=f"{name}: expected a scikit-learn learner, got str"):
            fit(table(), **{name: "ridge"})
    with pytest.raises(ValueError, match="degree"):
        fit(table(), learner=PolynomialRidge(0))
    with pytest.raises(ValueError, match="alpha"):
        fit(table(), learner=PolynomialRidge(2, -1.0))
    with pytest.raises(ValueError, match="finite predictions"):
        fit(table(), learner=Broken())


def test_one_class_in_training_is_named() -> None:
    df = table(binary=True)
    df["w"] = ((df["unit"] == 3) & (df["time"] > 2)).astype(float)
    with pytest.raises(ValueError, match="w: expected zeros and ones|learner: expected training rows"):
        fit(df, "pooled", model="irm", folds=20)


def test_dummies_warn_where_units_are_held_out() -> None:
    df = table()
    with pytest.warns(UserWarning, match="'dummies'"):
        fit_model(PanelDML("dummies", OLS), df)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit_model(PanelDML("dummies", OLS, scheme="random"), df)


def test_dummies_of_any_learner() -> None:
    df = table(balanced=False)
    expected = fit(df, "dummies", PolynomialRidge(1, 1e-8), scheme="random")
    found = fit(df, "dummies", Ridge(1e-8, tol=1e-12, solver="sparse_cg"), scheme="random")
    assert_allclose(found.coef_, expected.coef_, rtol=1e-5)
    assert np.isfinite(fit(df, "dummies", DecisionTreeRegressor(max_depth=3), scheme="random").coef_)


def test_the_table_of_coverage_is_the_recorded_one() -> None:
    rows = {
        'linear, 10, "cre" of units': "linear",
        'squared, 10, "cre" of units': "squared",
        'squared, 10, "cre" of rows': "squared, folds of rows",
        'squared, 40, "cre" of units': "squared, T = 40",
        'squared and the square given, 10, "cre" of units': "squared, x\u00b2 given",
        'squared, 10, "cre_general" of units': "squared, cre_general",
        'squared, 10, "fd" of units': "squared, fd",
    }
    found = recorded("panel/dml_panel")
    text = " ".join((PanelDML.__doc__ or "").split())
    for shown, claim in rows.items():
        assert f"{shown} {found[f'coverage, {claim}']['ours']:.0f}" in text, claim
    seeds = {found[f"coverage, {claim}"]["seeds"] for claim in rows.values()}
    assert len(seeds) == 1
