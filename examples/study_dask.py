"""A Monte Carlo study spread over a cluster by Dask; the numbers are those of one process.

    python examples/study_dask.py                                          # workers on this machine
    python examples/study_dask.py --scheduler tcp://HOST:8786 --datasets 10000 --chunk 100 --out study.csv

joblib hands chunks of datasets to the workers. A seed belongs to a dataset, not to a worker, so neither the number of
workers nor the size of the chunks changes an estimate.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import pandas as pd
from dask.distributed import Client
from joblib import parallel_config

from peftref.panel.experiments.dgp import dgp_fuhr_papies_2024
from peftref.panel.experiments.study import monte_carlo

ESTIMATORS = ("pooled", "fe", "late", "cre")
simulate = partial(dgp_fuhr_papies_2024, "C", "u-shaped", n_units=200)


def main(scheduler: str | None, datasets: int, chunk: int, out: Path | None) -> pd.DataFrame:
    """Run the study, print how each estimator did, and return an estimate for each dataset and estimator."""
    if datasets < 1:
        raise ValueError(f"datasets: expected at least 1, got {datasets}")
    cluster = {"address": scheduler} if scheduler else {"threads_per_worker": 1, "dashboard_address": None}
    with Client(**cluster) as client, parallel_config(backend="dask"):
        workers = len(client.scheduler_info(n_workers=-1)["workers"])
        table = monte_carlo(simulate, ESTIMATORS, range(datasets), chunk=chunk)
    error = (table - 1).abs()  # the true effect is one
    print(f"{datasets} datasets on {workers} workers")
    print(pd.DataFrame({"median": table.median(), "mean absolute error": error.mean()}).round(3))
    if out:
        table.to_csv(out)
    return table


if __name__ == "__main__":  # workers on this machine import this file
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scheduler", help="address of a running scheduler; without it, one starts on this machine")
    parser.add_argument("--datasets", type=int, default=100)
    parser.add_argument("--chunk", type=int, default=10, help="datasets that a worker gets at a time")
    parser.add_argument("--out", type=Path, help="CSV file for the estimates")
    arguments = parser.parse_args()
    main(arguments.scheduler, arguments.datasets, arguments.chunk, arguments.out)
