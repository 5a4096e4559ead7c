"""What :class:`~peftref.panel.dml_panel.PanelDML` refuses before it reads any data."""

from __future__ import annotations

import warnings
from typing import Any

from sklearn.base import is_classifier

from ..baselines.linear import LINEAR
from .estimators import SETS
from .folds import Folds

ESTIMATORS = (*LINEAR, *SETS)
CHOICES: dict[str, tuple[Any, ...]] = {
    "estimator": ESTIMATORS,
    "model": ("plr", "irm"),
    "score": ("partialling out", "IV-type"),
    "agg": ("dml2", "dml1"),
    "cluster": ("unit", "twoway", None),
}


def check_settings(method: Any) -> None:
    """Settings that do not exist or do not fit each other.

    Args:
        method: a ``PanelDML``.

    Raises:
        ValueError: a setting that does not exist, or two that exclude each other.
        TypeError: a learner that scikit-learn would not take.
    """
    for name, allowed in CHOICES.items():
        given = getattr(method, name)
        if given not in allowed:
            raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {given!r}")
    scheme = method.folds.scheme if isinstance(method.folds, Folds) else method.scheme
    if method.model == "irm" and method.estimator not in ("pooled", "cre", "cre_normal"):
        raise ValueError(f"estimator: expected 'pooled', 'cre' or 'cre_normal' for 'irm', got {method.estimator!r}")
    if method.twoway and method.estimator == "fd":
        raise ValueError("twoway: expected False for the estimator 'fd', got True")
    if method.model == "irm" and method.score != "partialling out":
        raise ValueError(f"score: expected 'partialling out' (none other) for 'irm', got {method.score!r}")
    if method.cluster == "twoway" and scheme != "product" and method.estimator not in LINEAR:
        raise ValueError(f"scheme: expected 'product' for cluster='twoway', got {scheme!r}")
    if not 0 < method.clip < 0.5:
        raise ValueError(f"clip: expected a number in (0, 0.5), got {method.clip!r}")
    for name in ("learner", "learner_w"):
        learner = getattr(method, name)
        if learner is not None and not (hasattr(learner, "fit") and hasattr(learner, "predict")):
            raise TypeError(f"{name}: expected a scikit-learn learner, got {type(learner).__name__}")
    if method.model == "irm" and method.learner_w is not None and not is_classifier(method.learner_w):
        raise TypeError(f"learner_w: expected a classifier for 'irm', got {type(method.learner_w).__name__}")
    if method.estimator == "dummies" and scheme in ("unit", "product"):
        text = f"scheme: {scheme!r} leaves the units of a fold without a trained column in 'dummies'"
        warnings.warn(text, UserWarning, stacklevel=3)
