"""Everything public says what it is: modules, functions, classes, and what one calls on them.

That public modules stand in ``book/api``, and names in their chapters, is tested in ``test_five_places``.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import peftref
from peftref.catalog import METHODS

ROOT = Path(__file__).resolve().parents[2]
MODULES = [m.name for m in pkgutil.walk_packages(peftref.__path__, "peftref.")]
FILES = sorted(p for part in ("peftref", "tools", "benchmarks", "examples") for p in (ROOT / part).rglob("*.py"))
# Torch says what these do, or timm, whose protocol has the second line; here the class explains them.
INHERITED = {"forward", "extra_repr", "train"} | {"forward_features", "forward_head", "head"}


def own(thing: Any) -> str:
    """The docstring that was written for it; dataclasses and named tuples make one of their signature themselves."""
    doc = vars(thing).get("__doc__") if inspect.isclass(thing) else getattr(thing, "__doc__", None)
    made = inspect.isclass(thing) and (doc or "").startswith(f"{thing.__name__}(")
    return "" if made else (doc or "").strip()


def explained_by_base(cls: type, name: str) -> bool:
    """A method that keeps the promise of the one it overrides needs no second text."""
    return any(own(vars(base)[name]) for base in cls.__mro__[1:] if name in vars(base))


def undocumented(module: Any) -> Iterator[str]:
    for name in getattr(module, "__all__", []):
        thing = getattr(module, name)
        if not inspect.isclass(thing) and not inspect.isfunction(thing):
            continue  # a constant or an alias of a type: its comment stands beside it
        if not own(thing):
            yield name
        for member, value in vars(thing).items() if inspect.isclass(thing) else ():
            inner = getattr(value, "__func__", getattr(value, "fget", value))
            if member.startswith("_") or not inspect.isfunction(inner) or own(inner):
                continue
            if not (member in INHERITED and issubclass(thing, nn.Module)) and not explained_by_base(thing, member):
                yield f"{name}.{member}"


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_has_a_docstring(name: str) -> None:
    missing = sorted(undocumented(importlib.import_module(name)))
    assert not missing, f"{name}: {missing}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_module_says_what_it_is_for(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    doc = ast.get_docstring(ast.parse(text)) or ""
    assert doc or not text.strip(), "no docstring"
    first = doc.partition("\n\n")[0]
    assert not text.strip() or first.rstrip()[-1] in ".:?!", f"the first paragraph is no sentence: {first!r}"


@pytest.mark.parametrize("method", [m for m in METHODS if m.status == "ready"], ids=lambda m: m.slug)
def test_the_module_of_a_method_names_its_paper(method: Any) -> None:
    doc = " ".join((importlib.import_module(f"peftref.{method.part}.{method.slug}").__doc__ or "").split())
    surname = re.split(r"[\s,]+", method.authors.strip())[0]
    assert str(method.year) in doc or (method.arxiv and method.arxiv in doc), "neither year nor number of the paper"
    assert surname in doc or method.arxiv in doc, f"not the authors: {method.authors}"


def test_what_is_named_public_exists_and_is_named_once() -> None:
    for name in MODULES:
        names = getattr(importlib.import_module(name), "__all__", [])
        assert len(set(names)) == len(names), f"{name}: a name twice in __all__"
        assert all(hasattr(importlib.import_module(name), n) for n in names), name


def test_documented_arguments_exist() -> None:
    """A name in ``Args:`` is one of the signature: text that outlived an argument misleads."""
    wrong = []
    for name in MODULES:
        module = importlib.import_module(name)
        for public in getattr(module, "__all__", []):
            thing = getattr(module, public)
            if not (inspect.isclass(thing) or inspect.isfunction(thing)) or not own(thing):
                continue
            pairs = [(public, thing)]
            if inspect.isclass(thing):
                pairs += [(f"{public}.{n}", f) for n, f in vars(thing).items() if inspect.isfunction(f) and n[0] != "_"]
            for label, one in pairs:
                wrong += [f"{name}.{label}: {argument}" for argument in documented(one) - parameters(one)]
    assert not wrong, wrong


def documented(thing: Any) -> set[str]:
    block = re.search(r"^Args:\n((?:[ ].*\n?|\n)+)", inspect.cleandoc(own(thing)) + "\n", re.M)
    entries = re.findall(r"^    ([\w*][\w*, ]*?):", block[1], re.M) if block else []
    return {name.strip().lstrip("*") for entry in entries for name in entry.split(",")}


def parameters(thing: Any) -> set[str]:
    return set(inspect.signature(thing).parameters)


class _Silent:
    """Said."""

    def method(self, x: int) -> None:
        pass

    def said(self, x: int) -> None:
        """Said.

        Args:
            x, y: of which one is gone.
        """


def test_the_tests_can_fail() -> None:
    module = type("Module", (), {"__all__": ["_Silent", "documented"], "_Silent": _Silent, "documented": documented})
    assert list(undocumented(module)) == ["_Silent.method", "documented"]
    assert documented(_Silent.said) - parameters(_Silent.said) == {"y"}
