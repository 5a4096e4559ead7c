"""The batched cross-fit is scikit-learn's, fold by fold, whatever the scheme, the targets and the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LinearRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures, StandardScaler

from peftref.panel import crossfit as module
from peftref.panel.crossfit import crossfit
from peftref.panel.folds import Folds, make_folds
from peftref.panel.layout import Layout
from peftref.panel.ridge import PolynomialRidge, monomials, polynomial, standardise


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


@pytest.mark.parametrize("scheme", ["unit", "nlo"])
def test_penalties_are_chosen_by_leaving_out_the_folds_that_train(scheme: str) -> None:
    z, y = data()
    y = y + 30 * torch.from_numpy(np.random.default_rng(5).normal(size=y.shape))  # noise: penalties matter
    folds, alphas = make_folds(LAYOUT, 7, scheme, seed=2), [0.1, 30.0, 300.0]
    found = crossfit(z, y, folds, PolynomialRidge(2, alphas))
    x, fold, chosen = scaled(z)[0], folds.fold[0], set()
    for k, (train, test) in enumerate(folds.splits()):
        for q in range(2):
            target, errors = y[0, q].numpy(), []
            for alpha in alphas:
                squares = 0.0
                for j in folds.keep[k].nonzero().flatten().tolist():
                    rows = (folds.keep[k] & folds.keep[j])[fold].numpy()
                    left = (fold == j).numpy()
                    model = peer(2, alpha).fit(x[rows], target[rows])
                    squares += ((model.predict(x[left]) - target[left]) ** 2).sum()
                errors.append(squares)
            best = alphas[int(np.argmin(errors))]
            chosen.add(best)
            model = peer(2, best).fit(x[train], target[train])
            assert np.allclose(found[0, q, test], model.predict(x[test]), rtol=0, atol=1e-7)
    assert len(chosen) > 1  # not the same everywhere


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
