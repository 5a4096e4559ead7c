"""Equation and code name each other."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest

from peftref.catalog import METHODS
from tools import chapters

ROOT = Path(__file__).resolve().parents[2]
NAME = r"eq-[a-z0-9_]+(?:-[a-z0-9]+)+"
PARTS = sorted({method.part for method in METHODS})
MODULES = {p.relative_to(ROOT).as_posix(): p for part in PARTS for p in (ROOT / "peftref" / part).rglob("*.py")}
READY = {method.slug: method.part for method in METHODS if method.status == "ready"}


def labels() -> list[str]:
    """Every equation label of the book."""
    text = [p.read_text(encoding="utf-8") for p in (ROOT / "book").rglob("*.md")]
    for path in chapters.chapters(ROOT):
        text += [c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "markdown"]
    return ["".join(pair) for pair in re.findall(rf"\$\$\s*\(({NAME})\)|:label:\s*({NAME})", "\n\n".join(text))]


@pytest.mark.parametrize("module", MODULES)
def test_equations_named_in_code_are_in_the_book(module: str) -> None:
    named = set(re.findall(NAME, MODULES[module].read_text(encoding="utf-8")))
    assert named <= set(labels()), f"{module} names {sorted(named - set(labels()))}, which no page defines"


@pytest.mark.parametrize("slug", READY)
def test_the_module_names_the_equations_of_its_chapter(slug: str) -> None:
    source = (ROOT / f"peftref/{READY[slug]}/{slug}.py").read_text(encoding="utf-8")
    own = {label for label in labels() if label.startswith(f"eq-{slug}-")}
    assert own, "the chapter labels no equation"
    assert own & set(re.findall(NAME, source)), "the module names none of its chapter's equations"


def test_labels_are_unique() -> None:
    found = labels()
    assert len(found) == len(set(found))
