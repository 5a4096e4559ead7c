"""Double machine learning for panels as loops over rows, units and folds, with least squares as the learner.

A row is a dictionary with the keys unit, time, y, w, x (a list) and, where folds matter, fold: a number, or for folds
that are units by periods a pair. Nothing is batched, nothing is sorted, and each estimator is written out.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

Row = dict[str, Any]


def unit_mean(rows: list[Row], unit: Any, get: Any) -> float:
    values = [get(row) for row in rows if row["unit"] == unit]
    return math.fsum(values) / len(values)


def demeaned(rows: list[Row], values: list[float]) -> list[float]:
    result = []
    for row, value in zip(rows, values, strict=True):
        own = [v for r, v in zip(rows, values, strict=True) if r["unit"] == row["unit"]]
        result.append(value - math.fsum(own) / len(own))
    return result


def features(rows: list[Row], estimator: str) -> tuple[list[Row], list[list[float]], list[list[float]]]:
    """The rows that an estimator learns from, and what predicts Y and W in each."""
    if estimator == "fd":
        made = []
        for row in rows:
            for old in rows:
                if old["unit"] == row["unit"] and old["time"] == row["time"] - 1:
                    now = row["x"] + old["x"]
                    made.append(row | {"y": row["y"] - old["y"], "w": row["w"] - old["w"], "x": now})
        return made, [r["x"] for r in made], [r["x"] for r in made]
    n_x = len(rows[0]["x"])
    x_means = [[unit_mean(rows, row["unit"], lambda r, j=j: r["x"][j]) for j in range(n_x)] for row in rows]
    w_means = [unit_mean(rows, row["unit"], lambda r: r["w"]) for row in rows]
    if estimator == "early":
        y, w = (demeaned(rows, [r[key] for r in rows]) for key in "yw")
        x = [[a - m for a, m in zip(row["x"], mean, strict=True)] for row, mean in zip(rows, x_means, strict=True)]
        return [row | {"y": a, "w": b} for row, a, b in zip(rows, y, w, strict=True)], x, x
    x = [row["x"] for row in rows]
    xb = [a + b for a, b in zip(x, x_means, strict=True)]
    xbm = [a + [m] for a, m in zip(xb, w_means, strict=True)]
    units = sorted({row["unit"] for row in rows})
    onehot = [a + [float(row["unit"] == u) for u in units] for row, a in zip(rows, x, strict=True)]
    for_y, for_w = {
        "pooled": (x, x), "late": (x, x), "dummies": (onehot, onehot), "cre": (xbm, xbm), "cre_general": (xb, xb),
        "cre_normal": (xb, xbm),
    }[estimator]  # fmt: skip
    return rows, for_y, for_w


def apart(row: Row, other: Row) -> bool:
    """Whether ``other`` may train what predicts ``row``: in a pair both sides must differ."""
    if isinstance(row["fold"], tuple):
        return all(a != b for a, b in zip(row["fold"], other["fold"], strict=True))
    return row["fold"] != other["fold"]


def residuals(rows: list[Row], z: list[list[float]], target: list[float]) -> list[float]:
    """Of each row, after least squares with an intercept on the rows of the other folds."""
    result = []
    for i, row in enumerate(rows):
        train = [j for j, other in enumerate(rows) if apart(row, other)]
        design = np.array([[1.0, *z[j]] for j in train])
        beta = np.linalg.lstsq(design, np.array([target[j] for j in train]), rcond=None)[0]
        result.append(target[i] - float(np.dot([1.0, *z[i]], beta)))
    return result


def effect(
    rows: list[Row], estimator: str, score: str = "partialling out", agg: str = "dml2", cluster: str | None = "unit",
    unit_folds: bool = True,
) -> tuple[float, float]:  # fmt: skip
    """The coefficient and its standard error."""
    rows, for_y, for_w = features(rows, estimator)
    y, w = [r["y"] for r in rows], [r["w"] for r in rows]
    u, v = residuals(rows, for_y, y), residuals(rows, for_w, w)
    if estimator == "late":
        u, w = demeaned(rows, u), demeaned(rows, w)
    if estimator in ("late", "cre_general"):
        v = demeaned(rows, v)
    if score == "IV-type":
        level = math.fsum(w) / len(w)
        w = [a - level for a in w]
        first = sum(a * b for a, b in zip(v, u, strict=True)) / sum(a * a for a in v)
        left = residuals(rows, for_y, [r["y"] - first * r["w"] for r in rows])
        left = demeaned(rows, left) if estimator == "late" else left
        psi_b = [a * (b + first * c) for a, b, c in zip(v, left, w, strict=True)]
        psi_a = [-a * c for a, c in zip(v, w, strict=True)]
    else:
        psi_b, psi_a = [a * b for a, b in zip(v, u, strict=True)], [-a * a for a in v]
    return estimate(rows, psi_a, psi_b, agg, cluster, unit_folds)


def estimate(
    rows: list[Row], psi_a: list[float], psi_b: list[float], agg: str, cluster: str | None, unit_folds: bool
) -> tuple[float, float]:
    """From the slope and the constant of the score of each row to the coefficient and its standard error."""
    folds, units = sorted({r["fold"] for r in rows}), sorted({r["unit"] for r in rows})
    inside = {k: [i for i, r in enumerate(rows) if r["fold"] == k] for k in folds}
    weighted = cluster == "unit" and unit_folds
    size = {}  # of each fold: the numbers of units and periods, where folds are made of those
    for k in folds:
        if cluster == "twoway":
            size[k] = (
                len({r["unit"] for r in rows if r["fold"][0] == k[0]}),
                len({r["time"] for r in rows if r["fold"][1] == k[1]}),
            )
        else:
            size[k] = (len({rows[i]["unit"] for i in inside[k]}) if weighted else 1, 1)
    say = {k: 1 / (n * t) for k, (n, t) in size.items()}
    if agg == "dml1":
        theta = -sum(sum(psi_b[i] for i in inside[k]) / sum(psi_a[i] for i in inside[k]) for k in folds) / len(folds)
    else:
        theta = -sum(say[k] * psi_b[i] for k in folds for i in inside[k])
        theta /= sum(say[k] * psi_a[i] for k in folds for i in inside[k])
    psi = [a * theta + b for a, b in zip(psi_a, psi_b, strict=True)]
    if cluster is None:
        return theta, math.sqrt(sum(p * p for p in psi)) / abs(sum(psi_a))
    slope = sum(say[k] * psi_a[i] for k in folds for i in inside[k]) / len(folds)
    gamma = 0.0
    if cluster == "twoway":
        periods = sorted({r["time"] for r in rows})
        for k in folds:
            squares = sum(sum(psi[i] for i in inside[k] if rows[i]["unit"] == unit) ** 2 for unit in units)
            squares += sum(sum(psi[i] for i in inside[k] if rows[i]["time"] == time) ** 2 for time in periods)
            gamma += min(size[k]) * say[k] ** 2 * squares / len(folds)
        return theta, math.sqrt(gamma / min(len(units), len(periods))) / abs(slope)
    if weighted:
        for unit in units:
            mine = [i for i, r in enumerate(rows) if r["unit"] == unit]
            gamma += say[rows[mine[0]]["fold"]] * sum(psi[i] for i in mine) ** 2 / len(folds)
        return theta, math.sqrt(gamma / len(units)) / abs(slope)
    squares = [sum(psi[i] for i, r in enumerate(rows) if r["unit"] == unit) ** 2 for unit in units]
    return theta, math.sqrt(sum(squares)) / abs(sum(psi_a))


def median(values: list[float]) -> float:
    values, half = sorted(values), len(values) // 2
    return values[half] if len(values) % 2 else (values[half - 1] + values[half]) / 2


def over_splits(pairs: list[tuple[float, float]]) -> tuple[float, float]:
    """The median coefficient, and the standard error that the median upper end of the intervals implies."""
    theta = median([coef for coef, _ in pairs])
    return theta, (median([coef + 1.96 * se for coef, se in pairs]) - theta) / 1.96


def logistic(design: np.ndarray, target: np.ndarray, c: float) -> np.ndarray:
    """Coefficients of a logistic regression by Newton's steps; the intercept, in front, has no penalty."""
    penalty, beta = np.diag([0.0] + [1 / c] * (design.shape[1] - 1)), np.zeros(design.shape[1])
    for _ in range(50):
        p = 1 / (1 + np.exp(-design @ beta))
        curvature = (design.T * (p * (1 - p))) @ design + penalty
        beta = beta + np.linalg.solve(curvature, design.T @ (target - p) - penalty @ beta)
    return beta


