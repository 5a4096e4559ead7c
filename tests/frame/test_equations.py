"""Equation and code name each other."""

from __future__ import annotations

import re
from functools import cache
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


@cache
def labels() -> tuple[str, ...]:
    """Every equation label of the book."""
    text = [p.read_text(encoding="utf-8") for p in (ROOT / "book").rglob("*.md")]
    for path in chapters.chapters(ROOT):
        text += [c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "markdown"]
    return tuple("".join(p) for p in re.findall(rf"\$\$\s*\(({NAME})\)|:label:\s*({NAME})", "\n\n".join(text)))


@cache
def named(path: Path) -> frozenset[str]:
    """The equations that a module names."""
    return frozenset(re.findall(NAME, path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("module", MODULES)
def test_equations_named_in_code_are_in_the_book(module: str) -> None:
    unknown = named(MODULES[module]) - set(labels())
    assert not unknown, f"{module} names {sorted(unknown)}, which no page defines"


@pytest.mark.parametrize("slug", READY)
def test_the_code_names_every_equation_of_a_chapter(slug: str) -> None:
    """The module itself names some; each stands above its line, or in a docstring, somewhere in the part."""
    own = {label for label in labels() if label.startswith(f"eq-{slug}-")}
    assert own, "the chapter labels no equation"
    assert own & named(ROOT / f"peftref/{READY[slug]}/{slug}.py"), "the module names none of its chapter's equations"
    missing = own - frozenset().union(*map(named, MODULES.values()))
    assert not missing, "label what is computed; a step of a derivation needs no label"


def test_labels_are_unique() -> None:
    assert len(labels()) == len(set(labels()))
