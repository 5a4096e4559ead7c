"""Recorded results are written on request only, and compared otherwise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from peftref.results import record

ROW = {"claim": "a", "paper": 5.0, "ours": 7.0, "interval": 0.5, "seeds": 3, "status": "close", "protocol": {"k": 5}}
LATER = {"claim": "b", "paper": None, "ours": None, "interval": None, "seeds": 0, "status": "not run"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PEFTREF_RECORD", "1")
    record("toy", [ROW, LATER], tmp_path)
    monkeypatch.delenv("PEFTREF_RECORD")
    return tmp_path


def test_written_rows_hold_everything_and_are_not_touched_again(folder: Path) -> None:
    path = folder / "toy.json"
    before = path.read_text()
    assert json.loads(before) == [{"slug": "toy", **ROW}, {"slug": "toy", **LATER}]
    table = record("toy", [ROW | {"ours": 7.9}, LATER], folder)
    assert table.ours.tolist()[0] == 7.9 and path.read_text() == before


@pytest.mark.parametrize("row", [ROW | {"ours": 9.0}, ROW | {"claim": "c"}])
def test_a_result_that_moved_is_an_error(folder: Path, row: dict) -> None:
    with pytest.raises(AssertionError, match="recorded"):
        record("toy", [row, LATER], folder)


def test_what_was_measured_elsewhere_stays(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "toy.json"
    measured = LATER | {"slug": "toy", "ours": 44.0, "interval": 0.1, "status": "matched"}
    path.write_text(json.dumps([{"slug": "toy", **ROW}, measured]))
    monkeypatch.setenv("PEFTREF_RECORD", "1")
    assert record("toy", [ROW, LATER], folder).status.tolist() == ["close", "matched"]
    assert json.loads(path.read_text())[1] == measured


@pytest.mark.parametrize("bad", [{"status": "good"}, {"claim": None}])
def test_bad_rows(tmp_path: Path, bad: dict) -> None:
    row = {k: v for k, v in (ROW | bad).items() if v is not None}
    with pytest.raises(ValueError, match="expected"):
        record("toy", [row], tmp_path)
