"""Simulated panels: the equations with what was drawn, the laws of the noise, and DoubleML's generator."""

from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from doubleml.plm.datasets import make_plpr_CP2025
from numpy.testing import assert_allclose
from scipy.stats import kstest

from peftref.panel.core.layout import Layout, within
from peftref.panel.experiments.dgp import Simulated, dgp_clarke_polselli_2025, dgp_fuhr_papies_2024

G0 = {"linear": lambda x: x, "u-shaped": lambda x: x**2}
SMALL = {"n_units": 5, "n_periods": 4}


def values(data: Simulated, i: int = 0) -> tuple[np.ndarray, ...]:
    """y, w, the confounding ``(N, T)`` and x ``(J, N, T)`` of a dataset."""
    layout = data.panel.layout
    tensors = data.panel.y[i], data.panel.w[i], data.confounding[i], data.panel.x[i]
    return tuple(t.reshape(*t.shape[:-1], layout.n_units, layout.n_periods).numpy() for t in tensors)


def noise(data: Simulated, i: int = 0, beta: float = 1.0) -> tuple[np.ndarray, ...]:
    """What the equations without U leave: of y, of w, and of each x."""
    y, w, confounding, x = values(data, i)
    p = data.parameters.iloc[i]
    of_x = x - p[[f"alpha0_{j + 1}" for j in range(len(x))]].to_numpy()[:, None, None]
    return y - p["alpha2"] - beta * w - confounding, w - p["alpha1"] - confounding, of_x


def is_standard_normal(a: np.ndarray) -> bool:
    return kstest(a.ravel(), "norm").pvalue > 1e-3


# -- Fuhr and Papies


@pytest.mark.parametrize("twoway", [False, True])
@pytest.mark.parametrize("n_covariates", [1, 3])
@pytest.mark.parametrize("shape", ["linear", "u-shaped"])
def test_the_equations_hold_with_what_was_drawn(shape: str, n_covariates: int, twoway: bool) -> None:
    make = partial(
        dgp_fuhr_papies_2024, shape=shape, n_covariates=n_covariates, twoway=twoway, beta=0.7, seeds=[3, 8], **SMALL
    )
    a, b, c = (make(structure) for structure in "ABC")
    for i in range(2):
        for data in (a, b, c):
            _, _, confounding, x = values(data, i)
            gamma = data.parameters.iloc[i][[f"gamma{j + 1}" for j in range(n_covariates)]].to_numpy()
            expected = sum(g / n_covariates * G0[shape](one) for g, one in zip(gamma, x, strict=True))
            assert_allclose(confounding, expected, atol=1e-12)
        mu, eta, epsilon = noise(a, i, beta=0.7)  # in A there is nothing else
        u = noise(b, i, beta=0.7)[1] - eta
        assert np.abs(u).min() > 1e-6
        constant = u - u.mean(1, keepdims=True)
        if twoway:
            assert np.abs(constant).max() > 0.01
            constant -= constant.mean(0)
        assert_allclose(constant, 0, atol=1e-12)
        # the arrows: B has U in W and Y, C in X too, with the same factor everywhere
        for data, in_x in ((b, 0.0), (c, u)):
            for found, expected in zip(noise(data, i, 0.7), (mu + u, eta + u, epsilon + in_x), strict=True):
                assert_allclose(found, expected, atol=1e-12)
        # that factor is delta
        once = make("B", delta=1.0)
        assert_allclose(b.parameters["delta"].iloc[i] * (noise(once, i, 0.7)[1] - eta), u, atol=1e-12)


@pytest.mark.parametrize("n_covariates", [1, 2])
def test_against_a_loop_that_draws_in_the_same_order(n_covariates: int) -> None:
    n, t = 4, 3
    rng = np.random.default_rng(11)
    gamma = [rng.normal() for _ in range(n_covariates)]
    delta = rng.normal()
    alpha0 = [rng.normal() for _ in range(n_covariates)]
    alpha1, alpha2 = rng.normal(), rng.normal()
    units = [rng.normal() for _ in range(n)]
    epsilon = rng.normal(size=(n_covariates, n, t))
    mixing = rng.normal(size=(2, 2)) if n_covariates == 2 else np.ones((1, 1))
    eta, e, periods = rng.normal(size=(n, t)), rng.normal(size=(n, t)), rng.normal(size=t)
    rows = []
    for i in range(n):
        mu = 0.0
        for s in range(t):
            u = delta * (units[i] + periods[s])
            # the row of noises times A has the covariance A'A
            x = [alpha0[j] + u + epsilon[:, i, s] @ mixing[:, j] for j in range(n_covariates)]
            effect = sum(gamma[j] * x[j] ** 2 for j in range(n_covariates)) / n_covariates
            w = alpha1 + effect + u + eta[i, s]
            mu = e[i, 0] / np.sqrt(1 - 0.6**2) if s == 0 else 0.6 * mu + e[i, s]
            rows.append([i, s, alpha2 + 2 * w + effect + u + mu, w, *x])
    made = dgp_fuhr_papies_2024(
        n_units=n, n_periods=t, n_covariates=n_covariates, beta=2.0, rho=0.6, twoway=True, seeds=[11]
    )
    assert_allclose(made.frame().to_numpy(), rows, rtol=1e-12)
    assert made.effect == 2.0


