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
from .gram import by_fold, fit, moments

__all__ = ["PolynomialRidge", "check_learner", "monomials", "polynomial", "standardise"]


class PolynomialRidge(RegressorMixin, BaseEstimator):
    """Ridge regression on all monomials of the standardised features up to a degree, standardised again.

    As a scikit-learn regressor it fits one model. :class:`~peftref.panel.dml_panel.PanelDML` recognises it and fits
    all folds and repetitions at once (:func:`peftref.panel.core.crossfit.crossfit`).

    Args:
        degree: of the polynomial, >= 1.
        alpha: penalty on the squared coefficients, >= 0 (as in scikit-learn: not divided by the number of rows); of
            several, cross-validation chooses one for each model.
        interactions: products of different features too.
    """

    def __init__(self, degree: int = 3, alpha: float | Sequence[float] = 1.0, interactions: bool = True) -> None:
        self.degree = degree
        self.alpha = alpha
        self.interactions = interactions

    def fit(self, X: NDArray[Any], y: NDArray[Any]) -> PolynomialRidge:  # noqa: N803 (scikit-learn's name)
        """Fit ``(n, J)`` to ``(n,)``; several ``alpha`` are compared on five folds of rows, in the order given."""
        alphas = check_learner(self)
        least = min(2, len(alphas))
        X, y = validate_data(self, X, y, dtype=np.float64, y_numeric=True, ensure_min_samples=least)  # noqa: N806
        z = torch.tensor(X.T)
        target = torch.tensor(y, dtype=torch.float64)[None]
        self._location, self._scale = standardise(z)
        self._level = target.mean()  # the Gram matrix of y itself would lose the digits that y varies in
        self._exponents = monomials(len(z), self.degree, self.interactions)
        f = polynomial((z - self._location) / self._scale, self._exponents)
        fold = torch.arange(z.shape[-1]) % (5 if len(alphas) > 1 else 1)
        parts = moments(*by_fold(torch.cat((f, target - self._level))[None], fold[None], int(fold.max()) + 1)[:2])
        every = torch.ones(1, len(parts.n[0]), dtype=torch.bool)  # one model, from all the folds
        columns = torch.arange(len(self._exponents))
        slope, intercept = fit(parts, every, columns, torch.tensor([len(columns)]), alphas)
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


def check_learner(learner: PolynomialRidge) -> list[float]:
    """The penalties of a learner, after checking its settings."""
    integer("degree", learner.degree, 1)
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
