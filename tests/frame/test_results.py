"""Recorded results are written on request only, and compared otherwise; those of the finished chapters are complete."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from peftref import results
from peftref.catalog import METHODS
from peftref.data import NAMES, load
from peftref.results import STATUSES, record

FOLDER = Path(__file__).resolve().parents[2] / "book/_results"
ROW = {"claim": "a", "where": "Table 2", "paper": 5.0, "ours": 7.0, "interval": 0.5, "seeds": 3, "status": "close",
       "protocol": {"k": 5, "lrs": [0.1, 0.2]}}  # fmt: skip
LATER = {"claim": "b", "paper": None, "ours": None, "interval": None, "seeds": 0, "status": "not run"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A results folder as seen from a chapter of the part ``toys``, with two rows written long ago."""
    for name in [name for name in os.environ if name.startswith("PEFTREF_")]:
        monkeypatch.delenv(name)  # switches of these tests themselves
    for name in ("toys", "_results"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "toys")
    long_ago = results.run() | {"date": "2000-01-01"}
    monkeypatch.setenv("PEFTREF_RECORD", "1")
    with monkeypatch.context() as context:
        context.setattr(results, "run", lambda: long_ago)
        record("toy", [ROW, LATER])
    return tmp_path / "_results"


def rows(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "toy.json").read_text())


def test_written_rows_hold_everything_and_are_not_touched_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = rows(folder)
    assert {k: v for k, v in first.items() if k != "run"} == {"slug": "toy", **ROW}
    assert second == {"slug": "toy", **LATER, "run": None}
    before = (folder / "toy.json").read_text()
    monkeypatch.delenv("PEFTREF_RECORD")
    table = record("toy", [ROW | {"ours": 7.9}, LATER])
    assert table.ours.tolist()[0] == 7.9 and (folder / "toy.json").read_text() == before
    assert table.columns.tolist() == ["claim", "where", "paper", "ours", "interval", "seeds", "status"]


def test_a_run_says_how_where_and_at_what_cost(folder: Path) -> None:
    run = rows(folder)[0]["run"]
    assert run["command"] == "make chapter NAME=toys/toy"
    assert set(run["hardware"]) == {"processor", "threads", "accelerator"} and all(run["hardware"].values())
    assert set(run["versions"]) == {"python", "torch", "peftref"} and run["date"] == "2000-01-01"
    assert run["seconds"] > 0 and 50 < run["peak_mb"] < 1e6


def test_recording_the_same_again_changes_nothing(folder: Path) -> None:
    before = (folder / "toy.json").read_bytes()
    record("toy", [ROW | {"protocol": {"k": 5, "lrs": (0.1, 0.2)}}, LATER])  # what JSON makes of it is the same
    assert (folder / "toy.json").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "fresh"),
    [({"ours": 7.1}, True), ({"protocol": {"k": 6}}, True), ({"status": "matched", "where": "abstract"}, False)],
)
def test_a_new_number_or_protocol_has_a_run_of_its_own(folder: Path, change: dict, fresh: bool) -> None:
    record("toy", [ROW | change, LATER | {"where": "ours"}])
    first, second = rows(folder)
    assert first.items() >= change.items() and (first["run"]["date"] != "2000-01-01") == fresh
    assert second["where"] == "ours" and second["run"] is None


def test_switches_are_part_of_the_command_but_no_folder_of_this_machine(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEFTREF_PRESET", "full")
    monkeypatch.setenv("PEFTREF_CIFAR", "/home/me/cifar")
    record("toy", [ROW | {"ours": 8.0}])
    assert rows(folder)[0]["run"]["command"] == "PEFTREF_CIFAR=... PEFTREF_PRESET=full make chapter NAME=toys/toy"


@pytest.mark.parametrize("change", [{"ours": 9.0}, {"claim": "c"}, {"ours": float("nan")}, {"ours": 7.8, "slack": 0.1}])
def test_a_result_that_moved_is_an_error(folder: Path, change: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PEFTREF_RECORD")
    with pytest.raises(AssertionError, match="recorded"):
        record("toy", [ROW | change, LATER])


def test_what_was_measured_elsewhere_stays(folder: Path) -> None:
    gpu = {"command": "make chapter NAME=toys/toy", "hardware": {"accelerator": "some GPU"}}
    measured = LATER | {"slug": "toy", "ours": 44.0, "interval": 0.1, "status": "matched", "run": gpu}
    (folder / "toy.json").write_text(json.dumps([{"slug": "toy", **ROW}, measured]))
    assert record("toy", [ROW, LATER | {"paper": 45.0}]).status.tolist() == ["close", "matched"]
    assert rows(folder)[1] == measured | {"paper": 45.0}  # what the paper says is the chapter's to say
    assert rows(folder)[0]["run"]["command"], "a row without a run gets one when it is next recorded"


@pytest.mark.parametrize("bad", [{"status": "good"}, {"claim": None}])
def test_bad_rows(tmp_path: Path, bad: dict) -> None:
    row = {k: v for k, v in (ROW | bad).items() if v is not None}
    with pytest.raises(ValueError, match="expected"):
        record("toy", [row], tmp_path)


@pytest.mark.parametrize("slug", [method.slug for method in METHODS if method.status == "ready"])
def test_rows_of_finished_chapters_are_complete(slug: str) -> None:
    """Whoever reads a number can tell what the paper says of it and how to get it again."""
    stored = json.loads((FOLDER / f"{slug}.json").read_text())
    assert len({row["claim"] for row in stored}) == len(stored) > 0
    for row in stored:
        name = f"{slug}, {row['claim']}"
        assert row["slug"] == slug and row["status"] in STATUSES and "run" in row, name
        assert row["where"], f"{name}: where does the paper say so? 'ours' if it does not ask"
        assert row["where"] != "ours" or row["paper"] is None, f"{name}: a number of the paper stands somewhere"
        if row["status"] == "not run":
            assert row["ours"] is None and row["run"] is None, name
            continue
        assert row["seeds"] > 0 and row["interval"] >= 0, name
        protocol = row["protocol"]
        assert {"data", "weights", "device"} <= set(protocol), f"{name}: expected data, weights (None: none), device"
        names = protocol["data"].split(", ") if protocol["data"] else []
        sums = protocol.get("sha256", [])
        sums = [sums] if isinstance(sums, str) else sums
        assert len(sums) == len(names) and all(re.fullmatch("[0-9a-f]{64}", value) for value in sums), name
        for data, value in zip(names, sums, strict=True):
            assert data not in NAMES or load(data).sha256 == value, name
