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
``arrays`` for the figures, and the ``protocol``. Each piece of work goes through ``each(key, function, *args)`` under a
key of its own, which keeps what the function returned, so a run that was interrupted goes on where it was.

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

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ._checks import number, one_of
from ._records import Record, read

__all__ = ["Judgement", "Record", "finding", "glue", "interval", "judge", "recorded"]

CLAIMS = ("above", "below", "paper")


class Judgement(NamedTuple):
    """Result of :func:`judge`: the mean, its 95 % interval, and what follows for the claim."""

    mean: float
    low: float
    high: float
    status: str


def interval(values: ArrayLike) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Mean over the first axis, and the ends of its 95 % interval by Student's t.

    Args:
        values: ``(seeds, ...)``.

    Raises:
        ValueError: fewer than two seeds.

    >>> [round(float(end), 2) for end in interval([1.2, 0.8, 1.5, 0.9, 1.1])]
    [1.1, 0.76, 1.44]
    """
    sample = np.asarray(values, float)
    if sample.ndim < 1 or len(sample) < 2:
        raise ValueError(f"values: expected those of two or more seeds, got shape {sample.shape}")
    from scipy.stats import t  # here, for those who only read results

    mean = sample.mean(0)
    half = t.ppf(0.975, len(sample) - 1) * sample.std(0, ddof=1) / len(sample) ** 0.5
    return mean, mean - half, mean + half


def judge(
    values: Sequence[float],
    *,
    claim: str = "above",
    paper: float | None = None,
    against: float = 0.0,
    margin: float | None = None,
) -> Judgement:
    """What paired values say of a claim: "matched", "differs" or "open".

    The 95 % interval is Student's, over the seeds. A claim of "above" or "below" is *matched* if the interval lies on
    that side of ``against``, *differs* if on the other, *open* if it holds ``against``; the paper's number plays no
    part. A claim of "paper" is *matched* if the interval holds the paper's number, and *differs* otherwise.

    Args:
        values: one for each seed (or network, or order): differences between two arms that share everything else.
        claim: "above" or "below" ``against``; or "paper": equal to the paper's number.
        paper: its number.
        against: where the sides meet.
        margin: half the length of an interval that does not come from seeds, of one value or more: 1.96 standard errors
            of an estimate; of an exact number, half a unit of the last digit that the paper prints.

    Raises:
        ValueError: fewer than two values and no margin, one that is not finite, an unknown claim, no number to hold
            against.
    """
    sample = _finite(values, 2 if margin is None else 1)
    one_of("claim", claim, CLAIMS)
    number("against", against)
    if paper is not None:
        number("paper", paper)
    if margin is None:
        mean, low, high = (float(end) for end in interval(sample))
    else:
        half = number("margin", margin, 0.0)
        mean = float(sample.mean())
        low, high = mean - half, mean + half
    if claim == "paper":
        if paper is None:
            raise ValueError("paper: expected the number that the values are held against, got None")
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
    margin: float | None = None,
    level: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """A row of a record: one claim, our numbers for it, and the status that :func:`judge` gives.

    Args:
        what: the claim, in words: ``"LAME gains over the source, class-sorted"``.
        values: one for each seed, see :func:`judge`.
        where: it stands in the paper, "Table 3", "abstract"; "ours" for a question that the paper does not ask, which
            gets no status.
        unit: of the values: "points", "%".
        claim: "above", "below" or "paper", see :func:`judge`.
        paper: the paper's number, in the same unit.
        against: where the sides meet.
        margin: of an interval that does not come from seeds, see :func:`judge`.
        level: the arms behind a difference, by name: ``{"source": 57.1, "LAME": 49.6}``.

    Raises:
        ValueError: see :func:`judge`; no words for the claim or its place; a number of a paper for a question that is
            ours; or a level that is not finite.
    """
    for name, text in (("what", what), ("where", where)):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{name}: expected words, got {text!r}")
    if where == "ours" and paper is not None:
        raise ValueError(f"paper: expected None, since the question is ours, got {paper!r}")
    found = judge(values, claim=claim, paper=paper, against=against, margin=margin)
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
        "level": {name: number(f"level[{name!r}]", value) for name, value in (level or {}).items()},
        "values": [float(v) for v in values],
        "rule": {"claim": claim, "against": against, "margin": margin},
    }


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
        call = f"peftref.recording.record({name!r}, {preset!r}, write=True)"
        raise ValueError(
            f"preset: expected one of {list(records)}, recorded for {name}, got {preset!r}; {call} makes it"
        )
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
    display({f"{prefix}text/plain": text}, raw=True, metadata={"scrapbook": {"name": name, "mime_prefix": prefix}})


def _finite(values: Sequence[float], least: int) -> NDArray[Any]:
    try:
        sample = np.asarray(values, float)
    except (TypeError, ValueError):
        sample = np.empty(0)
    if sample.ndim != 1 or len(sample) < least or not np.isfinite(sample).all():
        count = "two or more finite numbers, one for each seed" if least == 2 else "one or more finite numbers"
        raise ValueError(f"values: expected {count}, got {values!r}")
    return sample
