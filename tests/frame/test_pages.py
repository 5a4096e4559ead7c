"""The pages of results, speed and status say what the files say."""

from __future__ import annotations

import copy
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from benchmarks import _timing
from peftref.recording import SIZES
from peftref.results import finding
from tools import pages, speed, status

ROOT = Path(__file__).resolve().parents[2]
CPU = {"processor": "Some CPU", "threads": 1, "accelerator": "none"}
RUN = {
    "command": "make chapter NAME=tta/lame",
    "hardware": CPU,
    "date": "2026-01-01",
    "seconds": 41,
    "peak_mb": 900,
    "versions": {"python": "3.11", "torch": "2.9", "peftref": "0.1"},
    "code": "0" * 64,
}
PROTOCOL = {
    "data": "digits",
    "sha256": "0123456789abcdef",
    "weights": None,
    "batch_size": 64,
    "lrs": [0.1, 0.2],
    "domains": {"fog": [3, "cifar"], "invert": None},
    "flip": True,
    "more": "ab" * 32,
}
ROWS = [
    finding("error | a_b", [-1.0, -2.0, -3.0], where="Table 3", unit="points", claim="below", paper=-5.25),
    finding("gain", [7.0, 7.5], where="abstract", unit="%", level={"source": 57.06, "LAME": 123.4}),
    finding("why", [0.01, 0.02], where="ours", unit="nats"),
]
SPEED = {
    "claim": "step",
    "peer": "peft",
    "ours_s": 0.5,
    "peer_s": 1.0,
    "ratio": 2.0,
    "ours_peak_mb": 1.0,
    "peer_peak_mb": 3.0,
    "target": None,
}
MACHINE = {
    "command": "python -m benchmarks lame",
    "date": "2026-01-01",
    "python": "3.11",
    "torch": "2.9",
    "processor": "Some CPU",
    "threads": 2,
    "accelerator": "none",
}


def lay(root: Path, **files: object) -> Path:
    folder = root / "book/_results"
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return root


def lay_record(root: Path, name: str = "tta/lame", file: str = "lame", **sizes: dict[str, Any]) -> Path:
    """A record of some sizes; what is not given is that above."""
    folder = root / "peftref/recorded"
    folder.mkdir(parents=True, exist_ok=True)
    usual = {"rows": ROWS, "arrays": {}, "protocol": PROTOCOL, "run": RUN}
    content = {"schema": 2, "name": name, "records": {size: usual | given for size, given in sizes.items()}}
    (folder / f"{file}.json").write_text(json.dumps(content), encoding="utf-8")
    return root


def cells(page: str, first: str) -> list[str]:
    """The cells of the row that starts with ``first``."""
    line = next(line for line in page.splitlines() if line.startswith(f"| {first}"))
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_claims_stand_first_and_our_questions_are_folded(tmp_path: Path) -> None:
    page = pages.results_page(lay_record(tmp_path, cpu={}, smoke={"rows": ROWS[:1]}))
    head, claims, questions, settings = re.split(r"\n### LAME|\n:::\{dropdown\}", page)
    assert "In all 2 claims of 1 experiments: 1 matched, 0 differs, 1 open." in head
    assert "{doc}`tta/lame`; Boudiaf et al., CVPR 2022." in claims
    assert cells(claims, "error") == [
        r"error \| a\_b", "Table 3", "−5.25", r"−2.00 \[−4.48, 0.484] points, 3 seeds", "", "open"
    ]  # fmt: skip
    assert cells(claims, "gain")[2:5] == [
        "above 0", r"7.25 \[4.07, 10.4] %, 2 seeds", "source: 57.1; LAME: 123"
    ]  # fmt: skip
    assert questions.startswith(" Our own questions (1)\n") and len(cells(questions, "why")) == 3
    assert "| why" not in claims and "| gain" not in questions
    assert "lrs: 0.1, 0.2; domains: fog (3, cifar), invert; flip: yes; more: sha256 abababab.\n" in settings
    assert "\ndata: digits (sha256 01234567); batch size: 64;" in settings
    how = "`make record NAME=tta/lame`, 2026-01-01: Some CPU, 1 thread"
    assert f"\n{how}; Python 3.11, torch 2.9, peftref 0.1; 41 s of the processor, 900 MB.\n" in settings