def average_effect(rows: list[Row], estimator: str, clip: float, c: float = 1.0) -> tuple[float, float]:
    """The interactive model, with least squares for the outcome and a logistic regression for the treatment."""
    rows, for_y, for_w = features(rows, estimator)
    constant = []
    for i, row in enumerate(rows):
        train = [j for j, other in enumerate(rows) if apart(row, other)]
        g = []
        for arm in (0, 1):
            of_arm = [j for j in train if rows[j]["w"] == arm]
            design = np.array([[1.0, *for_y[j]] for j in of_arm])
            beta = np.linalg.lstsq(design, np.array([rows[j]["y"] for j in of_arm]), rcond=None)[0]
            g.append(float(np.dot([1.0, *for_y[i]], beta)))
        beta = logistic(np.array([[1.0, *for_w[j]] for j in train]), np.array([rows[j]["w"] for j in train]), c)
        m = min(max(1 / (1 + math.exp(-float(np.dot([1.0, *for_w[i]], beta)))), clip), 1 - clip)
        correction = (row["y"] - g[1]) / m if row["w"] == 1 else -(row["y"] - g[0]) / (1 - m)
        constant.append(g[1] - g[0] + correction)
    return estimate(rows, [-1.0] * len(rows), constant, "dml2", "unit", True)


