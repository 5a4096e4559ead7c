r"""Cross-fitting with any scikit-learn learner, the general form of :func:`peftref.panel.core.crossfit.crossfit`.

A learner that tunes itself (``GridSearchCV``, ``LassoCV``, ...) must not see two rows of one unit on both sides of its
inner split when the outer split keeps units together, or its choice is made on leaked data. So wherever a learner has a
``cv`` setting that is a number or ``None``, it is given inner folds of the outer scheme: the outer folds that it trains
on, left out in turn, each together with what the scheme keeps away from it. A splitter of your own is left alone. An
ensemble that resamples its rows, such as ``BaggingRegressor``, needs one: row numbers mean nothing inside it.

Least squares (``LinearRegression``) is done by our own ridge without a penalty, which does not give up columns whose
sizes or directions are far apart, as scikit-learn's does beyond a millionth. Columns of units are in
``peftref.panel.core.dummies``.

>>> from sklearn.linear_model import LinearRegression
>>> folds = Folds(torch.tensor([[0, 0, 1, 1]]), ~torch.eye(2, dtype=torch.bool))
>>> z = torch.tensor([[[0.0, 1.0, 2.0, 3.0]]], dtype=torch.float64)
>>> crossfit_sklearn(z, 2 * z, folds, [LinearRegression()]).round(decimals=6)
tensor([[[0., 2., 4., 6.]]], dtype=torch.float64)
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from numbers import Integral
from typing import Any

import numpy as np
import scipy.sparse
import torch
from joblib import Parallel, delayed
from numpy.typing import NDArray
from sklearn.base import clone, is_classifier
from torch import Tensor

from .dummies import as_ours, check_converged, tighten, with_unit_columns
from .folds import Folds, check_shapes
from .ridge import PolynomialRidge

__all__ = ["crossfit_sklearn", "follow_folds"]


def crossfit_sklearn(
    z: Tensor,
    targets: Tensor,
    folds: Folds,
    learners: Sequence[Any],
    *,
    uses: Sequence[Sequence[int]] | None = None,
    unit: Tensor | None = None,
    linear: int = 0,
    coarse: tuple[int, float] = (0, 0),
    within: Sequence[Tensor | None] | None = None,
    n_jobs: int | None = None,
) -> Tensor:
    """Out-of-fold predictions; the fits are spread by joblib, so ``joblib.parallel_config`` decides where they run.

    Args:
        z: variables of one dataset, ``(1, J, n)``.
        targets: ``(1 or R, q, n)``.
        folds: R splits of the rows.
        learners: one for each target; never changed. A classifier predicts the probability of class 1.
        uses: for each target the variables that predict it (all).
        unit: codes ``(n,)``: a column for each unit besides.
        linear: not used; a learner treats its columns as it will.
        coarse: not used, likewise.
        within: for each target the training rows it may learn from, a mask ``(n,)`` (all).
        n_jobs: of joblib.

    Returns:
        Predictions ``(R, q, n)``.

    Raises:
        ValueError: shapes that do not fit, predictions that are not finite, or a classifier whose classes are not 0
            and 1.
    """
    check_shapes(z, targets, folds, uses, unit, linear)
    repeats = len(folds.fold)
    if len(z) != 1 or len(targets) not in (1, repeats):
        raise ValueError(f"z, targets: expected batches of 1 and of 1 or {repeats}, got {len(z)} and {len(targets)}")
    for name, each in (("learners", learners), ("within", within)):
        if each is not None and len(each) != targets.shape[1]:
            raise ValueError(f"{name}: expected one for each of {targets.shape[1]} targets, got {len(each)}")
    table = z[0].T.cpu().numpy()
    fold = folds.fold.cpu().numpy()
    keep = folds.keep.cpu().numpy()
    codes = None if unit is None else unit.cpu().numpy()
    wanted = targets.expand(repeats, -1, -1).cpu().numpy()
    q = targets.shape[1]
    allowed = [True if m is None else m.cpu().numpy() for m in within or [None] * q]
    columns = [list(range(table.shape[1])) if uses is None else list(uses[t]) for t in range(q)]

    def rows(r: int, k: int, t: int) -> tuple[NDArray[Any], NDArray[Any]]:
        return np.flatnonzero(keep[k][fold[r]] & allowed[t]), np.flatnonzero(fold[r] == k)

    def job(r: int, k: int, t: int) -> tuple[Any, ...]:
        train, test = rows(r, k, t)
        features = table[:, columns[t]]
        if codes is not None:
            features = with_unit_columns(features, codes, learners[t])
        return learners[t], features[train], wanted[r, t, train], features[test], fold[r, train], keep

    cells = [(r, k, t) for r, k, t in product(range(repeats), range(len(keep)), range(q)) if (fold[r] == k).any()]
    for r, k, t in cells:  # errors before the first fit
        train, _ = rows(r, k, t)
        if not len(train):
            raise ValueError(f"learner: expected training rows for fold {k} of target {t}, got none")
        classes = np.unique(wanted[r, t, train])
        if is_classifier(learners[t]) and classes.tolist() != [0, 1]:
            raise ValueError(f"w: expected zeros and ones in the training rows of fold {k}, got {classes}")
    made = Parallel(n_jobs=n_jobs)(delayed(_fit_predict)(*job(*cell)) for cell in cells)
    out = torch.empty(repeats, q, z.shape[-1], dtype=torch.float64)
    for (r, k, t), values in zip(cells, made, strict=True):
        if not np.isfinite(values).all():
            raise ValueError(f"learner: expected finite predictions, got others from {learners[t]}")
        out[r, t, rows(r, k, t)[1]] = torch.from_numpy(values)
    return out.to(z.device)


def _fit_predict(
    learner: Any, x: NDArray[Any], y: NDArray[Any], new: NDArray[Any], fold: NDArray[Any], keep: NDArray[Any]
) -> NDArray[Any]:
    model = follow_folds(tighten(clone(learner)), fold, keep)
    model = model if scipy.sparse.issparse(x) else as_ours(model)
    if type(model) is PolynomialRidge:
        model._fit_folds(x, y, fold, keep)  # its penalties are compared on the outer folds too
    else:
        model.fit(x, y)
    if scipy.sparse.issparse(x):
        check_converged(model, x, y)
    if is_classifier(model):
        probability: NDArray[Any] = model.predict_proba(new)[:, 1]
        return probability
    return np.asarray(model.predict(new), dtype=np.float64).reshape(-1)


def follow_folds(learner: Any, fold: NDArray[Any], keep: NDArray[Any] | None = None) -> Any:
    """Set each ``cv`` of a learner that is a number or ``None`` to leave out the folds present in ``fold`` in turn.

    Args:
        learner: changed in place, and returned.
        fold: outer fold of each training row.
        keep: ``(K, K)``, which folds train the model of which (all others).

    Raises:
        ValueError: too few folds, or an open ``cv`` inside another: its rows are not those of ``fold``.

    >>> from sklearn.linear_model import LassoCV
    >>> [test.tolist() for _, test in follow_folds(LassoCV(), np.array([3, 3, 1])).cv]
    [[2], [0, 1]]
    """
    settings = learner.get_params() if hasattr(learner, "get_params") else {}
    open_cv = [key for key, value in settings.items() if key.split("__")[-1] == "cv" and _is_number_or_none(value)]
    if not open_cv:
        return learner
    for key in open_cv:
        path = key.split("__")[:-1]
        if any("__".join([*path[:i], "cv"]) in settings for i in range(len(path))):
            raise ValueError(f"learner: expected a splitter for a cv inside another, got {key}={settings[key]!r}")
    inner = []
    for j in np.unique(fold):
        train = (fold != j) if keep is None else keep[j][fold] & (fold != j)
        if not train.any():
            raise ValueError("folds: expected more, for a learner that cross-validates on those it trains on")
        inner.append((np.flatnonzero(train), np.flatnonzero(fold == j)))
    return learner.set_params(**dict.fromkeys(open_cv, inner))


def _is_number_or_none(value: Any) -> bool:
    return value is None or (isinstance(value, Integral) and not isinstance(value, bool))
