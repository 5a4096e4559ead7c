"""Monte Carlo studies: many datasets, many estimators, a few tensor operations.

All estimators that learn from levels share one set of features and one Gram matrix for each fold, and what two of them
would ask the learner alike is asked once. Chunks of datasets are handed to joblib, so
``with joblib.parallel_config(backend="dask")`` spreads a study over a cluster; whatever the number of workers and the
size of the chunks, the same seeds give the same numbers.

>>> from functools import partial
>>> from peftref.panel.experiments.dgp import dgp_fuhr_papies_2024
>>> simulate = partial(dgp_fuhr_papies_2024, "B", "linear", n_units=100)
>>> table = monte_carlo(simulate, ["pooled", "late", "oracle_fe"], seeds=range(4))
>>> table.shape, bool((table["oracle_fe"] - 1).abs().max() < 0.1)
((4, 3), True)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from joblib import Parallel, delayed
from numpy.typing import NDArray
from torch import Tensor

from ..._checks import integer
from ..baselines.linear import LINEAR, linear_residuals
from ..core.columns import ACROSS
from ..core.crossfit import crossfit
from ..core.estimators import partial_out, transform
from ..core.folds import Folds, make_folds
from ..core.inference import row_weights, solve
from ..core.ridge import PolynomialRidge
from ..dml_panel import ESTIMATORS, plr_score
from .dgp import Simulated

__all__ = ["ORACLES", "estimate", "monte_carlo"]

ORACLES = {"oracle_no_fe": "pols", "oracle_fe": "fe"}  # linear in the true confounding
ALONE = ("early", "fd", "dummies")  # learn from other data than the rest, or with other columns


def estimate(
    estimators: Sequence[str],
    data: Simulated,
    folds: Folds,
    *,
    learner: PolynomialRidge | None = None,
    agg: str = "dml1",
    twoway: bool = False,
) -> dict[str, Tensor]:
    """Coefficients ``(B,)`` of several estimators on B datasets.

    Args:
        estimators: those of :mod:`peftref.panel.dml_panel`, ``oracle_no_fe`` (least squares on the true confounding)
            and ``oracle_fe`` (the same within units).
        data: B simulated datasets.
        folds: ``(B or 1, n)``.
        learner: of the estimators that learn (a cubic ridge).
        agg: "dml1", as the paper, or "dml2".
        twoway: fixed differences between periods too.

    Raises:
        ValueError: an unknown estimator or ``agg``, ``twoway`` with "fd", one period only for an estimator within
            units, or a fold that leaves an estimator without rows.
    """
    unknown = [name for name in estimators if name not in (*ESTIMATORS, *ORACLES)]
    if unknown or not estimators:
        raise ValueError(f"estimators: expected some of {', '.join((*ESTIMATORS, *ORACLES))}, got {unknown or 'none'}")
    if agg not in ("dml1", "dml2"):
        raise ValueError(f"agg: expected 'dml1' or 'dml2', got {agg!r}")
    if twoway and "fd" in estimators:
        raise ValueError("twoway: expected False for the estimator 'fd', got True")
    inside = [name for name in estimators if name not in (*ACROSS, "oracle_no_fe")]
    if inside and data.panel.layout.n_periods == 1:
        raise ValueError(f"n_periods: expected 2 or more for {', '.join(inside)}, got 1")
    learner = learner or PolynomialRidge()
    size = len(data.panel.y)

    def fit(z: Tensor, targets: Tensor, folds: Folds, **more: Any) -> Tensor:
        return crossfit(z, targets, folds, learner, **more)

    together = [name for name in estimators if name not in (*ALONE, *LINEAR, *ORACLES)]
    found: dict[str, Tensor] = {}
    for group in ([together] if together else []) + [[name] for name in ALONE if name in estimators]:
        panel = transform(group[0], data.panel, twoway)
        split = folds.select(data.panel.layout.consecutive()[0]) if group == ["fd"] else folds
        weights = row_weights(panel.layout, split, "unit")
        for name, (u, v) in partial_out(group, panel, split, fit, twoway=twoway).items():
            found[name] = solve(*plr_score(v, u), weights, split, agg)
    for name in estimators:
        if name in LINEAR or name in ORACLES:
            panel = data.panel if name in LINEAR else data.panel._replace(x=data.confounding.unsqueeze(1))
            u, v = linear_residuals(ORACLES.get(name, name), panel, twoway)
            found[name] = (u * v).sum(-1) / v.square().sum(-1)
    broken = [name for name, theta in found.items() if not theta.isfinite().all()]
    if broken:
        raise ValueError(f"folds: expected rows of every estimator in each fold, got none for {', '.join(broken)}")
    return {name: found[name].expand(size) for name in estimators}


def monte_carlo(
    simulate: Callable[..., Simulated],
    estimators: Sequence[str],
    seeds: Sequence[int],
    *,
    folds: int = 5,
    scheme: str = "random",
    learner: PolynomialRidge | None = None,
    agg: str = "dml1",
    twoway: bool = False,
    chunk: int = 8,
    n_jobs: int | None = None,
    device: torch.device | str = "cpu",
) -> pd.DataFrame:
    """Estimates of many datasets: a row for each seed, a column for each estimator.

    Args:
        simulate: called with ``seeds=...``; a function of :mod:`peftref.panel.experiments.dgp`, with its settings by
            ``functools.partial``.
        estimators: names, as of :func:`estimate`.
        seeds: one for each dataset; also those of its folds.
        folds: K (5: paper).
        scheme: how rows are split ("random", folds of rows: paper).
        learner: of the estimators that learn (a cubic ridge).
        agg: "dml1", as the paper, or "dml2".
        twoway: fixed differences between periods too.
        chunk: datasets at a time: few on a processor, whose cache they should fit; hundreds on a GPU.
        n_jobs: of joblib; threads, unless ``joblib.parallel_config`` says otherwise.
        device: where to compute.

    Raises:
        ValueError: no seeds, chunks of less than one dataset, or what :func:`estimate` and the others refuse.
    """
    seeds = list(seeds)
    if not seeds:
        raise ValueError("seeds: expected at least one, got none")
    integer("chunk", chunk, 1)

    def run(some: Sequence[int]) -> NDArray[Any]:
        torch.set_num_threads(1)  # the operations are small: threads that share them would mostly wait for each other
        data = simulate(seeds=some)
        each = [make_folds(data.panel.layout, folds, scheme, seed=seed) for seed in some]
        split = Folds(torch.cat([one.fold for one in each]), each[0].keep, scheme)
        made = estimate(estimators, data.to(device), split.to(device), learner=learner, agg=agg, twoway=twoway)
        return torch.stack([made[name] for name in estimators], 1).cpu().numpy()

    pieces = [seeds[i : i + chunk] for i in range(0, len(seeds), chunk)]
    threads = torch.get_num_threads()
    try:
        rows = Parallel(n_jobs=n_jobs, prefer="threads")(delayed(run)(some) for some in pieces)
    finally:
        torch.set_num_threads(threads)
    return pd.DataFrame(np.concatenate(rows), index=pd.Index(seeds, name="seed"), columns=list(estimators))
