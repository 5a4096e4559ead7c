"""A polynomial ridge as a scikit-learn regressor; the estimators of this part fit all its folds at once.

>>> x = np.linspace(-1, 1, 50)[:, None]
>>> model = PolynomialRidge(degree=2, alpha=1e-6).fit(x, x[:, 0] ** 2)
>>> float(np.abs(model.predict(x) - x[:, 0] ** 2).max()) < 1e-6
True
>>> monomials(2, 2).tolist()  # exponents of a, b, a^2, ab, b^2
[[1, 0], [0, 1], [2, 0], [1, 1], [0, 2]]
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from ..._checks import integer
from .gram import by_fold, can_compare, fit, moments
from .shape import PENALTIES, check_room, choose_shape, well_conditioned

__all__ = ["PolynomialRidge", "check_learner", "monomials", "polynomial", "standardise"]


class PolynomialRidge(RegressorMixin, BaseEstimator):
    """Ridge regression on all monomials of the standardised features up to a degree, standardised again.

    As a scikit-learn regressor it fits one model. :class:`~peftref.panel.dml_panel.PanelDML` recognises it and fits
    all folds and repetitions at once (:func:`peftref.panel.core.crossfit.crossfit`).

    Args:
        degree: of the polynomial, >= 1; "auto" takes the first of these: cubic, if there are five training rows for
            each monomial; quadratic, both without products of different features, if there are two; linear.
        alpha: penalty on the squared coefficients, >= 0 (as in scikit-learn: not divided by the number of rows); of
            several, cross-validation chooses one for each model. "auto" lets it choose from 0.01 to 1; it is 1 where
            there are too few folds to choose by, or a column for each unit.
        interactions: products of different features too.
    """

    def __init__(
        self, degree: int | str = 3, alpha: float | str | Sequence[float] = 1.0, interactions: bool = True
    ) -> None:
        self.degree = degree
        self.alpha = alpha
        self.interactions = interactions

    def fit(self, X: NDArray[Any], y: NDArray[Any]) -> PolynomialRidge:  # noqa: N803 (scikit-learn's name)
        """Fit ``(n, J)`` to ``(n,)``; several ``alpha`` are compared on five folds of rows, in the order given."""
        return self._fit_folds(X, y)

    def _fit_folds(
        self,
        X: NDArray[Any],  # noqa: N803
        y: NDArray[Any],
        fold: NDArray[Any] | None = None,
        keep: NDArray[Any] | None = None,
    ) -> PolynomialRidge:
        """Fit, and compare several ``alpha`` by leaving out the folds present in ``fold`` in turn.

        Args:
            X: features ``(n, J)``.
            y: target ``(n,)``.
            fold: of each row, ``(n,)`` (five folds of rows).
            keep: ``(K, K)``, which folds train the model of which (all others).

        Raises:
            ValueError: folds that are no numbers from 0 on, one for each row, or no truth value for each pair of them.
        """
        alphas = check_learner(self)
        if fold is not None:
            _check_folds(len(X), fold, keep)
        several = len(alphas) > 1 and not isinstance(self.alpha, str)
        X, y = validate_data(  # noqa: N806
            self, X, y, dtype=np.float64, y_numeric=True, ensure_min_samples=2 if several else 1
        )
        z = torch.tensor(X.T)
        target = torch.tensor(y, dtype=torch.float64)[None]
        self._location, self._scale = standardise(z)
        self._level = target.mean()  # the Gram matrix of y itself would lose the digits that y varies in
        shape = choose_shape(self, len(z), z.shape[-1])[:2]
        check_room(len(z), *shape, z.shape[-1], 5)
        self._exponents = monomials(len(z), *shape)
        f = polynomial((z - self._location) / self._scale, self._exponents)
        scheme = None
        folds = torch.arange(z.shape[-1]) % 5
        if fold is not None:
            present, codes = np.unique(fold, return_inverse=True)
            folds = torch.from_numpy(codes)
            scheme = None if keep is None else torch.from_numpy(keep[np.ix_(present, present)])
        if len(alphas) == 1:  # all rows in one
            folds = torch.zeros_like(folds)
            scheme = None
        basis, back = well_conditioned(f[None]) if alphas == [0.0] else (f[None], None)
        rows = torch.cat((basis[0], target - self._level))
        parts = moments(*by_fold(rows[None], folds[None], int(folds.max()) + 1)[:2])
        every = torch.ones(1, len(parts.n[0]), dtype=torch.bool)  # one model, from all the folds
        if isinstance(self.alpha, str) and not can_compare(parts.n, every, scheme):
            alphas = [1.0]
        columns = torch.arange(len(basis[0]))
        slope, intercept = fit(parts, every, columns, torch.tensor([len(columns)]), alphas, scheme)
        if back is not None:  # from the well-conditioned columns, less their means, to the monomials
            slope = back[0].mT @ slope
            intercept = intercept - (slope[..., 0] * f.mean(-1)).sum(-1, keepdim=True)
        self.coef_ = slope[0, 0, :, 0].numpy()
        self.intercept_ = float(intercept[0, 0, 0] + self._level)
        return self

    def predict(self, X: NDArray[Any]) -> NDArray[Any]:  # noqa: N803
        """Predictions ``(n,)`` at ``(n, J)``."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)  # noqa: N806
        z = (torch.tensor(X.T) - self._location) / self._scale
        predicted: NDArray[Any] = self.coef_ @ polynomial(z, self._exponents).numpy() + self.intercept_
        return predicted


