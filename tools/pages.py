"""Pages made from what was measured: results beside the papers', speed beside the peers', time of each chapter.

A number on these pages stands in a file of ``book/_results``, which a chapter or a benchmark wrote; none is typed in.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from peftref.catalog import METHODS, PARTS
from peftref.results import STATUSES

ROOT = Path(__file__).resolve().parents[1]
# Benchmarks that belong to no single method: slug -> part and title.
SHARED = {
    "adapters": ("adapters", "All adapters"),
    "checkpoints": ("merging", "Merging of checkpoints"),
    "rehearsal": ("continual", "Rehearsal"),
}

RESULTS = """\
# Results

What each chapter found, beside what the paper reports. Every row is written by the chapter that measures it, and a run
that gives another number fails. *Ours* is the mean over the seeds with one standard deviation. The status says whether
the paper's claim held in our setting: matched, close, differs (the chapter shows why) or not run.

Two kinds of rows are kept apart. What runs **on a CPU, in the chapter**, is small: small networks, small images. It
shows whether an effect exists and what it depends on; it can neither confirm nor refute a number measured on ImageNet.
What needs **a GPU** takes the paper's backbones and data.
"""
SPEED = """\
# Speed

Each row first checks that our code and a peer give the same result, then times them in turn in one process. The ratio
is the peer's median time over ours: above 1 we are faster. A target is what we promise. Memory is the peak of what was
allocated beyond the inputs. `make bench` measures everything anew; `make book` then writes this page.
"""


def results_page(root: Path = ROOT) -> str:
    """All recorded results: a section for each part, a table for each method and kind of hardware."""
    files = _read(root, "book/_results/*.json")
    methods = [m for m in METHODS if m.status == "ready" and m.slug in files]
    found = [row["status"] for m in methods for row in files[m.slug]]
    lines = [RESULTS, "In all: " + ", ".join(f"{found.count(s)} {s}" for s in STATUSES) + ".", ""]
    for part in (part for part in PARTS if any(m.part == part.slug for m in methods)):
        lines += [f"## {part.title}", ""]
        for method in (m for m in methods if m.part == part.slug):
            lines += [f"### {method.title}", "", f"{{doc}}`{part.slug}/{method.slug}`; {method.reference}.", ""]
            for title, large in (("On a CPU, in the chapter", False), ("On a GPU, at scale", True)):
                rows = [_result(row) for row in files[method.slug] if at_scale(row) == large]
                lines += [f"**{title}**", "", *_table(rows), ""] if rows else []
    return "\n".join(lines)


def speed_page(root: Path = ROOT) -> str:
    """All benchmarks: a section for each part, a table for each file with the machine it was measured on.

    Raises:
        ValueError: a benchmark that belongs to no method and is not in ``SHARED``.
    """
    titles = {m.slug: (m.part, m.title) for m in METHODS} | SHARED
    files = {name.removeprefix("speed_"): found for name, found in _read(root, "book/_results/speed_*.json").items()}
    if unknown := sorted(set(files) - set(titles)):
        raise ValueError(f"SHARED: expected the part and title of each benchmark, got none for {unknown}")
    lines = [SPEED]
    for part in (part for part in PARTS if any(titles[name][0] == part.slug for name in files)):
        lines += [f"## {part.title}", ""]
        for name in (name for name in titles if name in files and titles[name][0] == part.slug):
            found = files[name]
            machine = f"{found['processor']}, {found['threads']} threads"
            machine += "" if found["accelerator"] == "none" else f", {found['accelerator']}"
            versions = f"Python {found['python']}, torch {found['torch']}"
            lines += [
                f"### {titles[name][1]}",
                "",
                f"`{found['command']}`, {found['date']}: {machine}; {versions}.",
                "",
            ]
            lines += [*_table(map(_speed, found["rows"])), ""]
    return "\n".join(lines)


def at_scale(row: Mapping[str, Any]) -> bool:
    """Whether a recorded row belongs to the large experiment, run or not yet."""
    return row["status"] == "not run" or (row.get("protocol") or {}).get("device", "cpu") != "cpu"


def _read(root: Path, pattern: str) -> dict[str, Any]:
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(root.glob(pattern))}


def _result(row: Mapping[str, Any]) -> dict[str, str]:
    spread = "" if row["interval"] is None else f" ± {row['interval']:g}"
    return {
        "Claim": row["claim"],
        "Paper": _number(row["paper"]),
        "Ours": _number(row["ours"]) + (spread if row["ours"] is not None else ""),
        "Seeds": str(row["seeds"] or ""),
        "Status": row["status"],
        "Settings": "; ".join(f"{name}: {_value(name, v)}" for name, v in (row.get("protocol") or {}).items()),
    }


def _speed(row: Mapping[str, Any]) -> dict[str, str]:
    return {
        "What": row["claim"],
        "Peer": row["peer"],
        "Ratio": f"{row['ratio']:.2f}",
        "Target": _number(row["target"]),
        "Ours (ms)": f"{1e3 * row['ours_s']:.1f}",
        "Peer (ms)": f"{1e3 * row['peer_s']:.1f}",
        "Ours (MB)": f"{row['ours_peak_mb']:.1f}",
        "Peer (MB)": f"{row['peer_peak_mb']:.1f}",
    }


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def _value(name: str, value: Any) -> str:
    if name == "sha256":
        return value[:8]
    return ", ".join(map(str, value)) if isinstance(value, (list, dict)) else str(value)


def _table(rows: Iterable[Mapping[str, str]]) -> list[str]:
    """A Markdown table; signs that mean something in Markdown are written as text."""
    rows = [*rows]
    lines = [[*rows[0]], [":--"] * len(rows[0])]
    lines += [["".join(f"\\{c}" if c in "|$*_`<[" else c for c in cell) for cell in row.values()] for row in rows]
    return ["| " + " | ".join(line) + " |" for line in lines]
