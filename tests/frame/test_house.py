"""The rules of the house that can be read off the source: who imports whom, how long files are, one thing a line.

Each rule is a function from a tree of modules to what breaks it, tried on a tree that does.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest

from peftref.catalog import METHODS, PARTS
from tools import chapters, stubs

ROOT = Path(__file__).resolve().parents[2]
PART_NAMES = {part.slug for part in PARTS}
SLUGS = {(method.part, method.slug) for method in METHODS}
LEND = {"adapters": {"continual", "merging"}}  # a part -> those that may use it
# Hyperformer, the rival of VL-Adapter, is its module with generated weights.
ON_A_CHAPTER = {"adapters.baselines.hyperformer"}
CODE_LINES = 160
LONGER = {  # and why
    "peftref/data/corruptions.py": 180,  # nineteen corruptions, one small function each
    "peftref/data/streams.py": 180,  # three streams and what they share
    "peftref/plots/diagrams.py": 165,
}
EXPERIMENT_LINES = 200  # a recorded run is read from top to bottom, once
MIXED = 2  # tuple assignments of unlike things, in a thousand lines
COLUMNS = 88  # of code that a page shows
# What a chapter may import of the package, beside its parts' public names and their recorded experiments.
OPEN = {"data", "models", "plots", "results", "recording", "widgets", "fitting"}


def modules(root: Path) -> dict[str, ast.Module]:
    """Dotted name, without the package's own, and tree of every module."""
    found = {}
    for path in sorted((root / "peftref").rglob("*.py")):
        name = ".".join(path.relative_to(root / "peftref").with_suffix("").parts)
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def imports(name: str, tree: ast.AST) -> Iterator[str]:
    """Modules and names of the package that a module imports, anywhere in it: ``tta.core.views.View``."""
    package = ["peftref", *name.split(".")][:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name.removeprefix("peftref.") for a in node.names if a.name.startswith("peftref."))
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            whole = ".".join([*start, *([node.module] if node.module else [])])
            if whole == "peftref" or whole.startswith("peftref."):
                yield from (f"{whole}.{a.name}".removeprefix("peftref.") for a in node.names)


def forbidden(root: Path) -> list[str]:
    """Imports against the direction: shared module -> part, part -> another part, core or baselines -> chapter."""
    wrong = []
    for name, tree in modules(root).items():
        steps = name.split(".")
        mine = steps[0] if steps[0] in PART_NAMES else None
        for imported in imports(name, tree):
            target = imported.split(".")
            if target[0] not in PART_NAMES:
                continue
            other = target[0] != mine and mine not in LEND.get(target[0], ())
            chapter = len(steps) == 3 and steps[1] in ("core", "baselines") and tuple(target[:2]) in SLUGS
            chapter = chapter and name not in ON_A_CHAPTER
            if other or (chapter and target[0] == mine):
                wrong.append(f"{name} imports {imported}")
    return wrong


