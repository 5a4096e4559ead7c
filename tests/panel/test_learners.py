"""Cross-fitting with any learner: equal to loops, nested tuning on the outer folds, nothing of the user's changed."""

from __future__ import annotations

import joblib
import numpy as np
import pytest
import scipy.sparse
import torch
from sklearn.base import BaseEstimator, RegressorMixin, clone
from sklearn.ensemble import GradientBoostingRegressor, StackingRegressor
from sklearn.linear_model import LassoCV, LinearRegression, LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import get_tags

from peftref.panel.core import dummies
from peftref.panel.core.crossfit import crossfit
from peftref.panel.core.folds import Folds, make_folds
from peftref.panel.core.layout import Layout
from peftref.panel.core.learners import crossfit_sklearn, follow_folds
from peftref.panel.core.ridge import PolynomialRidge

LAYOUT = Layout.of(np.repeat(np.arange(20), 6), np.tile(np.arange(6), 20))


def data(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(1, 3, 120))
    y = z[:, 0] ** 2 + z[:, 1] + 0.1 * rng.normal(size=(1, 120))
    w = (z[:, 2] + rng.normal(size=(1, 120)) > 0) * 1.0
    return torch.from_numpy(z), torch.from_numpy(np.stack((y, w), 1))


def takes_sparse(learner: BaseEstimator):
    tags = Ridge().__sklearn_tags__()
    tags.input_tags.sparse = True
    return tags


class Spy(RegressorMixin, BaseEstimator):
    """Notes what it is fitted on; predicts the mean."""

    seen: list = []
    asked: list = []

    def __init__(self, level: float = 1.0) -> None:
        self.level = level

    def fit(self, x, y):
        Spy.seen.append(x)
        self.mean_ = self.level * y.mean()
        return self

    def predict(self, x):
        Spy.asked.append(x)
        return np.full(x.shape[0], self.mean_)


@pytest.fixture(autouse=True)
def forget() -> None:
    Spy.seen, Spy.asked = [], []


@pytest.mark.parametrize("scheme", ["random", "unit", "nlo", "product"])
def test_equals_loops(scheme: str) -> None:
    z, targets = data()
    folds = make_folds(LAYOUT, 4 if scheme == "nlo" else 3, scheme, repeats=2, seed=1)
    learners = [GradientBoostingRegressor(n_estimators=5, random_state=0), Ridge(0.5)]
    found = crossfit_sklearn(z, targets, folds, learners, uses=[[0, 1], [2, 0]])
    for r in range(2):
        for train, test in folds.splits(r):
            for t, columns in enumerate(([0, 1], [2, 0])):
                x = z[0, columns].T.numpy()
                model = clone(learners[t]).fit(x[train], targets[0, t, train].numpy())
                assert np.allclose(found[r, t, test], model.predict(x[test]), rtol=0, atol=1e-12)


def test_targets_of_each_repetition() -> None:
    z, targets = data()
    folds = make_folds(LAYOUT, 3, "unit", repeats=2)
    both = torch.cat((targets, 3 * targets))
    found = crossfit_sklearn(z, both, folds, [LinearRegression()] * 2)
    once = crossfit_sklearn(z, targets, folds, [LinearRegression()] * 2)
    assert torch.allclose(found[0], once[0]) and torch.allclose(found[1], 3 * once[1])


def test_a_classifier_predicts_probabilities() -> None:
    z, targets = data()
    folds = make_folds(LAYOUT, 3, "unit")
    found = crossfit_sklearn(z, targets[:, 1:], folds, [LogisticRegression()])
    assert ((found > 0) & (found < 1)).all() and found.unique().numel() > 60
    with pytest.raises(ValueError, match="^w: expected zeros and ones in the training rows of fold"):
        crossfit_sklearn(z, torch.ones_like(targets[:, 1:]), folds, [LogisticRegression()])
    with pytest.raises(ValueError, match=r"^w: expected zeros and ones .* got \[1. 2.\]"):
        crossfit_sklearn(z, 1 + targets[:, 1:], folds, [LogisticRegression()])
    search = GridSearchCV(LogisticRegression(), {"C": [1.0]})
    assert torch.allclose(crossfit_sklearn(z, targets[:, 1:], folds, [search]), found)


