"""What the generated pages share: tables, machines and versions in words, files of results."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def read_all(root: Path, pattern: str) -> dict[str, Any]:
    """Stem -> content of every JSON file that matches."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(root.glob(pattern))}


def machine(found: Mapping[str, Any]) -> str:
    """Processor, threads, accelerator if there is one."""
    text = f"{found['processor']}, {found['threads']} thread{'s' * (found['threads'] != 1)}"
    return text if found["accelerator"] == "none" else f"{text}, {found['accelerator']}"


def versions(run: Mapping[str, Any]) -> str:
    """Those of Python, torch and this package."""
    names = {"python": "Python", "torch": "torch", "peftref": "peftref"}
    return ", ".join(f"{names[key]} {value}" for key, value in run["versions"].items())


def escaped(text: str) -> str:
    """Signs that mean something in Markdown, as text; a link to a chapter stays one."""
    return text if text.startswith("{doc}") else "".join(f"\\{c}" if c in "|$*_`<[" else c for c in text)


def table(rows: Iterable[Mapping[str, str]]) -> list[str]:
    """A Markdown table."""
    rows = [*rows]
    if not rows:
        return []
    lines = [[*rows[0]], [":--"] * len(rows[0]), *([escaped(cell) for cell in row.values()] for row in rows)]
    return ["| " + " | ".join(line) + " |" for line in lines]
