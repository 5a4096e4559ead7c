"""Recorded results: what a chapter found beside what the paper reports, kept in ``book/_results/<slug>.json``.

A chapter ends with ``record(slug, rows)``. Run with ``PEFTREF_RECORD=1`` it writes the file; run in any other way it
compares, so a result that has moved is noticed. Rows that were measured elsewhere (on a GPU) stay as they were.

>>> row = {"claim": "error of LAME", "paper": None, "ours": 7.0, "interval": 0.5, "seeds": 3, "status": "close"}
>>> record("example", [row], folder="/nowhere")  # no results folder, as on a hosted notebook: only the table
           claim paper  ours  interval  seeds status
0  error of LAME     -   7.0       0.5      3  close
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

__all__ = ["STATUSES", "record"]

STATUSES = ("matched", "close", "differs", "not run")
FIELDS = ("claim", "paper", "ours", "interval", "seeds", "status")
SLACK = 1.0  # percentage points that another processor or torch version may add to the spread over seeds


def record(slug: str, rows: Sequence[Mapping[str, Any]], folder: str | Path = "../_results") -> pd.DataFrame:
    """Write or check the results of a chapter, and return them as a table.

    Args:
        slug: of the method.
        rows: ``claim``, ``paper`` (None: no number), ``ours`` (None: not run), ``interval`` (one standard deviation),
            ``seeds``, ``status`` (one of :data:`STATUSES`), and optionally ``protocol``, a dictionary.
        folder: of the results files, seen from the chapter.

    Raises:
        ValueError: a field is missing, or an unknown status.
        AssertionError: a number that is not the recorded one, within its interval and a point.
    """
    for row in rows:
        if missing := set(FIELDS) - set(row):
            raise ValueError(f"rows: expected the fields {FIELDS}, got none for {sorted(missing)}")
        if row["status"] not in STATUSES:
            raise ValueError(f"status: expected one of {STATUSES}, got {row['status']!r}")
    path = Path(folder) / f"{slug}.json"
    stored = {row["claim"]: row for row in json.loads(path.read_text())} if path.is_file() else {}
    # What was measured on other hardware is not undone by a run that leaves it out.
    rows = [{"slug": slug, **(stored.get(r["claim"], r) if r["status"] == "not run" else r)} for r in rows]
    if os.environ.get("PEFTREF_RECORD") and path.parent.is_dir():
        path.write_text(json.dumps(rows, indent=1) + "\n")
    elif stored:
        for row in rows:
            old = stored.get(row["claim"])
            if old is None or (old["ours"] is None) != (row["ours"] is None):
                raise AssertionError(f"{row['claim']}: not among the recorded results; set PEFTREF_RECORD=1 to write")
            if row["ours"] is not None and abs(row["ours"] - old["ours"]) > (old["interval"] or 0) + SLACK:
                raise AssertionError(f"{row['claim']}: recorded {old['ours']}, now {row['ours']}")
    return pd.DataFrame([{field: "-" if row[field] is None else row[field] for field in FIELDS} for row in rows])
