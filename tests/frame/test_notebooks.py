"""House rules of a chapter. That its cells run and its asserts hold is shown by nbval, in the same run of pytest."""

from __future__ import annotations

import json
import re
from pathlib import Path

import nbformat
import pytest
import yaml

from tools import chapters

ROOT = Path(__file__).resolve().parents[2]
CHAPTERS = {path.relative_to(ROOT / "book").as_posix(): path for path in chapters.chapters(ROOT)}
FIRST = re.search(r"^## The first cell.*?```python\n(.*?)\n```", (ROOT / "CONTRIBUTING.md").read_text(), re.S | re.M)


@pytest.fixture(params=CHAPTERS)
def nb(request: pytest.FixtureRequest) -> nbformat.NotebookNode:
    return nbformat.read(CHAPTERS[request.param], as_version=4)


def code(nb: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in nb.cells if cell.cell_type == "code"]


def test_nbval_runs_every_chapter() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert re.search(r'^testpaths = .*"book"', text, re.M) and re.search(r"^addopts = .*--nbval-lax\b", text, re.M)


def test_first_cell(nb: nbformat.NotebookNode) -> None:
    assert FIRST and code(nb)[0].source == FIRST[1], "the first code cell differs from the one in CONTRIBUTING.md"


def test_cells_are_short(nb: nbformat.NotebookNode) -> None:
    assert max(cell.source.count("\n") + 1 for cell in code(nb)) <= 25


def test_outputs_are_there_and_no_cell_failed(nb: nbformat.NotebookNode) -> None:
    assert all(cell.execution_count for cell in code(nb))
    assert not [out for cell in code(nb) for out in cell.outputs if out.output_type == "error"]
    assert not [cell for cell in nb.cells if "execution" in cell.metadata], "timestamps make every diff large"


@pytest.mark.parametrize("name", CHAPTERS)
def test_a_chapter_is_light(name: str) -> None:
    """The budget is 30 s of one core, start of Python included; held against what its execution took, not a clock."""
    status = json.loads((ROOT / chapters.STATUS).read_text(encoding="utf-8"))
    assert status[name.removesuffix(".ipynb")]["seconds"] <= 45


def test_stderr_is_empty(nb: nbformat.NotebookNode) -> None:
    assert not [out.text for cell in code(nb) for out in cell.outputs if out.get("name") == "stderr"]


def test_one_version_everywhere() -> None:
    """The wheel, the notebooks and the tag that the Colab button opens belong together."""
    found = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert found
    version = found[1]
    config = yaml.safe_load((ROOT / "_config.yml").read_text())
    assert config["repository"]["branch"] == f"v{version}"
    assert FIRST and f'"peftref=={version}"' in FIRST[1]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    assert f'__version__ = "{version}"' in (ROOT / "peftref/__init__.py").read_text()
    assert f"version = {{{version}}}" in (ROOT / "book/intro.md").read_text()
    assert f"\n## {version}\n" in (ROOT / "CHANGELOG.md").read_text()
