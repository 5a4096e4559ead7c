"""Recorded results: the evidence of a chapter, computed once, kept with the package, read by the page.

A chapter computes in seconds what it can. What takes longer is an *experiment*, in
``peftref/<part>/experiments/<slug>.py``, with settings of several sizes:

==========  ============================================================================================================
``smoke``   seconds, on stand-in data; the tests run it and compare with the stored numbers
``cpu``     the evidence: real data and a real network, up to an hour and a half on two cores
``t4``      what a small hosted GPU does in minutes (optional)
``gpu``     the paper's network and data, ten minutes of a data-centre GPU
==========  ============================================================================================================

An experiment has ``PRESETS`` (size -> settings), ``MINUTES`` (size -> how long it takes), ``NEEDS`` (size -> data sets,
extras and ``"cuda"``), and ``run(each, data=None, **settings)``. It returns ``rows`` made by :func:`finding`, small
``arrays`` for the figures, and the ``protocol``. Each piece of work goes through ``each(key, function, *args)``, which
keeps what the function returned, so a run that was interrupted goes on where it was.

>>> paired = [1.2, 0.8, 1.5, 0.9, 1.1]  # one difference a seed
>>> [round(number, 2) for number in judge(paired)[:3]]
[1.1, 0.76, 1.44]
>>> judge(paired).status
'matched'
>>> judge(paired, claim="below").status
'differs'
>>> judge(paired, claim="paper", paper=1.3).status
'matched'
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

__all__ = ["Judgement", "Record", "finding", "glue", "judge", "recorded"]

SCHEMA = 2
FOLDER = Path(__file__).with_name("recorded")
CLAIMS = ("above", "below", "paper")
DIGITS = 6  # significant ones kept of an array


class Judgement(NamedTuple):
    """Result of :func:`judge`: the mean, its 95 % interval, and what follows for the claim."""

    mean: float
    low: float
    high: float
    status: str


def judge(
    values: Sequence[float], *, claim: str = "above", paper: float | None = None, against: float = 0.0
) -> Judgement:
    """What paired values say of a claim: "matched", "differs" or "open".

    The interval is Student's, over the seeds. *Matched*: it lies on the claimed side of ``against``, or holds the
    paper's value. *Differs*: it lies on the other side, or excludes the value. *Open*: neither.

    Args:
        values: one for each seed (or network, or order): differences between two arms that share everything else.
        claim: "above" or "below" ``against``; or "paper": equal to the paper's number.
        paper: that number.
        against: where the sides meet.

    Raises:
        ValueError: fewer than two values, one that is not finite, an unknown claim, no number to hold against.
    """
    sample = np.asarray(values, float)
    if sample.ndim != 1 or len(sample) < 2 or not np.isfinite(sample).all():
        raise ValueError(f"values: expected two or more finite numbers, one for each seed, got {values!r}")
    if claim not in CLAIMS:
        raise ValueError(f"claim: expected one of {CLAIMS}, got {claim!r}")
    if claim == "paper" and paper is None:
        raise ValueError("paper: expected the number that the values are held against, got None")
    from scipy.stats import t  # here, for those who only read results

    mean = float(sample.mean())
    half = float(t.ppf(0.975, len(sample) - 1) * sample.std(ddof=1) / len(sample) ** 0.5)
    low = mean - half
    high = mean + half
    if claim == "paper":
        assert paper is not None
        return Judgement(mean, low, high, "matched" if low <= paper <= high else "differs")
    above = low > against
    below = high < against
    if not above and not below:
        return Judgement(mean, low, high, "open")
    return Judgement(mean, low, high, "matched" if above == (claim == "above") else "differs")


def finding(
    what: str,
    values: Sequence[float],
    *,
    where: str,
    unit: str,
    claim: str = "above",
    paper: float | None = None,
    against: float = 0.0,
    level: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """A row of a record: one claim, our numbers for it, and the status that :func:`judge` gives.

    Args:
        what: the claim, in words: ``"LAME gains over the source, class-sorted"``.
        values: one for each seed, see :func:`judge`.
        where: it stands in the paper, "Table 3", "abstract"; "ours" for a question that the paper does not ask, which
            gets no status.
        unit: of the values: "points", "%".
        claim, paper, against: see :func:`judge`.
        level: the arms behind a difference, by name: ``{"source": 57.1, "LAME": 49.6}``.

    Raises:
        ValueError: see :func:`judge`; or a number of a paper for a question that is ours.
    """
    if where == "ours" and paper is not None:
        raise ValueError(f"paper: expected None, since the question is ours, got {paper!r}")
    found = judge(values, claim=claim, paper=paper, against=against)
    return {
        "claim": what,
        "where": where,
        "unit": unit,
        "paper": paper,
        "ours": found.mean,
        "low": found.low,
        "high": found.high,
        "seeds": len(values),
        "status": None if where == "ours" else found.status,
        "level": dict(level or {}),
        "values": [float(v) for v in values],
    }


@dataclass(frozen=True)
class Record:
    """One run of an experiment; made by :func:`peftref.recording.record`, read by :func:`recorded`."""

    name: str  # "tta/lame"
    preset: str
    rows: list[dict[str, Any]]
    arrays: dict[str, Any]
    protocol: dict[str, Any]
    run: dict[str, Any]

    def __getitem__(self, claim: str) -> dict[str, Any]:
        """The row of a claim.

        Raises:
            KeyError: there is none; the message lists those that there are.
        """
        rows = {row["claim"]: row for row in self.rows}
        if claim not in rows:
            raise KeyError(f"claim: expected one of {list(rows)}, got {claim!r}")
        return rows[claim]

    def array(self, name: str) -> np.ndarray[Any, Any]:
        """One of the arrays, as NumPy's.

        Raises:
            KeyError: there is none of this name.
        """
        if name not in self.arrays:
            raise KeyError(f"name: expected one of {sorted(self.arrays)}, got {name!r}")
        return np.asarray(self.arrays[name])

    def table(self) -> pd.DataFrame:
        """The rows as a reader wants them: claim, place, the paper's number, ours with its interval, status."""
        return pd.DataFrame([_shown(row) for row in self.rows])


