"""CONTRIBUTING is enough: a method added by its table to a copy of the tree passes, and no place may be missing.

The toy, ``halfway``, moves each probability halfway to 1/K.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest

from tools import forked

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
FRAME = ("five_places", "catalog", "equations", "mutants", "results", "notebooks")  # what holds a method to its places
# What the frame's tests and the toy import; there once, it need not be imported at each run.
SLOW = ("torch", "pandas", "nbclient", "matplotlib.figure", "tqdm", "pytest")

MODULE = '''\
r"""Halfway moves each probability halfway to uniform.

Nobody, "Halfway", arXiv 2401.00000.

.. math:: z_k=(p_k+1/K)/2
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["halfway"]


def halfway(p: Tensor) -> Tensor:
    """Probabilities ``(..., K)``, nearer to uniform.

    Raises:
        ValueError: negative entries.
    """
    if (p < 0).any():
        raise ValueError(f"p: expected probabilities, got {p.min().item():g}")
    # eq-halfway-update:  z_k = (p_k + 1/K) / 2
    return (p + 1 / p.shape[-1]) / 2
'''
TEST = """\
import pytest
import torch

from peftref.tta.halfway import halfway
from tests._naive import halfway as naive


def test_equals_the_loop():
    p = torch.rand(5, 3).softmax(-1)
    torch.testing.assert_close(halfway(p), torch.tensor([naive.halfway(row) for row in p.tolist()]))


def test_bad_input():
    with pytest.raises(ValueError, match="^p: expected probabilities"):
        halfway(torch.tensor([-0.5, 1.5]))
"""
TWIN = '''\
"""The specification of Halfway: one probability at a time."""


def halfway(p: list[float]) -> list[float]:
    return [(x + 1 / len(p)) / 2 for x in p]
'''
DEFECTS = {
    "not halfway": ("p.shape[-1]) / 2", "p.shape[-1]) / 3"),
    "all the way": ("(p + 1 / p", "(2 / p"),
    "K of the batch": ("1 / p.shape[-1]", "1 / p.shape[0]"),
    "away from uniform": ("(p + 1 /", "(p - 1 /"),
    "no 1/K": ("(p + 1 / p.shape[-1])", "(p + 1)"),
    "nothing is checked": ("if (p < 0).any():", "if False:"),
}
BENCHMARK = '''\
"""Halfway against its loop."""

import torch

from benchmarks._timing import Row, compare
from peftref.tta.halfway import halfway
from tests._naive import halfway as naive


def rows() -> list[Row]:
    p = torch.rand(8, 4).softmax(-1)

    def peer() -> torch.Tensor:
        return torch.tensor([naive.halfway(row) for row in p.tolist()])

    torch.testing.assert_close(halfway(p), peer())
    return [compare("8 x 4", lambda: halfway(p), peer, peer_name="loop", repeats=1)]
