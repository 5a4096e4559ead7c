"""``make method`` and ``make part`` give files that pass.

In a copy of the tree, a method in a part that is there, and one in a part begun for it, go through every test of the
frame that holds a method to its places, bad calls included.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools import new

ROOT = Path(__file__).resolve().parents[2]
METHODS = ("toys/halfway", "tta/halves")  # one in a new part, one beside others
# In the order of the commands; the second process finds the part and the rows of the first.
BEGIN = (
    "from tools import new; new.part('toys')",
    "from tools import new; [new.method(name) for name in ('toys/halfway', 'tta/halves')]",
    "from tools import new; raise SystemExit(new.finish('toys/halfway', 'tta/halves'))",
)
FRAME = ("five_places", "catalog", "equations", "mutants", "notebooks", "house", "docs", "records", "fuzz")
OURS = "halfway or halves or toys or table_is_complete or in_the_reference or existing_files or links or linked"


def python(root: Path, *arguments: str) -> str:
    """A tool of the copy."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHONPATH", "PEFTREF_", "PYTEST_"))}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, *arguments], cwd=root, env=env, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this tree, to which the two methods have been added."""
    root = tmp_path_factory.mktemp("new").resolve() / "tree"
    git = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(git, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, root / name)
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    for step in BEGIN:
        python(root, "-c", step)
    return root


def test_what_is_written_passes_every_test(tree: Path) -> None:
    paths = [f"tests/frame/test_{name}.py" for name in FRAME] + ["tests/toys", "tests/tta/test_halves.py"]
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:nbval", "-o", "addopts=--import-mode=importlib"]
    out = python(tree, "-m", "pytest", *options, "-k", OURS, *paths)
    assert int(re.findall(r"(\d+) passed", out)[0]) > 60, out
    python(tree, "-m", "ruff", "check", "-q", "peftref/toys", "tests/toys", "tests/tta", "book/toys", "benchmarks/toys")


def test_the_written_pages_show_it(tree: Path) -> None:
    toc = (tree / "_toc.yml").read_text(encoding="utf-8")
    for name in METHODS:
        slug = name.partition("/")[2]
        assert f"[{slug.capitalize()}](book/{name}.ipynb)" in (tree / "README.md").read_text(encoding="utf-8")
        assert f"book/{name}\n" in toc and f"book/api/{name}\n" in toc


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="NAME: expected a part that is there"):
        new.method("nowhere/halfway", tmp_path)
    (tmp_path / "tests/tta").mkdir(parents=True)
    (tmp_path / "tests/tta/calls.py").touch()
    (tmp_path / "tests/_naive").mkdir()
    (tmp_path / "tests/_naive/halfway.py").write_text("mine")
    with pytest.raises(ValueError, match="there is tests/_naive/halfway.py"):
        new.method("tta/halfway", tmp_path)
    with pytest.raises(ValueError, match="stands in the catalogue under tta"):
        (tmp_path / "tests/panel").mkdir()
        (tmp_path / "tests/panel/calls.py").touch()
        new.method("panel/lame", tmp_path)
    assert (tmp_path / "tests/_naive/halfway.py").read_text() == "mine"
    assert not (tmp_path / "peftref").exists()
