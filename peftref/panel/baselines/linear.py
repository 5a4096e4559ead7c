r"""Linear panel regressions: what the estimators without learning do, and the textbook's table of them.

By Frisch, Waugh and Lovell the coefficient of the treatment is that of the residuals: of outcome and treatment, after
the other regressors and the fixed effects have been projected out.

>>> x = np.array([[0.0], [1.0], [0.0], [2.0]])
>>> panel_ols([1.0, 3.0, 5.0, 9.0], x, [1, 1, 2, 2], [1, 2, 1, 2], effects="fixed")["coef"].round(6)
x0    2.0
Name: coef, dtype: float64
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ..core.columns import Panel, read_panel
from ..core.inference import check_clusters
from ..core.layout import Layout, group_sums, means, within

__all__ = ["LINEAR", "linear_residuals", "panel_ols"]

LINEAR = ("simple_ols", "pols", "fe_only", "fe")


def linear_residuals(estimator: str, panel: Panel, twoway: bool = False) -> tuple[Tensor, Tensor]:
    """Residuals u and v ``(B, n)`` of outcome and treatment, for one of :data:`LINEAR`."""
    if estimator not in LINEAR:
        raise ValueError(f"estimator: expected one of {', '.join(LINEAR)}, got {estimator!r}")
    y, w, x, layout = panel
    both = torch.stack((y, w), 1)
    if estimator in ("fe_only", "fe"):
        both = within(both, layout, twoway)
        x = within(x, layout, twoway)
    else:
        both = both - both.mean(-1, keepdim=True)
        x = x - x.mean(-1, keepdim=True)
    if estimator in ("pols", "fe"):
        both = project_out(both, x)
    return both[:, 0], both[:, 1]


def project_out(a: Tensor, x: Tensor) -> Tensor:
    """What least squares on the rows of ``x`` ``(..., J, n)``, of any rank, leaves of ``a`` ``(..., q, n)``.

    The rows are made orthonormal: their products would square what sets them apart, as year, year^2 and year^3 differ
    within units by less than a millionth.
    """
    basis = orthonormal(x)
    for _ in range(2):  # the second pass takes what the first left by rounding
        a = a - (a @ basis.mT) @ basis
    return a


def orthonormal(x: Tensor) -> Tensor:
    """An orthonormal basis ``(..., min(J, n), n)`` of the rows of ``x`` ``(..., J, n)``; zeros beyond its rank."""
    size = x.square().sum(-1, keepdim=True).sqrt()
    q, r = torch.linalg.qr((x / torch.where(size > 0, size, 1.0)).mT)
    u, s, _ = torch.linalg.svd(r, full_matrices=False)
    basis: Tensor = ((q @ u) * (s > 1e-13 * r.shape[-1] * s[..., :1]).unsqueeze(-2)).mT
    return basis


def panel_ols(y: Any, x: Any, unit: Any, time: Any, *, effects: str = "pooled", twoway: bool = False) -> pd.DataFrame:
    """Least squares with all coefficients, and two kinds of standard errors.

    Args:
        y: outcome ``(n,)``.
        x: regressors, a DataFrame or array ``(n, J)``; an intercept is added where the model has one.
        unit: labels ``(n,)``.
        time: labels ``(n,)``.
        effects: "pooled"; "random", by Swamy and Arora's quasi-demeaning; "fixed", which leaves out regressors that do
            not vary within units.
        twoway: with "fixed", periods too.

    Returns:
        Columns ``coef``, ``std err`` and ``clustered``, a row for each regressor. ``std err`` assumes equal variances
        and has n - k degrees of freedom, as in linearmodels: k counts the intercept and the fixed effects, N of units
        and T - 1 of periods. Where units and periods fall into blocks that share neither, that is one too many for each
        block after the first, and ``std err`` is a little too large, there as in pyfixest too. ``clustered``, by unit,
        has no small-sample factor: linearmodels multiplies the variance by n / (n - k), where k leaves the effects of
        units out, and with ``twoway`` counts all effects. With few units it is too small, with a warning below 20.

    Raises:
        ValueError: unknown effects, regressors that determine each other or leave no degrees of freedom, or columns
            that :func:`~peftref.panel.core.columns.read_panel` refuses; a single unit.
    """
    if effects not in ("pooled", "random", "fixed"):
        raise ValueError(f"effects: expected 'pooled', 'random' or 'fixed', got {effects!r}")
    if twoway and effects != "fixed":
        raise ValueError(f"twoway: expected effects='fixed', got {effects!r}")
    if not isinstance(x, pd.DataFrame) and np.ndim(x) not in (1, 2):
        raise ValueError(f"x: expected a DataFrame or an array (n, J), got {np.ndim(x)} dimensions")
    x = x if isinstance(x, pd.DataFrame) else pd.DataFrame(np.asarray(x)).rename(columns="x{}".format)
    # the row's number stands in for the treatment, which is checked for variation
    panel, _ = read_panel(y, None if y is None else range(len(y)), x, unit, time, estimator="pols")
    layout = panel.layout
    names = ["intercept", *map(str, x)]
    y = panel.y[0]
    level = panel.x[0].mean(1, keepdim=True)
    x = torch.cat((torch.ones_like(panel.y), panel.x[0] - level))  # the level is put back into the intercept at the end
    digits = torch.cat((torch.ones_like(level[:1]), panel.x[0].abs().amax(1, keepdim=True))).squeeze(1)
    degrees = 0
    if effects == "fixed":
        inside = within(x, layout, twoway)
        varies = inside.abs().amax(1) > 1e-10 * digits
        varies[0] = False
        names = [name for name, v in zip(names, varies.tolist(), strict=True) if v]
        y = within(y, layout, twoway)
        x = inside[varies]
        digits = digits[varies]
        degrees = layout.n_units + (layout.n_periods - 1 if twoway else 0)
    elif effects == "random":
        theta = _quasi(y, x, layout)
        y = y - theta * means(y, layout.unit)
        x = x - theta * means(x, layout.unit)
    left = len(y) - len(x) - degrees
    if not len(x) or left < 1:
        raise ValueError(
            f"x: expected regressors that vary, and more rows, got {len(x)} for {left + len(x)} to explain"
        )
    check_clusters(layout, "unit")
    size = x.square().sum(1).sqrt()
    # In columns of equal size: what they have of their own must exceed the rounding of their digits.
    noise = 1e-15 * (digits * len(y) ** 0.5 / size).amax()
    q, r = torch.linalg.qr((x / size[:, None]).T)
    if not (size > 0).all() or not torch.linalg.svdvals(r)[-1] > 8 * noise + 1e-14 * len(x):
        raise ValueError(f"x: expected regressors that do not determine each other, got {', '.join(names)}")
    root = torch.linalg.inv(r) / size[:, None]  # (X'X)^-1 = root root'
    coef = root @ (q.T @ y)
    residual = y - coef @ x
    score = group_sums(q.T * residual, layout.unit, layout.n_units)
    if effects != "fixed":  # of x less its level to those of x
        root[0] -= level.squeeze(1) @ root[1:]
        coef[0] -= level.squeeze(1) @ coef[1:]
    variance = residual.square().sum() / left
    table = {
        "coef": coef,
        "std err": variance.sqrt() * root.square().sum(1).sqrt(),
        "clustered": (root @ score).square().sum(1).sqrt(),
    }
    return pd.DataFrame({name: column.numpy() for name, column in table.items()}, index=names)


def _quasi(y: Tensor, x: Tensor, layout: Layout) -> Tensor:
    """The share of its unit's mean to take from each row: 1 - sqrt(s_e^2 / (s_e^2 + T_i s_u^2)), Swamy and Arora."""
    counts = layout.counts().double()
    largest = x.abs().amax(1)

    def unexplained(y: Tensor, x: Tensor, rows: int, what: str) -> Tensor:
        """The variance that least squares leaves. Regressors count by their rank: in a balanced panel, say, the units'
        means of period dummies repeat the intercept."""
        x = x[x.abs().amax(1) > 1e-10 * largest]
        rank = round(orthonormal(x).square().sum().item()) if len(x) else 0
        if rows <= rank:
            raise ValueError(f"{what} than coefficients, got {rows} for {rank}")
        return project_out(y[None], x).square().sum() / (rows - rank)

    more = "unit: expected more rows (beyond one for each unit)"
    inner = unexplained(within(y, layout), within(x, layout), len(y) - layout.n_units, more)
    by, bx = (group_sums(t, layout.unit, layout.n_units) / counts for t in (y, x))
    between = unexplained(by, bx, layout.n_units, "unit: expected more units")
    unit = (between - inner * (1 / counts).mean()).clamp(min=0)
    return (1 - (inner / (inner + counts * unit)).sqrt())[layout.unit]
