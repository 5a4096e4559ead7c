"""Coverage is recorded from a run in which all passed and enough was reached, and from no other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools import coverage

MODULE = "def sign(x):\n    if x < 0:\n        return -1\n    return 1\n"
TEST = "from peftref.toy import sign\n\n\ndef test_sign():\n    assert sign(2) == 1\n"
SETTINGS = '[tool.coverage.run]\nsource = ["peftref"]\nbranch = true\n[tool.coverage.report]\nfail_under = {}\n'


def lay(root: Path, least: int, test: str = TEST) -> Path:
    files = {"peftref/__init__.py": "", "peftref/toy.py": MODULE, "tests/test_toy.py": test,
             "pyproject.toml": SETTINGS.format(least), "book/_results/other.json": "{}"}  # fmt: skip
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


def test_lines_and_branches_are_counted(tmp_path: Path) -> None:
    assert coverage.main([], lay(tmp_path, 50)) == 0
    found = json.loads((tmp_path / coverage.RECORD).read_text(encoding="utf-8"))
    assert found["lines"] == {"reached": 3, "of": 4, "percent": 75.0}  # the third line is not
    assert found["branches"] == {"reached": 1, "of": 2, "percent": 50.0}


@pytest.mark.parametrize(("least", "test"), [(90, TEST), (50, TEST.replace("== 1", "== 0"))])
def test_a_failure_is_not_recorded(tmp_path: Path, least: int, test: str) -> None:
    assert coverage.main([], lay(tmp_path, least, test)) != 0
    assert not (tmp_path / coverage.RECORD).exists()


def test_percents_are_cut_not_rounded() -> None:
    totals = {"covered_lines": 9999, "num_statements": 10000, "covered_branches": 2, "num_branches": 3}
    found = coverage.reached({"totals": totals})
    assert found["lines"]["percent"] == 99.9 and found["branches"]["percent"] == 66.6


def test_what_is_recorded_is_enough() -> None:
    record = coverage.ROOT / coverage.RECORD
    if not record.is_file():
        pytest.skip("not measured yet: make coverage")
    assert json.loads(record.read_text(encoding="utf-8"))["lines"]["percent"] >= 95