def test_only_the_rows_allowed() -> None:
    z, targets = data()
    folds, treated = make_folds(LAYOUT, 3, "unit"), targets[0, 1] == 1
    found = crossfit_sklearn(z, targets[:, :1], folds, [LinearRegression()], within=[treated])
    train, test = next(folds.splits())
    rows = train[treated[train]]
    model = LinearRegression().fit(z[0].T[rows], targets[0, 0, rows])
    assert np.allclose(found[0, 0, test], model.predict(z[0].T[test]))
    with pytest.raises(ValueError, match="expected training rows for fold"):
        crossfit_sklearn(z, targets[:, :1], folds, [LinearRegression()], within=[torch.zeros(120, dtype=torch.bool)])


@pytest.mark.parametrize(
    "learner",
    [
        LassoCV(),
        GridSearchCV(Ridge(), {"alpha": [0.1, 10.0]}),
        make_pipeline(StandardScaler(), GridSearchCV(Ridge(), {"alpha": [0.1, 10.0]}, cv=7)),
    ],
    ids=["LassoCV", "GridSearchCV", "in a pipeline"],
)
def test_inner_folds_keep_units_together(learner) -> None:
    folds = make_folds(LAYOUT, 4, "unit")
    train, _ = next(folds.splits())
    model = follow_folds(clone(learner), folds.fold[0, train].numpy())
    ((name, inner),) = [(k, v) for k, v in model.get_params().items() if k.split("__")[-1] == "cv"]
    units = LAYOUT.unit[train].numpy()
    assert len(inner) == 3 and all(not set(units[a]) & set(units[b]) for a, b in inner)
    assert sorted(np.concatenate([b for _, b in inner])) == list(range(len(train)))
    assert learner.get_params()[name] in (None, 7)  # the user's learner is as it was


def test_inner_folds_are_used_in_the_fit() -> None:
    z, targets = data()
    folds = make_folds(LAYOUT, 4, "unit")
    found = crossfit_sklearn(z, targets[:, :1], folds, [GridSearchCV(Spy(), {"level": [0.5, 1.0]})])
    assert torch.isfinite(found).all()
    per_fold = 2 * 3 + 1  # two settings on three inner folds, and the best on all
    assert len(Spy.seen) == 4 * per_fold
    assert {len(x) for x in Spy.seen} == {90, 60}  # three folds, and two of them


def test_a_splitter_of_the_users_own_is_left_alone() -> None:
    learner = GridSearchCV(Ridge(), {"alpha": [1.0]}, cv=KFold(5))
    assert follow_folds(learner, np.arange(10) % 3).cv is learner.cv and isinstance(learner.cv, KFold)
    assert follow_folds(Ridge(), np.zeros(3)).get_params() == Ridge().get_params()
    with pytest.raises(ValueError, match="^folds: expected more, for a learner that cross-validates"):
        follow_folds(LassoCV(), np.zeros(10))


@pytest.mark.parametrize(("scheme", "k"), [("product", 3), ("nlo", 7), ("unit", 4), ("period", 3)])
def test_inner_folds_are_kept_apart_as_the_outer_ones(scheme: str, k: int) -> None:
    """The learner is told the unit and period of each row; fits and predictions are matched in the order they come."""
    layout = Layout.of(np.repeat(np.arange(12), 14), np.tile(np.arange(14), 12))
    z = torch.stack((layout.unit, layout.time)).double()[None]
    folds = make_folds(layout, k, scheme, seed=1)
    apart = {"unit": (0,), "product": (0, 1)}.get(scheme, (1,))
    for _, (train, _) in enumerate(folds.splits()):
        Spy.seen, Spy.asked = [], []
        fold = folds.fold[0, train].numpy()
        search = GridSearchCV(Spy(), {"level": [0.5]}, refit=False)
        x = z[0].T.numpy()[train]
        follow_folds(search, fold, folds.keep.numpy()).fit(x, x[:, 0])
        assert len(Spy.seen) == len(Spy.asked) == len(np.unique(fold))
        for fitted, asked in zip(Spy.seen, Spy.asked, strict=True):
            assert all(not set(fitted[:, i]) & set(asked[:, i]) for i in apart)
            if scheme == "nlo":
                assert np.abs(fitted[:, 1][:, None] - asked[:, 1]).min() > 2  # the blocks between have two periods
    found = crossfit_sklearn(z, z[:, :1], folds, [LassoCV(alphas=[0.1, 1.0])])
    assert torch.isfinite(found).all()