def recorded(name: str, preset: str = "cpu", *, folder: str | Path | None = None) -> Record:
    """A result that was computed before.

    Args:
        name: part and method, ``"tta/lame"``.
        preset: which size.
        folder: of the files; the package's own if not given.

    Raises:
        ValueError: no such record, with the call that makes it; or a file that is damaged or of something else.
    """
    records = read(name, folder)
    if preset not in records:
        raise ValueError(f"preset: expected one of {list(records)}, recorded for {name}, got {preset!r}")
    return records[preset]


def glue(name: str, value: Any, spec: str = "") -> None:
    """Give a value to the text: the page then says ``{glue:text}`name```. Shows nothing by itself.

    Args:
        name: unique in the book; begin with the method: ``"lame-gain"``.
        value: a number or a text.
        spec: how to write it, as in ``format``: ``".1f"``.
    """
    from IPython.display import display

    prefix = "application/papermill.record/"
    text = format(value, spec).replace("-", "\N{MINUS SIGN}") if spec else str(value)
    display(
        {f"{prefix}text/plain": text}, raw=True, metadata={"scrapbook": {"name": name, "mime_prefix": prefix}}
    )


def read(name: str, folder: str | Path | None, *, missing_ok: bool = False) -> dict[str, Record]:
    part, _, slug = name.partition("/")
    path = Path(folder or FOLDER) / f"{slug}.json"
    if not slug or not path.is_file():
        if missing_ok:
            return {}
        raise ValueError(f"name: expected part and method of a recorded experiment, such as 'tta/lame', got {name!r}")
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["schema"] != SCHEMA or stored["name"] != name:
            raise ValueError(f"of {stored['name']!r}, schema {stored['schema']!r}")
        return {preset: Record(name=name, preset=preset, **content) for preset, content in stored["records"].items()}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: expected a record of {name}, schema {SCHEMA}, got {error}") from error


def plain(value: Any) -> Any:
    """What JSON can hold: arrays and tensors as lists of rounded numbers."""
    if isinstance(value, Mapping):
        return {str(key): plain(v) for key, v in value.items()}
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, list | tuple | range):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    return value


def _shown(row: Mapping[str, Any]) -> dict[str, Any]:
    interval = f"{row['ours']:.3g} [{row['low']:.3g}, {row['high']:.3g}]"
    return {
        "claim": row["claim"],
        "where": row["where"],
        "paper": "-" if row["paper"] is None else f"{row['paper']:g}",
        "ours, 95 % interval": f"{interval} {row['unit']}",
        "seeds": row["seeds"],
        "status": row["status"] or "-",
    }
