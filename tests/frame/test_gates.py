"""The gates can fail: what must turn `make book` or the tests red does, and an untouched book is green."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]


def notebook(path: Path, text: str, *cells: str) -> None:
    nb = nbformat.v4.new_notebook()
    nb.cells = [nbformat.v4.new_markdown_cell(text), *map(nbformat.v4.new_code_cell, cells)]
    nbformat.write(nb, path)


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A book of two pages under our Makefile, tools and configuration, with our environment and vendored scripts."""
    root = tmp_path_factory.mktemp("gates")
    (root / "book").mkdir()
    (root / "peftref").mkdir()
    modules = [f"peftref/{name}.py" for name in ("__init__", "catalog", "results", "_replacing")]
    for name in ("Makefile", "_config.yml", "README.md", "peftref/catalog.toml", *modules):
        shutil.copy(ROOT / name, root / name)
    shutil.copytree(ROOT / "tools", root / "tools")  # a copy, not a link: the tools work on the tree they lie in
    (root / "tools/readme.py").write_text("")  # the pages that follow from the catalogue are of the whole book
    (root / "book" / "_static").symlink_to(ROOT / "book" / "_static")
    (root / ".venv").symlink_to(Path(sys.prefix))
    for name in ("requirements.lock", "pyproject.toml"):
        (root / name).touch()
        os.utime(root / name, (0, 0))  # older than the environment's stamp: nothing is installed
    (root / "_toc.yml").write_text("format: jb-book\nroot: book/intro\nchapters:\n- file: book/page\n")
    (root / "book" / "references.bib").write_text("@misc{someone, author={A. One}, title={T}, year={2020}}\n")
    (root / "CHANGELOG.md").write_text("# Changes\n")
    return root


INTRO = "# Intro\n\n{cite}`someone`, {eq}`eq-gates-one`.\n\n```{bibliography}\n```\n"
PAGE = "# Page\n\n$$\nx = 1\n$$ (eq-gates-one)\n"


def make(root: Path, *, intro: str = INTRO, cell: str = "assert 1 + 1 == 2") -> tuple[int, str]:
    """`make book` in the small tree."""
    (root / "book" / "intro.md").write_text(intro)
    notebook(root / "book" / "page.ipynb", PAGE, cell)
    env = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    done = subprocess.run(["make", "book"], cwd=root, env=env, text=True, capture_output=True)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.skipif(not (Path(sys.prefix) / ".stamp").exists(), reason="needs the environment that make creates")
def test_make_book_is_green_then_red(book: Path) -> None:
    code, out = make(book)
    assert code == 0, out[-3000:]
    assert (book / "_build/html/book/page.html").is_file()
    for change, said in (
        ({"intro": INTRO.replace("eq-gates-one", "eq-gates-two")}, "eq-gates-two"),
        ({"cell": "raise ValueError('the reason')"}, "the reason"),
        ({"cell": "assert 1 + 1 == 3"}, "AssertionError"),
    ):
        code, out = make(book, **change)
        assert code != 0 and said in out, f"{change}: still green\n{out[-3000:]}"


def test_nbval_is_green_then_red(tmp_path: Path) -> None:
    notebook(tmp_path / "good.ipynb", PAGE, "assert 1 + 1 == 2")
    notebook(tmp_path / "raises.ipynb", PAGE, "raise ValueError('the reason')")
    notebook(tmp_path / "wrong.ipynb", PAGE, "assert 1 + 1 == 3")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)  # our options, whatever they are
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rA", "-q", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True)
    passed = set(re.findall(r"^PASSED .*?(\w+)\.ipynb", done.stdout, re.M))
    failed = set(re.findall(r"^FAILED .*?(\w+)\.ipynb", done.stdout, re.M))
    assert done.returncode == 1 and passed == {"good"} and failed == {"raises", "wrong"}, done.stdout[-3000:]
