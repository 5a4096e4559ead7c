"""What the recorded runs of this part share: methods compared piece by piece, and paired differences.

>>> runs = pd.DataFrame({"method": ["a", "a", "b", "b"], "seed": [0, 1, 0, 1], "accuracy": [70.0, 72.0, 69.0, 70.0]})
>>> paired(runs, "a", "b"), levels(runs, "a", "b")
([1.0, 2.0], {'a': 71.0, 'b': 69.5})
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pandas as pd
from torch import nn

from ...data import Dataset, Split
from ...results import finding
from .transfer import Task, compare

__all__ = ["Claim", "compare_pieces", "cut_test", "judged", "levels", "paired", "protocol_of", "records"]


def compare_pieces(
    each: Callable[..., Any],
    methods: Mapping[str, Callable[[nn.Module], object]],
    task: Task,
    **options: Any,
) -> pd.DataFrame:
    """:func:`~peftref.adapters.experiments.transfer.compare`, each method a piece of work of its own.

    Args:
        each: of :func:`peftref.recording.record`.
        methods: name -> function that changes the network in place.
        task: what is learned.
        options: of ``compare``.
    """
    rows: list[dict[str, Any]] = []
    for name, build in methods.items():
        rows += each(f"{task.name}: {name}", _runs, name, build, task, options)
    return pd.DataFrame(rows)


def paired(runs: pd.DataFrame, one: str, other: str, column: str = "accuracy") -> list[float]:
    """The difference of two methods, for each seed.

    Args:
        runs: one row for each method and seed.
        one: a method.
        other: the method that is subtracted.
        column: which result.
    """
    table = runs.pivot(index="seed", columns="method", values=column)
    gap: list[float] = (table[one] - table[other]).round(9).tolist()  # no rests of rounding
    return gap


def levels(runs: pd.DataFrame, *methods: str, column: str = "accuracy") -> dict[str, float]:
    """Mean over the seeds, for each of some methods.

    Args:
        runs: one row for each method and seed.
        methods: those wanted.
        column: which result.
    """
    mean = runs.groupby("method")[column].mean()
    return {name: float(mean[name]) for name in methods}


class Claim(NamedTuple):
    """A sentence about two methods, before it is judged.

    Attributes:
        what: the claim, in words.
        one: a method.
        other: the method that is subtracted.
        where: it stands in the paper, or "ours".
        paper: the paper's difference, if it has one.
        side: "above" or "below" zero.
        column: which result, in %.
    """

    what: str
    one: str
    other: str
    where: str = "ours"
    paper: float | None = None
    side: str = "above"
    column: str = "accuracy"


def judged(runs: pd.DataFrame, *claims: Claim) -> list[dict[str, Any]]:
    """The rows of a record, by :func:`peftref.results.finding`.

    Args:
        runs: one row for each method and seed.
        claims: about methods among them.
    """
    return [
        finding(
            claim.what,
            paired(runs, claim.one, claim.other, claim.column),
            where=claim.where,
            unit="points",
            claim=claim.side,
            paper=claim.paper,
            level=levels(runs, claim.one, claim.other, column=claim.column),
        )
        for claim in claims
    ]


def cut_test(task: Task, count: int | None) -> Task:
    """The task with the first ``count`` of its test images; None: all.

    Args:
        task: of :func:`~peftref.adapters.experiments.transfer.shifted`.
        count: images kept.
    """
    return task._replace(test=Split(task.test.x[:count], task.test.y[:count]))


def protocol_of(data: Dataset, **settings: Any) -> dict[str, Any]:
    """What a record says of its data.

    Args:
        data: as loaded.
        settings: what else it says.
    """
    return {"data": data.name, "sha256": data.sha256, "device": "cpu", **settings}


def records(runs: pd.DataFrame) -> list[dict[str, Any]]:
    """A table as a list of rows, as JSON keeps it.

    Args:
        runs: one row for each method and seed.
    """
    return [{str(key): value for key, value in row.items()} for row in runs.to_dict("records")]


def _runs(name: str, build: Callable[[nn.Module], object], task: Task, options: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs of one method, without its time."""
    return records(compare({name: build}, task, **options).drop(columns="ms"))
