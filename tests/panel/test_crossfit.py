"""The batched cross-fit is scikit-learn's, fold by fold, whatever the scheme, the targets and the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LinearRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures, StandardScaler

from peftref.panel.core import crossfit as module
from peftref.panel.core.crossfit import crossfit
from peftref.panel.core.folds import Folds, make_folds
from peftref.panel.core.layout import Layout, means
from peftref.panel.core.ridge import PolynomialRidge, monomials, polynomial, standardise


def unbalanced(seed: int = 0) -> Layout:
    rng = np.random.default_rng(seed)
    unit, time = np.repeat(np.arange(40), 7), np.tile(np.arange(7), 40)
    keep = rng.random(280) < 0.9
    return Layout.of(unit[keep], time[keep])


LAYOUT = unbalanced()


def data(batch: int = 1, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    z = torch.from_numpy(rng.normal(2, 3, (batch, 3, len(LAYOUT))))
    return z, z[:, :2] ** 2 + torch.from_numpy(rng.normal(size=(batch, 2, len(LAYOUT))))


def peer(degree: int, alpha: float):
    last = Ridge(alpha) if alpha else LinearRegression()
    return make_pipeline(PolynomialFeatures(degree, include_bias=False), StandardScaler(), last)


def scaled(z: torch.Tensor) -> np.ndarray:
    location, scale = standardise(z)
    return ((z - location) / scale).mT.numpy()


@pytest.mark.parametrize("alpha", [0.0, 1.0, 30.0])
@pytest.mark.parametrize("scheme", ["random", "unit", "period", "time_block", "nlo", "product"])
def test_equals_scikit_learn(scheme: str, alpha: float) -> None:
    z, y = data()
    folds = make_folds(LAYOUT, 2 if scheme == "product" else 5, scheme, repeats=2, seed=1)
    uses = [[0, 1], [0, 1, 2]]
    found = crossfit(z, y, folds, PolynomialRidge(2, alpha), uses=uses)
    x = scaled(z)[0]
    for r in range(2):
        for train, test in folds.splits(r):
            for q, used in enumerate(uses):
                model = peer(2, alpha).fit(x[train][:, used], y[0, q, train].numpy())
                assert np.allclose(found[r, q, test], model.predict(x[test][:, used]), rtol=0, atol=1e-8)


def test_batch_of_datasets_each_with_its_own_folds(monkeypatch: pytest.MonkeyPatch) -> None:
    z, y = data(batch=5)
    before = z.clone(), y.clone()
    folds = make_folds(LAYOUT, 4, "random", repeats=5)
    together = crossfit(z, y, folds, PolynomialRidge(3))
    assert torch.equal(z, before[0]) and torch.equal(y, before[1])
    for i in range(5):
        one = Folds(folds.fold[i : i + 1], folds.keep, "random")
        alone = crossfit(z[i : i + 1], y[i : i + 1], one, PolynomialRidge(3))
        assert torch.allclose(together[i : i + 1], alone, rtol=0, atol=1e-9)
    monkeypatch.setattr(module, "CHUNK", 1)
    assert torch.allclose(crossfit(z, y, folds, PolynomialRidge(3)), together, rtol=0, atol=1e-9)


@pytest.mark.parametrize("scheme", ["random", "unit", "nlo", "product"])
@pytest.mark.parametrize("alpha", [0.0, 2.0])
def test_columns_of_units_are_those_written_out(scheme: str, alpha: float) -> None:
    """Also of units that are in no training row, and at alpha = 0 the solution of least norm."""
    z, y = data()
    folds = make_folds(LAYOUT, 3 if scheme == "product" else 5, scheme, seed=3)
    found = crossfit(z, y, folds, PolynomialRidge(1, alpha), unit=LAYOUT.unit)
    x, onehot = scaled(z)[0], np.eye(LAYOUT.n_units)[LAYOUT.unit.numpy()]
    for train, test in folds.splits():
        columns = np.hstack([StandardScaler().fit(x[train]).transform(x), onehot])
        for q in range(2):
            model = (Ridge(alpha) if alpha else LinearRegression()).fit(columns[train], y[0, q, train].numpy())
            assert np.allclose(found[0, q, test], model.predict(columns[test]), rtol=0, atol=1e-8)


@pytest.mark.parametrize("scheme", ["unit", "nlo", "product"])
def test_penalties_are_chosen_by_leaving_out_the_folds_that_train(scheme: str) -> None:
    z, y = data()
    y = y + 30 * torch.from_numpy(np.random.default_rng(5).normal(size=y.shape))  # noise: penalties matter
    folds, alphas = make_folds(LAYOUT, 3 if scheme == "product" else 7, scheme, seed=2), [0.1, 30.0, 300.0]
    found = crossfit(z, y, folds, PolynomialRidge(2, alphas))
    x, fold, target, chosen = scaled(z)[0], folds.fold[0], y[0].T.numpy(), set()
    for k, (train, test) in enumerate(folds.splits()):
        errors = np.zeros((len(alphas), 2))
        for i, alpha in enumerate(alphas):
            for j in folds.keep[k].nonzero().flatten().tolist():
                rows, left = (folds.keep[k] & folds.keep[j])[fold].numpy(), (fold == j).numpy()
                model = peer(2, alpha).fit(x[rows], target[rows])
                errors[i] += ((model.predict(x[left]) - target[left]) ** 2).sum(0)
        for q, best in enumerate(errors.argmin(0)):
            chosen.add(best)
            model = peer(2, alphas[best]).fit(x[train], target[train, q])
            assert np.allclose(found[0, q, test], model.predict(x[test]), rtol=0, atol=1e-7)
    assert len(chosen) > 1  # not the same everywhere


@pytest.mark.parametrize("scheme", ["random", "unit"])
@pytest.mark.parametrize("alpha", [0.0, 1e-9, 1.0])
def test_columns_of_units_beside_features_that_they_explain(scheme: str, alpha: float) -> None:
    """A feature that is constant within units, and a copy of another, leave many solutions: the smallest is taken."""
    z, y = data()
    z = torch.cat((z, means(z[:, :1], LAYOUT.unit), z[:, :1]), 1)
    folds = make_folds(LAYOUT, 5, scheme, seed=3)
    found = crossfit(z, y, folds, PolynomialRidge(1, alpha), unit=LAYOUT.unit)
    x, onehot = scaled(z)[0], np.eye(LAYOUT.n_units)[LAYOUT.unit.numpy()]
    for train, test in folds.splits():
        columns = np.hstack([StandardScaler().fit(x[train]).transform(x), onehot])
        for q in range(2):
            model = Ridge(alpha, solver="svd") if alpha > 1e-6 else LinearRegression()
            model.fit(columns[train], y[0, q, train].numpy())
            atol = 1e-4 if alpha == 1e-9 else 1e-7
            assert np.allclose(found[0, q, test], model.predict(columns[test]), rtol=0, atol=atol)


def test_columns_of_units_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each target with its own variables, each dataset with its own folds; squares and products too."""
    z, y = data(batch=3)
    folds, uses = make_folds(LAYOUT, 4, "random", repeats=3), [[0, 2], [1]]
    found = crossfit(z, y, folds, PolynomialRidge(2, 0.5), uses=uses, unit=LAYOUT.unit)
    onehot = np.eye(LAYOUT.n_units)[LAYOUT.unit.numpy()]
    for b in range(3):
        for q, used in enumerate(uses):
            x = PolynomialFeatures(2, include_bias=False).fit_transform(scaled(z)[b][:, used])
            for train, test in folds.splits(b):
                columns = np.hstack([StandardScaler().fit(x[train]).transform(x), onehot])
                model = Ridge(0.5).fit(columns[train], y[b, q, train].numpy())
                assert np.allclose(found[b, q, test], model.predict(columns[test]), rtol=0, atol=1e-8)
    monkeypatch.setattr(module, "CHUNK", 1)
    again = crossfit(z, y, folds, PolynomialRidge(2, 0.5), uses=uses, unit=LAYOUT.unit)
    assert torch.allclose(again, found, rtol=0, atol=1e-9)


