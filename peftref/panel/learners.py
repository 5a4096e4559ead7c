r"""Cross-fitting with any scikit-learn learner, the general form of :func:`peftref.panel.crossfit.crossfit`.

A learner that tunes itself (``GridSearchCV``, ``LassoCV``, ...) must not see two rows of one unit on both sides of its
inner split when the outer split keeps units together, or its choice is made on leaked data. So wherever a learner has a
``cv`` setting that is a number or ``None``, it is given inner folds of the outer scheme: the outer folds that it trains
on, left out in turn.

>>> from sklearn.linear_model import LinearRegression
>>> folds = Folds(torch.tensor([[0, 0, 1, 1]]), ~torch.eye(2, dtype=torch.bool))
>>> z = torch.tensor([[[0.0, 1.0, 2.0, 3.0]]], dtype=torch.float64)
>>> crossfit_sklearn(z, 2 * z, folds, [LinearRegression()]).round(decimals=6)
tensor([[[0., 2., 4., 6.]]], dtype=torch.float64)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.sparse
import torch
from joblib import Parallel, delayed
from sklearn.base import clone, is_classifier
from torch import Tensor

from .folds import Folds

__all__ = ["crossfit_sklearn", "follow_folds"]


def crossfit_sklearn(
    z: Tensor, targets: Tensor, folds: Folds, learners: Sequence[Any], *, uses: Sequence[Sequence[int]] | None = None,
    unit: Tensor | None = None, linear: int = 0, within: Sequence[Tensor | None] | None = None,
    n_jobs: int | None = None,
) -> Tensor:  # fmt: skip
    """Out-of-fold predictions; the fits are spread by joblib, so ``joblib.parallel_config`` decides where they run.

    Args:
        z, targets, folds, uses, unit: see :func:`~peftref.panel.crossfit.crossfit`; z of one dataset.
        learners: one for each target; never changed. A classifier predicts the probability of class 1.
        linear: not used; a learner treats its columns as it will.
        within: for each target the training rows it may learn from, a mask ``(n,)`` (all).
        n_jobs: of joblib.

    Returns:
        Predictions ``(R, q, n)``.

    Raises:
        ValueError: predictions that are not finite, or a classifier that met one class only.
    """
    repeats = len(folds.fold)
    if len(z) != 1 or len(targets) not in (1, repeats):
        raise ValueError(f"z, targets: expected batches of 1 and of 1 or {repeats}, got {len(z)} and {len(targets)}")
    table = z[0].T.cpu().numpy()
    onehot = None if unit is None else _onehot(unit.cpu().numpy())
    wanted, q = targets.expand(repeats, -1, -1).cpu().numpy(), targets.shape[1]
    allowed = [None if m is None else m.cpu().numpy() for m in within or [None] * q]
    columns = [list(range(table.shape[1])) if uses is None else list(uses[t]) for t in range(q)]

    def one(r: int, k: int, t: int) -> np.ndarray:
        train, test = (rows.cpu().numpy() for rows in _split(folds, r, k))
        fold = folds.fold[r].cpu().numpy()
        train = train if allowed[t] is None else train[allowed[t][train]]
        if not len(train):
            raise ValueError(f"learner: expected training rows for fold {k} of target {t}, got none")
        features = table[:, columns[t]]
        if onehot is not None:
            features = scipy.sparse.hstack([features, onehot], "csr")
        goal = wanted[r, t, train]
        if is_classifier(learners[t]) and len(classes := np.unique(goal)) != 2:
            raise ValueError(f"w: expected zeros and ones in the training rows of fold {k}, got {classes}")
        model = follow_folds(clone(learners[t]), fold[train]).fit(features[train], goal)
        if is_classifier(model):
            return model.predict_proba(features[test])[:, 1]
        return np.asarray(model.predict(features[test]), dtype=np.float64).reshape(-1)

    jobs = [(r, k, t) for r in range(repeats) for k in range(len(folds)) for t in range(q)]
    made = Parallel(n_jobs=n_jobs)(delayed(one)(*job) for job in jobs)
    out = torch.empty(repeats, q, z.shape[-1], dtype=torch.float64)
    for (r, k, t), values in zip(jobs, made, strict=True):
        if not np.isfinite(values).all():
            raise ValueError(f"learner: expected finite predictions, got others from {learners[t]}")
        out[r, t, _split(folds, r, k)[1].cpu()] = torch.from_numpy(values)
    return out.to(z.device)


def follow_folds(learner: Any, fold: np.ndarray) -> Any:
    """Set each ``cv`` of a learner that is a number or ``None`` to leave out the folds present in ``fold`` in turn.

    Args:
        learner: changed in place, and returned.
        fold: outer fold of each training row.

    >>> from sklearn.linear_model import LassoCV
    >>> [test.tolist() for _, test in follow_folds(LassoCV(), np.array([3, 3, 1])).cv]
    [[2], [0, 1]]
    """
    settings = learner.get_params() if hasattr(learner, "get_params") else {}
    open_cv = [key for key, value in settings.items() if key.split("__")[-1] == "cv" and _is_number_or_none(value)]
    present = np.unique(fold)
    if open_cv and len(present) < 2:
        raise ValueError("folds: expected at least 3 for a learner that cross-validates on the training folds, got 2")
    if open_cv:
        inner = [(np.flatnonzero(fold != j), np.flatnonzero(fold == j)) for j in present]
        learner.set_params(**dict.fromkeys(open_cv, inner))
    return learner


def _is_number_or_none(value: Any) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool))


def _split(folds: Folds, r: int, k: int) -> tuple[Tensor, Tensor]:
    fold = folds.fold[r]
    return folds.keep[k][fold].nonzero().squeeze(1), (fold == k).nonzero().squeeze(1)


def _onehot(codes: np.ndarray) -> scipy.sparse.csr_matrix:
    ones = np.ones(len(codes))
    return scipy.sparse.csr_matrix((ones, (np.arange(len(codes)), codes)), shape=(len(codes), codes.max() + 1))
