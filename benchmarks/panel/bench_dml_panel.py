"""Double machine learning for panels against DoubleML: the same data, folds and learner, so the same coefficients."""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable

import numpy as np
import torch
from doubleml import DoubleMLData, DoubleMLPLPR, DoubleMLPLR
from doubleml.data import DoubleMLPanelData
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures, StandardScaler

from benchmarks._timing import Row, compare, peak_mb
from peftref.panel.dgp import Simulated, dgp_fuhr_papies_2024
from peftref.panel.dml_panel import PanelDML
from peftref.panel.folds import Folds, make_folds
from peftref.panel.study import estimate

CELLS = [(structure, shape) for shape in ("linear", "u-shaped") for structure in "ABC"]
PLPR = {"early": "wg_approx", "cre_general": "cre_general", "cre_normal": "cre_normal", "fd": "fd_exact"}
PLR = ("pooled", "cre")


class Fixed(TransformerMixin, BaseEstimator):
    """Standardises by the location and scale of all rows, as our cross-fit does; learns nothing of its own."""

    def __init__(self, location: np.ndarray, scale: np.ndarray) -> None:
        self.location, self.scale = location, scale

    def fit(self, x: np.ndarray, y: object = None) -> Fixed:
        return self

    def transform(self, x: np.ndarray) -> np.ndarray:
        width = x.shape[1]
        return (x - self.location[:width]) / self.scale[:width]


def learner(x: np.ndarray):
    """A cubic ridge on the features ``x``, from scikit-learn's parts."""
    fixed = Fixed(x.mean(0), x.std(0))
    return make_pipeline(fixed, PolynomialFeatures(3, include_bias=False), StandardScaler(), Ridge(1.0))


def by_doubleml(data: Simulated, folds: Folds) -> dict[str, float]:
    """The estimators that DoubleML has, on one dataset."""
    frame, found = data.frame(), {}
    means = frame.groupby("unit")[["x1", "w"]].transform("mean")
    for name in PLR:
        x = frame[["x1"]].to_numpy() if name == "pooled" else np.column_stack([frame["x1"], means["x1"], means["w"]])
        model = learner(x)
        peer = DoubleMLPLR(DoubleMLData.from_arrays(x, frame["y"].to_numpy(), frame["w"].to_numpy()), model, model)
        peer.set_sample_splitting([(a.numpy(), b.numpy()) for a, b in folds.splits()])
        found[name] = float(peer.fit().coef[0])
    panel = DoubleMLPanelData(frame, "y", "w", "time", "unit", x_cols=["x1"], static_panel=True)
    for name, approach in PLPR.items():
        peer = DoubleMLPLPR(panel, Ridge(), Ridge(), approach=approach, n_folds=len(folds))
        known = peer.data_transform
        x = known.x if approach != "cre_normal" else np.column_stack([known.x, means["w"]])
        peer = DoubleMLPLPR(panel, learner(x), learner(x), approach=approach, n_folds=len(folds))
        unit_fold = dict(zip(data.panel.layout.unit.tolist(), folds.fold[0].tolist(), strict=True))
        fold, units = np.array([unit_fold[u] for u in known.id_var]), np.array(list(unit_fold.values()))
        rows = [(np.flatnonzero(fold != k), np.flatnonzero(fold == k)) for k in range(len(folds))]
        clusters = [([np.flatnonzero(units != k)], [np.flatnonzero(units == k)]) for k in range(len(folds))]
        peer.set_sample_splitting([rows], [clusters])
        found[name] = float(peer.fit().coef[0])
    return found


def study_row() -> Row:
    """The study of the paper's Figure 4, one dataset for each of its cells."""
    made = [dgp_fuhr_papies_2024(*cell, seeds=[i]) for i, cell in enumerate(CELLS)]
    splits = [make_folds(data.panel.layout, 5, "unit", seed=i) for i, data in enumerate(made)]
    names = [*PLR, *PLPR]

    def ours() -> list[dict[str, torch.Tensor]]:
        return [estimate(names, data, folds, agg="dml2") for data, folds in zip(made, splits, strict=True)]

    def peer() -> list[dict[str, float]]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return [by_doubleml(data, folds) for data, folds in zip(made, splits, strict=True)]

    for one, other in zip(ours(), peer(), strict=True):
        for name in names:
            np.testing.assert_allclose(one[name].item(), other[name], rtol=1e-7, err_msg=name)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of many small matrices, as in a study
    try:
        return compare(
            f"{len(CELLS)} panels of 500 x 10, {len(names)} estimators, 5 folds", ours, peer,
            peer_name="DoubleML, the same learner", target=50.0, warmup=1, repeats=3,
        )  # fmt: skip
    finally:
        torch.set_num_threads(threads)


def fitted(n_units: int, n_periods: int, n_covariates: int = 1) -> Callable[[], PanelDML]:
    frame = dgp_fuhr_papies_2024(n_units=n_units, n_periods=n_periods, n_covariates=n_covariates).frame()
    x = frame[[f"x{j + 1}" for j in range(n_covariates)]]
    return lambda: PanelDML("cre").fit(frame["y"], frame["w"], x, frame["unit"], frame["time"])


def seconds(run: Callable[[], object], repeats: int = 3) -> float:
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def scaling_row(what: str, small: tuple[int, ...], large: tuple[int, ...], factor: float, target: float | None) -> Row:
    """``factor`` times the small problem beside the large one: the ratio is 1 where time is linear."""
    one, other = fitted(*small), fitted(*large)
    small_s, large_s = seconds(one), seconds(other)
    exponent = math.log(large_s / small_s) / math.log(factor)
    return Row(
        claim=f"cre, {what}: time grows with the power {exponent:.2f}", peer=f"{factor:g} times the smaller problem",
        ours_s=large_s, peer_s=factor * small_s, ratio=factor * small_s / large_s, ours_peak_mb=peak_mb(other),
        peer_peak_mb=factor * peak_mb(one), target=target,
    )  # fmt: skip


def rows() -> list[Row]:
    return [
        study_row(),
        scaling_row("1e4 to 1e6 rows, more units", (1000, 10), (100_000, 10), 100, 0.5),
        scaling_row("1e4 to 1e6 rows, more periods", (1000, 10), (1000, 1000), 100, 0.5),
        scaling_row("1 to 4 covariates, 1e4 rows", (1000, 10, 1), (1000, 10, 4), 4, None),
    ]
