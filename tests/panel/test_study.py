"""Studies: the same numbers as one fit at a time, however the work is cut; the paper's ranking; the known biases."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from distributed import Client, LocalCluster, get_worker
from joblib import parallel_config
from numpy.testing import assert_allclose

from peftref.panel.core.folds import SCHEMES, Folds, make_folds
from peftref.panel.core.ridge import PolynomialRidge
from peftref.panel.dml_panel import ESTIMATORS, PanelDML
from peftref.panel.experiments.dgp import Simulated, dgp_clarke_polselli_2025, dgp_fuhr_papies_2024
from peftref.panel.experiments.study import ORACLES, estimate, monte_carlo

ALL = (*ESTIMATORS, *ORACLES)
small = partial(dgp_fuhr_papies_2024, "C", "u-shaped", n_units=30, n_periods=9, n_covariates=2)
ignore_dummies = pytest.mark.filterwarnings("ignore:scheme. 'unit'", "ignore:scheme. 'product'")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Single fits here are too small to share: on a busy machine, threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def split(data: Simulated, seeds: list[int], k: int = 5, scheme: str = "random") -> Folds:
    each = [make_folds(data.panel.layout, k, scheme, seed=seed) for seed in seeds]
    return Folds(torch.cat([one.fold for one in each]), each[0].keep, scheme)


def alone(name: str, data: Simulated, i: int, folds: Folds, **settings: object) -> float:
    """One dataset as a user has it: a table, its rows in any order, given to PanelDML."""
    table = data.frame(i)
    if name in ORACLES:
        table = table[["unit", "time", "y", "w"]].assign(x1=data.confounding[i].numpy())
    table = table.sample(frac=1, random_state=i)
    own = Folds(folds.fold[i : i + 1], folds.keep, folds.scheme)
    if name == "fd":
        own = own.select(data.panel.layout.consecutive()[0])
    model = PanelDML(ORACLES.get(name, name), folds=own, **{"learner": PolynomialRidge(), **settings})
    x = table.filter(regex="^x")
    return model.fit(table["y"], table["w"], x, table["unit"], table["time"]).coef_


def compare(names: tuple[str, ...], data: Simulated, folds: Folds, **settings: object) -> None:
    found = estimate(names, data, folds, **settings)
    assert list(found) == list(names)
    for name in names:
        expected = [alone(name, data, i, folds, **settings) for i in range(len(data.panel.y))]
        assert_allclose(found[name], expected, rtol=1e-9, err_msg=name)
        assert np.ptp(expected) > 1e-3


# -- against one fit at a time


@ignore_dummies
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_estimator_under_every_scheme(scheme: str) -> None:
    seeds = [2, 5]
    data = small(seeds=seeds)
    compare(ALL, data, split(data, seeds, {"product": 2}.get(scheme, 4), scheme), agg="dml2")


@pytest.mark.parametrize("agg", ["dml1", "dml2"])
@pytest.mark.parametrize("learner", [PolynomialRidge(1, 0.0), PolynomialRidge(2, 3.0, interactions=False)])
def test_every_estimator_with_other_settings(agg: str, learner: PolynomialRidge) -> None:
    seeds = [0, 7]
    data = small(seeds=seeds)
    compare(ALL, data, split(data, seeds, 3), agg=agg, learner=learner)


def test_fixed_differences_of_periods() -> None:
    data = small(twoway=True, seeds=[1, 2])
    compare(tuple(name for name in ALL if name != "fd"), data, split(data, [1, 2], 3), agg="dml2", twoway=True)


def test_penalties_to_choose_from() -> None:
    names = tuple(name for name in ALL if name != "dummies")
    data = small(seeds=[3, 4])
    compare(names, data, split(data, [3, 4], 4), agg="dml1", learner=PolynomialRidge(3, (0.1, 10.0, 1e4)))


def test_data_of_clarke_and_polselli() -> None:
    data = dgp_clarke_polselli_2025(3, n_units=40, n_periods=5, n_covariates=4, seeds=[0, 1])
    compare(ALL, data, split(data, [0, 1], 3), agg="dml1", learner=PolynomialRidge(2))


def test_one_split_serves_all_datasets() -> None:
    data = small(seeds=[0, 1, 2])
    one = make_folds(data.panel.layout, 4, "random", seed=9)
    each = Folds(one.fold.expand(3, -1), one.keep, "random")
    for name, found in estimate(ALL, data, one).items():
        assert_allclose(found, estimate([name], data, each)[name], rtol=1e-12)


# -- however the work is cut


def test_an_estimate_does_not_depend_on_the_company() -> None:
    table = monte_carlo(small, ALL, range(3))
    for some in (["cre"], ["late", "pooled"], ["dummies", "fe"], ["cre_normal", "cre", "cre_general"], ["fd", "early"]):
        pd.testing.assert_frame_equal(monte_carlo(small, some, range(3)), table[some], rtol=1e-11)
    pd.testing.assert_frame_equal(monte_carlo(small, ["cre", "fe", "cre"], [0]), table.loc[[0], ["cre", "fe", "cre"]])


@pytest.mark.parametrize("scheme", ["random", "unit"])
def test_chunks_and_workers_change_nothing(scheme: str) -> None:
    run = partial(monte_carlo, small, ALL, [5, 0, 11, 3, 8, 2, 7], scheme=scheme)
    table, threads = run(), torch.get_num_threads()
    assert table.index.tolist() == [5, 0, 11, 3, 8, 2, 7] and table.index.name == "seed" and list(table) == list(ALL)
    for chunk, n_jobs in ((1, None), (3, 2), (100, 1), (2, -1)):
        pd.testing.assert_frame_equal(run(chunk=chunk, n_jobs=n_jobs), table, rtol=1e-12)
    assert torch.get_num_threads() == threads
    pd.testing.assert_frame_equal(monte_carlo(small, ALL, [11], scheme=scheme), table.loc[[11]], rtol=1e-12)


def in_a_worker(seeds: list[int]) -> Simulated:
    assert get_worker() is not None
    return small(seeds=seeds)


def test_a_cluster_changes_nothing() -> None:
    table = monte_carlo(small, ALL, range(6), chunk=2)
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None) as cluster,
        Client(cluster),
        parallel_config(backend="dask"),
    ):
        pd.testing.assert_frame_equal(monte_carlo(in_a_worker, ALL, range(6), chunk=2), table, rtol=1e-12)
    with pytest.raises(ValueError, match="worker"):  # what shows that it was the cluster
        monte_carlo(in_a_worker, ALL, [0])


def test_threads_are_given_back_after_an_error() -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        with pytest.raises(ValueError, match="estimators"):
            monte_carlo(small, ["ols"], [0])
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)


def test_every_setting_changes_the_estimates() -> None:
    plain = monte_carlo(small, ["cre"], [0])["cre"].item()
    for setting in ({"folds": 3}, {"scheme": "unit"}, {"learner": PolynomialRidge(2)}, {"agg": "dml2"},
                    {"twoway": True}, {"seeds": [1]}):  # fmt: skip
        assert abs(monte_carlo(small, ["cre"], **{"seeds": [0]} | setting)["cre"].item() - plain) > 1e-6


# -- what is known of these data

# Medians and mean absolute errors of 100 datasets of 500 units and 10 periods, from other draws: hence the tolerance.
KNOWN = {
    ("A", "u-shaped"): {"early": (1.22, 0.27), "fe": (1.50, 0.48), "cre": (1.00, 0.01)},
    ("B", "linear"): {"pooled": (1.27, 0.32), "late": (1.00, 0.01), "cre": (1.00, 0.01)},
    ("B", "u-shaped"): {"early": (1.22, 0.27), "late": (1.00, 0.01), "cre": (1.03, 0.07)},
    ("C", "linear"): {"late": (1.07, 0.12), "pooled": (1.21, 0.21), "cre": (1.00, 0.01)},
    ("C", "u-shaped"): {
        "simple_ols": (1.84, 0.75), "pols": (1.70, 0.65), "fe": (1.63, 0.58), "early": (1.49, 0.49),
        "pooled": (1.21, 0.21), "late": (1.07, 0.12), "oracle_no_fe": (1.23, 0.29), "cre": (1.02, 0.025),
        "oracle_fe": (1.00, 0.01),
    },
}  # fmt: skip


@pytest.mark.parametrize("cell", KNOWN, ids=" ".join)
def test_medians_and_errors(cell: tuple[str, str]) -> None:
    names = list(KNOWN[cell])
    table = monte_carlo(partial(dgp_fuhr_papies_2024, *cell), names, range(100), n_jobs=2)
    found = np.stack([table.median(), (table - 1).abs().mean()], 1)
    assert_allclose(found, list(KNOWN[cell].values()), atol=0.025)
    if cell == ("C", "u-shaped"):
        error = (table - 1).abs().mean()
        assert error["cre"] < 0.05 < error["late"] < error["pooled"] < error["early"] < error["fe"] < error["pols"]
        units = monte_carlo(partial(dgp_fuhr_papies_2024, *cell), ["cre"], range(100), scheme="unit", n_jobs=2)["cre"]
        assert_allclose([units.median(), (units - 1).abs().mean()], [1.02, 0.026], atol=0.02)


@pytest.mark.parametrize("delta", [0.5, 1.0, -2.0])
def test_bias_of_a_pooled_estimate(delta: float) -> None:
    """delta^2 s / (1 + delta^2 s), where s is the variance of U given X: 1 in B, 1 / (1 + delta^2) in C."""
    square = delta**2
    for structure, s in (("A", 0.0), ("B", 1.0), ("C", 1 / (1 + square))):
        simulate = partial(dgp_fuhr_papies_2024, structure, "linear", n_units=2000, delta=delta)
        found = monte_carlo(simulate, ["pooled"], range(4))["pooled"].mean() - 1
        assert abs(found - square * s / (1 + square * s)) < 0.03


# -- refusals


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"estimators": ["cre", "ols"]}, r"estimators: expected some of simple_ols, .*oracle_fe, got \['ols'\]"),
        ({"estimators": []}, "estimators: expected some of .*, got none"),
        ({"agg": "dml3"}, "agg: expected 'dml1' or 'dml2', got 'dml3'"),
        ({"estimators": ["cre", "fd"], "twoway": True}, "twoway: expected False for the estimator 'fd', got True"),
        ({"seeds": []}, "seeds: expected at least one, got none"),
        ({"chunk": 0}, "chunk: expected an integer >= 1, got 0"),
        ({"chunk": 2.5}, "chunk: expected an integer >= 1, got 2.5"),
        ({"scheme": "rows"}, "scheme: expected one of"),
        ({"folds": 1}, "folds: expected an integer >= 2"),
        ({"learner": PolynomialRidge(0)}, "degree: expected an integer >= 1, got 0"),
        ({"simulate": partial(small, n_periods=1), "estimators": ["pols", "cre", "fe"]},
         "n_periods: expected 2 or more for cre, fe, got 1"),
        # differences leave the first period without rows
        ({"estimators": ["cre", "fd"], "scheme": "period", "folds": 9}, "folds: .* in each fold, got none for fd"),
    ],
)  # fmt: skip
def test_bad_settings(settings: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        monte_carlo(**{"simulate": small, "estimators": ["cre"], "seeds": [0]} | settings)


def test_one_period_is_enough_to_compare_units() -> None:
    names = ["simple_ols", "pols", "pooled", "oracle_no_fe"]
    found = monte_carlo(partial(dgp_fuhr_papies_2024, "A", n_units=2000, n_periods=1), names, [0]).loc[0]
    assert_allclose(found[["pooled", "oracle_no_fe"]], 1, atol=0.1)
