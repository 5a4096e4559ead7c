"""Double machine learning for panels as loops over rows, units and folds, with least squares as the learner.

A row is a dictionary with the keys unit, time, y, w, x (a list) and, where folds matter, fold. Nothing is batched,
nothing is sorted, and each estimator is written out.
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


def residuals(rows: list[Row], z: list[list[float]], target: list[float]) -> list[float]:
    """Of each row, after least squares with an intercept on the rows of the other folds."""
    result = []
    for i, row in enumerate(rows):
        train = [j for j, other in enumerate(rows) if other["fold"] != row["fold"]]
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
        first = sum(a * b for a, b in zip(v, u, strict=True)) / sum(a * a for a in v)
        left = residuals(rows, for_y, [r["y"] - first * r["w"] for r in rows])
        left = demeaned(rows, left) if estimator == "late" else left
        psi_b = [a * (b + first * c) for a, b, c in zip(v, left, w, strict=True)]
        psi_a = [-a * c for a, c in zip(v, w, strict=True)]
    else:
        psi_b, psi_a = [a * b for a, b in zip(v, u, strict=True)], [-a * a for a in v]
    folds, units = sorted({r["fold"] for r in rows}), sorted({r["unit"] for r in rows})
    inside = {k: [i for i, r in enumerate(rows) if r["fold"] == k] for k in folds}
    weighted = cluster == "unit" and unit_folds
    say = {k: 1 / len({rows[i]["unit"] for i in inside[k]}) if weighted else 1.0 for k in folds}
    if agg == "dml1":
        theta = -sum(sum(psi_b[i] for i in inside[k]) / sum(psi_a[i] for i in inside[k]) for k in folds) / len(folds)
    else:
        theta = -sum(say[k] * psi_b[i] for k in folds for i in inside[k])
        theta /= sum(say[k] * psi_a[i] for k in folds for i in inside[k])
    psi = [a * theta + b for a, b in zip(psi_a, psi_b, strict=True)]
    if cluster is None:
        return theta, math.sqrt(sum(p * p for p in psi)) / abs(sum(psi_a))
    if weighted:
        slope = sum(say[k] * psi_a[i] for k in folds for i in inside[k]) / len(folds)
        gamma = 0.0
        for unit in units:
            mine = [i for i, r in enumerate(rows) if r["unit"] == unit]
            gamma += say[rows[mine[0]]["fold"]] * sum(psi[i] for i in mine) ** 2 / len(folds)
        return theta, math.sqrt(gamma / len(units)) / abs(slope)
    squares = [sum(psi[i] for i, r in enumerate(rows) if r["unit"] == unit) ** 2 for unit in units]
    return theta, math.sqrt(sum(squares)) / abs(sum(psi_a))
