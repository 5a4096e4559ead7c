"""A valid call of everything public in peftref.panel: tests.frame.test_fuzz spoils its arguments one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from peftref import panel
from tests.frame._inputs import Call, labels, t


def lay() -> panel.Layout:
    unit = torch.arange(8).repeat_interleave(3)
    return panel.Layout.of(unit, torch.arange(3).repeat(8))


def simulated() -> panel.Simulated:
    return panel.dgp_fuhr_papies_2024(n_units=12, n_periods=3, seeds=(0, 1))


def made_folds(n: int = 2) -> panel.Folds:
    return panel.make_folds(simulated().panel.layout, n, "unit")


def frame() -> dict[str, Any]:
    table = simulated().frame()
    return {name: table[name] for name in table.columns}


def sorted_rows() -> tuple[Tensor, Tensor]:
    fold = torch.arange(12).view(1, 12) % 3
    return t(1, 4, 12).double(), fold


def gram_moments() -> panel.Moments:
    rows, fold = sorted_rows()
    ordered, counts, _ = panel.by_fold(rows, fold, 3)
    return panel.moments(ordered, counts)


def keep() -> Tensor:
    return ~torch.eye(3, dtype=torch.bool)


def fitted_dml() -> panel.PanelDML:
    return panel.PanelDML(folds=2).fit(**{k: frame()[k] for k in ("y", "w", "unit", "time")}, x=xs())


def xs() -> pd.DataFrame:
    table = simulated().frame()
    return table[[c for c in table.columns if str(c).startswith("x")]]


def panel_columns() -> dict[str, Any]:
    given = {k: v for k, v in frame().items() if k in ("y", "w", "unit", "time")}
    return given | {"x": xs()}


CALLS: dict[str, Callable[[], Call]] = {
    "read_panel": lambda: (panel.read_panel, panel_columns() | dict(estimator="cre")),
    "check_shapes": lambda: (
        panel.check_shapes,
        dict(
            z=t(1, 2, 36).double(),
            targets=t(1, 2, 36).double(),
            folds=made_folds(),
            uses=[[0], [1]],
            unit=None,
            linear=0,
        ),
    ),
    "crossfit": lambda: (
        panel.crossfit,
        dict(
            z=t(1, 2, 36).double(), targets=t(1, 2, 36).double(), folds=made_folds(), learner=panel.PolynomialRidge(1)
        ),
    ),
    "dgp_clarke_polselli_2025": lambda: (
        panel.dgp_clarke_polselli_2025,
        dict(design=1, n_units=5, n_periods=3, n_covariates=4, theta=0.5, seeds=(0,)),
    ),
    "dgp_fuhr_papies_2024": lambda: (
        panel.dgp_fuhr_papies_2024,
        dict(
            structure="C",
            shape="u-shaped",
            n_units=5,
            n_periods=3,
            n_covariates=1,
            beta=1.0,
            gamma=1.0,
            delta=1.0,
            rho=0.0,
            seeds=(0,),
        ),
    ),
    "PanelDML": lambda: (
        (lambda **options: panel.PanelDML(**options).fit(**panel_columns())),
        dict(
            estimator="cre",
            model="plr",
            score="partialling out",
            agg="dml2",
            folds=2,
            scheme="unit",
            repeats=1,
            clip=0.01,
            seed=0,
        ),
    ),
    "PanelDML.fit": lambda: (
        panel.PanelDML(folds=2).fit,
        {k: v.to_numpy() for k, v in panel_columns().items()},
    ),
    "PanelDML.confint": lambda: (fitted_dml().confint, dict(level=0.9)),
    "aipw_score": lambda: (
        panel.aipw_score,
        dict(y=t(8), w=labels(8, 2).double(), g0=t(8), g1=t(8), m=t(8).sigmoid(), clip=0.01),
    ),
    "plr_score": lambda: (panel.plr_score, dict(v=t(8), u=t(8, seed=1), w=t(8, seed=2))),
    "Folds": lambda: (
        panel.Folds,
        dict(fold=torch.arange(6).view(1, 6) % 2, keep=~torch.eye(2, dtype=torch.bool)),
    ),
    "make_folds": lambda: (panel.make_folds, dict(layout=lay(), folds=2, scheme="unit", repeats=1, seed=0)),
    "by_fold": lambda: (panel.by_fold, dict(rows=sorted_rows()[0], fold=sorted_rows()[1], k=3)),
    "fit": lambda: (
        panel.fit,
        dict(parts=gram_moments(), keep=keep(), columns=torch.tensor([0, 1]), targets=torch.tensor([3]), alphas=[1.0]),
    ),
    "inverse_times": lambda: (panel.inverse_times, dict(a=torch.eye(3).double(), b=t(3, 2).double(), alpha=1.0)),
    "moments": lambda: (panel.moments, dict(columns=t(1, 3, 4, 5).double(), counts=torch.full((1, 3), 5))),
    "standardised": lambda: (
        panel.standardised,
        dict(train=gram_moments(), columns=torch.tensor([0, 1]), targets=torch.tensor([3])),
    ),
    "check_clusters": lambda: (
        panel.check_clusters,
        dict(layout=simulated().panel.layout, cluster="unit", stacklevel=0),
    ),
    "over_repeats": lambda: (panel.over_repeats, dict(coefs=t(3), ses=t(3).abs())),
    "row_weights": lambda: (
        panel.row_weights,
        dict(layout=simulated().panel.layout, folds=made_folds(), cluster="unit"),
    ),
    "solve": lambda: (
        panel.solve,
        dict(
            psi_a=t(1, 36).double().abs(),
            psi_b=t(1, 36).double(),
            weights=torch.ones(1, 36).double(),
            folds=made_folds(),
        ),
    ),
    "standard_error": lambda: (
        panel.standard_error,
        dict(
            psi=t(1, 36).double(),
            psi_a=t(1, 36).double().abs(),
            layout=simulated().panel.layout,
            folds=made_folds(),
            cluster="unit",
        ),
    ),
    "partial_out": lambda: (
        panel.partial_out,
        dict(
            estimators=["cre"],
            panel=simulated().panel,
            folds=made_folds(),
            fit=lambda *a, **k: panel.crossfit(*a, learner=panel.PolynomialRidge(1), **k),
        ),
    ),
    "transform": lambda: (panel.transform, dict(estimator="fd", panel=simulated().panel)),
    "variables": lambda: (panel.variables, dict(panel=simulated().panel, wanted="xbm")),
    "Layout": lambda: (panel.Layout.of, dict(unit=[0, 0, 1, 1], time=[0, 1, 0, 1])),
    "group_sums": lambda: (panel.group_sums, dict(a=t(8), group=labels(), size=4)),
    "means": lambda: (panel.means, dict(a=t(8), group=labels())),
    "within": lambda: (panel.within, dict(a=t(24).double(), layout=lay(), tol=1e-9)),
    "crossfit_sklearn": lambda: (
        panel.crossfit_sklearn,
        dict(
            z=t(1, 2, 36).double(),
            targets=t(1, 1, 36).double(),
            folds=made_folds(),
            learners=[panel.PolynomialRidge(1)],
        ),
    ),
    "follow_folds": lambda: (
        panel.follow_folds,
        dict(learner=panel.PolynomialRidge(1), fold=np.arange(8) % 2),
    ),
    "linear_residuals": lambda: (
        panel.linear_residuals,
        dict(estimator="fe", panel=simulated().panel) | dict(estimator="pols"),
    ),
    "panel_ols": lambda: (
        panel.panel_ols,
        {k: v.to_numpy() for k, v in panel_columns().items() if k != "w"} | dict(effects="fixed"),
    ),
    "PolynomialRidge": lambda: (
        (lambda **options: panel.PolynomialRidge(**options).fit(t(12, 2).numpy(), t(12).numpy())),
        dict(degree=2, alpha=1.0),
    ),
    "PolynomialRidge.fit": lambda: (panel.PolynomialRidge(2).fit, dict(X=t(12, 2).numpy(), y=t(12).numpy())),
    "check_learner": lambda: (panel.check_learner, dict(learner=panel.PolynomialRidge(2))),
    "monomials": lambda: (panel.monomials, dict(n=2, degree=2, linear=0)),
    "polynomial": lambda: (
        panel.polynomial,
        dict(z=t(1, 2, 5).double(), exponents=panel.monomials(2, 2), room=0),
    ),
    "standardise": lambda: (panel.standardise, dict(z=t(1, 2, 5).double())),
    "estimate": lambda: (
        panel.estimate,
        dict(estimators=["pols"], data=simulated(), folds=made_folds(), agg="dml1"),
    ),
    "monte_carlo": lambda: (
        panel.monte_carlo,
        dict(
            simulate=lambda seeds: panel.dgp_fuhr_papies_2024(n_units=12, n_periods=3, seeds=seeds),
            estimators=["pols"],
            seeds=[0],
            folds=2,
            chunk=8,
            n_jobs=1,
        ),
    ),
}


# Lines of mathematics whose docstring gives the shapes: torch names the sizes that do not fit.
KERNELS = {
    "aipw_score",
    "by_fold",
    "check_clusters",
    "fit",
    "group_sums",
    "inverse_times",
    "means",
    "moments",
    "monomials",
    "over_repeats",
    "plr_score",
    "polynomial",
    "row_weights",
    "solve",
    "standard_error",
    "standardise",
    "standardised",
    "within",
}


# Cases that stay as they are, and why.
SPARED = {
    ("by_fold", "rows", "empty"): "nothing at this place",
    ("group_sums", "a", "fewer dims"): "nothing at this place",
    ("means", "a", "fewer dims"): "nothing at this place",
    ("means", "group", "negative"): "no negative groups",
    ("polynomial", "exponents", "no columns"): "no exponents",
    ("polynomial", "exponents", "negative"): "no such product",
    ("polynomial", "exponents", "beyond"): "no such product",
    ("polynomial", "exponents", "halves"): "no such product",
    ("monte_carlo", "n_jobs", "0"): "joblib says so",
}
