"""The page of results: what the papers claim, and what the recorded experiments found.

A number on the page stands in a file of ``peftref/recorded``, which an experiment wrote; none is typed in.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftref._records import STATUSES, Record, read
from peftref.catalog import METHODS, PARTS
from peftref.recording import SIZES
from tools.markdown import escaped, machine, table, versions

ROOT = Path(__file__).resolve().parents[1]
INTRODUCTION = "introduction"  # the experiment of a whole part

RESULTS = """\
# Results

Each method has an experiment, run once and recorded: `make record NAME=tta/lame` repeats it. For each method the first
table holds what the **paper claims**, its number where it prints one, the place where it stands, and what we measured:
the mean and its 95 % interval over seeds (Student's t, of differences between two arms that share everything else).
The status follows from the interval by rule. Where the claim is that one arm is better, *matched*: the interval lies on
the claimed side of zero; *differs*: on the other side; *open*: it holds zero, and more seeds or a larger network would
have to decide. The paper's number stands beside it and decides nothing, since networks and data are others. Where the
claim is a level, *matched*: the interval holds the paper's number; *differs*: it does not. *Levels* in the table are
the arms behind a difference. The folded table holds **our own questions**, which the paper does not ask, so they have
no status; below it stand the settings and the run.

Networks and data are those that a processor trains in an hour, often smaller than the paper's. So a difference shows on
which side an effect lies and what it depends on; its size need not be the paper's.
"""


def results_page(root: Path = ROOT) -> str:
    """All recorded results: a section for each part, tables for each method and kind of hardware."""
    found = _records(root)
    claims = [row for records in found.values() for record in records for row in _claims(record)]
    count = ", ".join(f"{sum(row['status'] == status for row in claims)} {status}" for status in STATUSES)
    lines = [RESULTS, f"In all {len(claims)} claims of {len(found)} experiments: {count}.", ""]
    titles = {f"{method.part}/{method.slug}": method for method in METHODS}
    for part in PARTS:
        names = [name for name in found if name.startswith(f"{part.slug}/")]
        lines += [f"## {part.title}", ""] if names else []
        for name in names:
            if name in titles:
                lines += [f"### {titles[name].title}", "", f"{{doc}}`{name}`; {titles[name].reference}.", ""]
            else:
                lines += [
                    "### Introduction",
                    "",
                    f"{{doc}}`{part.slug}/index`; comparisons that its methods share.",
                    "",
                ]
            for record in found[name]:
                lines += _record(record, several=len(found[name]) > 1)
    return "\n".join(lines)


def _records(root: Path) -> dict[str, list[Record]]:
    """Name -> its records but the smallest, which only the tests look at; in the order of the book."""
    folder = root / "peftref/recorded"
    names = []
    for part in PARTS:
        slugs = [INTRODUCTION, *(m.slug for m in METHODS if m.part == part.slug and m.status == "ready")]
        names += [f"{part.slug}/{slug}" for slug in slugs]
    stored = {name: read(name, folder, missing_ok=True) for name in names}
    larger = {name: [records[size] for size in SIZES[1:] if size in records] for name, records in stored.items()}
    return {name: records for name, records in larger.items() if records}


def _claims(record: Record) -> list[dict[str, Any]]:
    return [row for row in record.rows if row["where"] != "ours"]


def _record(record: Record, *, several: bool) -> list[str]:
    """Tables of one run: the paper's claims, then folded our own questions, settings, machine."""
    accelerator = record.run["hardware"]["accelerator"]
    where = "On a processor" if accelerator == "none" else f"On a GPU ({accelerator})"
    lines = [f"**{where}**", ""] if several else []
    lines += [*table(_claim(row) for row in _claims(record)), ""] if _claims(record) else []
    own = [row for row in record.rows if row["where"] == "ours"]
    if own:
        lines += [f":::{{dropdown}} Our own questions ({len(own)})", *table(map(_question, own)), ":::", ""]
    lines += [":::{dropdown} Settings and run", f"{escaped('; '.join(_settings(record.protocol)))}.", ""]
    return [*lines, _run(record), ":::", ""]


def _claim(row: Mapping[str, Any]) -> dict[str, str]:
    return {
        "Claim": row["claim"],
        "Where": row["where"],
        "Paper": _paper(row),
        "Ours, 95 % interval": _ours(row),
        "Levels": _levels(row),
        "Status": row["status"],
    }


def _question(row: Mapping[str, Any]) -> dict[str, str]:
    return {"Question": row["claim"], "Ours, 95 % interval": _ours(row), "Levels": _levels(row)}


def _paper(row: Mapping[str, Any]) -> str:
    """Its number, or on which side it claims ours to lie."""
    if row["paper"] is not None:
        return f"{row['paper']:g}".replace("-", "\N{MINUS SIGN}")
    rule = row.get("rule")
    return f"{rule['claim']} {rule['against']:g}" if rule else ""


def _ours(row: Mapping[str, Any]) -> str:
    count = f"{row['seeds']} seeds" if row["seeds"] > 1 else "exact, or one estimate"
    return f"{_short(row['ours'])} [{_short(row['low'])}, {_short(row['high'])}] {row['unit']}, {count}"


def _levels(row: Mapping[str, Any]) -> str:
    return "; ".join(f"{name}: {_short(value)}" for name, value in row["level"].items())


def _run(record: Record) -> str:
    run = record.run
    size = "" if record.preset == "cpu" else f" PRESET={record.preset}"
    cost = f"{run['seconds']} s of the processor, {run['peak_mb']} MB"
    if "peak_gpu_mb" in run:
        cost += f", {run['peak_gpu_mb']} MB on the GPU"
    how = f"`make record NAME={record.name}{size}`, {run['date']}"
    return f"{how}: {machine(run['hardware'])}; {versions(run)}; {cost}."


def _short(value: float) -> str:
    """Three significant digits, and none after the point from a hundred on."""
    text = f"{value:.0f}" if abs(value) >= 100 else f"{value:#.3g}"
    return text.replace("-", "\N{MINUS SIGN}")


def _settings(protocol: Mapping[str, Any]) -> list[str]:
    """``["data: digits (sha256 6afed88b)", "steps: 50"]``, without what is none."""
    given = {name: value for name, value in protocol.items() if value is not None}
    sums = given.pop("sha256", [])
    found = ", ".join(value[:8] for value in ([sums] if isinstance(sums, str) else sums))
    texts = {name.replace("_", " "): _value(value) for name, value in given.items()}
    if found:
        texts["data"] = f"{texts.get('data', '')} (sha256 {found})".strip()
    return [f"{name}: {text}" for name, text in texts.items()]


def _value(value: Any) -> str:
    """Lists and dictionaries without their brackets."""
    if isinstance(value, Mapping):
        return ", ".join(name if v is None else f"{name} ({_value(v)})" for name, v in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value):
        return f"sha256 {value[:8]}"
    return ", ".join(map(_value, value)) if isinstance(value, (list, tuple)) else str(value)