def test_noise_is_standard_normal_and_independent() -> None:
    made = dgp_fuhr_papies_2024("A", "linear", n_units=300, n_periods=40, seeds=[1, 2])
    each = [np.stack([mu, eta, epsilon[0]]) for mu, eta, epsilon in (noise(made, i) for i in range(2))]
    for part in (*each[0], *each[1]):
        assert is_standard_normal(part)
        assert abs(np.corrcoef(part[:, 1:].ravel(), part[:, :-1].ravel())[0, 1]) < 0.04  # of the period before
        assert abs(part.mean(1).var() * 40 - 1) < 0.35  # no part common to a unit
    across = np.corrcoef(np.concatenate([part.reshape(3, -1) for part in each]))
    assert np.abs(across - np.eye(6)).max() < 4 / np.sqrt(300 * 40)


def test_units_periods_and_what_is_drawn_once_are_standard_normal() -> None:
    make = partial(dgp_fuhr_papies_2024, shape="linear", delta=1.0, seeds=[5])
    a, b = make("A", n_units=6000, n_periods=2), make("B", n_units=6000, n_periods=2)
    u = noise(b)[1] - noise(a)[1]
    assert is_standard_normal(u[:, 0])
    assert np.abs(np.corrcoef(u[:, 0], np.concatenate([noise(a)[0].T, noise(a)[1].T]))[0, 1:]).max() < 0.05
    make = partial(make, n_units=2, n_periods=4000)
    one, two = make("B"), make("B", twoway=True)
    assert is_standard_normal((noise(two)[1] - noise(one)[1])[0])
    drawn = dgp_fuhr_papies_2024("A", n_units=1, n_periods=1, n_covariates=2, seeds=range(1500)).parameters
    assert list(drawn) == ["delta", "gamma1", "gamma2", "alpha0_1", "alpha0_2", "alpha1", "alpha2"]
    assert drawn.index.tolist() == list(range(1500))
    assert all(is_standard_normal(drawn[name].to_numpy()) for name in drawn)
    assert np.abs(drawn.corr() - np.eye(7)).max(axis=None) < 0.1


@pytest.mark.parametrize("rho", [-0.5, 0.9])
def test_autoregression_is_stationary(rho: float) -> None:
    make = partial(dgp_fuhr_papies_2024, "A", n_units=4000, n_periods=12, seeds=[0])
    mu, e = noise(make(rho=rho))[0], noise(make())[0]
    assert_allclose(mu[:, 1:] - rho * mu[:, :-1], e[:, 1:], atol=1e-12)
    variance = mu.var(0) * (1 - rho**2)
    assert np.abs(variance - 1).max() < 0.1  # from the first period on
    for lag in (1, 2, 3):
        assert abs(np.corrcoef(mu[:, lag:].ravel(), mu[:, :-lag].ravel())[0, 1] - rho**lag) < 0.02


def test_covariates_are_correlated_by_a_random_matrix() -> None:
    make = partial(dgp_fuhr_papies_2024, "A", n_periods=1, n_covariates=3)
    rng = np.random.default_rng(0)
    rng.normal(size=3 + 1 + 3 + 2 + 4000 + 3 * 4000)
    mixing = rng.normal(size=(3, 3))
    found = np.cov(noise(make(n_units=4000, seeds=[0]))[2].reshape(3, -1))
    assert_allclose(found, mixing.T @ mixing, atol=0.1 * np.trace(mixing.T @ mixing))
    each = [np.cov(x) for x in make(n_units=40, seeds=range(400)).panel.x.numpy()]
    assert_allclose(np.mean(each, 0), 3 * np.eye(3), atol=0.6)  # E A'A = J I