def test_a_cv_inside_a_cv_must_bring_its_own_splitter() -> None:
    """Row numbers of the outer training set mean nothing in a part of it."""
    for nested in (
        GridSearchCV(make_pipeline(StandardScaler(), LassoCV()), {"lassocv__n_alphas": [5]}),
        StackingRegressor([("lasso", LassoCV(cv=3))], Ridge()),
        GridSearchCV(LassoCV(), {}, cv=KFold(3)),
    ):
        with pytest.raises(ValueError, match="^learner: expected a splitter for a cv inside another, got .*cv="):
            follow_folds(nested, np.arange(12) % 3)
    z, targets = data()
    learner = StackingRegressor([("lasso", LassoCV(cv=KFold(3)))], Ridge())
    assert torch.isfinite(crossfit_sklearn(z, targets[:, :1], make_folds(LAYOUT, 3, "unit"), [learner])).all()
    assert learner.cv is None


def test_many_columns_of_units_stay_sparse(monkeypatch: pytest.MonkeyPatch) -> None:
    z, targets = data()
    crossfit_sklearn(z, targets[:, :1], make_folds(LAYOUT, 3, "random"), [Spy()], unit=LAYOUT.unit)
    assert len(Spy.seen) == 3 and all(isinstance(x, np.ndarray) and x.shape[1] == 3 + 20 for x in Spy.seen)
    Spy.seen = []
    monkeypatch.setattr(dummies, "DENSE", 100)
    monkeypatch.setattr(Spy, "__sklearn_tags__", takes_sparse)
    crossfit_sklearn(z, targets[:, :1], make_folds(LAYOUT, 3, "random"), [Spy()], unit=LAYOUT.unit)
    assert len(Spy.seen) == 3 and all(scipy.sparse.issparse(x) and x.shape[1] == 3 + 20 for x in Spy.seen)
    assert all((x[:, 3:].sum(1) == 1).all() for x in Spy.seen)


