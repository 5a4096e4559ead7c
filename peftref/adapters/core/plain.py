"""Layers by the names that files have for them: without ``torch.compile``, ``DataParallel`` and other wrappers.

>>> from torch import nn
>>> net = nn.Sequential(nn.DataParallel(nn.Sequential(nn.Linear(2, 2))))
>>> meant(nn.DataParallel(net), ["0.0"])                  # plain name -> name in this model
{'0.0': 'module.0.module.0'}
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from torch import nn

from ..._wrapped import plain_name, unwrapped
from .targets import find, frozen_module, matches, modules_by_name

T = TypeVar("T")


def plainly(model: nn.Module, named: Mapping[str, T]) -> dict[str, T]:
    """What is known by the names of modules, by their plain ones.

    Raises:
        ValueError: two of them have one plain name.
    """
    found = {plain_name(model, n): value for n, value in named.items()}
    if len(found) < len(named):
        raise ValueError(f"model: expected one plain name for each layer, got {list(found)} for {list(named)}")
    return found


def exactly(names: Iterable[str]) -> str:
    """The regular expression of these names and no others."""
    return "|".join(map(re.escape, names))


def meant(
    model: nn.Module, targets: str | Iterable[str], exclude: str | Iterable[str] = (), *, any_module: bool = False
) -> dict[str, str]:
    """The plain names of the layers meant by ``targets``, each with the name that it has in this model.

    Of a layer in a wrapper of its own the layer is meant, not the wrapper. A layer that has no wrapper around it has
    the same name twice. Arguments and refusals are those of :func:`~peftref.adapters.core.targets.find`.

    Raises:
        ValueError: a layer that is compiled by itself, so that nothing put in its place would be called.
    """
    hit = _hit("targets", targets, model)
    out = _hit("exclude", exclude, model)
    called: dict[int, set[str]] = {}  # of a module in several places, any name will do
    for n, m in model.named_modules(remove_duplicate=False):
        called.setdefault(id(m), set()).update((n, plain_name(model, n)))
    found = {}
    for n, m in modules_by_name(model).items():
        plain = plain_name(model, n)
        names = called.get(id(m), set()) | {n, plain}
        bare = unwrapped(frozen_module(m)) is frozen_module(m)
        if bare and plain and any(map(hit, names)) and not any(map(out, names)):
            found[plain] = n
    if not found:
        find(unwrapped(model), targets, exclude, any_module=any_module)  # says which there are
    find(model, exactly(found.values()), any_module=any_module)
    alone = [plain for plain, n in found.items() if _compiled(model, n)]
    if alone:
        raise ValueError(f"targets: expected layers that are not compiled one by one, got {alone}; compile them later")
    return found


def _hit(label: str, wanted: str | Iterable[str], model: nn.Module) -> Callable[[str], object]:
    bare = unwrapped(model)  # which knows its own output layer
    hit = matches(label, wanted, bare)
    if isinstance(wanted, str) and wanted.lower() == "all-linear":
        return {plain_name(bare, n) for n in modules_by_name(bare) if hit(n)}.__contains__
    return hit


def _compiled(model: nn.Module, name: str) -> bool:
    """Whether the module is what ``torch.compile`` was given, whose call is fixed."""
    parent, _, last = name.rpartition(".")
    return last == "_orig_mod" and type(model.get_submodule(parent)).__name__ == "OptimizedModule"