def test_a_record_of_our_own_questions_alone(tmp_path: Path) -> None:
    root = lay_record(tmp_path, "tta/introduction", "tta_introduction", cpu={"rows": ROWS[2:]})
    page = pages.results_page(root)
    assert "### Introduction" in page and "{doc}`tta/index`" in page and "| Claim" not in page
    assert "In all 0 claims of 1 experiments" in page


def test_what_ran_on_a_gpu_stands_apart(tmp_path: Path) -> None:
    gpu = RUN | {"hardware": CPU | {"accelerator": "Some GPU", "threads": 8}, "peak_gpu_mb": 7000}
    page = pages.results_page(lay_record(tmp_path, cpu={}, gpu={"run": gpu, "rows": ROWS[:1]}))
    small, large = page.split("**On a GPU (Some GPU)**")
    assert "**On a processor**" in small and "| gain" in small and "| gain" not in large
    assert "NAME=tta/lame PRESET=gpu`" in large and "8 threads, Some GPU" in large and "7000 MB on the GPU" in large


def test_the_page_can_be_written_while_some_are_missing(tmp_path: Path) -> None:
    assert "In all 0 claims of 0 experiments" in pages.results_page(tmp_path)


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    broken = copy.deepcopy(ROWS)
    del broken[0]["unit"]
    with pytest.raises(ValueError, match=r"lame\.json: expected a record of tta/lame"):
        pages.results_page(lay_record(tmp_path, cpu={"rows": broken}))


def test_every_row_of_every_record_is_on_the_page() -> None:
    page = pages.results_page()
    for path in (ROOT / "peftref/recorded").glob("[!.]*.json"):
        for size, found in json.loads(path.read_text(encoding="utf-8"))["records"].items():
            assert size in SIZES
            if size != "smoke":
                for row in found["rows"]:
                    assert f"\n| {pages.escaped(row['claim'])} |" in page, f"{path.stem}: {row['claim']}"


def test_a_benchmark_in_its_row(tmp_path: Path) -> None:
    page = speed.speed_page(lay(tmp_path, speed_lame=MACHINE | {"rows": [SPEED]}))
    assert cells(page, "step") == ["step", "peft", "2.00", "500.0, 1000.0", "1.0, 3.0"]
    assert "2026-01-01: Some CPU, 2 threads; Python 3.11, torch 2.9." in page


def test_a_missed_target_is_said(tmp_path: Path) -> None:
    rows = [SPEED, SPEED | {"claim": "held", "target": 2.0}, SPEED | {"claim": "short", "target": 2.5, "peer_s": 1e-4}]
    page = speed.speed_page(lay(tmp_path, speed_lame=MACHINE | {"rows": rows}))
    assert [cells(page, claim)[3] for claim in ("What", "step", "held", "short")] == ["Target", "", "2", "2.5 (missed)"]
    assert cells(page, "short")[4] == "500.0, 0.100"


def test_a_floor_is_a_share_of_our_time_and_old_files_have_none(tmp_path: Path) -> None:
    above = SPEED | {"claim": "above", "floor": {"seconds": 0.2, "what": "235 MB"}}
    none = SPEED | {"claim": "none", "floor": None}
    page = speed.speed_page(lay(tmp_path, speed_lame=MACHINE | {"rows": [SPEED, above, none]}))
    assert [cells(page, claim)[5] for claim in ("What", "step", "above", "none")] == ["Floor", "", "40 % (235 MB)", ""]


def test_a_row_names_its_own_threads(tmp_path: Path) -> None:
    rows = [SPEED, SPEED | {"claim": "alone", "threads": 1}]
    page = speed.speed_page(lay(tmp_path, speed_lame=MACHINE | {"rows": rows}))
    assert [cells(page, claim)[3] for claim in ("What", "step", "alone")] == ["Threads", "", "1"]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert _timing.compare("c", int, int, peer_name="p", warmup=0, repeats=1)["threads"] == 1
    finally:
        torch.set_num_threads(before)


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
    page = status.status_page(root)
    versions = "Python 3.11, torch 2.9, peftref 0.1"
    assert cells(page, "{doc}`tta/lame`")[1:] == ["41", "900", "Some CPU, 1 thread", versions, "2026-01-01"]
    assert cells(page, "{doc}`new`")[1:] == ["not recorded yet", "", "", "", ""]
    assert page.index("tta/lame") < page.index("`new`") and not re.search("gone|draft|map", page)
    assert "1 of 2 chapters are recorded; together they took 41 s." in page
    (root / "book/_results/status.json").unlink()
    assert status.status_page(root).count("not recorded yet") == 2


