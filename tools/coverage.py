"""Which lines and branches of the package the tests reach, chapters left aside; writes ``book/_results/coverage.json``.

Run as ``python -m tools.coverage --jobs 2``. The exit code is not 0 if a test fails or less is reached than
``pyproject.toml`` asks for (``fail_under``).
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from peftref._replacing import replace_text

ROOT = Path(__file__).resolve().parents[1]
RECORD = "book/_results/coverage.json"
OPTIONS = "addopts=--import-mode=importlib --doctest-modules"  # without the chapters: their cells are no tests
OURS = "tests/frame/test_coverage.py::test_what_is_recorded_is_enough"  # a low record would stay for ever


def reached(report: dict[str, Any]) -> dict[str, Any]:
    """Lines and branches in the totals of coverage's own report, in % cut (not rounded) to a tenth."""
    totals = report["totals"]
    counts = {
        "lines": (totals["covered_lines"], totals["num_statements"]),
        "branches": (totals["covered_branches"], totals["num_branches"]),
    }
    return {name: {"reached": hit, "of": n, "percent": 1000 * hit // n / 10} for name, (hit, n) in counts.items()}


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.coverage", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--jobs", type=int, default=1, help="processes (default 1)")
    parser.add_argument("paths", nargs="*", default=["tests", "peftref"], help="tests (default: all but the chapters)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "coverage.json"
        command = [sys.executable, "-m", "pytest", "-q", "-n", str(args.jobs), "--dist", "loadfile", "-p", "no:nbval"]
        command += ["--override-ini", OPTIONS, "--cov", f"--cov-report=json:{report}", "--cov-report=term"]
        command += ["--deselect", OURS, *args.paths]
        code = subprocess.run(command, cwd=root).returncode
        if code == 0:
            found = reached(json.loads(report.read_text(encoding="utf-8")))
            found |= {"python": platform.python_version(), "date": datetime.date.today().isoformat()}
            replace_text(root / RECORD, json.dumps(found, indent=1) + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
