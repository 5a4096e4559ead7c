r"""Polynomial ridge, cross-fitted over folds, repetitions, datasets and targets in a few batched operations.

Features are built once, from rows already sorted into folds, and serve all targets; a target that may know only some of
the variables takes its part of the same Gram matrices (:mod:`peftref.panel.core.gram`). Variables are standardised on
all rows before, features on the training rows after; no target is seen before its fold's turn.

A column for each unit ("dummies") is not built: its coefficient is eliminated first (eq-dml_panel-dummies),

.. math:: c_i=\frac{t_{iy}-t_{if}^\top b-n_i\mu}{n_i+\alpha},

where :math:`t_i` are the sums of the centred columns over the :math:`n_i` training rows of unit i, and what is left to
solve, for :math:`\mu` and b, has the size of the features. A unit without training rows has :math:`c_i=0`.

Everything works on any device, in float64.

>>> z = torch.linspace(-1, 1, 40, dtype=torch.float64).view(1, 1, -1)
>>> folds = Folds(torch.arange(40).view(1, -1) % 4, ~torch.eye(4, dtype=torch.bool))
>>> predicted = crossfit(z, z**2, folds, PolynomialRidge(degree=2, alpha=1e-9))
>>> float((predicted - z**2).abs().max()) < 1e-9
True
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .folds import Folds, check_shapes
from .gram import Moments, by_fold, can_compare, fit, moments, standardised
from .ridge import PolynomialRidge, check_learner, monomials, polynomial, standardise
from .shape import check_room, choose_shape
from .spans import independent

__all__ = ["crossfit"]

CHUNK = 1 << 22  # numbers in the features of one piece of a batch


def crossfit(
    z: Tensor,
    targets: Tensor,
    folds: Folds,
    learner: PolynomialRidge,
    *,
    uses: Sequence[Sequence[int]] | None = None,
    unit: Tensor | None = None,
    linear: int = 0,
    coarse: tuple[int, float] = (0, 0),
) -> Tensor:
    """Out-of-fold predictions of several targets, from features that are built once.

    Args:
        z: variables ``(B or 1, J, n)``.
        targets: ``(B or 1, q, n)``.
        folds: ``(B or 1, n)``: a split for each dataset, or several splits of one.
        learner: degree and penalty.
        uses: for each target the variables that predict it (all): all monomials of these only.
        unit: codes ``(n,)``: a column for each unit besides, penalised like the others (eq-dml_panel-dummies).
        linear: of the variables, so many at the end enter linearly.
        coarse: of the variables before those, so many at the end are constant in groups, such as means of units, and
            the number of groups: with ``degree="auto"`` a few groups teach a few features only.

    Returns:
        Predictions ``(B, q, n)``.

    Raises:
        ValueError: shapes that do not fit, several penalties together with ``unit``, or a fold without training rows.
    """
    alphas = check_learner(learner)
    if unit is not None and learner.alpha == "auto":
        alphas = [1.0]
    if unit is not None and len(alphas) > 1:
        raise ValueError(f"alpha: expected one number where units have columns of their own, got {learner.alpha!r}")
    sizes = check_shapes(z, targets, folds, uses, unit, linear)
    z = z.double()
    targets = targets.double()
    location, scale = standardise(z)
    z = (z - location) / scale
    level = targets.mean(-1, keepdim=True)  # the Gram matrix of y itself would lose the digits that y varies in
    targets = targets - level
    keep = folds.keep.double()
    if isinstance(learner.degree, str) or isinstance(learner.alpha, str):
        counts = torch.stack([row.bincount(minlength=len(keep)) for row in folds.fold])
        least = int((counts.double() @ keep.T)[counts > 0].min())
        if len(alphas) > 1 and not can_compare(counts, folds.keep):
            alphas = [1.0]
    else:
        least = z.shape[-1]
    free = z.shape[-2] - linear
    groups = coarse[1] * least / z.shape[-1]
    degree, interactions, more = choose_shape(learner, free, least, coarse[0], groups)
    check_room(free - more, degree, interactions, z.shape[-1], len(keep) + 1)
    exponents = monomials(free - more, degree, interactions, linear + more)
    batch = max(sizes, default=1)
    chunk = max(1, CHUNK // (len(exponents) * z.shape[-1]))
    made = []
    for i in range(0, batch, chunk):
        some_z, some_targets, fold = (t if len(t) == 1 else t[i : i + chunk] for t in (z, targets, folds.fold))
        made.append(_crossfit(some_z, some_targets, fold, folds.keep, exponents, alphas, uses, unit))
    return torch.cat(made) + level


def _crossfit(
    z: Tensor,
    targets: Tensor,
    fold: Tensor,
    keep: Tensor,
    exponents: Tensor,
    alphas: list[float],
    uses: Sequence[Sequence[int]] | None,
    unit: Tensor | None,
) -> Tensor:
    if alphas == [0.0]:
        z, exponents, uses = independent(z, exponents, uses, targets.shape[-2])
    p = len(exponents)
    q = targets.shape[-2]
    batch = max(len(z), len(targets), len(fold))
    rows = torch.cat([t.expand(batch, -1, -1) for t in (z, targets)], -2)
    sorted_rows, counts, place = by_fold(rows, fold.expand(batch, -1), len(keep))
    z_sorted, y_sorted = sorted_rows.split((z.shape[-2], q), -2)
    columns = polynomial(z_sorted, exponents, room=q)
    columns[..., p:, :] = y_sorted
    parts = moments(columns, counts)
    if not ((counts.double() @ keep.T.double() > 0) | (counts == 0)).all():
        raise ValueError("folds: expected training rows for each fold, got none")
    code = None if unit is None else by_fold(unit.expand(batch, 1, -1), fold.expand(batch, -1), len(keep))[0]
    features = columns[..., :p, :]
    predicted = columns.new_empty(*columns.shape[:-2], q, columns.shape[-1])
    groups: dict[tuple[int, ...], list[int]] = {}
    for target in range(q):
        groups.setdefault(tuple(uses[target]) if uses else tuple(range(z.shape[-2])), []).append(target)
    for used, members in groups.items():
        absent = [j for j in range(z.shape[-2]) if j not in used]
        picked = (exponents[:, absent].sum(1) == 0).nonzero().squeeze(1).to(z.device)
        whose = p + torch.tensor(members, device=z.device)
        f = features if len(picked) == p else features[..., picked, :]
        if code is None:
            slope, intercept = fit(parts, keep, picked, whose, alphas)
            fitted = torch.baddbmm(
                intercept.flatten(0, 1).unsqueeze(-1), slope.mT.flatten(0, 1), f.flatten(0, 1)
            ).unflatten(0, f.shape[:2])
        else:
            fitted = _fit_dummies(parts, keep, columns, f, code, picked, whose, alphas[0])
        predicted[..., members, :] = fitted
    # (B, K, q, m) -> (B, q, K m) -> the rows in their own order
    return predicted.transpose(1, 2).flatten(2).gather(-1, place.unsqueeze(1).expand(-1, q, -1))


def _fit_dummies(
    parts: Moments,
    keep: Tensor,
    columns: Tensor,
    f: Tensor,
    code: Tensor,
    picked: Tensor,
    targets: Tensor,
    alpha: float,
) -> Tensor:
    """Predictions ``(..., K, q, m)`` with a column for each unit; ``code`` is ``(..., K, 1, m)``, padded with 0."""
    train = parts.kept(keep)
    mean, scale, corr, cross = standardised(train, picked, targets)
    size = int(code.max()) + 1
    p = len(picked)
    used = torch.cat((picked, targets))
    filled = (torch.arange(code.shape[-1], device=code.device) < parts.n.unsqueeze(-1)).to(f.dtype).unsqueeze(-2)
    rows = torch.cat((filled, columns[..., used, :]), -2)  # a column of ones, f and y; zeros behind the end of a fold
    sums = rows.new_zeros(*rows.shape[:-1], size).scatter_add_(-1, code.expand_as(rows), rows)
    sums = torch.einsum("kj,...jpi->...kpi", keep.to(rows.dtype), sums)  # (..., K, 1 + p + q, N) of the training rows
    count = sums[..., 0, :]
    t = sums[..., 1:, :] - mean[..., used].unsqueeze(-1) * sums[..., :1, :]
    t = torch.cat((count.unsqueeze(-2), t[..., :p, :] / scale.unsqueeze(-1), t[..., p:, :]), -2)  # centred and scaled
    weight = torch.where(count > 0, 1 / (count + alpha).clamp(min=1e-300), 0.0).unsqueeze(-2)
    # eq-dml_panel-dummies:  what eliminating the c_i takes from the normal equations of (mu, b)
    taken = (t * weight) @ t.mT
    a = -taken[..., : 1 + p, : 1 + p]
    a[..., 1:, 1:] += train.n[..., None, None] * corr + alpha * torch.eye(p, dtype=a.dtype, device=a.device)
    right = -taken[..., : 1 + p, 1 + p :]
    right[..., 1:, :] += cross
    # Those of mu without cancellation: n_i - n_i^2 / (n_i + alpha) = alpha n_i / (n_i + alpha); the t_i sum to zero.
    of_mu = alpha * (t * weight).sum(-1)
    a[..., 0, :] = a[..., :, 0] = of_mu[..., : 1 + p]
    right[..., 0, :] = of_mu[..., 1 + p :]
    known = t[..., : 1 + p, :]
    wanted = t[..., 1 + p :, :]
    if alpha > 0:
        solution = torch.linalg.solve(a, right)
        c = weight * (wanted - solution.mT @ known)  # (..., K, q, N)
    else:
        values, vectors = torch.linalg.eigh(a)
        free = values <= 1e-11 * values[..., -1:]
        inverse = torch.where(free, 0.0, 1 / values)
        solution = (vectors * inverse.unsqueeze(-2)) @ (vectors.mT @ right)
        c = weight * (wanted - solution.mT @ known)
        # Directions that change no fitted value (mu against all c_i; a feature that is constant within units against
        # them) are settled as in the limit of small alpha: the penalised coefficients, b and c, are smallest.
        null = vectors * free.unsqueeze(-2)
        null_c = -weight * (null.mT @ known)
        gram = null[..., 1:, :].mT @ null[..., 1:, :] + null_c @ null_c.mT
        shift = torch.linalg.pinv(gram, hermitian=True, rtol=1e-11) @ (
            null[..., 1:, :].mT @ solution[..., 1:, :] + null_c @ c.mT
        )
        solution = solution - null @ shift
        c = c - shift.mT @ null_c
    slope = solution[..., 1:, :] / scale.unsqueeze(-1)
    level = solution[..., 0, :] + mean[..., targets] - (slope * mean[..., picked].unsqueeze(-1)).sum(-2)
    fitted: Tensor = slope.mT @ f + level.unsqueeze(-1) + c.gather(-1, code.expand(*c.shape[:-1], -1))
    return fitted