def random_effects(rows: list[Row]) -> list[float]:
    """Coefficients of an intercept, w and x by Swamy and Arora's quasi-demeaning; all regressors vary within units."""
    y, design = [r["y"] for r in rows], [[1.0, r["w"], *r["x"]] for r in rows]
    columns = list(zip(*design, strict=True))
    dy, dx = demeaned(rows, y), np.array([demeaned(rows, column) for column in columns[1:]]).T
    units = sorted({r["unit"] for r in rows})
    by = [unit_mean(rows, unit, lambda r: r["y"]) for unit in units]
    bx = [[unit_mean(rows, unit, lambda r, j=j: [1.0, r["w"], *r["x"]][j]) for j in range(len(design[0]))]
          for unit in units]  # fmt: skip
    counts = {unit: sum(r["unit"] == unit for r in rows) for unit in units}
    inner = _unexplained(np.array(dx), np.array(dy)) / (len(rows) - len(units) - dx.shape[1])
    between = _unexplained(np.array(bx), np.array(by)) / (len(units) - len(bx[0]))
    own = max(0.0, between - inner * sum(1 / counts[unit] for unit in units) / len(units))
    theta = {unit: 1 - math.sqrt(inner / (inner + counts[unit] * own)) for unit in units}
    of_unit = {unit: (mean, row) for unit, mean, row in zip(units, by, bx, strict=True)}
    left_y = [v - theta[r["unit"]] * of_unit[r["unit"]][0] for r, v in zip(rows, y, strict=True)]
    left_x = [[a - theta[r["unit"]] * b for a, b in zip(row, of_unit[r["unit"]][1], strict=True)]
              for r, row in zip(rows, design, strict=True)]  # fmt: skip
    return np.linalg.lstsq(np.array(left_x), np.array(left_y), rcond=None)[0].tolist()


def _unexplained(x: np.ndarray, y: np.ndarray) -> float:
    return float(((y - x @ np.linalg.lstsq(x, y, rcond=None)[0]) ** 2).sum())
