"""A finished method is in all its places; an unfinished one is linked from none."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import nbformat
import pytest
import yaml

from peftref.catalog import METHODS
from tools import reference

ROOT = Path(__file__).resolve().parents[2]
READY = {method.slug: method for method in METHODS if method.status == "ready"}
PLANNED = {method.slug: method for method in METHODS if method.status != "ready"}


def toc() -> set[str]:
    """Every file that the table of contents names."""
    return set(re.findall(r"(?:file|root): (\S+)", (ROOT / "_toc.yml").read_text()))


def public(path: Path) -> list[str]:
    """``__all__`` of a module, read without importing it."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return ast.literal_eval(node.value)
    return []


@pytest.fixture(params=READY)
def slug(request: pytest.FixtureRequest) -> str:
    return request.param


def test_five_places(slug: str) -> None:
    part = READY[slug].part
    for place in (
        f"peftref/{part}/{slug}.py",
        f"tests/{part}/test_{slug}.py",
        f"tests/_naive/{slug}.py",
        f"book/{part}/{slug}.ipynb",
        f"benchmarks/{part}/bench_{slug}.py",
    ):
        assert (ROOT / place).is_file(), place
    assert f"book/{part}/{slug}" in toc()
    entries = re.findall(r"^@\w+\{([^,\s]+)", (ROOT / "book/references.bib").read_text(encoding="utf-8"), re.M)
    assert entries.count(slug) == 1, f"book/references.bib: expected one entry {slug}"


def test_chapter_shows_results(slug: str) -> None:
    nb = nbformat.read(ROOT / f"book/{READY[slug].part}/{slug}.ipynb", as_version=4)
    outputs = [out for cell in nb.cells if cell.cell_type == "code" for out in cell.outputs]
    assert any("image/png" in out.get("data", {}) or "image/svg+xml" in out.get("data", {}) for out in outputs)
    assert f"cite}}`{slug}" in "".join(c.source for c in nb.cells) or slug in str(nb.cells[0].source)


def test_every_public_name_appears_in_the_chapter(slug: str) -> None:
    part = READY[slug].part
    nb = nbformat.read(ROOT / f"book/{part}/{slug}.ipynb", as_version=4)
    text = "\n".join(cell.source for cell in nb.cells)
    names = public(ROOT / f"peftref/{part}/{slug}.py")
    assert names, "the module has no __all__"
    assert not [name for name in names if not re.search(rf"\b{name}\b", text)]


def test_nothing_planned_is_linked() -> None:
    pages = [ROOT / "README.md", ROOT / "_toc.yml", *(ROOT / "book").rglob("*.md"), *(ROOT / "book").rglob("*.ipynb")]
    for page in pages:
        text = page.read_text(encoding="utf-8")
        linked = {s for s, m in PLANNED.items() if re.search(rf"{m.part}/{s}(?:\.ipynb|\.html|\.md|$)", text, re.M)}
        assert not linked, f"{page.relative_to(ROOT)} links what does not exist"


def test_every_public_module_is_in_the_reference() -> None:
    """It has a page, and the table of contents the page; private modules, scripts and recorded runs have none."""
    assert {"tta.lame", "tta.core.views", "results", "plots.charts"} <= set(reference.modules())
    for path, text in reference.pages().items():
        assert path.read_text(encoding="utf-8") == text, path
        assert path.relative_to(ROOT).with_suffix("").as_posix() in toc()
    labels = [reference.label(name) for name in reference.modules()]
    assert len(labels) == len(set(labels))


def test_toc_names_existing_files() -> None:
    assert yaml.safe_load((ROOT / "_toc.yml").read_text())["root"] == "book/intro"
    missing = {f for f in toc() if not any((ROOT / f).with_suffix(s).is_file() for s in (".md", ".ipynb"))}
    assert not missing
