"""The pages of results and of speed say what the files say, in tables that do not mix small runs with large ones."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from peftref.catalog import METHODS
from tools import pages

ROOT = Path(__file__).resolve().parents[2]
ROW = {"slug": "lame", "claim": "error | a_b, %", "paper": 5.0, "ours": 7.25, "interval": 0.5, "seeds": 3,
       "status": "close", "protocol": {"device": "cpu", "sha256": "0123456789abcdef", "lrs": [0.1, 0.2]}}  # fmt: skip
LARGE = ROW | {"claim": "large", "protocol": {"device": "NVIDIA T4"}}
LATER = ROW | {"claim": "later", "ours": None, "interval": None, "seeds": 0, "status": "not run", "protocol": {}}
SPEED = {"claim": "step", "peer": "peft", "ours_s": 0.5, "peer_s": 1.0, "ratio": 2.0, "ours_peak_mb": 1.0,
         "peer_peak_mb": 3.0, "target": None}  # fmt: skip
MACHINE = {"command": "python -m benchmarks lame", "date": "2026-01-01", "python": "3.11", "torch": "2.9",
           "processor": "Some CPU", "threads": 2, "accelerator": "none"}  # fmt: skip


def lay(root: Path, **files: object) -> Path:
    folder = root / "book/_results"
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return root


def cells(page: str, first: str) -> list[str]:
    """The cells of the row that starts with ``first``."""
    line = next(line for line in page.splitlines() if line.startswith(f"| {first}"))
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_a_result_in_its_row(tmp_path: Path) -> None:
    page = pages.results_page(lay(tmp_path, lame=[ROW]))
    settings = "device: cpu; sha256: 01234567; lrs: 0.1, 0.2"
    assert cells(page, "error") == [r"error \| a\_b, %", "5", "7.25 ± 0.5", "3", "close", settings]
    assert "In all: 0 matched, 1 close, 0 differs, 0 not run." in page and "{doc}`tta/lame`" in page


def test_small_and_large_rows_stand_in_tables_of_their_own(tmp_path: Path) -> None:
    page = pages.results_page(lay(tmp_path, lame=[LARGE, ROW, LATER]))
    small, large = page.split("**On a CPU, in the chapter**")[1].split("**On a GPU, at scale**")
    assert "| error" in small and "| large" not in small and "| later" not in small
    assert "| error" not in large and "| large" in large and "| later |  5" not in large
    assert cells(large, "later") == ["later", "5", "", "", "not run", ""]


def test_a_benchmark_in_its_row(tmp_path: Path) -> None:
    page = pages.speed_page(lay(tmp_path, speed_lame=MACHINE | {"rows": [SPEED]}))
    assert cells(page, "step") == ["step", "peft", "2.00", "", "500.0", "1000.0", "1.0", "3.0"]
    assert "2026-01-01: Some CPU, 2 threads; Python 3.11, torch 2.9." in page


def test_a_benchmark_without_a_place_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got none for .'nobody'"):
        pages.speed_page(lay(tmp_path, speed_nobody=MACHINE | {"rows": [SPEED]}))


def test_every_row_of_every_file_is_on_its_page() -> None:
    ready = {m.slug for m in METHODS if m.status == "ready"}
    for path in sorted((ROOT / "book/_results").glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        if path.stem.startswith("speed_"):
            page, rows = pages.speed_page(), len(found["rows"])
            section = page.split(f"`{found['command']}`")[1].split("\n#")[0]
        elif path.stem in ready:
            page, rows = pages.results_page(), len(found)
            section = page.split(f"/{path.stem}`;")[1].split("\n#")[0]
        else:
            continue
        heads = len(re.findall(r"^\| :--", section, re.M))
        assert len(re.findall(r"^\| ", section, re.M)) - 2 * heads == rows, path.stem
