"""The learner as scikit-learn sees it."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
import torch
from sklearn.base import clone
from sklearn.linear_model import LinearRegression, Ridge
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures, StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from peftref.panel.core.crossfit import crossfit
from peftref.panel.core.dummies import as_ours
from peftref.panel.core.folds import Folds
from peftref.panel.core.ridge import PolynomialRidge
from peftref.panel.core.shape import choose_shape


def data(n: int = 83) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.normal(5, 2, size=(n, 2))
    return x, x[:, 0] ** 2 - x[:, 1] + rng.normal(size=n)


@pytest.mark.parametrize("alpha", [0.5, 20.0])
@pytest.mark.parametrize("degree", [1, 2, 3])
def test_equals_its_parts(degree: int, alpha: float) -> None:
    x, y = data()
    parts = (StandardScaler(), PolynomialFeatures(degree, include_bias=False), StandardScaler(), Ridge(alpha))
    ours, peer = PolynomialRidge(degree, alpha).fit(x, y), make_pipeline(*parts).fit(x, y)
    new = data(200)[0]
    assert np.allclose(ours.predict(new), peer.predict(new), rtol=0, atol=1e-8)


def test_several_penalties_are_compared_on_five_folds() -> None:
    x, y = data()
    y = y + 20 * np.random.default_rng(1).normal(size=len(y))
    alphas, fold, errors = [0.01, 10.0, 1000.0], np.arange(len(y)) % 5, []
    z = StandardScaler().fit_transform(x)
    for alpha in alphas:
        peer = make_pipeline(PolynomialFeatures(2, include_bias=False), StandardScaler(), Ridge(alpha))
        errors.append(sum(((peer.fit(z[fold != j], y[fold != j]).predict(z[fold == j]) - y[fold == j]) ** 2).sum()
                          for j in range(5)))  # fmt: skip
    best = alphas[int(np.argmin(errors))]
    found = PolynomialRidge(2, alphas).fit(x, y).predict(x)
    assert np.allclose(found, PolynomialRidge(2, best).fit(x, y).predict(x)) and best != alphas[0]


def test_conventions() -> None:
    x, y = data()
    model = PolynomialRidge(degree=2, alpha=[1.0, 2.0], interactions=False)
    assert clone(model).get_params() == {"degree": 2, "alpha": [1.0, 2.0], "interactions": False}
    assert model.fit(x, y) is model and model.n_features_in_ == 2 and model.score(x, y) > 0.9
    search = GridSearchCV(PolynomialRidge(), {"degree": [1, 2], "alpha": [0.1, 100.0]}).fit(x, y)
    assert search.best_params_ == {"degree": 2, "alpha": 0.1}


def test_inputs_stay_and_float32_is_widened() -> None:
    x, y = data()
    before = x.copy(), y.copy()
    wide = PolynomialRidge().fit(x, y).predict(x)
    assert np.array_equal(x, before[0]) and np.array_equal(y, before[1])
    narrow = PolynomialRidge().fit(x.astype(np.float32), y.astype(np.float32)).predict(x.astype(np.float32))
    assert narrow.dtype == np.float64 and np.allclose(narrow, wide, rtol=1e-4)


def test_bad_input() -> None:
    x, y = data()
    with pytest.raises(ValueError, match="inconsistent numbers of samples: .83, 5."):
        PolynomialRidge().fit(x, y[:5])
    with pytest.raises(TypeError, match="[Ss]parse data was passed"):
        PolynomialRidge().fit(scipy.sparse.csr_matrix(x), y)
    for alpha in (-1, float("nan"), "much", None, [], [1.0, np.inf]):
        with pytest.raises(ValueError, match="^alpha: expected a number >= 0, or several, got "):
            PolynomialRidge(alpha=alpha).fit(x, y)
    for degree in (0, 1.5, "2", None):
        with pytest.raises(ValueError, match="^degree: expected an integer >= 1, got "):
            PolynomialRidge(degree).fit(x, y)
    with pytest.raises(ValueError, match="with 1 sample.* while a minimum of 2 is required"):
        PolynomialRidge(alpha=[1.0, 2.0]).fit(x[:1], y[:1])


@parametrize_with_checks([PolynomialRidge(2), PolynomialRidge(1, [0.1, 1.0])])
def test_contract_of_scikit_learn(estimator, check) -> None:
    check(estimator)


def test_settings_may_be_numpy_numbers() -> None:
    x, y = data()
    search = GridSearchCV(PolynomialRidge(), {"degree": np.arange(1, 3), "alpha": np.array([0.1, 100.0])}).fit(x, y)
    assert search.best_params_ == {"degree": 2, "alpha": 0.1}


def test_a_target_far_from_zero_gets_the_same_penalty() -> None:
    """Its sum of squares has 16 digits, of which the residuals are the last."""
    x, y = data()
    y = y + 20 * np.random.default_rng(1).normal(size=len(y))
    alphas = [0.01, 10.0, 1000.0]
    near, far = (PolynomialRidge(2, alphas).fit(x, y + level).predict(x) for level in (0, 1e9))
    assert np.allclose(far - 1e9, near, rtol=0, atol=1e-5)
    assert not np.allclose(near, PolynomialRidge(2, 0.01).fit(x, y).predict(x), rtol=0, atol=1e-3)


def test_interactions_are_products_of_different_features() -> None:
    x, y = data()
    z = StandardScaler().fit_transform(x)
    features = np.column_stack([z, z**2])
    peer = make_pipeline(StandardScaler(), Ridge(1.0)).fit(features, y)
    assert np.allclose(PolynomialRidge(2, 1.0, interactions=False).fit(x, y).predict(x), peer.predict(features))


def test_degree_by_rows_and_columns() -> None:
    rng = np.random.default_rng(0)
    for rows, columns, features in ((400, 2, 9), (400, 8, 44), (400, 30, 90), (100, 30, 30), (20, 30, 30)):
        x = rng.normal(size=(rows, columns))
        model = PolynomialRidge("auto", "auto").fit(x, x[:, 0])
        assert len(model.coef_) == features and (features <= rows / 2 or features == columns)
    for setting in ({"degree": "much"}, {"alpha": "much"}):
        with pytest.raises(ValueError, match=f"^{next(iter(setting))}: expected"):
            PolynomialRidge(**setting).fit(x, x[:, 0])


def test_few_groups_teach_few_features() -> None:
    """Three variables of rows and nine of units: monomials of the latter only where units are many."""
    auto = PolynomialRidge("auto", "auto")
    shapes = [choose_shape(auto, 12, 4000, 9, groups) for groups in (40, 1000)]
    assert shapes == [(3, True, 9), (3, True, 0)]
    assert choose_shape(auto, 12, 400, 0, 0) == (2, True, 0)
    assert choose_shape(PolynomialRidge(3), 12, 4000, 9, 40) == (3, True, 0)


def test_room_is_asked_for_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peftref.panel.core.shape.LIMIT", 1000)
    x = np.random.default_rng(0).normal(size=(40, 5))
    PolynomialRidge(1).fit(x, x[:, 0])
    with pytest.raises(ValueError, match="^degree: expected a polynomial that fits"):
        PolynomialRidge(3).fit(x, x[:, 0])


def test_what_would_not_fit_is_refused_before_it_is_built() -> None:
    x = np.random.default_rng(0).normal(size=(5000, 61))
    with pytest.raises(
        ValueError, match=r"^degree: expected a polynomial that fits into 17 GB, got 41663 features of 61"
    ):
        PolynomialRidge(3).fit(x, x[:, 0])
    folds = Folds(torch.arange(5000)[None] % 5, ~torch.eye(5, dtype=torch.bool))
    z = torch.from_numpy(x.T.copy())[None]
    with pytest.raises(ValueError, match="^degree: expected a polynomial that fits into 17 GB"):
        crossfit(z, z[:, :1], folds, PolynomialRidge(3))


@pytest.mark.parametrize("learner", [PolynomialRidge(1, 0.0), LinearRegression()])
def test_least_squares_on_powers_of_years(learner: object) -> None:
    rng = np.random.default_rng(0)
    late = np.tile(np.arange(10.0), 30) - 4.5
    y = 0.02 * late**3 - 0.1 * late**2 + rng.normal(size=300)
    years = np.column_stack([(2004.5 + late) ** k for k in (1, 2, 3)])
    expected = np.polyval(np.polyfit(late, y, 3), late)
    assert np.allclose(as_ours(learner).fit(years, y).predict(years), expected, rtol=0, atol=1e-6)
    repeated = np.column_stack([years, years[:, 0] * 3 + 1, np.ones(300)])
    assert np.allclose(as_ours(learner).fit(repeated, y).predict(repeated), expected, rtol=0, atol=1e-6)
