r"""Which design did the paper simulate? Its text leaves some of it open; its own linear estimators decide.

Five estimators need no learner, so no tuning can move them: least squares without and with the covariate, both within
units too, and least squares on the true confounding. For each reading of the text :func:`reading` simulates their
absolute errors; :func:`distance` compares the mean of the paper's 100 datasets with what 100 datasets of that reading
scatter by (eq-dml_panel-distance),

.. math:: d=(a-\bar a)^\top\Sigma^{-1}(a-\bar a),

with :math:`\Sigma` the covariance of a mean of 100 plus that of our own mean; under the reading :math:`d` is
:math:`\chi^2` with five degrees of freedom.

:func:`matched` goes further: of many batches of 100 datasets it takes those whose yardsticks come nearest to the
paper's, whose random :math:`\gamma,\delta` are then like the paper's, and looks at the other estimators there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["READINGS", "YARDSTICKS", "distance", "matched", "reading", "yardsticks"]

Array = NDArray[Any]
YARDSTICKS = ("simple_ols", "pols", "fe_only", "fe", "oracle_no_fe")
Draw = Callable[[np.random.Generator, int], dict[str, Any]]


def _text(rng: np.random.Generator, units: int) -> dict[str, Any]:
    g = rng.normal()
    d = rng.normal()
    return {"alpha0": rng.normal(), "gamma": (g, g), "delta": (d, d, d)}


def _changed(**changes: Callable[[np.random.Generator, int, dict[str, Any]], Any]) -> Draw:
    def draw(rng: np.random.Generator, units: int) -> dict[str, Any]:
        drawn = _text(rng, units)
        return drawn | {name: change(rng, units, drawn) for name, change in changes.items()}

    return draw


# gamma: of the treatment and the outcome; delta: of the treatment, the outcome and the covariate
READINGS: dict[str, Draw] = {
    "one γ and one δ": _text,
    "no intercept of the covariate": _changed(alpha0=lambda rng, units, drawn: 0.0),
    "an intercept of the covariate for each unit": _changed(
        alpha0=lambda rng, units, drawn: rng.normal(size=(units, 1))
    ),
    "a γ for each equation": _changed(gamma=lambda rng, units, drawn: (drawn["gamma"][0], rng.normal())),
    "a δ for each outcome": _changed(
        delta=lambda rng, units, drawn: (*drawn["delta"][:1], rng.normal(), drawn["delta"][0])
    ),
    "a δ of its own for the covariate": _changed(delta=lambda rng, units, drawn: (*drawn["delta"][:2], rng.normal())),
    "U in the covariate without δ": _changed(delta=lambda rng, units, drawn: (*drawn["delta"][:2], 1.0)),
    "γ and δ uniform on (-1, 1)": _changed(
        gamma=lambda rng, units, drawn: (rng.uniform(-1, 1),) * 2,
        delta=lambda rng, units, drawn: (rng.uniform(-1, 1),) * 3,
    ),
}


def reading(name: str, datasets: int, units: int, periods: int = 10) -> list[list[float]]:
    """Absolute errors of the yardsticks on datasets of structure C with squared confounding, ``(datasets, 5)``.

    Args:
        name: of a reading.
        datasets: how many.
        units: N of each.
        periods: T of each.
    """
    rng = np.random.default_rng(0)
    found = []
    for _ in range(datasets):
        drawn = READINGS[name](rng, units)
        u = rng.normal(size=(units, 1))
        x = drawn["alpha0"] + drawn["delta"][2] * u + rng.normal(size=(units, periods))
        noise = rng.normal(size=(2, units, periods))
        w = rng.normal() + drawn["gamma"][0] * x**2 + drawn["delta"][0] * u + noise[0]
        y = rng.normal() + w + drawn["gamma"][1] * x**2 + drawn["delta"][1] * u + noise[1]
        found.append([round(abs(float(value) - 1), 5) for value in yardsticks(y, w, x, x**2)])
    return found


def yardsticks(y: Array, w: Array, x: Array, confounding: Array) -> list[float]:
    """Slopes of the treatment in five regressions, in the order of :data:`YARDSTICKS`; all arguments ``(N, T)``."""
    within = [a - a.mean(1, keepdims=True) for a in (y, w, x)]
    one = np.ones_like(y)
    return [
        _slope(y, w, one),
        _slope(y, w, x, one),
        _slope(*within[:2]),
        _slope(*within),
        _slope(y, w, confounding, one),
    ]


def _slope(y: Array, *regressors: Array) -> float:
    columns = np.stack([column.ravel() for column in regressors], 1)
    return float(np.linalg.lstsq(columns, y.ravel(), rcond=None)[0][0])


def distance(errors: Sequence[Sequence[float]], paper: Sequence[float], datasets: int = 100) -> dict[str, float]:
    """How far the paper's means are from those of a reading, and how often 100 of its datasets are as far.

    Args:
        errors: of the reading, ``(datasets, 5)``.
        paper: the five means.
        datasets: of the paper.
    """
    from scipy.stats import chi2

    a = np.asarray(errors)
    sigma = np.cov(a.T) * (1 / datasets + 1 / len(a))
    away = np.asarray(paper) - a.mean(0)
    d = float(away @ np.linalg.solve(sigma, away))  # eq-dml_panel-distance
    return {"distance": d, "p": float(chi2.sf(d, len(paper)))}


def matched(errors: Mapping[str, Sequence[float]], paper: Mapping[str, float], kept: int, tries: int) -> dict[str, Any]:
    """Mean absolute errors in the batches of 100 datasets whose yardsticks are nearest to the paper's.

    Args:
        errors: estimator -> one value a dataset.
        paper: estimator -> the paper's mean.
        kept: batches to keep.
        tries: batches to draw.

    Returns:
        estimator -> mean over the kept batches, and standard deviation over them.
    """
    table = np.stack([np.asarray(errors[name]) for name in paper], 1)  # (datasets, estimators)
    size = min(100, len(table))
    rng = np.random.default_rng(0)
    rows = np.stack([rng.choice(len(table), size, replace=False) for _ in range(tries)])
    means = table[rows].mean(1)  # (tries, estimators)
    named = [list(paper).index(name) for name in YARDSTICKS]
    away = means[:, named] - [paper[name] for name in YARDSTICKS]
    nearest = np.argsort(np.square(away / means[:, named].std(0)).sum(1))[:kept]
    return {
        name: {"mean": float(means[nearest, i].mean()), "spread": float(means[nearest, i].std()), "paper": paper[name]}
        for i, name in enumerate(paper)
    }
