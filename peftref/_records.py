"""Files of recorded results: what they hold, how they are read and checked; see :mod:`peftref.results`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pandas as pd
from numpy.typing import NDArray

SCHEMA = 2
FOLDER = Path(__file__).with_name("recorded")
STATUSES = ("matched", "differs", "open")
DIGITS = 6  # significant ones kept of an array
ROW = ("claim", "where", "unit", "paper", "ours", "low", "high", "seeds", "status", "level", "values")
RUN = ("hardware", "versions", "date", "seconds", "peak_mb", "code")


@dataclass(frozen=True)
class Record:
    """One run of an experiment; made by :func:`peftref.recording.record`, read by :func:`recorded`.

    Attributes:
        name: part and method, ``"tta/lame"``.
        preset: its size.
        rows: the findings.
        arrays: what the figures need, as lists; see :meth:`array`.
        protocol: settings, data, networks.
        run: hardware, versions, date, seconds of the processor, peak memory in MB, hash of the code.
    """

    name: str
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

    def array(self, name: str) -> NDArray[Any]:
        """One of the arrays, as NumPy's; NaN where there is no number.

        Raises:
            KeyError: there is none of this name.
        """
        if name not in self.arrays:
            raise KeyError(f"name: expected one of {sorted(self.arrays)}, got {name!r}")
        found = np.asarray(self.arrays[name])
        return found.astype(float) if found.dtype == object else found

    def table(self) -> pd.DataFrame:
        """The rows as a reader wants them: claim, place, the paper's number, ours with its interval, status."""
        return pd.DataFrame([_shown(row) for row in self.rows])


def file_name(name: str) -> str:
    """The method's; the introductions of the parts, which all have the same name, are told apart.

    >>> file_name("tta/lame"), file_name("tta/introduction")
    ('lame.json', 'tta_introduction.json')
    """
    part, _, slug = name.partition("/")
    if not (part.isidentifier() and slug.isidentifier()):
        raise ValueError(f"name: expected part and method, such as 'tta/lame', got {name!r}")
    return f"{part}_{slug}.json" if slug == "introduction" else f"{slug}.json"


def read(name: str, folder: str | Path | None = None, *, missing_ok: bool = False) -> dict[str, Record]:
    """All sizes of a record, by preset."""
    path = Path(folder or FOLDER) / file_name(name)
    if not path.is_file():
        if missing_ok:
            return {}
        call = f"peftref.recording.record({name!r}, write=True)"
        raise ValueError(f"name: expected a recorded experiment, got {name!r}, and no {path}; {call} makes it")
    try:
        stored = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
        if stored["schema"] != SCHEMA or stored["name"] != name:
            raise ValueError(f"one of {stored['name']!r}, schema {stored['schema']!r}")
        return {preset: checked(Record(name, preset, **parts)) for preset, parts in stored["records"].items()}
    except KeyError as error:
        raise ValueError(f"{path}: expected a record of {name}, schema {SCHEMA}, got one without {error}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: expected a record of {name}, schema {SCHEMA}, got {error}") from error


def checked(found: Record) -> Record:
    """The record itself, if all that a page or a chapter will ask of it is there.

    Raises:
        ValueError: something is missing, twice there, or no number; the message begins with what came.
    """
    for row in found.rows:
        missing = [key for key in ROW if key not in row]
        if missing:
            raise ValueError(f"a row without {missing} in {found.preset!r}: {row.get('claim')!r}")
        if not all(math.isfinite(value) for value in (row["ours"], row["low"], row["high"], *row["values"])):
            raise ValueError(f"numbers that are not finite in {found.preset!r}: {row['claim']!r}")
        if row["status"] not in (*STATUSES, None):
            raise ValueError(f"a status {row['status']!r} in {found.preset!r}: {row['claim']!r}")
    if not found.rows or len({row["claim"] for row in found.rows}) < len(found.rows):
        raise ValueError(f"no rows, or two of the same claim, in {found.preset!r}")
    missing = [key for key in RUN if key not in found.run]
    if missing:
        raise ValueError(f"a run without {missing} in {found.preset!r}")
    return found


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


def _no_number(constant: str) -> NoReturn:
    raise ValueError(f"{constant}, which is no number")


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