def test_variables_that_enter_linearly() -> None:
    z, y = data()
    folds = make_folds(LAYOUT, 4, "random")
    found = crossfit(z, y, folds, PolynomialRidge(2), linear=1)
    x = scaled(z)[0]
    features = np.column_stack([PolynomialFeatures(2, include_bias=False).fit_transform(x[:, :2]), x[:, 2]])
    for train, test in folds.splits():
        model = make_pipeline(StandardScaler(), Ridge(1.0)).fit(features[train], y[0, 0, train].numpy())
        assert np.allclose(found[0, 0, test], model.predict(features[test]), rtol=0, atol=1e-8)


def test_constant_repeated_and_far_away_columns() -> None:
    """A year has a mean 300 times its spread; a column that is another's copy shares its coefficient."""
    z, y = data()
    folds = make_folds(LAYOUT, 4, "random")
    plain = crossfit(z[:, :1], y, folds, PolynomialRidge(2, 0.0))
    odd = torch.cat((z[:, :1], torch.full_like(z[:, :1], 7.0), z[:, :1]), 1)
    assert torch.allclose(crossfit(odd, y, folds, PolynomialRidge(2, 0.0)), plain, rtol=0, atol=1e-6)
    assert torch.isfinite(crossfit(odd, y, folds, PolynomialRidge(3, 1.0))).all()
    far = crossfit(z[:, :1] * 1e-6 + 1e3, y, folds, PolynomialRidge(2, 1.0))
    assert torch.allclose(far, crossfit(z[:, :1], y, folds, PolynomialRidge(2, 1.0)), rtol=0, atol=1e-4)