# -- Clarke and Polselli


def moments(table: pd.DataFrame) -> np.ndarray:
    """For each unit all products of two variables, functions of the covariates and unit means, meant over its rows."""
    table = table[["unit", "y", "w", "x1", "x2", "x3"]].copy()
    means = table.groupby("unit").transform("mean").add_suffix("_mean")
    x1, x3 = table["x1"], table["x3"]
    table = table.join(means).assign(one=1.0, cos=np.cos(x1), kink=x3.clip(lower=0), product=x1 * x3, step=np.tanh(x3))
    unit = table.pop("unit")
    columns = table.to_numpy()
    pairs = [columns[:, i] * columns[:, j] for i in range(columns.shape[1]) for j in range(i + 1)]
    return pd.DataFrame(np.stack(pairs, 1)).groupby(unit.to_numpy()).mean().to_numpy()


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference of two means in standard errors."""
    error = np.sqrt(a.var(0) / len(a) + b.var(0) / len(b))
    difference = np.abs(a.mean(0) - b.mean(0))
    return float((difference / np.where(error > 1e-9, error, 1.0)).max())


def peers(design: int, theta: float = 0.5) -> pd.DataFrame:
    np.random.seed(7)  # DoubleML draws from the global stream
    made = make_plpr_CP2025(num_id=6000, num_t=4, dim_x=4, theta=theta, dgp_type=f"dgp{design}")
    return made.rename(columns={"id": "unit", "d": "w"})


def ours(design: int, **more: float) -> Simulated:
    return dgp_clarke_polselli_2025(design, n_units=6000, n_periods=4, n_covariates=4, seeds=[2], **more)


def test_moments_are_those_of_doubleml() -> None:
    theirs = {design: moments(peers(design)) for design in (1, 2, 3)}
    for design in (1, 2, 3):
        mine = moments(ours(design).frame())
        assert distance(mine, theirs[design]) < 4.5
        for other in {1, 2, 3} - {design}:
            assert distance(mine, theirs[other]) > 20  # what the comparison can see
    assert distance(moments(ours(1, theta=0.6).frame()), theirs[1]) > 5


@pytest.mark.parametrize("design", [1, 2, 3])
def test_the_effect_is_found_within_units_as_in_doubleml(design: int) -> None:
    """And not across units, whose own terms depend on the treatment."""
    made = ours(design)
    of_peer = peers(design)
    x1, x3 = of_peer["x1"].to_numpy(), of_peer["x3"].to_numpy()
    g = {
        1: 0.25 * x1 + x3, 2: 1 / (1 + np.exp(-x1)) + 0.25 * np.cos(x3), 3: 0.5 * x1 * x3 + 0.25 * x3 * (x3 > 0)
    }[design]  # fmt: skip
    first, second = made.frame()[["y", "w"]].assign(g=made.confounding[0].numpy()), of_peer[["y", "w"]].assign(g=g)
    found = []
    for table, layout in ((first, made.panel.layout), (second, Layout.of(of_peer["unit"], of_peer["time"]))):
        rows = torch.from_numpy(table.to_numpy().T.copy())
        y, *z = within(rows, layout).numpy()
        across = np.polyfit(table["w"], table["y"] - table["g"], 1)[0]
        found.append([*np.linalg.lstsq(np.stack(z, 1), y, rcond=None)[0], across])
    assert_allclose(found[0][:2], [0.5, 1.0], atol=0.03)
    assert_allclose(found[0], found[1], atol=0.04)
    assert found[0][2] > 0.55


# -- both


@pytest.mark.parametrize("make", [dgp_fuhr_papies_2024, dgp_clarke_polselli_2025])
def test_a_seed_is_a_dataset_whatever_the_batch(make) -> None:
    together = make(seeds=[4, 0, 9], **SMALL)
    for i, seed in enumerate([4, 0, 9]):
        alone = make(seeds=[seed], **SMALL)
        for a, b in ((together.panel.y, alone.panel.y), (together.panel.x, alone.panel.x),
                     (together.panel.w, alone.panel.w), (together.confounding, alone.confounding)):  # fmt: skip
            assert torch.equal(a[i], b[0])
            assert not torch.isclose(a[i], a[i - 1]).any()
        assert together.parameters.index[i] == seed
        pd.testing.assert_frame_equal(together.frame(i), alone.frame())
    assert torch.equal(make(seeds=np.arange(3), **SMALL).panel.y, make(seeds=iter(range(3)), **SMALL).panel.y)
    assert torch.equal(make(**SMALL).panel.y, make(seeds=[0], **SMALL).panel.y)


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (dgp_fuhr_papies_2024, [{"structure": "A"}, {"structure": "B"}, {"shape": "linear"}, {"n_units": 6},
                                {"n_periods": 5}, {"n_covariates": 2}, {"beta": 0.5}, {"gamma": 0.5}, {"delta": 0.5},
                                {"rho": 0.5}, {"twoway": True}, {"seeds": [1]}]),
        (dgp_clarke_polselli_2025, [{"design": 2}, {"design": 3}, {"n_units": 6}, {"n_periods": 5},
                                    {"n_covariates": 5}, {"theta": 0.7}, {"seeds": [1]}]),
    ],
)  # fmt: skip
def test_every_setting_changes_the_data(make, settings: list[dict]) -> None:
    plain = make(**SMALL)
    for setting in settings:
        other = make(**SMALL | setting)
        assert other.panel.y.shape != plain.panel.y.shape or not torch.isclose(other.panel.y, plain.panel.y).all()
        if set(setting) <= {"beta", "theta", "gamma", "rho", "shape", "design"}:  # and nothing that it does not concern
            assert torch.equal(other.panel.x, plain.panel.x)


def test_given_factors_stand_in_for_random_ones() -> None:
    plain = dgp_fuhr_papies_2024("C", n_covariates=2, seeds=[3], **SMALL)
    drawn = plain.parameters.iloc[0]
    same = dgp_fuhr_papies_2024("C", n_covariates=2, delta=drawn["delta"], seeds=[3], **SMALL)
    assert torch.equal(same.panel.y, plain.panel.y)
    given = dgp_fuhr_papies_2024("C", n_covariates=2, gamma=0.3, delta=-2, seeds=[3], **SMALL).parameters.iloc[0]
    assert given[["gamma1", "gamma2", "delta"]].tolist() == [0.3, 0.3, -2.0]


def test_a_panel_is_balanced_and_sorted_and_a_table_has_its_columns() -> None:
    made = dgp_fuhr_papies_2024(n_units=np.int64(3), n_periods=2, n_covariates=2, seeds=[0, 1])
    layout = made.panel.layout
    assert layout.balanced and (layout.n_units, layout.n_periods) == (3, 2)
    again = Layout.of(layout.unit.tolist(), layout.time.tolist())
    assert torch.equal(again.order, layout.order)
    assert made.panel.y.dtype == made.panel.x.dtype == torch.float64
    table = made.to("cpu").frame(1)
    assert list(table) == ["unit", "time", "y", "w", "x1", "x2"]
    assert table["unit"].tolist() == [0, 0, 1, 1, 2, 2] and table["time"].tolist() == [0, 1] * 3
    assert_allclose(table["x2"], made.panel.x[1, 1])


@pytest.mark.parametrize(
    ("make", "settings", "said"),
    [
        (dgp_fuhr_papies_2024, {"structure": "D"}, "structure: expected 'A', 'B' or 'C', got 'D'"),
        (dgp_fuhr_papies_2024, {"shape": "sine"}, "shape: expected one of linear, u-shaped, got 'sine'"),
        (dgp_fuhr_papies_2024, {"rho": 1.0}, r"rho: expected a number in \(-1, 1\), got 1.0"),
        (dgp_fuhr_papies_2024, {"rho": float("nan")}, "rho: expected a number"),
        (dgp_fuhr_papies_2024, {"n_units": 0}, "n_units: expected an integer >= 1, got 0"),
        (dgp_fuhr_papies_2024, {"n_periods": 2.5}, "n_periods: expected an integer >= 1, got 2.5"),
        (dgp_fuhr_papies_2024, {"n_covariates": 0}, "n_covariates: expected an integer >= 1, got 0"),
        (dgp_fuhr_papies_2024, {"seeds": []}, "seeds: expected at least one, got none"),
        (dgp_clarke_polselli_2025, {"design": 4}, "design: expected 1, 2 or 3, got 4"),
        (dgp_clarke_polselli_2025, {"n_covariates": 2}, "n_covariates: expected an integer >= 3, got 2"),
        (dgp_clarke_polselli_2025, {"n_units": -1}, "n_units: expected an integer >= 1, got -1"),
        (dgp_clarke_polselli_2025, {"seeds": ()}, "seeds: expected at least one, got none"),
    ],
)
def test_bad_settings(make, settings: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make(**settings)
