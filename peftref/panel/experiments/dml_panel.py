"""The recorded run of the chapter on double machine learning for panels.

``cpu``: the paper's simulated panels, with its sizes, readings of what its text leaves open, boosted trees in place of
the ridge, and intervals of 300 panels. ``gpu``: more datasets and units.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...results import finding
from ..core.folds import SCHEMES
from ..core.ridge import PolynomialRidge
from ..dml_panel import PanelDML
from ._dml_readings import READINGS, YARDSTICKS, distance, matched, reading
from ._dml_trees import boosted_cre, by_bins
from .dgp import dgp_fuhr_papies_2024
from .study import monte_carlo

METHODS = ["simple_ols", "pols", "fe", "pooled", "early", "late"]
METHODS += ["dummies", "cre", "cre_general", "fd", "oracle_fe"]
COMPARED = ["pooled", "late", "dummies", "cre", "oracle_fe"]
CELLS = [(structure, shape) for shape in ("linear", "u-shaped") for structure in "ABC"]
FIGURES = "Figures 6 and 7 (measured in pixels, ±0.002)"
# Mean absolute errors of the paper: structure C, squared confounding, 10 periods, 100 datasets.
PAPER: dict[tuple[str, int], dict[str, float]] = {
    ("units", 500): {
        "simple_ols": 0.679,
        "pols": 0.575,
        "fe_only": 0.561,
        "fe": 0.476,
        "early": 0.414,
        "oracle_no_fe": 0.305,
        "pooled": 0.198,
        "late": 0.125,
        "dummies": 0.099,
        "cre": 0.032,
        "oracle_fe": 0.011,
    },
    ("units", 50): {"pooled": 0.211, "late": 0.160, "dummies": 0.114, "cre": 0.080, "oracle_fe": 0.036},
    ("units", 5000): {"pooled": 0.196, "late": 0.119, "cre": 0.019, "oracle_fe": 0.004},
    ("covariates", 10): {"pooled": 0.252, "late": 0.24, "dummies": 0.25, "cre": 0.236, "oracle_fe": 0.011},
}
# shape of the confounding, periods, folds, covariates, estimator
CASES: dict[str, tuple[str, int, str, tuple[str, ...], str]] = {
    "linear": ("linear", 10, "unit", ("x1",), "cre"),
    "squared": ("u-shaped", 10, "unit", ("x1",), "cre"),
    "squared, folds of rows": ("u-shaped", 10, "random", ("x1",), "cre"),
    "squared, T = 40": ("u-shaped", 40, "unit", ("x1",), "cre"),
    "squared, x² given": ("u-shaped", 10, "unit", ("x1", "square"), "cre"),
    "squared, cre_general": ("u-shaped", 10, "unit", ("x1",), "cre_general"),
    "squared, fd": ("u-shaped", 10, "unit", ("x1",), "fd"),
}
SIZES = {"datasets": 100, "many": 1000, "few": 20, "splits": 40, "panels": 300, "trees": 3, "units": [50, 500, 5000]}
SIZES |= {"boosted": 50, "read": 400}
SMALL = {
    "datasets": 4,
    "many": 20,
    "few": 2,
    "splits": 2,
    "panels": 20,
    "trees": 1,
    "units": [50],
    "boosted": 2,
    "read": 20,
}
PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {**SMALL},
    "cpu": {**SIZES},
    "gpu": {"few": 1000, "units": [50, 500, 5000], "device": "cuda"},
}
MINUTES = {"smoke": 0.1, "cpu": 14, "gpu": 5}
NEEDS = {"gpu": ("cuda",)}
Each = Callable[..., Any]
Table = dict[str, list[float]]
Array = NDArray[Any]


def run(each: Each, *, data: Path | None = None, **settings: Any) -> dict[str, Any]:
    """Every study of the chapter; on a ``device``, the one of the sizes alone."""
    if "device" in settings:
        sizes = _by_size(each, **settings)
        return {"rows": _size_rows(sizes), "arrays": {"sizes": sizes}, "protocol": _protocol()}
    return _all(each, **settings)


def _all(
    each: Each,
    datasets: int,
    many: int,
    few: int,
    splits: int,
    panels: int,
    trees: int,
    boosted: int,
    read: int,
    units: Sequence[int],
) -> dict[str, Any]:
    cells = {f"{s}, {f}": each(f"{s}, {f}", estimates, METHODS, datasets, s, f) for s, f in CELLS}
    trained = {
        f"{s}, {f}": each(f"boosted {s}, {f}", boosted_cre, boosted, min(units, key=_from_500), s, f) for s, f in CELLS
    }
    readings = {name: each(f"reading {name}", reading, name, read, min(units, key=_from_500)) for name in READINGS}
    errors = each("errors", absolute_errors, list(PAPER["units", 500]), many, 10)
    sizes = _by_size(each, few, units)
    splitting = {
        scheme: each(f"folds {scheme}", by_scheme, scheme, splits) for scheme in SCHEMES if scheme != "product"
    }
    coverage = {name: each(f"coverage {name}", intervals, panels, *case) for name, case in CASES.items()}
    boosting = each("boosting", by_bins, trees)
    arrays = {
        "cells": cells,
        "boosted": trained,
        "readings": {name: _reading(found) for name, found in readings.items()},
        "matched": errors["matched"],
        "errors": errors["batches"],
        "sizes": sizes,
        "splits": splitting,
        "coverage": {name: _summary(found) for name, found in coverage.items()},
        "boosting": boosting,
    }
    rows = [*_error_rows(errors["first"], PAPER["units", 500], ""), *_size_rows(sizes), *_coverage_rows(coverage)]
    of_trees = {"cre": [abs(value - 1) for value in trained["C, u-shaped"]]}
    rows += _error_rows(of_trees, {"cre": PAPER["units", 500]["cre"]}, ", boosted trees")
    return {"rows": rows, "arrays": arrays, "protocol": _protocol()}


def estimates(methods: Sequence[str], datasets: int, structure: str, shape: str) -> Table:
    """Of an effect of 1, in each dataset."""
    return _lists(monte_carlo(partial(dgp_fuhr_papies_2024, structure, shape), methods, range(datasets)))


def absolute_errors(methods: Sequence[str], datasets: int, batches: int) -> dict[str, Any]:
    """Absolute errors, structure C, squared confounding, 500 units: of each dataset of the first batch, and means."""
    found = (monte_carlo(partial(dgp_fuhr_papies_2024, "C", "u-shaped"), methods, range(datasets)) - 1).abs()
    means = found.groupby(np.arange(datasets) * batches // datasets).mean()
    near = matched(_lists(found), {name: PAPER["units", 500][name] for name in methods}, kept=50, tries=20 * datasets)
    return {"first": _lists(found[: datasets // batches]), "batches": _lists(means), "matched": near}


def _from_500(units: int) -> int:
    return abs(units - 500)


def _reading(errors: Sequence[Sequence[float]]) -> dict[str, Any]:
    paper = [PAPER["units", 500][name] for name in YARDSTICKS]
    return {**dict(zip(YARDSTICKS, np.mean(errors, 0).tolist(), strict=True)), **distance(errors, paper)}


def _by_size(each: Each, few: int, units: Sequence[int], device: str = "cpu") -> dict[str, Table]:
    found = {f"units {n}": each(f"units {n}", sized_errors, few, n, 1, 3, device) for n in units}
    for j in (1, 3, 10):
        found[f"covariates {j}"] = each(f"covariates {j}", sized_errors, few, 500, j, 2, device)
    return found


def sized_errors(datasets: int, units: int, covariates: int, degree: int, device: str) -> Table:
    """Absolute errors of five estimators in each dataset."""
    make = partial(dgp_fuhr_papies_2024, "C", "u-shaped", n_units=units, n_covariates=covariates)
    chunk = 8 if device == "cpu" else max(1, 100_000 // units)
    learner = PolynomialRidge(degree=degree)
    found = monte_carlo(make, COMPARED, range(datasets), learner=learner, chunk=chunk, device=device)
    return _lists((found - 1).abs())


def by_scheme(scheme: str, datasets: int) -> Table:
    """Estimates with one way to split a panel of 100 units and 50 periods with long memory, in ten folds."""
    make = partial(dgp_fuhr_papies_2024, "C", "u-shaped", n_units=100, n_periods=50, rho=0.9)
    methods = ["pooled", "late", "dummies", "cre"]
    return _lists(monte_carlo(make, methods, range(datasets), scheme=scheme, folds=10))


def intervals(
    panels: int, shape: str, periods: int, folds: str, columns: Sequence[str], estimator: str
) -> list[list[float]]:
    """Of each panel of 200 units: whether the 95 % interval holds the effect, the error, its claimed standard error."""
    rows = []
    for seed in range(panels):
        made = dgp_fuhr_papies_2024("C", shape, n_units=200, n_periods=periods, gamma=1.0, delta=1.0, seeds=[seed])
        d = made.frame()
        d["square"] = d["x1"] ** 2
        method = PanelDML(estimator, PolynomialRidge(2), scheme=folds, seed=seed)
        fit = method.fit(d["y"], d["w"], d[list(columns)], d["unit"], d["time"])
        low, high = fit.confint().to_numpy()[0]
        rows.append([float(low <= 1 <= high), fit.coef_ - 1, fit.se_])
    return rows


def _summary(rows: Sequence[Sequence[float]]) -> dict[str, float]:
    covers, error, se = np.array(rows).T
    scatter = np.subtract(*np.quantile(error, [0.75, 0.25])) / 1.349
    return {"coverage": 100 * covers.mean(), "bias": np.median(error), "scatter": scatter, "claimed": np.median(se)}


def _error_rows(errors: Table, paper: dict[str, float], setting: str) -> list[dict[str, Any]]:
    """In hundredths, beside the paper's."""
    rows = []
    for name, number in paper.items():
        what = f"mean absolute error of {name}{setting}"
        values = [100 * v for v in errors[name]]
        rows.append(finding(what, values, where=FIGURES, unit="hundredths", claim="paper", paper=100 * number))
    return rows


def _size_rows(sizes: dict[str, Table]) -> list[dict[str, Any]]:
    rows = []
    for (axis, n), paper in PAPER.items():
        if f"{axis} {n}" in sizes and (axis, n) != ("units", 500):
            rows += _error_rows(sizes[f"{axis} {n}"], paper, f", {n} {axis}")
    return rows


def _coverage_rows(coverage: dict[str, list[list[float]]]) -> list[dict[str, Any]]:
    """Coverage of the 95 % intervals, in ten batches of panels."""
    rows = []
    for name, found in coverage.items():
        covers: Array = np.array(found)[:, 0].reshape(10, -1).mean(1)
        rows.append(finding(f"coverage, {name}", (100 * covers).tolist(), where="ours", unit="%"))
    return rows


def _lists(table: Any) -> Table:
    return {name: table[name].tolist() for name in table}


def _protocol() -> dict[str, Any]:
    return {"data": "simulated by dgp_fuhr_papies_2024", "learner": "cubic ridge, alpha 1", "folds": "5, of rows, DML1"}