def test_a_column_that_varies_in_the_held_out_rows_only() -> None:
    """A fold's model has no use for it, as in scikit-learn, however small the penalty."""
    z, y = data()
    folds = make_folds(LAYOUT, 4, "random")
    z[:, 2] = torch.where(folds.fold == 1, z[:, 2], 1.7)
    for alpha in (0.0, 1e-9, 1.0):
        found, x = crossfit(z, y, folds, PolynomialRidge(2, alpha, interactions=False)), scaled(z)[0]
        train, test = list(folds.splits())[1]
        used = np.column_stack([x[:, :2], x[:, :2] ** 2])  # without the third
        model = peer(1, alpha).fit(used[train], y[0, 0, train].numpy())
        assert np.allclose(found[0, 0, test], model.predict(used[test]), rtol=0, atol=1e-8)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_years_and_small_numbers(alpha: float) -> None:
    """Calendar years and a variable a billionth in size, cubed."""
    z, y = data()
    z[:, 0], z[:, 1] = LAYOUT.time + 1980.0, 1e-9 * z[:, 1] + 1e-3
    folds = make_folds(LAYOUT, 5, "random")
    found, x = crossfit(z, y, folds, PolynomialRidge(3, alpha)), StandardScaler().fit_transform(z[0].T.numpy())
    for train, test in folds.splits():
        model = peer(3, alpha).fit(x[train], y[0, 1, train].numpy())
        assert np.allclose(found[0, 1, test], model.predict(x[test]), rtol=0, atol=1e-7)


def test_targets_far_from_zero() -> None:
    """Even the choice of a penalty does not notice: sums of squares would have lost the residuals."""
    z, y = data()
    y = y + 30 * torch.from_numpy(np.random.default_rng(5).normal(size=y.shape))
    folds, learner = make_folds(LAYOUT, 7, "unit", seed=2), PolynomialRidge(2, [0.1, 30.0, 300.0])
    near = crossfit(z, y, folds, learner)
    assert torch.allclose(crossfit(z, y + 1e9, folds, learner) - 1e9, near, rtol=0, atol=1e-5)
    assert not torch.allclose(near, crossfit(z, y, folds, PolynomialRidge(2, 0.1)), rtol=0, atol=1e-3)


def test_a_penalty_too_small_to_be_seen_is_none() -> None:
    z, y = data()
    z = torch.cat((z, z), 1)  # a singular matrix
    folds = make_folds(LAYOUT, 4, "random")
    none = crossfit(z, y, folds, PolynomialRidge(2, 0.0))
    for alpha in (1e-300, 1e-17, 1e-12):
        assert torch.allclose(crossfit(z, y, folds, PolynomialRidge(2, alpha)), none, rtol=0, atol=1e-3)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_no_variables_at_all(alpha: float) -> None:
    z, y = data()
    folds = make_folds(LAYOUT, 4, "unit")
    found = crossfit(z, y, folds, PolynomialRidge(2, alpha), uses=[[], [0]])
    for train, test in folds.splits():
        assert torch.allclose(found[0, 0, test], y[0, 0, train].mean(), rtol=0, atol=1e-10)
    assert torch.allclose(found[:, 1:], crossfit(z, y, folds, PolynomialRidge(2, alpha), uses=[[0], [0]])[:, 1:])


def test_nothing_held_out() -> None:
    z, y = data()
    all_rows = Folds(torch.zeros(1, len(LAYOUT), dtype=torch.long), torch.ones(1, 1, dtype=torch.bool))
    x = scaled(z)[0]
    expected = peer(2, 1.0).fit(x, y[0].T.numpy()).predict(x).T
    assert np.allclose(crossfit(z, y, all_rows, PolynomialRidge(2))[0], expected, rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="^alpha: expected enough folds"):
        crossfit(z, y, all_rows, PolynomialRidge(2, [0.1, 1.0]))


