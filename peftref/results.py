"""Recorded results: what a chapter found beside what the paper reports, kept in ``book/_results/<slug>.json``.

A chapter ends with ``record(slug, rows)``. Run with ``PEFTREF_RECORD=1`` it writes the file; run in any other way it
compares, so a result that has moved is noticed. Rows that were measured elsewhere (on a GPU) stay as they were.

============  ======================================================================================================
field         of a row
============  ======================================================================================================
``claim``     what is compared, with its unit
``where``     it stands in the paper: "Table 3", "abstract"; "ours" for a question that the paper does not ask
``paper``     its number there, or None
``ours``      mean over the seeds; None where it was not run
``interval``  one standard deviation over the seeds
``seeds``     how many
``status``    one of :data:`STATUSES`
``slack``     what another processor or version may add to the interval, in the row's unit (default: 1)
``protocol``  ``data`` and ``sha256`` of the set, ``weights`` of the source network (None: none) with the ``mean`` and
              ``std`` of its inputs where it has them, ``device``, and every switch of the experiment
``run``       written by :func:`record`: the command, and what :func:`run` says
============  ======================================================================================================

>>> row = {"claim": "error of LAME", "paper": None, "ours": 7.0, "interval": 0.5, "seeds": 3, "status": "close"}
>>> record("example", [row | {"where": "abstract"}], folder="/nowhere")  # no such folder, as when hosted: only a table
           claim     where paper  ours  interval  seeds status
0  error of LAME  abstract     -   7.0       0.5      3  close
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from . import __version__
from ._replacing import replace_text

__all__ = ["STATUSES", "hardware", "record", "run"]

STATUSES = ("matched", "close", "differs", "not run")
FIELDS = ("claim", "paper", "ours", "interval", "seeds", "status")
SHOWN = ("claim", "where", *FIELDS[1:])
ORDER = ("slug", *SHOWN, "slack", "protocol", "run")
SLACK = 1.0  # percentage points: what another processor or torch version may add to the spread over seeds


def record(slug: str, rows: Sequence[Mapping[str, Any]], folder: str | Path = "../_results") -> pd.DataFrame:
    """Write or check the results of a chapter, and return them as a table.

    Args:
        slug: of the method.
        rows: with the fields above; ``where``, ``slack`` and ``protocol`` may be missing, ``run`` is added here.
        folder: of the results files, seen from the chapter.

    Raises:
        ValueError: a field is missing, or an unknown status.
        AssertionError: a number that is not the recorded one, within its interval and slack.
    """
    for row in rows:
        if missing := set(FIELDS) - set(row):
            raise ValueError(f"rows: expected the fields {FIELDS}, got none for {sorted(missing)}")
        if row["status"] not in STATUSES:
            raise ValueError(f"status: expected one of {STATUSES}, got {row['status']!r}")
    path = Path(folder) / f"{slug}.json"
    stored = {row["claim"]: row for row in json.loads(path.read_text())} if path.is_file() else {}
    rows = [_kept({"slug": slug, **row}, stored.get(row["claim"])) for row in rows]
    if os.environ.get("PEFTREF_RECORD") and path.parent.is_dir():
        now = {"command": _command(slug), **run()}
        rows = [_with_run(json.loads(json.dumps(row)), stored.get(row["claim"], {}), now) for row in rows]
        replace_text(path, json.dumps(rows, indent=1) + "\n")
    elif stored:
        for row in rows:
            old = stored.get(row["claim"])
            if old is None or (old["ours"] is None) != (row["ours"] is None):
                raise AssertionError(f"{row['claim']}: not among the recorded results; set PEFTREF_RECORD=1 to write")
            slack = (old["interval"] or 0) + row.get("slack", SLACK)
            if row["ours"] is not None and not abs(row["ours"] - old["ours"]) <= slack:
                raise AssertionError(f"{row['claim']}: recorded {old['ours']}, now {row['ours']}")
    shown = [field for field in SHOWN if any(field in row for row in rows)]
    return pd.DataFrame([{f: "-" if row.get(f) is None else row[f] for f in shown} for row in rows])


def run() -> dict[str, Any]:
    """Where this process runs, with what, and what it has taken so far: processor seconds, peak memory in MB.

    Processor time, of all threads and finished children, does not depend on what else the machine was doing.

    >>> sorted(run()["versions"])
    ['peftref', 'python', 'torch']
    """
    import resource  # there wherever results are recorded, not wherever they are compared

    import torch

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "hardware": hardware(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "peftref": __version__},
        "date": datetime.date.today().isoformat(),
        "seconds": round(sum(os.times()[:4])),
        "peak_mb": round(peak / 1e6),
    }


def hardware() -> dict[str, str | int]:
    """Processor, threads that torch uses, accelerator."""
    import torch  # here, for those who only read results

    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return {
        "processor": names[0].partition(": ")[2] if names else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


def _command(slug: str) -> str:
    """A chapter runs in the folder of its part; the switches of its large experiment are environment variables."""
    switches = {k: v for k, v in sorted(os.environ.items()) if k.startswith("PEFTREF_") and k != "PEFTREF_RECORD"}
    given = [f"{k}={'...' if os.sep in v else v}" for k, v in switches.items()]  # no folder of this machine
    return " ".join([*given, f"make chapter NAME={Path.cwd().name}/{slug}"])


def _kept(row: dict[str, Any], old: Mapping[str, Any] | None) -> dict[str, Any]:
    """What was measured on other hardware is not undone by a run that leaves it out."""
    if old is not None and row["status"] == "not run" and old["status"] != "not run":
        row = {"run": None, **old, **{k: row[k] for k in ("where", "paper") if k in row}}
    return {k: row[k] for k in ORDER if k in row} | row


def _with_run(row: dict[str, Any], old: Mapping[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """A row that a new run left as it was also keeps the run that first gave it."""
    if "run" in row or row["ours"] is None:  # measured elsewhere, or not at all
        return row | {"run": row.get("run")}
    same = all(row.get(field) == old.get(field) for field in ("ours", "interval", "seeds", "protocol"))
    return row | {"run": (old.get("run") if same else None) or now}
