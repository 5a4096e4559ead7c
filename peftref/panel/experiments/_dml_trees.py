"""Boosted trees in place of the ridge, for the chapter on panels."""

from __future__ import annotations

from sklearn.ensemble import GradientBoostingRegressor, HistGradientBoostingRegressor

from ..core.ridge import PolynomialRidge
from ..dml_panel import PanelDML
from .dgp import dgp_fuhr_papies_2024

__all__ = ["boosted_cre", "by_bins"]


def boosted_cre(datasets: int, units: int, structure: str, shape: str) -> list[float]:
    """Estimates of cre with boosted trees that see every value, 60 of depth 4 at a learning rate of 0.2."""
    trees = GradientBoostingRegressor(n_estimators=60, max_depth=4, learning_rate=0.2, random_state=0)
    made = dgp_fuhr_papies_2024(structure, shape, n_units=units, seeds=range(datasets))
    found = []
    for seed in range(datasets):
        d = made.frame(seed)
        method = PanelDML("cre", trees, scheme="random", agg="dml1")
        found.append(float(method.fit(d["y"], d["w"], d[["x1"]], d["unit"], d["time"]).coef_))
    return found


def by_bins(datasets: int) -> dict[str, list[float]]:
    """Estimates of cre with a ridge, and with boosted trees that see each feature exactly or in few bins."""
    trees = {"max_depth": 4, "learning_rate": 0.2, "min_samples_leaf": 1, "random_state": 0}
    learners = {
        "cubic ridge": PolynomialRidge(),
        "boosting, exact splits": GradientBoostingRegressor(n_estimators=50, **trees),
    }
    for bins in (255, 63):
        histogram = HistGradientBoostingRegressor(max_iter=50, max_bins=bins, max_leaf_nodes=None, **trees)
        learners[f"boosting, {bins} bins"] = histogram
    extreme = dgp_fuhr_papies_2024("C", "u-shaped", n_units=200, gamma=1.17, delta=-2.0, seeds=range(datasets))
    found: dict[str, list[float]] = {name: [] for name in learners}
    for seed in range(datasets):
        d = extreme.frame(seed)
        for name, learner in learners.items():
            method = PanelDML("cre", learner, scheme="random", agg="dml1")
            found[name].append(method.fit(d["y"], d["w"], d[["x1"]], d["unit"], d["time"]).coef_)
    return found
