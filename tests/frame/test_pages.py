"""The pages of results, speed and status say what the files say; small runs and large ones stand apart."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from benchmarks import _timing
from peftref.catalog import METHODS
from tools import pages

ROOT = Path(__file__).resolve().parents[2]
CPU = {"processor": "Some CPU", "threads": 1, "accelerator": "none"}
RUN = {"command": "make chapter NAME=tta/lame", "hardware": CPU, "date": "2026-01-01", "seconds": 41, "peak_mb": 900,
       "versions": {"python": "3.11", "torch": "2.9", "peftref": "0.1"}}  # fmt: skip
ROW = {"slug": "lame", "claim": "error | a_b, %", "where": "Table 3", "paper": 5.0, "ours": 7.25, "interval": 0.5,
       "seeds": 3, "status": "close", "run": RUN, "protocol": {
           "data": "digits", "sha256": "0123456789abcdef", "weights": None, "batch_size": 64, "lrs": [0.1, 0.2],
           "domains": {"fog": [3, "cifar"], "invert": None}, "flip": True, "device": "cpu"}}  # fmt: skip
SETTINGS = r"batch size: 64; lrs: 0.1, 0.2; domains: fog (3, cifar), invert; flip: yes; device: cpu."
GPU = RUN | {"hardware": CPU | {"threads": 8, "accelerator": "NVIDIA T4"}}
LARGE = ROW | {"claim": "large", "protocol": {"device": "NVIDIA T4"}, "run": GPU}
LATER = ROW | {"claim": "later", "ours": None, "interval": None, "seeds": 0, "status": "not run", "protocol": {},
               "run": None}  # fmt: skip
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
    assert cells(page, "error") == [r"error \| a\_b, %", "Table 3", "5", "7.25 ± 0.5", "3", "close"]
    assert f"\nSettings: data: digits (sha256 01234567); {SETTINGS}\n" in page
    how = "`make chapter NAME=tta/lame`, 2026-01-01: Some CPU, 1 thread"
    assert f"\n{how}; Python 3.11, torch 2.9, peftref 0.1; 41 s, 900 MB.\n" in page
    assert "In all: 0 matched, 1 close, 0 differs, 0 not run." in page and "{doc}`tta/lame`" in page


def test_settings_and_runs_are_said_once_and_where_they_differ_by_letter(tmp_path: Path) -> None:
    other = ROW | {"claim": "other", "protocol": ROW["protocol"] | {"data": "mnist5k", "sha256": ["ab" * 9, "cd" * 9]}}
    unknown = ROW | {"claim": "unknown", "run": None}
    page = pages.results_page(lay(tmp_path, lame=[ROW, other, unknown]))
    assert [cells(page, claim)[-1] for claim in ("error", "other", "unknown")] == ["A", "B", "A"]
    assert page.count(SETTINGS) == 1 and page.count("make chapter NAME=tta/lame") == 1
    assert "\nA: data: digits (sha256 01234567).\n" in page
    assert "\nB: data: mnist5k (sha256 abababab, cdcdcdcd).\n" in page
    assert page.count("Not recorded yet") == 1


def test_small_and_large_rows_stand_in_tables_of_their_own(tmp_path: Path) -> None:
    page = pages.results_page(lay(tmp_path, lame=[LARGE, ROW, LATER]))
    small, large = page.split("**On a CPU, in the chapter**")[1].split("**On a GPU, at scale**")
    assert "| error" in small and "| large" not in small and "| later" not in small
    assert "| error" not in large and "| large" in large
    assert cells(large, "later") == ["later", "Table 3", "5", "", "", "not run", ""]
    assert "8 threads, NVIDIA T4" in large and "T4" not in small and "1 thread;" in small


def test_a_benchmark_in_its_row(tmp_path: Path) -> None:
    page = pages.speed_page(lay(tmp_path, speed_lame=MACHINE | {"rows": [SPEED]}))
    assert cells(page, "step") == ["step", "peft", "2.00", "500.0, 1000.0", "1.0, 3.0"]
    assert "2026-01-01: Some CPU, 2 threads; Python 3.11, torch 2.9." in page


def test_a_missed_target_is_said(tmp_path: Path) -> None:
    rows = [SPEED, SPEED | {"claim": "held", "target": 2.0}, SPEED | {"claim": "short", "target": 2.5, "peer_s": 1e-4}]
    page = pages.speed_page(lay(tmp_path, speed_lame=MACHINE | {"rows": rows}))
    assert [cells(page, claim)[3] for claim in ("What", "step", "held", "short")] == ["Target", "", "2", "2.5 (missed)"]
    assert cells(page, "short")[4] == "500.0, 0.100"


def test_a_floor_is_a_share_of_our_time_and_old_files_have_none(tmp_path: Path) -> None:
    above = SPEED | {"claim": "above", "floor": {"seconds": 0.2, "what": "235 MB"}}
    none = SPEED | {"claim": "none", "floor": None}
    page = pages.speed_page(lay(tmp_path, speed_lame=MACHINE | {"rows": [SPEED, above, none]}))
    assert [cells(page, claim)[5] for claim in ("What", "step", "above", "none")] == ["Floor", "", "40 % (235 MB)", ""]


def test_floors_are_proportional_to_what_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_timing, "_copied_bytes", lambda threads: 1e10)
    monkeypatch.setattr(_timing, "_multiplied_flops", lambda threads, dtype: 1e11)
    assert _timing.bytes_floor(2e9) == {"seconds": 0.2, "what": "2000 MB"}
    assert _timing.flops_floor(5e9) == {"seconds": 0.05, "what": "5 GFLOP"}
    row = _timing.compare("c", int, int, peer_name="p", floor=_timing.bytes_floor(1e6), warmup=0, repeats=1)
    assert row["floor"] == {"seconds": 1e-4, "what": "1 MB"}


def test_products_are_counted_and_what_is_frozen_is_not_learned() -> None:
    layer, x = torch.nn.Linear(5, 3), torch.ones(7, 5, requires_grad=True)
    one = 2 * 7 * 5 * 3
    assert _timing.counted_flops(lambda: layer(x)) == one
    assert _timing.counted_flops(lambda: layer(x).sum().backward()) == 3 * one
    layer.requires_grad_(False)
    assert _timing.counted_flops(lambda: layer(x).sum().backward()) == 2 * one


def test_the_state_of_each_chapter_in_the_order_of_the_book(tmp_path: Path) -> None:
    root = lay(tmp_path, status={"tta/lame": RUN, "tta/gone": RUN})
    (root / "_toc.yml").write_text("- file: book/tta/lame\n- file: book/map\n- file: book/new\n")
    (root / "book/tta").mkdir()
    for name in ("tta/lame", "new", "tta/draft"):  # a draft is no chapter before the table of contents names it
        (root / f"book/{name}.ipynb").touch()
    page = pages.status_page(root)
    versions = "Python 3.11, torch 2.9, peftref 0.1"
    assert cells(page, "{doc}`tta/lame`")[1:] == ["41", "900", "Some CPU, 1 thread", versions, "2026-01-01"]
    assert cells(page, "{doc}`new`")[1:] == ["not recorded yet", "", "", "", ""]
    assert page.index("tta/lame") < page.index("`new`") and not re.search("gone|draft|map", page)
    assert "1 of 2 chapters are recorded; together they took 41 s." in page
    (root / "book/_results/status.json").unlink()
    assert pages.status_page(root).count("not recorded yet") == 2


def test_what_the_tests_reach_and_notice(tmp_path: Path) -> None:
    coverage = {"lines": {"reached": 995, "of": 1000, "percent": 99.5}, "date": "2026-01-01", "python": "3.11",
                "branches": {"reached": 3, "of": 4, "percent": 75.0}}  # fmt: skip
    mutants = {"lame": {"killed": 5, "total": 6}, "tta": {"killed": 3, "total": 3}}
    root = lay(tmp_path, coverage=coverage, mutants=mutants)
    (root / "_toc.yml").write_text("root: book/intro", encoding="utf-8")
    page = pages.status_page(root)
    assert "reach 99.5 % of 1,000 lines and 75 % of 4 branches of the package (`make coverage`, 2026-01-01, Py" in page
    assert "Of 9, 8 were noticed." in page and cells(page, "LAME")[1] == "5 / 6" and cells(page, "shared")[1] == "3 / 3"
    for name in ("coverage", "mutants"):
        (root / f"book/_results/{name}.json").unlink()
    assert "## Tests" not in pages.status_page(root)


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