@pytest.mark.parametrize("alpha", [1.0, [0.1, 10.0]])
def test_folds_without_rows_are_passed_over(alpha) -> None:
    z, y = data()
    fold = torch.arange(len(LAYOUT))[None] % 4
    gaps = Folds(fold * 2, ~torch.eye(8, dtype=torch.bool))
    expected = crossfit(z, y, Folds(fold, ~torch.eye(4, dtype=torch.bool)), PolynomialRidge(2, alpha))
    assert torch.allclose(crossfit(z, y, gaps, PolynomialRidge(2, alpha)), expected, rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="^folds: expected training rows for each fold"):
        crossfit(z, y, Folds(fold, torch.zeros(4, 4, dtype=torch.bool)), PolynomialRidge(2, alpha))


def test_single_precision_is_widened() -> None:
    z, y = data()
    folds = make_folds(LAYOUT, 4, "unit")
    found = crossfit(z.float(), y.float(), folds, PolynomialRidge(2))
    assert found.dtype == torch.float64
    assert torch.equal(found, crossfit(z.float().double(), y.float().double(), folds, PolynomialRidge(2)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu() -> None:
    z, y = data(batch=2)
    folds = make_folds(LAYOUT, 5, "unit", repeats=2)
    for alpha, more in ((1.0, {}), ([0.1, 10.0], {}), (0.0, {"unit": LAYOUT.unit}), (1.0, {"unit": LAYOUT.unit})):
        here = crossfit(z, y, folds, PolynomialRidge(2, alpha), **more)
        moved = {name: t.cuda() for name, t in more.items()}
        there = crossfit(z.cuda(), y.cuda(), folds.to("cuda"), PolynomialRidge(2, alpha), **moved)
        assert there.is_cuda and torch.allclose(there.cpu(), here, rtol=0, atol=1e-7)


def test_monomials_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20, 3))
    for degree in (1, 2, 3, 4):
        theirs = PolynomialFeatures(degree, include_bias=False).fit(x)
        exponents = monomials(3, degree)
        assert np.array_equal(exponents, theirs.powers_)
        assert np.allclose(polynomial(torch.from_numpy(x.T), exponents).T, theirs.transform(x))
    assert monomials(2, 3, interactions=False).tolist() == [[1, 0], [0, 1], [2, 0], [0, 2], [3, 0], [0, 3]]
    assert monomials(1, 2, linear=1).tolist() == [[1, 0], [2, 0], [0, 1]]


def test_every_setting_matters() -> None:
    z, y = data()
    folds = make_folds(LAYOUT, 4, "random")
    settings = [{}, {"degree": 2}, {"alpha": 5.0}, {"interactions": False}]
    made = [crossfit(z, y, folds, PolynomialRidge(**s)) for s in settings]
    assert all(not torch.allclose(a, b, atol=1e-4) for i, a in enumerate(made) for b in made[:i])


@pytest.mark.parametrize(
    ("name", "learner", "change"),
    [
        ("degree", PolynomialRidge(0), {}),
        ("degree", PolynomialRidge(1.5), {}),
        ("alpha", PolynomialRidge(1, -1.0), {}),
        ("alpha", PolynomialRidge(1, []), {}),
        ("alpha", PolynomialRidge(1, [1.0, 2.0]), {"unit": LAYOUT.unit}),
        ("z, targets, folds", PolynomialRidge(1), {"targets": torch.zeros(3, 2, 5)}),
        ("z, targets, folds", PolynomialRidge(1), {"z": torch.zeros(3, len(LAYOUT))}),
        ("linear", PolynomialRidge(1), {"linear": 4}),
        ("unit", PolynomialRidge(1), {"unit": torch.zeros(3, dtype=torch.long)}),
        ("uses", PolynomialRidge(1), {"uses": [[0]]}),
        ("uses", PolynomialRidge(1), {"uses": [[0], [3]]}),
    ],
)
def test_bad_input(name: str, learner: PolynomialRidge, change: dict) -> None:
    z, y = data()
    with pytest.raises(ValueError, match=rf"^{name}: expected"):
        crossfit(**{"z": z, "targets": y, "folds": make_folds(LAYOUT, 4, "random"), "learner": learner} | change)


def test_too_few_folds_to_choose_a_penalty() -> None:
    z, y = data()
    with pytest.raises(ValueError, match="^alpha: expected enough folds"):
        crossfit(z, y, make_folds(LAYOUT, 2, "random"), PolynomialRidge(1, [1.0, 2.0]))
