"""Pages made from what was measured: results beside the papers', speed beside the peers', cost of each chapter.

A number on these pages stands in a file of ``book/_results``, which a chapter or a benchmark wrote; none is typed in.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from string import ascii_uppercase
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
whose number is off by more than the spread and a small allowance fails. *Where* is the place of the claim or number in
the paper; *ours* marks a question that the paper does not ask. *Ours* is the mean over the seeds with one standard
deviation (in the panel chapter one standard error). The status says whether the claim held in our setting: matched,
close (nearly, or in part), differs (the chapter shows why) or not run.

Two kinds of rows are kept apart. What runs **on a CPU, in the chapter**, is small: small networks, small images. It
shows whether an effect exists and what it depends on; it can neither confirm nor refute a number measured on ImageNet.
What needs **a GPU** takes the paper's backbones and data.

Below each table stand its settings, first those that all rows have, then by letter those that differ; and how, where
and with what the rows were measured, in the run that first gave these numbers. What a chapter takes today stands on the
[status](status.md) page.
"""
SPEED = """\
# Speed

Where a peer computes the same thing, a row first checks that both results are equal; rows against another method
compare the cost alone. The two are then timed in turn in one process. The ratio is the peer's median time over ours:
above 1 we are faster. A target is the ratio that we aim at; where it is missed, the row says so. Numbers of one table
were measured together, those of different tables perhaps on different machines. Memory is the peak of what was
allocated beyond the inputs. Where a *floor* is given, it is the time that the bytes or operations which no
implementation can avoid take on this machine, at the speed of a plain copy or of one large product of matrices in the
same process, as a share of our time: at 100 % nothing is left to gain. `make bench` measures everything anew;
`make book` then writes this page.
"""
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
                lines += _results(title, [row for row in files[method.slug] if at_scale(row) == large])
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
            versions = f"Python {found['python']}, torch {found['torch']}"
            lines += [
                f"### {titles[name][1]}",
                "",
                f"`{found['command']}`, {found['date']}: {_machine(found)}; {versions}.",
                "",
            ]
            # a file written before there were floors has none
            optional = {key for key in ("target", "floor") if any(row.get(key) for row in found["rows"])}
            lines += [*_table(_speed(row, optional) for row in found["rows"]), ""]
    return "\n".join(lines)


def status_page(root: Path = ROOT) -> str:
    """What the last recorded execution of each chapter took, in the order of the book."""
    file = root / "book/_results/status.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    names = re.findall(r"file: book/(\S+)", (root / "_toc.yml").read_text(encoding="utf-8"))
    names = [name for name in names if (root / f"book/{name}.ipynb").is_file()]
    seconds = [known[name]["seconds"] for name in names if name in known]
    total = f"{len(seconds)} of {len(names)} chapters are recorded; together they took {sum(seconds)} s."
    table = _table(_cost(name, known.get(name)) for name in names)
    return "\n".join([STATUS, "## Chapters", "", total, "", *table, "", *_tests(root)])


def _tests(root: Path) -> list[str]:
    """How much of the package the tests reach, and how many of the seeded defects they noticed, when last measured."""
    files = _read(root, "book/_results/*.json")
    lines = ["## Tests", ""] * any(name in files for name in ("coverage", "mutants"))
    if found := files.get("coverage"):
        parts = [f"{found[name]['percent']:g} % of {found[name]['of']:,} {name}" for name in ("lines", "branches")]
        how = f"`make coverage`, {found['date']}, Python {found['python']}"
        lines += [f"The tests reach {' and '.join(parts)} of the package ({how}).", ""]
    if found := files.get("mutants"):
        total, killed = (sum(one[key] for one in found.values()) for key in ("total", "killed"))
        titles = {m.slug: m.title for m in METHODS} | {part.slug: f"shared: {part.title}" for part in PARTS}
        rows = ({"Seeded defects": titles[n], "Noticed": f"{o['killed']} / {o['total']}"} for n, o in found.items())
        lines += [MUTANTS.format(total=total, killed=killed), *_table(rows), ""]
    return lines


def at_scale(row: Mapping[str, Any]) -> bool:
    """Whether a recorded row belongs to the large experiment, run or not yet."""
    return row["status"] == "not run" or (row.get("protocol") or {}).get("device", "cpu") != "cpu"


def _read(root: Path, pattern: str) -> dict[str, Any]:
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(root.glob(pattern))}


