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

from benchmarks._timing import Row, compare, one_thread
from peftref.panel.core.columns import Panel
from peftref.panel.core.folds import Folds, make_folds
from peftref.panel.core.inference import standard_error
from peftref.panel.core.ridge import PolynomialRidge, monomials
from peftref.panel.dml_panel import PanelDML
from peftref.panel.experiments.dgp import Simulated, dgp_fuhr_papies_2024
from peftref.panel.experiments.study import estimate

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


class Peer:
    """The estimators that DoubleML has, on one dataset; tables, splits and learners are made before the clock runs."""

    def __init__(self, data: Simulated, folds: Folds) -> None:
        frame = data.frame()
        means = frame.groupby("unit")[["x1", "w"]].transform("mean")
        y, w, x = (frame[name].to_numpy() for name in ("y", "w", "x1"))
        levels = {"pooled": x[:, None], "cre": np.column_stack([x, means["x1"], means["w"]])}
        self.data = {name: DoubleMLData.from_arrays(z, y, w) for name, z in levels.items()}
        self.learners = {name: learner(z) for name, z in levels.items()}
        self.rows = [tuple(part.numpy() for part in split) for split in folds.splits()]
        self.panel = DoubleMLPanelData(frame, "y", "w", "time", "unit", x_cols=["x1"], static_panel=True)
        units, first = np.unique(data.panel.layout.unit.numpy(), return_index=True)
        of_unit, every, self.splits = folds.fold[0].numpy()[first], range(len(folds)), {}
        clusters = [tuple([np.flatnonzero((of_unit == k) == test)] for test in (False, True)) for k in every]
        for name, approach in PLPR.items():
            known = DoubleMLPLPR(self.panel, Ridge(), Ridge(), approach=approach, n_folds=len(folds)).data_transform
            z = known.x if approach != "cre_normal" else np.column_stack([known.x, means["w"]])
            fold = of_unit[np.searchsorted(units, known.id_var)]
            rows = [tuple(np.flatnonzero((fold == k) == test) for test in (False, True)) for k in every]
            self.learners[name], self.splits[name] = learner(z), ([rows], [clusters])

    def __call__(self) -> dict[str, float]:
        found = {}
        for name in (*PLR, *PLPR):
            model = self.learners[name]
            if name in PLR:
                peer = DoubleMLPLR(self.data[name], model, model, draw_sample_splitting=False)
                peer.set_sample_splitting(self.rows)
            else:
                peer = DoubleMLPLPR(self.panel, model, model, approach=PLPR[name], n_folds=len(self.rows))
                peer.set_sample_splitting(*self.splits[name])
            found[name] = float(peer.fit().coef[0])
        return found


def study_row(what: str, cells: list[tuple[str, str]], target: float | None) -> Row:
    """Panels of the paper's Figure 4, one for each of these cells: ours in one batch, the peer's one after another."""
    made = [dgp_fuhr_papies_2024(*cell, seeds=[i]) for i, cell in enumerate(cells)]
    splits = [make_folds(data.panel.layout, 5, "unit", seed=i) for i, data in enumerate(made)]
    names, layout = [*PLR, *PLPR], made[0].panel.layout
    y, w, x = (torch.cat([data.panel[i] for data in made]) for i in range(3))
    confounding, parameters = torch.cat([data.confounding for data in made]), made[0].parameters
    batch = Simulated(Panel(y, w, x, layout), confounding, 1.0, parameters)
    folds = Folds(torch.cat([one.fold for one in splits]), splits[0].keep, "unit")
    peers = [Peer(data, one) for data, one in zip(made, splits, strict=True)]

    def ours() -> dict[str, torch.Tensor]:
        return estimate(names, batch, folds, agg="dml2")

    def peer() -> list[dict[str, float]]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return [one() for one in peers]

    found = ours()
    for i, expected in enumerate(peer()):
        for name in names:
            np.testing.assert_allclose(found[name][i].item(), expected[name], rtol=1e-8, err_msg=name)
    row = compare(
        f"{what} of 500 x 10, {len(names)} estimators, 5 folds", ours, peer,
        peer_name=f"{PEER}, the same learner, one thread", target=target, warmup=1, repeats=5,
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
    return lambda: PanelDML("cre", PolynomialRidge()).fit(frame["y"], frame["w"], x, frame["unit"], frame["time"])


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


@one_thread()
def rows() -> list[Row]:
    return [
        study_row("6 panels", CELLS, 50.0),
        study_row("1 panel", CELLS[-1:], 50.0),
        error_row(10_000, 10),
        scaling_row("1e4 to 1e5 rows, units", (1000, 10), (10_000, 10), 10, 0.5),
        scaling_row("1e5 to 1e6 rows, units", (10_000, 10), (100_000, 10), 10, 0.5),
        scaling_row("1e5 to 1e6 rows, periods", (1000, 100), (1000, 1000), 10, 0.5),
        scaling_row(
            f"{features(1)} to {features(4)} features", (1000, 10, 1), (1000, 10, 4), features(4) / features(1), None
        ),
        scaling_row(
            f"{features(4)} to {features(8)} features", (1000, 10, 4), (1000, 10, 8), features(8) / features(4), None
        ),
    ]