'''
ENTRY = "\n@misc{halfway,\n  author = {Nobody},\n  title  = {Halfway},\n  year   = {2024},\n}\n"
METHOD = """\
    Method("halfway", "Halfway", "tta", "Each probability, halfway to uniform", "Nobody", "arXiv", 2024, "2401.00000",
           "ready"),
    # continual
"""
API = """
(api-halfway)=
## `peftref.tta.halfway`

```{eval-rst}
.. automodule:: peftref.tta.halfway
   :members:
```
"""
TEXT = """\
# Halfway

**It moves each probability halfway to uniform** {cite}`halfway`.

$$
z_k = (p_k + 1/K) / 2
$$ (eq-halfway-update)
"""
FIGURE = """\
from peftref import plots
from peftref.results import record
from peftref.tta.halfway import halfway

p = torch.tensor([0.9, 0.1])
torch.testing.assert_close(halfway(p), torch.tensor([0.7, 0.3]))
plots.lines([0, 1], {"p": p, "z": halfway(p)}, "class", "probability")"""
RESULT = """\
row = {"claim": "mean of z", "where": "ours", "paper": None, "interval": 0.0, "seeds": 1, "status": "matched"}
protocol = {"data": None, "weights": None, "device": "cpu"}
record("halfway", [row | {"ours": round(halfway(p).mean().item(), 3), "protocol": protocol}])"""


# Two tools in one process, which saves half the time.
BOTH = (
    "from tools import mutants, readme\nassert mutants.main(['--slug', 'halfway', '--check']) == readme.main([]) == 0"
)


def write(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text, encoding="utf-8")


def insert(root: Path, name: str, before: str, text: str) -> None:
    """``text`` in place of ``before``, which is there once."""
    found = (root / name).read_text(encoding="utf-8")
    assert found.count(before) == 1, f"{name}: {before!r}"
    write(root, name, found.replace(before, text))


def python(root: Path, *arguments: str) -> str:
    """A tool of the copy, run as CONTRIBUTING says."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHONPATH", "PEFTREF_"))}
    env |= {"OMP_NUM_THREADS": "1", "PEFTREF_RECORD": "1"}
    done = subprocess.run([sys.executable, *arguments], cwd=root, env=env, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def add(root: Path) -> None:
    """The table of CONTRIBUTING, line by line, then its commands."""
    write(root, "peftref/tta/halfway.py", MODULE)
    write(root, "book/api/tta.md", (root / "book/api/tta.md").read_text(encoding="utf-8") + API)
    write(root, "tests/tta/test_halfway.py", TEST)
    write(root, "tests/_naive/halfway.py", TWIN)
    seeded = [f"[[mutant]]\nwhat = '{what}'\nold = '{old}'\nnew = '{new}'\n" for what, (old, new) in DEFECTS.items()]
    write(root, "tests/mutants/halfway.toml", "\n".join(seeded))
    write(root, "benchmarks/tta/bench_halfway.py", BENCHMARK)
    chapter(root / "book/tta/halfway.ipynb")
    insert(
        root,
        "_toc.yml",
        "      - file: book/tta/cotta\n",
        "      - file: book/tta/cotta\n      - file: book/tta/halfway\n",
    )
    write(root, "book/references.bib", (root / "book/references.bib").read_text(encoding="utf-8") + ENTRY)
    insert(root, "peftref/catalog.py", "    # continual\n", METHOD)
    insert(root, "tests/frame/test_catalog.py", "tta=3", "tta=4")
    insert(root, "tests/frame/test_catalog.py", "len(parts) == 42", "len(parts) == 43")
    python(root, "-m", "tools.chapters", "tta/halfway")
    python(root, "-c", BOTH)


def chapter(path: Path) -> None:
    """A stub: the first cell, one equation, one figure, one result."""
    first = re.search(r"^## The first cell.*?```python\n(.*?)\n```", GUIDE, re.S | re.M)
    assert first
    image = {"alt": "Two falling lines, that of z half as steep", "classes": "dark-light"}
    figure = {"caption": "Before and after.", "name": "fig-halfway-result"}
    nb = nbformat.v4.new_notebook()
    nb.cells = [
        nbformat.v4.new_markdown_cell(TEXT),
        nbformat.v4.new_code_cell(first[1], metadata={"tags": ["hide-cell"]}),
        nbformat.v4.new_code_cell(FIGURE, metadata={"mystnb": {"image": image, "figure": figure}}),
        nbformat.v4.new_code_cell(RESULT),
    ]
    nbformat.write(nb, path)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this tree, the book included, to which the method has been added."""
    root = tmp_path_factory.mktemp("contributing").resolve() / "tree"
    git = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(git, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, root / name)
    add(root)
    return root


@pytest.fixture(scope="module")
def runner(tree: Path) -> Iterator[forked.Forked]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forked, "SLOW", SLOW)
        running = forked.Forked(tree)
    yield running
    running.close()


def frame(runner: forked.Forked, *names: str, only: str = "halfway") -> tuple[int | None, str]:
    """The frame's own tests, in the copy: exit code and output."""
    paths = [f"tests/frame/test_{name}.py" for name in names or FRAME]
    return runner.pytest([*paths, "-k", only, "--maxfail=99", "-rfE"], 300)


def test_the_table_names_the_places_that_are_added_here() -> None:
    """As CONTRIBUTING has them for LAME; a place that joins the table must join this test."""
    table = GUIDE.split("## A method has one name")[1].split("1. **Module")[0]
    assert set(re.findall(r"`([\w./]+\.\w+)`", table)) == {
        "peftref/tta/lame.py", "book/api/tta.md", "tests/tta/test_lame.py", "tests/_naive/lame.py",
        "tests/mutants/lame.toml", "book/tta/lame.ipynb", "_toc.yml", "benchmarks/tta/bench_lame.py",
        "book/references.bib", "peftref/catalog.py", "book/_results/lame.json",
    }  # fmt: skip


def test_a_method_in_all_its_places_passes(runner: forked.Forked) -> None:
    code, out = frame(
        runner, only="halfway or 42 or row_per or linked or up_to_date or reference or existing_files or unique"
    )
    assert code == 0, out
    assert int(re.findall(r"(\d+) passed", out)[0]) > 15, out
    code, out = runner.pytest(["tests/tta/test_halfway.py"], 300)
    assert code == 0, out


MISSING = {
    "peftref/tta/halfway.py": ("five_places", "five_places"),
    "tests/tta/test_halfway.py": ("five_places", "five_places"),
    "tests/_naive/halfway.py": ("five_places", "five_places"),
    "tests/mutants/halfway.toml": ("mutants", "has_mutants"),
    "book/tta/halfway.ipynb": ("five_places", "five_places"),
    "benchmarks/tta/bench_halfway.py": ("five_places", "five_places"),
    "book/_results/halfway.json": ("results", "are_complete"),
}


@pytest.mark.parametrize("place", MISSING)
def test_a_missing_file_fails(place: str, tree: Path, runner: forked.Forked) -> None:
    kept = (tree / place).read_bytes()
    (tree / place).unlink()
    try:
        code, out = frame(runner, MISSING[place][0])
    finally:
        (tree / place).write_bytes(kept)
    assert code == 1 and re.search(rf"^FAILED .*{MISSING[place][1]}\[halfway\]", out, re.M), out


@pytest.mark.parametrize(
    ("place", "text", "module", "fails"),
    [
        ("book/api/tta.md", API, "five_places", "in_the_reference"),
        ("_toc.yml", "      - file: book/tta/halfway\n", "five_places", r"five_places\[halfway\]"),
        ("book/references.bib", ENTRY, "five_places", r"five_places\[halfway\]"),
        ("peftref/catalog.py", METHOD.removesuffix("    # continual\n"), "catalog", "up_to_date"),
        ("peftref/tta/halfway.py", "    # eq-halfway-update:  z_k = (p_k + 1/K) / 2\n", "equations", r"\[halfway\]"),
        ("README.md", "Each probability, halfway to uniform. ", "catalog", "up_to_date"),
    ],
)
def test_a_missing_line_fails(
    place: str, text: str, module: str, fails: str, tree: Path, runner: forked.Forked
) -> None:
    kept = (tree / place).read_text(encoding="utf-8")
    assert text in kept
    (tree / place).write_text(kept.replace(text, ""), encoding="utf-8")
    try:
        code, out = frame(runner, module, only="halfway or reference or up_to_date")
    finally:
        (tree / place).write_text(kept, encoding="utf-8")
    assert code == 1 and re.search(rf"^FAILED .*{fails}", out, re.M), out


def test_the_written_pages_show_it(tree: Path) -> None:
    assert "[Halfway](book/tta/halfway.ipynb)" in (tree / "README.md").read_text(encoding="utf-8")
    for page in ("map", "results", "status"):
        assert re.search("tta/halfway|Halfway", (tree / f"book/{page}.md").read_text(encoding="utf-8")), page
    rows = json.loads((tree / "book/_results/halfway.json").read_text(encoding="utf-8"))
    assert rows[0]["ours"] == 0.5 and rows[0]["run"]["command"] == "make chapter NAME=tta/halfway"
