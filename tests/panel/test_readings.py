"""Readings of the paper's design: yardsticks that are the package's estimators, a distance that is chi-squared."""

from __future__ import annotations

import numpy as np
import pytest

from peftref.panel import monte_carlo
from peftref.panel.experiments._dml_readings import READINGS, YARDSTICKS, distance, matched, reading, yardsticks
from peftref.panel.experiments.dgp import dgp_fuhr_papies_2024


def test_yardsticks_are_the_packages_estimators() -> None:
    made = dgp_fuhr_papies_2024("C", "u-shaped", n_units=30, n_periods=4, seeds=[3])
    y, w, x, _ = made.panel
    shape = (30, 4)
    ours = yardsticks(y[0].reshape(shape).numpy(), w[0].reshape(shape).numpy(), x[0, 0].reshape(shape).numpy(),
                      made.confounding[0].reshape(shape).numpy())  # fmt: skip
    simulate = lambda seeds: made  # noqa: E731
    theirs = monte_carlo(simulate, YARDSTICKS, [3], folds=2).iloc[0]
    np.testing.assert_allclose(ours, theirs[list(YARDSTICKS)], rtol=1e-9)


def test_the_text_is_read_as_the_simulation_reads_it() -> None:
    """Other random numbers, so equal in distribution: means of 150 datasets within four standard errors."""
    ours = np.array(reading("one γ and one δ", 150, 40))
    simulate = lambda seeds: dgp_fuhr_papies_2024("C", "u-shaped", n_units=40, seeds=seeds)  # noqa: E731
    theirs = (monte_carlo(simulate, YARDSTICKS, range(150)) - 1).abs()[list(YARDSTICKS)].to_numpy()
    error = np.hypot(ours.std(0), theirs.std(0)) / 150**0.5
    assert (np.abs(ours.mean(0) - theirs.mean(0)) < 4 * error).all()


@pytest.mark.parametrize("name", READINGS)
def test_each_reading_is_one_of_its_own(name: str) -> None:
    found = np.array(reading(name, 3, 10))
    assert found.shape == (3, 5) and (found >= 0).all()
    others = [reading(other, 3, 10) for other in READINGS if other != name]
    assert all(not np.allclose(found, other) for other in others)


def test_the_distance_is_chi_squared_under_its_own_reading() -> None:
    """Means of 100 draws of one law, against 400 other draws of it: p values are uniform."""
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(5, 5))
    values = []
    for _ in range(300):
        reference = rng.normal(size=(400, 5)) @ mix
        values.append(distance(reference, (rng.normal(size=(100, 5)) @ mix).mean(0))["p"])
    assert abs(np.mean(values) - 0.5) < 0.05 and 0.01 < np.mean(np.array(values) < 0.05) < 0.1


def test_the_distance_in_closed_form() -> None:
    errors = np.random.default_rng(1).normal(size=(50, 5))
    paper = np.arange(5.0)
    away = paper - errors.mean(0)
    sigma = np.cov(errors.T) * (1 / 20 + 1 / 50)
    found = distance(errors, paper, datasets=20)
    np.testing.assert_allclose(found["distance"], away @ np.linalg.inv(sigma) @ away, rtol=1e-9)
    assert distance(errors, errors.mean(0))["p"] == pytest.approx(1)


def test_matched_batches_have_the_papers_yardsticks() -> None:
    """The yardsticks are driven by one hidden variable; another estimator that follows it is then right as well."""
    hidden = np.random.default_rng(2).uniform(size=400)
    errors = {name: hidden + i for i, name in enumerate(YARDSTICKS)} | {"cre": 2 * hidden, "late": 1 - hidden}
    paper = {name: 0.55 + i for i, name in enumerate(YARDSTICKS)} | {"cre": 1.1, "late": 0.45}
    found = matched(errors, paper, kept=20, tries=4000)
    assert abs(np.mean(hidden) - 0.55) > 0.02
    for name, number in paper.items():
        assert found[name]["mean"] == pytest.approx(number, abs=0.01) and found[name]["paper"] == number
