"""Chapters: what makes one stale, and that executing one is repeatable and safe."""

from __future__ import annotations

import asyncio
import io
import json
import subprocess
import tarfile
from pathlib import Path

import nbformat
import pytest

from tools import chapters

ROOT = Path(__file__).resolve().parents[2]


def write(path: Path, *cells: str) -> Path:
    """A notebook of code cells, with one line of text above."""
    nb = nbformat.v4.new_notebook()
    nb.cells = [nbformat.v4.new_markdown_cell("Text"), *map(nbformat.v4.new_code_cell, cells)]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nb, path)
    return path


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree with a package of two modules, of which its one executed chapter imports the first."""
    root = tmp_path_factory.mktemp("toy")
    for name in ("__init__", "used", "unused"):
        root.joinpath("peftref").mkdir(exist_ok=True)
        root.joinpath(f"peftref/{name}.py").write_text("x = 1\n")
    root.joinpath("peftref/weights").mkdir()
    root.joinpath("peftref/weights/small.npz").write_bytes(b"data")
    root.joinpath("peftref/recorded").mkdir()
    cells = "import ipywidgets\nfrom peftref.used import x", "print(x)\nobject()", "ipywidgets.IntSlider()"
    cells += ('recorded = str\nrecorded("part/toy")',)
    asyncio.run(chapters.execute(write(root / "book/part/toy.ipynb", *cells), root))
    return root


def test_executed_chapter_is_fresh_and_holds_its_outputs(toy: Path) -> None:
    nb = nbformat.read(toy / "book/part/toy.ipynb", as_version=4)
    assert chapters.stale(toy) == []
    assert nb.cells[2].outputs[0].text == "1\n"
    assert set(nb.metadata.peftref.modules) == {"peftref", "peftref.used"}
    assert set(nb.metadata.peftref.data) == {"peftref/weights/small.npz"}
    assert nb.metadata.widgets[chapters.WIDGETS]["state"], "the page needs the widgets' state"


def test_executing_again_changes_nothing(toy: Path) -> None:
    path = toy / "book/part/toy.ipynb"
    before = path.read_bytes()
    asyncio.run(chapters.execute(path, toy))
    assert path.read_bytes() == before


def test_an_execution_is_noted_and_changes_nothing_else(toy: Path) -> None:
    recording = toy / "peftref/recording.py"
    recording.write_text("def run():\n    return {'seconds': 3}\n")
    status = toy / chapters.STATUS
    status.write_text(json.dumps({"part/gone": {"seconds": 1}, "part/toy": {"seconds": 2}}))
    path, other = toy / "book/part/toy.ipynb", write(toy / "book/part/other.ipynb", "1")
    before = path.read_bytes()
    assert asyncio.run(chapters.execute_all([path, other], toy, jobs=2)) == {}
    assert json.loads(status.read_text()) == {"part/other": {"seconds": 3}, "part/toy": {"seconds": 3}}
    assert path.read_bytes() == before and chapters.stale(toy) == []
    for file in (other, recording):
        file.unlink()


@pytest.mark.parametrize(
    ("name", "stale"),
    [
        ("peftref/used.py", True),
        ("peftref/__init__.py", True),
        ("peftref/weights/small.npz", True),
        ("peftref/recorded/toy.json", True),
        ("peftref/unused.py", False),
        ("peftref/other.npz", False),
        ("peftref/recorded/other.json", False),
        ("book/_results/toy.json", False),
    ],
)
def test_a_changed_file_makes_exactly_its_users_stale(toy: Path, name: str, stale: bool) -> None:
    path = toy / name
    before = path.read_bytes() if path.exists() else None
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"x = 1  # changed\n")
    assert bool(chapters.stale(toy)) == stale
    if before is None:
        path.unlink()
    else:
        path.write_bytes(before)
    assert chapters.stale(toy) == []


@pytest.mark.parametrize(("index", "stale"), [(0, False), (2, True)])
def test_a_changed_cell(toy: Path, index: int, stale: bool) -> None:
    path = toy / "book/part/toy.ipynb"
    before = path.read_bytes()
    nb = nbformat.read(path, as_version=4)
    nb.cells[index].source += "\n"
    nbformat.write(nb, path)
    assert bool(chapters.stale(toy)) == stale
    path.write_bytes(before)


def test_a_removed_module_and_a_chapter_never_executed_are_stale(toy: Path) -> None:
    module = toy / "peftref/used.py"
    module.rename(module.with_suffix(".away"))
    assert chapters.stale(toy) == [toy / "book/part/toy.ipynb"]
    module.with_suffix(".away").rename(module)
    new = write(toy / "book/part/new.ipynb", "1")
    assert chapters.stale(toy) == [new]
    new.unlink()


def test_a_raising_cell_leaves_the_file_and_exits_with_one(
    toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(toy / "book/part/bad.ipynb", "1", "raise ValueError('the reason')")
    before = path.read_bytes()
    monkeypatch.setattr(chapters, "ROOT", toy)
    assert chapters.main(["part/bad"]) == 1
    error = capsys.readouterr().err
    assert "book/part/bad.ipynb failed" in error and "raise ValueError" in error
    assert path.read_bytes() == before
    assert sorted(p.name for p in path.parent.iterdir()) == ["bad.ipynb", "toy.ipynb"]
    path.unlink()


def test_unknown_chapter(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        chapters.main(["tta/no_such_method"])
    assert "expected a chapter such as tta/lame" in capsys.readouterr().err


def test_committed_chapters_are_fresh(tmp_path: Path) -> None:
    """Of the commit itself: `make book` has just refreshed the working tree, which would hide a stale commit."""
    archive = subprocess.run(["git", "archive", "HEAD", "book", "peftref"], cwd=ROOT, capture_output=True)
    if archive.returncode == 0:
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
            tar.extraction_filter = getattr(tarfile, "data_filter", None)  # not in Python 3.11.3 and before
            tar.extractall(tmp_path)
    root = ROOT if archive.returncode else tmp_path
    stale = [str(path.relative_to(root)) for path in chapters.stale(root)]
    assert not stale, "run `make book` and commit the chapters it executed"
