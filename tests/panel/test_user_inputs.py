"""Columns as users bring them: what has an order, what is missing, what is made of many covariates."""

import numpy as np
import pandas as pd
import pytest

from peftref.panel import PanelDML, PolynomialRidge

U = np.repeat(np.arange(40), 12)
T = np.tile(np.arange(1, 13), 40)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(480, 2))
W = X[:, 0] + RNG.normal(size=480)
Y = W + X[:, 0] + RNG.normal(size=480)


@pytest.mark.parametrize("prefix", ["", "t", "week "])
@pytest.mark.parametrize("estimator", ["fd", "cre_general"])
def test_an_ordered_category_in_the_order_of_text_is_refused(estimator: str, prefix: str) -> None:
    words = [f"{prefix}{t}" for t in T]
    with pytest.raises(TypeError, match="time: expected categories in the order of time, got "):
        PanelDML(estimator).fit(Y, W, X, U, pd.Categorical(words, ordered=True))
    order = [f"{prefix}{t}" for t in range(1, 13)]
    found = PanelDML(estimator).fit(Y, W, X, U, pd.Categorical(words, categories=order, ordered=True))
    assert found.coef_ == PanelDML(estimator).fit(Y, W, X, U, T).coef_


def test_masked_entries_are_missing() -> None:
    with pytest.raises(ValueError, match="y: expected finite numbers, got 36 that are missing or infinite"):
        PanelDML("fe").fit(np.ma.masked_array(Y, U < 3), W, X, U, T)
    assert PanelDML("fe").fit(np.ma.masked_array(Y), W, X, U, T).coef_ == PanelDML("fe").fit(Y, W, X, U, T).coef_


@pytest.mark.parametrize("estimator", ["fe", "cre_general", "fd"])
def test_an_outcome_without_variation_is_refused(estimator: str) -> None:
    with pytest.raises(ValueError, match="y: expected an outcome that varies"):
        PanelDML(estimator).fit(np.full(480, 3.3), W, X, U, T)


def test_the_default_keeps_products_of_many_covariates() -> None:
    rng = np.random.default_rng(1)
    unit = np.repeat(np.arange(200), 10)
    x = rng.normal(size=(2000, 30))
    confounder = 0.5 * x[:, 0] ** 2 + x[:, 1] + 0.5 * x[:, 2] * x[:, 3]
    w = confounder + rng.normal(size=2000)
    y = 0.5 * w + confounder + rng.normal(size=2000)
    found = PanelDML().fit(y, w, x, unit, np.tile(np.arange(10), 200))
    assert abs(found.coef_ - 0.5) < 0.12  # without the product: 0.72
    given = PanelDML(learner=PolynomialRidge(2, 1.0)).fit(y, w, x, unit, np.tile(np.arange(10), 200))
    assert abs(given.coef_ - 0.5) < 0.12