def _check_folds(n: int, fold: NDArray[Any], keep: NDArray[Any] | None) -> None:
    if not n or fold.shape != (n,) or fold.dtype.kind not in "iu" or fold.min() < 0:
        raise ValueError(f"fold: expected integers from 0 on, ({n},), got {fold.dtype} {fold.shape}")
    size = int(fold.max()) + 1
    if keep is not None and (keep.dtype != bool or keep.ndim != 2 or min(keep.shape) < size):
        raise ValueError(f"keep: expected truth values ({size}, {size}), got {keep.dtype} {keep.shape}")


def check_learner(learner: PolynomialRidge) -> list[float]:
    """The penalties of a learner, after checking its settings."""
    if not isinstance(learner.degree, str) or learner.degree != "auto":
        integer("degree", learner.degree, 1)
    if isinstance(learner.alpha, str) and learner.alpha == "auto":
        return list(PENALTIES)
    try:
        alphas = np.ravel(np.asarray(learner.alpha, dtype=float)).tolist()
    except (TypeError, ValueError):
        alphas = []
    if not alphas or not all(0 <= a < float("inf") for a in alphas):
        raise ValueError(f"alpha: expected a number >= 0, or several, got {learner.alpha!r}")
    return alphas


def monomials(n: int, degree: int, interactions: bool = True, linear: int = 0) -> Tensor:
    """Exponents ``(p, n + linear)`` of all monomials of n variables of degrees 1 to ``degree``, in the order of
    scikit-learn's ``PolynomialFeatures``; the last ``linear`` variables appear by themselves only."""
    rows = []
    for d in range(1, degree + 1):
        for picked in combinations_with_replacement(range(n), d):
            if interactions or len(set(picked)) == 1:
                rows.append(np.bincount(picked, minlength=n + linear))
    rows += list(np.eye(n + linear, dtype=int)[n:])
    return torch.from_numpy(np.stack(rows))


def polynomial(z: Tensor, exponents: Tensor, room: int = 0) -> Tensor:
    """Monomials ``(..., p, n)`` of variables ``(..., J, n)``: each is an earlier one times a variable; behind them, if
    asked for, is room for more columns, which the caller fills."""
    out = z.new_empty((*z.shape[:-2], len(exponents) + room, z.shape[-1]))
    seen: dict[tuple[int, ...], int] = {}
    for i, row in enumerate(map(tuple, exponents.tolist())):
        last = max(j for j, e in enumerate(row) if e)
        rest = (*row[:last], row[last] - 1, *row[last + 1 :])
        if any(rest):
            torch.mul(out[..., seen[rest], :], z[..., last, :], out=out[..., i, :])
        else:
            out[..., i, :] = z[..., last, :]
        seen[row] = i
    return out


def standardise(z: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over the last dimension, kept as a dimension; a constant has scale 1."""
    location = z.mean(-1, keepdim=True)
    scale = (z - location).square().mean(-1, keepdim=True).sqrt()
    flat = scale <= 1e-12 * (location.abs() + scale)
    return location, torch.where(flat, 1.0, scale)
