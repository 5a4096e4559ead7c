"""Double machine learning for panels against DoubleML: the same data, folds and learner, so the same coefficients.

All on one thread: the matrices are small, and threads that share them would be timed waiting for each other.
"""

from __future__ import annotations

import math
import tracemalloc
import warnings
from collections.abc import Callable
from importlib.metadata import version

import numpy as np
import torch
from doubleml import DoubleMLData, DoubleMLPLPR, DoubleMLPLR
from doubleml.data import DoubleMLPanelData
from doubleml.utils._estimation import _var_est
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures, StandardScaler
from threadpoolctl import threadpool_limits

from benchmarks._timing import Row, compare
from peftref.panel.dgp import Simulated, dgp_fuhr_papies_2024
from peftref.panel.dml_panel import PanelDML
from peftref.panel.folds import Folds, make_folds
from peftref.panel.inference import standard_error
from peftref.panel.ridge import monomials
from peftref.panel.study import estimate

CELLS = [(structure, shape) for shape in ("linear", "u-shaped") for structure in "ABC"]
PLPR = {"early": "wg_approx", "cre_general": "cre_general", "cre_normal": "cre_normal", "fd": "fd_exact"}
PLR = ("pooled", "cre")
PEER = f"DoubleML {version('doubleml')}"


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
            np.testing.assert_allclose(one[name].item(), other[name], rtol=1e-8, err_msg=name)
    row = compare(
        f"{len(CELLS)} panels of 500 x 10, {len(names)} estimators, 5 folds", ours, peer,
        peer_name=f"{PEER}, the same learner", target=50.0, warmup=1, repeats=5,
    )  # fmt: skip
    row["peer_peak_mb"] = numpy_peak_mb(peer)
    return row


def numpy_peak_mb(run: Callable[[], object]) -> float:
    """What ``peak_mb`` is for tensors, for the arrays of a peer without any."""
    tracemalloc.start()
    run()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 1e6


def error_row(n_units: int, n_periods: int) -> Row:
    """Standard errors clustered by unit: sums over units in one pass, for their loop over units."""
    layout = dgp_fuhr_papies_2024(n_units=n_units, n_periods=n_periods).panel.layout
    folds = make_folds(layout, 5, "unit")
    psi, slope = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 1, len(layout))))
    slope = slope - 2
    smpls = [tuple(part.numpy() for part in split) for split in folds.splits()]
    unit = layout.unit.numpy()[:, None]
    clusters = [tuple([np.unique(unit[part])] for part in split) for split in smpls]

    def ours() -> float:
        return standard_error(psi, slope, layout, folds).item()

    def peer() -> float:
        return _var_est(psi[0].numpy(), slope[0].numpy(), smpls, True, unit, clusters, 5)[0] ** 0.5

    np.testing.assert_allclose(ours(), peer(), rtol=1e-10)
    row = compare(
        f"se clustered by {n_units} units, {len(layout)} rows", ours, peer, peer_name=PEER, target=50.0, warmup=1,
        repeats=5,
    )  # fmt: skip
    row["peer_peak_mb"] = numpy_peak_mb(peer)
    return row


def fitted(n_units: int, n_periods: int, n_covariates: int = 1) -> Callable[[], PanelDML]:
    frame = dgp_fuhr_papies_2024(n_units=n_units, n_periods=n_periods, n_covariates=n_covariates).frame()
    x = frame[[f"x{j + 1}" for j in range(n_covariates)]]
    return lambda: PanelDML("cre").fit(frame["y"], frame["w"], x, frame["unit"], frame["time"])


def scaling_row(what: str, small: tuple[int, ...], large: tuple[int, ...], factor: float, target: float | None) -> Row:
    """``factor`` times the time and memory of the small problem beside those of the large one: 1 where linear."""
    row = compare(
        f"cre, {what}", fitted(*large), fitted(*small), peer_name=f"{factor:.3g} times the small one", target=target,
        warmup=1, repeats=5,
    )  # fmt: skip
    for key in ("peer_s", "peer_peak_mb", "ratio"):
        row[key] *= factor
    row["claim"] += f": time ~ power {1 - math.log(row['ratio'], factor):.2f}"
    return row


def features(n_covariates: int) -> int:
    """Of x, its means and that of w, to the third degree."""
    return len(monomials(2 * n_covariates + 1, 3))


def rows() -> list[Row]:
    with threadpool_limits(1):
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return [
                study_row(),
                error_row(10_000, 10),
                scaling_row("1e4 to 1e5 rows, units", (1000, 10), (10_000, 10), 10, 0.5),
                scaling_row("1e5 to 1e6 rows, units", (10_000, 10), (100_000, 10), 10, 0.5),
                scaling_row("1e5 to 1e6 rows, periods", (1000, 100), (1000, 1000), 10, 0.5),
                scaling_row(
                    f"{features(1)} to {features(4)} features", (1000, 10, 1), (1000, 10, 4), features(4) / features(1),
                    None,
                ),
            ]  # fmt: skip
        finally:
            torch.set_num_threads(threads)