def ridge_with_units(x: np.ndarray, y: np.ndarray, alpha: float, fold: np.ndarray) -> np.ndarray:
    """Out-of-fold predictions of a ridge on x and a column for each unit: least squares on rows that stand for it."""
    z = np.column_stack([x, np.eye(20)[LAYOUT.unit.numpy()]])
    predicted = np.empty(len(y))
    for k in range(int(fold.max()) + 1):
        train, test = fold != k, fold == k
        mean = z[train].mean(0)
        a = np.vstack([z[train] - mean, alpha**0.5 * np.eye(z.shape[1])])
        size = np.linalg.norm(a, axis=0)
        b = np.concatenate([y[train] - y[train].mean(), np.zeros(z.shape[1])])
        slope = np.linalg.lstsq(a / size, b, rcond=1e-13)[0] / size
        predicted[test] = y[train].mean() + (z[test] - mean) @ slope
    return predicted


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("spread", [1.0, 15000.0])
@pytest.mark.parametrize(
    ("learner", "alpha"),
    [
        (LinearRegression(), 0.0),
        (make_pipeline(StandardScaler(), LinearRegression()), 0.0),
        (make_pipeline(StandardScaler(with_mean=False), LinearRegression()), 0.0),
        (Ridge(1e-3), 1e-3),
        (GridSearchCV(Ridge(), {"alpha": [1e-3]}), 1e-3),
    ],
)
def test_units_columns_are_solved_exactly(
    learner, alpha: float, spread: float, dense: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    z, targets = data()
    z = 3 * spread + spread * z[:, 1:2]
    folds = make_folds(LAYOUT, 3, "random")
    monkeypatch.setattr(dummies, "DENSE", 1 << 25 if dense else 100)
    if not dense and not get_tags(learner).input_tags.sparse:
        with pytest.raises(ValueError, match="^learner: expected one that takes sparse matrices for 120 rows and 20"):
            crossfit_sklearn(z, targets[:, :1], folds, [learner], unit=LAYOUT.unit)
        return
    found = crossfit_sklearn(z, targets[:, :1], folds, [learner], unit=LAYOUT.unit)
    expected = ridge_with_units(z[0].T.numpy(), targets[0, 0].numpy(), alpha, folds.fold[0].numpy())
    assert np.allclose(found[0, 0], expected, rtol=0, atol=1e-8 if dense else 1e-6)


def test_a_solver_that_stops_early_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    z, targets = data()
    monkeypatch.setattr(dummies, "DENSE", 100)
    with pytest.raises(ValueError, match="^learner: expected a solver that converges on 23 columns, got Ridge"):
        crossfit_sklearn(
            1e4 + z, targets[:, :1], make_folds(LAYOUT, 3, "random"), [Ridge(1e-3, tol=0.1)], unit=LAYOUT.unit
        )


def test_penalties_of_our_learner_are_compared_on_the_outer_folds() -> None:
    z, targets = data()
    folds = make_folds(LAYOUT, 4, "unit")
    learner = PolynomialRidge(1, [1e-3, 1.0, 100.0])
    found = crossfit_sklearn(z, targets[:, :1], folds, [learner])
    assert torch.allclose(found, crossfit(z, targets[:, :1], folds, learner), rtol=0, atol=1e-9)


def test_the_learner_given_is_never_fitted_and_inputs_stay() -> None:
    z, targets = data()
    before, learner = (z.clone(), targets.clone()), LinearRegression()
    crossfit_sklearn(z, targets, make_folds(LAYOUT, 3, "unit"), [learner, learner])
    assert not hasattr(learner, "coef_") and torch.equal(z, before[0]) and torch.equal(targets, before[1])


def test_workers_change_nothing() -> None:
    z, targets = data()
    folds = make_folds(LAYOUT, 3, "unit")
    one = crossfit_sklearn(z, targets, folds, [Ridge(), Ridge()])
    for backend in ("threading", "multiprocessing"):
        with joblib.parallel_config(backend=backend):
            assert torch.equal(crossfit_sklearn(z, targets, folds, [Ridge(), Ridge()], n_jobs=2), one)


def test_our_own_learner_as_any_other() -> None:
    """One column for each variable: the polynomial sees the same features whichever rows standardise them."""
    z, targets = data()
    folds = make_folds(LAYOUT, 5, "unit", repeats=2)
    learner = PolynomialRidge(1, 3.0)
    found = crossfit_sklearn(z, targets, folds, [learner, learner], uses=[[0, 1], [2]])
    assert torch.allclose(found, crossfit(z, targets, folds, learner, uses=[[0, 1], [2]]), rtol=0, atol=1e-10)


def test_folds_of_ones_own() -> None:
    """A fold without rows is passed over, one without training rows refused."""
    z, targets = data()
    fold = torch.arange(120)[None] % 2 * 2
    found = crossfit_sklearn(z, targets, Folds(fold, ~torch.eye(3).bool()), [Ridge(), Ridge()])
    same = crossfit_sklearn(z, targets, Folds(fold // 2, ~torch.eye(2).bool()), [Ridge(), Ridge()])
    assert torch.equal(found, same)
    with pytest.raises(ValueError, match="^learner: expected training rows for fold 0 of target 0, got none"):
        crossfit_sklearn(z, targets, Folds(fold, torch.zeros(3, 3).bool()), [Ridge(), Ridge()])


def test_predictions_must_be_finite() -> None:
    z, targets = data()
    with pytest.raises(ValueError, match="^learner: expected finite predictions, got others from Spy"):
        crossfit_sklearn(z, targets[:, :1], make_folds(LAYOUT, 3, "unit"), [Spy(level=np.inf)])


def test_batches_of_datasets_are_refused() -> None:
    z, targets = data()
    with pytest.raises(ValueError, match="^z, targets: expected batches of 1"):
        crossfit_sklearn(z.expand(2, -1, -1), targets, make_folds(LAYOUT, 3, "unit"), [Ridge()] * 2)


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("^learners: expected one for each of 2 targets, got 1", {"learners": [Ridge()]}),
        ("^within: expected one for each of 2 targets, got 1", {"within": [None]}),
        ("^uses: expected 2 sequences of numbers from 0 to 2", {"uses": [[0, 3], [0]]}),
        (r"^unit: expected codes of shape \(120,\), got \(5,\)", {"unit": torch.arange(5)}),
        ("^z, targets, folds: expected", {"z": torch.zeros(1, 3, 7)}),
    ],
)
def test_bad_input(message: str, arguments: dict) -> None:
    z, targets = data()
    given = {"z": z, "targets": targets, "folds": make_folds(LAYOUT, 3, "unit"), "learners": [Ridge()] * 2}
    with pytest.raises(ValueError, match=message):
        crossfit_sklearn(**given | arguments)