def test_what_the_tests_reach_and_notice(tmp_path: Path) -> None:
    coverage = {"lines": {"reached": 995, "of": 1000, "percent": 99.5}, "date": "2026-01-01", "python": "3.11",
                "branches": {"reached": 3, "of": 4, "percent": 75.0}}  # fmt: skip
    mutants = {"lame": {"killed": 5, "total": 6}, "tta": {"killed": 3, "total": 3}}
    root = lay(tmp_path, coverage=coverage, mutants=mutants)
    (root / "_toc.yml").write_text("root: book/intro", encoding="utf-8")
    page = status.status_page(root)
    assert "reach 99.5 % of 1,000 lines and 75 % of 4 branches of the package (`make coverage`, 2026-01-01, Py" in page
    assert "Of 9, 8 were noticed." in page and cells(page, "LAME")[1] == "5 / 6" and cells(page, "shared")[1] == "3 / 3"
    for name in ("coverage", "mutants"):
        (root / f"book/_results/{name}.json").unlink()
    assert "## Tests" not in status.status_page(root)


def test_a_benchmark_without_a_place_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got none for .'nobody'"):
        speed.speed_page(lay(tmp_path, speed_nobody=MACHINE | {"rows": [SPEED]}))


def test_who_wrote_the_peer_is_said(tmp_path: Path) -> None:
    rows = [SPEED, SPEED | {"claim": "twin", "peer": "schedule of the published code (tests/_naive/lame.py)"}]
    rows.append(SPEED | {"claim": "scale", "peer": "10 times the small one"})
    page = speed.speed_page(lay(tmp_path, speed_lame=MACHINE | {"rows": rows}))
    assert cells(page, "twin")[1].endswith("(written by us)") and "written" not in cells(page, "scale")[1]
    assert "2 ratios from 2 to 2" in page and ":::{dropdown} LAME" in page


@pytest.mark.parametrize(
    ("peer", "kind"),
    [
        ("PEFT's LoRA, r = 8", "a released package"),
        ("nn.BatchNorm2d", "a released package"),
        ("torch.optim.Adagrad(foreach=True)", "a released package"),
        ("scipy.integrate.quad in a loop", "written by us"),
        ("nn.Sequential and torch.optim.Adam, one after the other", "written by us"),
        ("the published layer (tests/_naive/adab2n.py)", "written by us"),
        ("11.5 times the small one", None),
        ("read and write, nothing else", None),
    ],
)
def test_kinds_of_peers(peer: str, kind: str | None) -> None:
    assert speed._kind(peer) == kind


def test_the_chart_is_drawn_again_only_for_other_ratios(tmp_path: Path) -> None:
    root = lay(tmp_path, speed_lame=MACHINE | {"rows": [SPEED, SPEED | {"peer": "a loop", "ratio": 30.0}]})
    drawn = speed.chart(root)
    assert Image.open(io.BytesIO(drawn)).info["inputs"]
    file = root / speed.CHART
    file.parent.mkdir(parents=True)
    other = Image.open(io.BytesIO(drawn))  # what another version of matplotlib would have drawn
    note = speed.PngImagePlugin.PngInfo()
    note.add_text("inputs", other.info["inputs"])
    other.convert("RGBA").save(file, pnginfo=note)
    assert speed.chart(root) == file.read_bytes() != drawn
    (root / "book/_results/speed_lame.json").write_text(json.dumps(MACHINE | {"rows": [SPEED]}), encoding="utf-8")
    assert speed.chart(root) != file.read_bytes()


def test_every_benchmark_is_on_its_page() -> None:
    page = speed.speed_page()
    for path in sorted((ROOT / "book/_results").glob("speed_*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        section = page.split(f"`{found['command']}`")[1].split("\n:::")[0]
        assert len(re.findall(r"^\| ", section, re.M)) - 2 == len(found["rows"]), path.stem
