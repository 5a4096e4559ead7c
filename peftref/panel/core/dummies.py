"""A column for each unit, for learners of scikit-learn.

They are a plain array as long as that has at most 33 million entries (268 MB), and a sparse matrix beyond. On a sparse
matrix scikit-learn's linear learners iterate, and may stop far from the solution without a word, above all where
covariates are large: there they get tight tolerances, and what they found is checked.

>>> with_unit_columns(np.array([[7.0], [8.0]]), np.array([0, 1]), LinearRegression())
array([[7., 1., 0.],
       [8., 0., 1.]])
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse
from numpy.typing import NDArray
from sklearn.linear_model import LinearRegression, Ridge
from sklearn.utils import get_tags

from .ridge import PolynomialRidge

DENSE = 1 << 25  # entries of the largest plain array


def with_unit_columns(table: NDArray[Any], codes: NDArray[Any], learner: Any) -> Any:
    """``table`` ``(n, J)`` with a column of zeros and ones for each of the N codes behind, ``(n, J + N)``.

    Raises:
        ValueError: columns that only a sparse matrix can hold, for a learner that takes none.
    """
    n, j = table.shape
    size = int(codes.max()) + 1
    if n * (j + size) <= DENSE:
        return np.concatenate((table, np.eye(size)[codes]), 1)
    if not get_tags(learner).input_tags.sparse:
        raise ValueError(
            f"learner: expected one that takes sparse matrices for {n} rows and {size} columns of units, got "
            f"{type(learner).__name__}; PolynomialRidge needs neither"
        )
    onehot = scipy.sparse.csr_matrix((np.ones(n), (np.arange(n), codes)), shape=(n, size))
    return scipy.sparse.hstack([table, onehot], "csr")


def as_ours(learner: Any) -> Any:
    """Plain least squares as our own ridge without a penalty; any other learner as it is."""
    plain = type(learner) is LinearRegression and learner.fit_intercept and not learner.positive
    return PolynomialRidge(1, 0.0) if plain else learner


def tighten(learner: Any) -> Any:
    """The learner, with tight tolerances wherever it solves least squares."""
    settings = {"": learner} | (learner.get_params() if hasattr(learner, "get_params") else {})
    for part in settings.values():
        if type(part) is LinearRegression and getattr(part, "tol", None) == LinearRegression().tol:
            part.set_params(tol=1e-13)
        elif type(part) is Ridge and part.tol == Ridge().tol:
            part.set_params(tol=1e-12)
    return learner


def check_converged(model: Any, x: Any, y: NDArray[Any]) -> None:
    """At the minimum of a ridge, what its residuals share with each column is what the penalty holds back.

    Args:
        model: fitted; others than a ridge or least squares pass, or warn themselves.
        x: a sparse matrix ``(n, p)``.
        y: target ``(n,)``.

    Raises:
        ValueError: a ridge that is not at its minimum.
    """
    last = model[-1] if hasattr(model, "steps") else model
    if type(last) not in (LinearRegression, Ridge) or getattr(last, "positive", False):
        return
    x = model[:-1].transform(x) if last is not model and len(model) > 1 else x
    residual = y - last.predict(x)
    mean = np.asarray(x.mean(0)).ravel() if last.fit_intercept else np.zeros(x.shape[1])
    held = np.broadcast_to(getattr(last, "alpha", 0.0), last.coef_.shape) * last.coef_
    gradient = x.T @ residual - mean * residual.sum() - held
    size = np.sqrt(np.maximum(np.asarray(x.multiply(x).sum(0)).ravel() - len(y) * mean**2, 0.0))
    scale = size * np.linalg.norm(y - y.mean()) + np.abs(held)
    if (np.abs(gradient) > 1e-7 * scale + 1e-300).any():
        raise ValueError(
            f"learner: expected a solver that converges on {x.shape[1]} columns, got {last}; standardise the "
            "covariates, or take PolynomialRidge"
        )
