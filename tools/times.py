"""What a chapter says of its own length: reading, running, recording; each from what was measured."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from peftref._records import read

PACE = 150  # words a minute, of a text with equations
LINE = re.compile(r"- \*\*Time\.\*\*[^\"\\]*")  # as it stands in the file of a notebook


def chapters(root: Path) -> dict[Path, bytes]:
    """The content that each notebook with such a line should have.

    Args:
        root: of the tree.
    """
    file = root / "book/_results/status.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    found = {}
    for path in sorted((root / "book").glob("*/*.ipynb")):
        text = path.read_text(encoding="utf-8")
        name = f"{path.parent.name}/{path.stem}"
        if LINE.search(text) and name in known:
            new = line(json.loads(text), known[name]["seconds"], recorded_seconds(root, name))
            found[path] = LINE.sub(new, text).encode()  # plain words, so nothing in them means anything to `sub`
    return found


def line(notebook: dict[str, Any], seconds: float, recorded: float | None) -> str:
    """The sentence of one chapter.

    >>> line({"cells": [{"cell_type": "markdown", "source": ["word " * 1400]}]}, 17, 190)
    '- **Time.** 10 minutes to read, 20 s to run on one processor core; the evidence is a recorded run of 3 minutes.'
    """
    words = sum(len("".join(c["source"]).split()) for c in notebook["cells"] if c["cell_type"] == "markdown")
    reading = max(5, 5 * round(words / PACE / 5))
    running = max(5, 5 * -(-round(seconds) // 5))
    text = f"- **Time.** {reading} minutes to read, {running} s to run on one processor core"
    if recorded is None:
        return f"{text}."
    minutes = max(1, round(recorded / 60))
    return f"{text}; the evidence is a recorded run of {minutes} minute{'s' * (minutes > 1)}."


def recorded_seconds(root: Path, name: str) -> float | None:
    """Processor seconds of the record that the chapter shows, None if there is none."""
    experiment = name.replace("/index", "/introduction")
    found = read(experiment, root / "peftref/recorded", missing_ok=True)
    return float(found["cpu"].run["seconds"]) if "cpu" in found else None