def _results(title: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table, its settings, its runs: what rows have in common is said once."""
    if not rows:
        return []
    shared, *own = _split([row.get("protocol") or {} for row in rows])
    letters = dict(zip(dict.fromkeys(filter(None, own)), ascii_uppercase, strict=False))
    cells = [{"Settings": letters.get(text, "")} if letters else {} for text in own]
    table = _table(_result(row) | cell for row, cell in zip(rows, cells, strict=True))
    settings = [f"Settings: {shared}."] * bool(shared) + [f"{letter}: {text}." for text, letter in letters.items()]
    runs = dict.fromkeys(_run(row.get("run")) for row in rows if row["ours"] is not None)
    return [f"**{title}**", "", *table, "", *(line for text in settings for line in (_escaped(text), "")), *runs]


def _result(row: Mapping[str, Any]) -> dict[str, str]:
    spread = "" if row["interval"] is None else f" ± {row['interval']:g}"
    return {
        "Claim": row["claim"],
        "Where": row.get("where") or "",
        "Paper": _number(row["paper"]),
        "Ours": _number(row["ours"]) + (spread if row["ours"] is not None else ""),
        "Seeds": str(row["seeds"] or ""),
        "Status": row["status"],
    }


def _split(protocols: Sequence[Mapping[str, Any]]) -> list[str]:
    """The settings that all have, then for each protocol what remains of it."""
    texts = [_settings(protocol) for protocol in protocols]
    shared = [item for item in texts[0] if all(item in text for text in texts)]
    return ["; ".join(shared), *("; ".join(i for i in text if i not in shared) for text in texts)]


def _settings(protocol: Mapping[str, Any]) -> list[str]:
    """``["data: digits (sha256 6afed88b)", "steps: 50"]``, without what is none."""
    given = {name: value for name, value in protocol.items() if value is not None}
    sums = given.pop("sha256", [])
    sums = ", ".join(value[:8] for value in ([sums] if isinstance(sums, str) else sums))
    texts = {name.replace("_", " "): _value(value) for name, value in given.items()}
    if sums:
        texts["data"] = f"{texts['data']} (sha256 {sums})"
    return [f"{name}: {text}" for name, text in texts.items()]


def _run(run: Mapping[str, Any] | None) -> str:
    if run is None:
        return "Not recorded yet: the machine and the versions.\n"
    cost = f"{run['seconds']} s, {run['peak_mb']} MB"
    return f"`{run['command']}`, {run['date']}: {_machine(run['hardware'])}; {_versions(run)}; {cost}.\n"


def _cost(name: str, run: Mapping[str, Any] | None) -> dict[str, str]:
    known = run is not None
    return {
        "Chapter": f"{{doc}}`{name}`",
        "Seconds": str(run["seconds"]) if known else "not recorded yet",
        "Memory (MB)": str(run["peak_mb"]) if known else "",
        "Machine": _machine(run["hardware"]) if known else "",
        "Versions": _versions(run) if known else "",
        "Date": run["date"] if known else "",
    }


def _machine(found: Mapping[str, Any]) -> str:
    text = f"{found['processor']}, {found['threads']} thread{'s' * (found['threads'] != 1)}"
    return text if found["accelerator"] == "none" else f"{text}, {found['accelerator']}"


def _versions(run: Mapping[str, Any]) -> str:
    names = {"python": "Python", "torch": "torch", "peftref": "peftref"}
    return ", ".join(f"{names[key]} {value}" for key, value in run["versions"].items())


def _speed(row: Mapping[str, Any], optional: Collection[str]) -> dict[str, str]:
    cells = {"What": row["claim"], "Peer": row["peer"], "Ratio": f"{row['ratio']:.2f}"}
    if "target" in optional:
        missed = row["target"] is not None and row["ratio"] < row["target"]
        cells["Target"] = _number(row["target"]) + " (missed)" * missed
    cells["Time, ours and peer's (ms)"] = f"{_milliseconds(row['ours_s'])}, {_milliseconds(row['peer_s'])}"
    cells["Memory (MB)"] = f"{row['ours_peak_mb']:.1f}, {row['peer_peak_mb']:.1f}"
    if "floor" in optional:
        floor = row.get("floor")
        cells["Floor"] = f"{100 * floor['seconds'] / row['ours_s']:.0f} % ({floor['what']})" if floor else ""
    return cells


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.1f}" if seconds >= 1e-3 else f"{1e3 * seconds:.3f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def _value(value: Any) -> str:
    """Lists and dictionaries without their brackets."""
    if isinstance(value, Mapping):
        return ", ".join(name if v is None else f"{name} ({_value(v)})" for name, v in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(_value, value)) if isinstance(value, (list, tuple)) else str(value)


def _escaped(text: str) -> str:
    """Signs that mean something in Markdown, as text; a link to a chapter stays one."""
    return text if text.startswith("{doc}") else "".join(f"\\{c}" if c in "|$*_`<[" else c for c in text)


def _table(rows: Iterable[Mapping[str, str]]) -> list[str]:
    """A Markdown table."""
    rows = [*rows]
    if not rows:
        return []
    lines = [[*rows[0]], [":--"] * len(rows[0]), *([_escaped(cell) for cell in row.values()] for row in rows)]
    return ["| " + " | ".join(line) + " |" for line in lines]
