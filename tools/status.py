"""The page of the build: what each chapter takes, what the tests reach and notice."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftref.catalog import METHODS, PARTS
from tools.markdown import machine, read_all, table, versions

ROOT = Path(__file__).resolve().parents[1]
STATUS = """\
# Status

What each chapter took when it was last executed: processor time and peak memory of its whole process, start of Python
included. Each runs on one thread, so on a free core the clock says about the same. `PEFTREF_RECORD=1 make execute`
measures all of them anew; `make book` then writes this page.
"""
MUTANTS = """\
Seeded defects are mistakes that one could make and that run happily (a sign, a factor, a mode left on). Each is put
into a copy of the package, and some test must fail. Of {total}, {killed} were noticed.
"""


def status_page(root: Path = ROOT, toc: str | None = None) -> str:
    """What the last recorded execution of each chapter took, in the order of the book.

    Args:
        root: of the tree.
        toc: the table of contents, if it is not that of the file.
    """
    file = root / "book/_results/status.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    text = (root / "_toc.yml").read_text(encoding="utf-8") if toc is None else toc
    names = re.findall(r"file: book/(\S+)", text)
    names = [name for name in names if (root / f"book/{name}.ipynb").is_file()]
    seconds = [known[name]["seconds"] for name in names if name in known]
    total = f"{len(seconds)} of {len(names)} chapters are recorded; together they took {sum(seconds)} s."
    rows = table(_cost(name, known.get(name)) for name in names)
    return "\n".join([STATUS, "## Chapters", "", total, "", *rows, "", *_tests(root)])


def _tests(root: Path) -> list[str]:
    """How much of the package the tests reach, and how many of the seeded defects they noticed, when last measured."""
    files = read_all(root, "book/_results/*.json")
    lines = ["## Tests", ""] * any(name in files for name in ("coverage", "mutants"))
    if found := files.get("coverage"):
        parts = [f"{found[name]['percent']:g} % of {found[name]['of']:,} {name}" for name in ("lines", "branches")]
        how = f"`make coverage`, {found['date']}, Python {found['python']}"
        lines += [f"The tests reach {' and '.join(parts)} of the package ({how}).", ""]
    if found := files.get("mutants"):
        total, killed = (sum(one[key] for one in found.values()) for key in ("total", "killed"))
        titles = {m.slug: m.title for m in METHODS} | {part.slug: f"shared: {part.title}" for part in PARTS}
        rows = ({"Seeded defects": titles[n], "Noticed": f"{o['killed']} / {o['total']}"} for n, o in found.items())
        lines += [MUTANTS.format(total=total, killed=killed), *table(rows), ""]
    return lines


def _cost(name: str, run: Mapping[str, Any] | None) -> dict[str, str]:
    known = run is not None
    return {
        "Chapter": f"{{doc}}`{name}`",
        "Seconds": str(run["seconds"]) if known else "not recorded yet",
        "Memory (MB)": str(run["peak_mb"]) if known else "",
        "Machine": machine(run["hardware"]) if known else "",
        "Versions": versions(run) if known else "",
        "Date": run["date"] if known else "",
    }
