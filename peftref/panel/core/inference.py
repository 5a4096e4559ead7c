r"""From scores to a coefficient with its standard error, when rows of a unit depend on each other.

A score that is linear in the coefficient, :math:`\psi=\psi_a\theta+\psi_b`, is solved over all rows (DML2) or fold by
fold, with the mean over the folds (DML1) (eq-dml_panel-solve):

.. math:: \hat\theta=-\frac{\sum\omega\psi_b}{\sum\omega\psi_a},\qquad
          \hat\theta^{\rm DML1}=\frac1K\sum_k-\frac{\sum_{r\in k}\psi_b}{\sum_{r\in k}\psi_a}.

Where folds keep units together, :math:`I_k` being those of fold k, DoubleML's :math:`\omega=1/|I_k|` gives each fold
the same say; elsewhere :math:`\omega` is constant. With K folds and N units the variance clustered by unit is
(eq-dml_panel-variance)

.. math:: \hat\sigma^2=\frac{\hat\Gamma}{N\hat J^2},\qquad \hat J=\frac1K\sum_r\omega_r\psi_{a,r},\qquad
          \hat\Gamma=\frac1K\sum_i\omega_i\Bigl(\sum_{t}\psi_{it}\Bigr)^2 .

Of repeated splits the median counts, and the standard error is that of the median upper end of the intervals, which
carries the spread of the splits too (eq-dml_panel-median):

.. math:: \tilde\theta=\mathrm{med}_r\,\hat\theta_r,\qquad
          \tilde\sigma=\frac{\mathrm{med}_r(\hat\theta_r+1.96\,\hat\sigma_r)-\tilde\theta}{1.96}.

This is what DoubleML does. An older rule takes
:math:`\sqrt{\mathrm{med}_r(\hat\sigma_r^2+(\hat\theta_r-\tilde\theta)^2)}`.

Two-way clusters without folds, as of the linear estimators, take Cameron, Gelbach and Miller's variance, which counts
what a row shares with itself once:

.. math:: \hat V=\frac{\sum_i(\sum_t\psi_{it})^2+\sum_t(\sum_i\psi_{it})^2-\sum_{it}\psi_{it}^2}{(\sum\psi_a)^2} .

With folds it is that of Chiang, Kato, Ma and Sasaki (2022), as in DoubleML, which subtracts nothing. None of these has
a small-sample factor: they are pyfixest's with ``ssc(k_adj=False, G_adj=False)``.

>>> over_repeats(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0.5, 0.5, 0.5]))
(2.0, 0.5)
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from .folds import Folds
from .layout import Layout, group_sums

__all__ = ["check_clusters", "over_repeats", "row_weights", "solve", "standard_error"]

CRITICAL = 1.96  # DoubleML's value
FEW = 20  # clusters below which the normal distribution is a poor guide


def check_clusters(layout: Layout, cluster: str | None, stacklevel: int = 3) -> None:
    """One cluster has no standard error: its scores sum to zero at the estimate. Few have one that is too small.

    Args:
        layout: of the rows.
        cluster: "unit", "twoway" (the fewer of units and periods count), or ``None``.
        stacklevel: of the warning, as of ``warnings.warn``; 0 for none.

    Raises:
        ValueError: a single cluster.
    """
    sizes = {"unit": layout.n_units, "time": layout.n_periods} if cluster == "twoway" else {"unit": layout.n_units}
    for name, size in sizes.items() if cluster else ():
        if size < 2:
            raise ValueError(f"{name}: expected two clusters or more for clustered standard errors, got {size}")
        if size < FEW and stacklevel:
            text = f"{name}: {size} clusters are few: standard errors are too small below about {FEW}"
            warnings.warn(text, UserWarning, stacklevel=stacklevel)


def row_weights(layout: Layout, folds: Folds, cluster: str | None) -> Tensor:
    """The weights :math:`\\omega` of the rows, ``(R, n)``; constant where folds may cut through the clusters.

    Raises:
        ValueError: folds that cut through units (or periods) although their scheme says that they do not.
    """
    fold = folds.fold
    k = len(folds)
    if cluster == "unit" and folds.scheme == "unit":
        return 1 / _members(fold, layout.unit, k, layout.n_units).gather(1, fold)
    if cluster == "twoway":
        units, periods = _cells(layout, folds)
        return 1 / (units * periods).gather(1, fold)
    size = layout.n_units if cluster == "unit" else len(layout)
    return torch.full(fold.shape, k / size, dtype=torch.float64, device=fold.device)


def solve(psi_a: Tensor, psi_b: Tensor, weights: Tensor, folds: Folds, agg: str = "dml2") -> Tensor:
    """The coefficient, ``(B,)``, of scores ``(B, n)`` (eq-dml_panel-solve).

    Args:
        psi_a: slope of the score.
        psi_b: its constant.
        weights: of :func:`row_weights`, ``(B or 1, n)``.
        folds: ``(B or 1, n)``.
        agg: "dml2", or "dml1", which does without weights.
    """
    if agg == "dml2":
        # eq-dml_panel-solve
        return -(weights * psi_b).sum(-1) / (weights * psi_a).sum(-1)
    fold = folds.fold.expand(len(psi_a), -1)
    a, b = (t.new_zeros(len(t), len(folds)).scatter_add_(1, fold, t) for t in (psi_a, psi_b))
    return -(b / a).mean(1)


def standard_error(psi: Tensor, psi_a: Tensor, layout: Layout, folds: Folds, cluster: str | None = "unit") -> Tensor:
    """Standard errors ``(R,)`` of scores ``(R, n)`` at the estimate, and of their slopes.

    They have no small-sample factor. With few clusters they are too small: 95 % intervals cover 78 % with 3 units and
    85 % with 5, so there is a warning below 20. What two-way clusters subtract can exceed the rest, and the variance be
    negative: the standard error is then missing, as in pyfixest, with a warning.

    Args:
        psi: the score at the estimated coefficient.
        psi_a: its slope.
        layout: of the rows.
        folds: of the rows.
        cluster: "unit" (eq-dml_panel-variance), "twoway" for units and periods, with folds of the scheme "product" or
            a single fold, or ``None`` for rows that are independent.

    Raises:
        ValueError: a single cluster, or folds that cut what their scheme keeps together.
    """
    check_clusters(layout, cluster, stacklevel=4)
    weights = row_weights(layout, folds, cluster)
    k = len(folds)
    slope = (weights * psi_a).sum(-1) / k
    if cluster is None:
        return (psi.square().mean(-1) / len(layout)).sqrt() / slope.abs()
    if cluster == "twoway" and k == 1:
        return _without_folds(psi, psi_a, layout)
    fold = folds.fold.expand(len(psi), -1)
    by_unit = _sums(psi, fold, layout.unit, k, layout.n_units)  # (R, K, N): the part of each unit in each fold
    if cluster == "unit":
        size = layout.n_units
        if folds.scheme == "unit":
            say = 1 / _members(fold, layout.unit, k, size)
            # eq-dml_panel-variance:  Gamma = 1/K sum_i w_i (sum_t psi_it)^2
            gamma = (say.unsqueeze(-1) * by_unit.square()).sum((1, 2)) / k
        else:
            gamma = by_unit.sum(1).square().sum(1) / size
    else:
        size = min(layout.n_units, layout.n_periods)
        units, periods = _cells(layout, folds)
        by_time = _sums(psi, fold, layout.time, k, layout.n_periods)
        squares = by_unit.square().sum(-1) + by_time.square().sum(-1)
        gamma = (torch.minimum(units, periods) / (units * periods).square() * squares).sum(1) / k
    return (gamma / size).sqrt() / slope.abs()


def _without_folds(psi: Tensor, psi_a: Tensor, layout: Layout) -> Tensor:
    """Standard errors ``(R,)`` by Cameron, Gelbach and Miller; missing where the variance is negative."""
    of_unit = group_sums(psi, layout.unit, layout.n_units)
    of_time = group_sums(psi, layout.time, layout.n_periods)
    # Each row is in both sums of squares, and is counted once
    squares = of_unit.square().sum(-1) + of_time.square().sum(-1) - psi.square().sum(-1)
    if (squares < 0).any():
        text = "cluster: 'twoway' has a negative variance here, and no standard error; take 'unit'"
        warnings.warn(text, UserWarning, stacklevel=4)
    return torch.where(squares < 0, torch.nan, squares.clamp(min=0).sqrt()) / psi_a.sum(-1).abs()


def over_repeats(coefs: Tensor, ses: Tensor) -> tuple[float, float]:
    """One coefficient and standard error from those of repeated splits, ``(R,)`` each (eq-dml_panel-median)."""
    theta = coefs.quantile(0.5)
    # eq-dml_panel-median
    return theta.item(), (((coefs + CRITICAL * ses).quantile(0.5) - theta) / CRITICAL).item()


def _sums(psi: Tensor, fold: Tensor, code: Tensor, k: int, size: int) -> Tensor:
    return psi.new_zeros(len(psi), k * size).scatter_add_(1, fold * size + code, psi).view(-1, k, size)


def _members(fold: Tensor, code: Tensor, k: int, size: int) -> Tensor:
    """How many different codes each fold has, ``(R, K)``; each code is in one fold."""
    present = torch.zeros(len(fold), k * size, dtype=torch.bool, device=fold.device)
    members = present.scatter_(1, fold * size + code, True).view(-1, k, size).sum(-1)
    if not (members.sum(1) == size).all():
        raise ValueError("folds: expected all rows of a unit (or period) in one fold, as their scheme says")
    return members.double()


def _cells(layout: Layout, folds: Folds) -> tuple[Tensor, Tensor]:
    """How many units and how many periods the row and the column of each of the K x K folds have, ``(R, K^2)``."""
    k = round(len(folds) ** 0.5)
    if k * k != len(folds):
        raise ValueError(f"folds: expected K x K of them for two kinds of clusters, got {len(folds)}")
    units = _members(folds.fold // k, layout.unit, k, layout.n_units)
    periods = _members(folds.fold % k, layout.time, k, layout.n_periods)
    return units.repeat_interleave(k, 1), periods.repeat(1, k)