def code_lines(text: str) -> int:
    """Lines that hold code: no comments, no docstrings, no blank lines."""
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in silent:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def mixed(tree: ast.AST) -> list[int]:
    """Lines in which several unlike things are assigned at once; alike is what differs in names and numbers only."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
            if not isinstance(node.targets[0], ast.Tuple) or len(node.value.elts) < 2:
                continue
            forms = {
                re.sub(r"(id|attr|value|arg)=('[^']*'|[-\d.]+|True|False|None)", "", ast.dump(v))
                for v in node.value.elts
            }
            if len(forms) > 1:
                found.append(node.lineno)
    return found


def test_imports_follow_the_house() -> None:
    assert not forbidden(ROOT)


def test_a_forbidden_import_is_found(tmp_path: Path) -> None:
    files = {
        "data/sets.py": "from ..tta import LAME",
        "panel/core/gram.py": "from ...adapters.core.layers import view",
        "merging/rws.py": "from peftref.adapters import inject",
        "tta/core/views.py": "def f():\n    from ..lame import LAME",
        "tta/baselines/tent.py": "from ..core.views import View",
        "tta/experiments/lame.py": "import peftref.tta.lame",
        "results.py": "from . import continual",
    }
    for name, text in files.items():
        (tmp_path / "peftref" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "peftref" / name).write_text(text)
    assert sorted(forbidden(tmp_path)) == [
        "data.sets imports tta.LAME",
        "panel.core.gram imports adapters.core.layers.view",
        "results imports continual",
        "tta.core.views imports tta.lame.LAME",
    ]


def test_a_part_has_chapters_at_its_root_and_its_rooms() -> None:
    for part in PART_NAMES:
        folder = ROOT / "peftref" / part
        if folder.is_dir():
            files = {(part, path.stem) for path in folder.glob("*.py") if path.name != "__init__.py"}
            rooms = {path.name for path in folder.iterdir() if path.is_dir()} - {"__pycache__"}
            assert files <= SLUGS and rooms <= {"core", "baselines", "experiments"}


def test_public_names_are_up_to_date() -> None:
    """And unique in their package, and none is also the name of a file beside them: the stub refuses both."""
    assert stubs.main(["--check"]) == 0, "run python -m tools.stubs"


@pytest.mark.parametrize("path", sorted((ROOT / "peftref").rglob("*.py")), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_files_are_short_and_formatted(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    usual = EXPERIMENT_LINES if path.parent.name == "experiments" else CODE_LINES
    limit = LONGER.get(path.relative_to(ROOT).as_posix(), usual)
    assert code_lines(text) <= limit, "explanation is not counted: move what is an idea of its own"
    assert not re.search(r"#\s*fmt:", text), "the formatter has its way"


def test_one_assignment_one_thing() -> None:
    found, lines = [], 0
    for path in sorted((ROOT / "peftref").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        lines += text.count("\n")
        found += [f"{path.relative_to(ROOT)}:{line}" for line in mixed(ast.parse(text))]
    assert len(found) <= MIXED * lines / 1000, f"{len(found)} in {lines} lines: {found}"


def test_counting_can_count() -> None:
    text = '"""Two\nlines."""\n\nx = 1  # one\n# none\n\n\ndef f():\n    """None."""\n    return (\n        1\n    )\n'
    assert code_lines(text) == 5
    cases = {"a, b = 1, 2": 0, "a, b = x.p, x.q": 0, "a, b = f(x), f(y)": 0, "a, b = f(x), 1": 1, "o, i = w.shape": 0}
    assert {line: len(mixed(ast.parse(line))) for line in cases} == cases


# --- Chapters ---------------------------------------------------------------------------------------------------------

CHAPTERS = {path.relative_to(ROOT / "book").as_posix(): path for path in chapters.chapters(ROOT)}


def cells(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def closed(source: str) -> list[str]:
    """Imports of a chapter from where it should not: only public names of parts, and their recorded experiments."""
    plain = re.sub(r"^(\s*)%.*", r"\1pass", source, flags=re.M)
    wrong = []
    for imported in imports("chapter", ast.parse(plain)):
        steps = imported.split(".")
        if steps[0] in PART_NAMES:
            if len(steps) > 2 and steps[1] != "experiments":
                wrong.append(imported)
        elif steps[0] not in OPEN:
            wrong.append(imported)
    return wrong


@pytest.mark.parametrize("name", CHAPTERS)
def test_chapters_import_public_names(name: str) -> None:
    wrong = [one for cell in cells(CHAPTERS[name]) for one in closed(cell.source)]
    assert not wrong


def test_a_closed_door_is_found() -> None:
    text = "%pip install x\nfrom peftref.tta import LAME\nfrom peftref import tta, plots\nimport peftref\n"
    assert closed(text + "from peftref.tta.experiments.lame import PRESETS") == []
    assert closed("from peftref.tta.lame import LAME\nfrom peftref._checks import integer") == [
        "tta.lame.LAME",
        "_checks.integer",
    ]


@pytest.mark.parametrize("name", CHAPTERS)
def test_visible_code_fits_the_page(name: str) -> None:
    """Longer lines are cut at the right edge. Folded cells may be as wide as the source."""
    shown = [
        c
        for c in cells(CHAPTERS[name])
        if not {"hide-cell", "hide-input", "remove-input"} & set(c.metadata.get("tags", ()))
    ]
    wide = [line for cell in shown for line in cell.source.splitlines() if len(line) > COLUMNS]
    assert not wide
