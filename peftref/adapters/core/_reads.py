"""Which weights of its children a module's code reads itself, found in the source of its methods.

>>> from torch import nn
>>> class Fused(nn.Module):
...     def forward(self, x):
...         return self.out(self.project(self.q, x))
...     def project(self, layer, x):
...         return x @ layer.weight.T if layer.bias is None else None
>>> sorted(weights_read(Fused, "forward"))          # of q; and out is called, as it should be
['q']
"""

from __future__ import annotations

import ast
import dis
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping
from typing import Any

__all__ = ["names_read", "weights_read"]

Path = tuple[str, ...]  # of names from the module down; "*" for any of a list
PARTS = ("weight", "bias")
HARMLESS = {"dtype", "device", "shape", "ndim", "requires_grad", "size", "numel", "dim", "is_cuda", "is_meta"}
ASKING = {"isinstance", "hasattr", "len", "type", "id"}  # functions that look at a tensor, and not at its entries
LIKE = {"to", "type_as"}  # methods that take another tensor's type and place
NESTED = 4  # helpers that call helpers


def names_read(parent: type, method: str) -> set[str]:
    """What a method, and those it calls, reads of the module itself: children, numbers, other methods."""
    return {path[0] for path in _of_method(parent, method, [], {}, NESTED, set())}


def weights_read(parent: type, method: str) -> set[str]:
    """Paths of the children whose ``weight`` or ``bias`` a method, or what it calls, uses for more than its type."""
    paths = _of_method(parent, method, [], {}, NESTED, set())
    return {".".join(path[:-1]) for path in paths if path[-1] in PARTS and path[:-1]}


def _of_method(
    parent: type, name: str, args: list[Path | None], words: Mapping[str, Path], depth: int, seen: set[Any]
) -> Iterator[Path]:
    """What a method, or the getter of a property, reads when it is called with these modules."""
    found = inspect.getattr_static(parent, name, None)
    if isinstance(found, property):
        found = found.fget
    elif isinstance(found, functools.cached_property):
        found = found.func
    if isinstance(found, staticmethod):
        yield from _of_function(parent, found.__func__, args, words, depth, seen)
    else:
        yield from _of_function(parent, found, [(), *args], words, depth, seen)


def _of_function(
    parent: type, function: Any, args: list[Path | None], words: Mapping[str, Path], depth: int, seen: set[Any]
) -> Iterator[Path]:
    if not inspect.isfunction(function):
        return
    function = inspect.unwrap(function)
    names = list(inspect.signature(function).parameters)
    env = {n: path for n, path in [*zip(names, args, strict=False), *words.items()] if path is not None}
    key = function, tuple(sorted(env.items()))
    if not env or not depth or key in seen:
        return
    seen.add(key)
    tree = _tree(function)
    if tree is None:
        yield from _compiled(function, names[0])
        return
    _bind(tree, env)
    skipped = _harmless(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and node not in skipped:
            path = _path(node, env)
            if path:
                yield path
            if path and len(path) == 1:  # of the module's own: a method that is called or handed on, a property
                yield from _of_method(parent, path[0], [], {}, depth - 1, seen)
        if isinstance(node, ast.Call):
            more = [_path(value, env) for value in node.args]
            named = [(word.arg, _path(word.value, env)) for word in node.keywords]
            given = {str(word): path for word, path in named if path is not None}
            target = _path(node.func, env)
            if target is not None and len(target) == 1:
                yield from _of_method(parent, target[0], more, given, depth - 1, seen)
            elif isinstance(node.func, ast.Name):
                helper = function.__globals__.get(node.func.id)
                yield from _of_function(parent, helper, more, given, depth - 1, seen)


@functools.cache
def _tree(function: Callable[..., Any]) -> ast.AST | None:
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError):
        return None
    for text in (textwrap.dedent(source), f"if True:\n{source}"):  # a comment may stand to the left of a method
        try:
            return ast.parse(text)
        except SyntaxError:
            continue
    return None


def _path(node: ast.AST, env: Mapping[str, Path]) -> Path | None:
    """The path of an expression such as ``self.layers[0].q``; None for others."""
    if isinstance(node, ast.Name):
        return env.get(node.id)
    if isinstance(node, ast.Attribute):
        inner = _path(node.value, env)
        return None if inner is None else (*inner, node.attr)
    if isinstance(node, ast.Subscript):
        inner = _path(node.value, env)
        word = node.slice.value if isinstance(node.slice, ast.Constant) else "*"
        return None if inner is None else (*inner, str(word))
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr" and len(node.args) > 1:
        inner = _path(node.args[0], env)
        word = node.args[1].value if isinstance(node.args[1], ast.Constant) else "*"
        return None if inner is None else (*inner, str(word))
    return None


def _bind(tree: ast.AST, env: dict[str, Path]) -> None:
    """Other names of modules: ``q = self.q``, ``for layer in self.layers``."""
    for node in ast.walk(tree):
        pairs: list[tuple[ast.AST, Path | None]] = []
        if isinstance(node, ast.Assign):
            for target in node.targets:
                both = isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple)
                lefts, rights = (target.elts, node.value.elts) if both else ([target], [node.value])  # type: ignore[attr-defined]
                pairs += [(left, _path(right, env)) for left, right in zip(lefts, rights, strict=False)]
        elif isinstance(node, ast.NamedExpr):
            pairs.append((node.target, _path(node.value, env)))
        elif isinstance(node, ast.For | ast.comprehension):
            pairs += _each(node.target, node.iter, env)
        env.update({left.id: path for left, path in pairs if isinstance(left, ast.Name) and path is not None})


def _each(target: ast.AST, source: ast.expr, env: Mapping[str, Path]) -> list[tuple[ast.AST, Path | None]]:
    """What the names of a loop stand for."""
    word = getattr(source.func, "id", getattr(source.func, "attr", "")) if isinstance(source, ast.Call) else ""
    if isinstance(source, ast.Call) and word == "zip" and isinstance(target, ast.Tuple):
        inner = [_each(t, s, env) for t, s in zip(target.elts, source.args, strict=False)]
        return [pair for pairs in inner for pair in pairs]
    if isinstance(source, ast.Call) and word in ("enumerate", "items") and isinstance(target, ast.Tuple):
        return _each(target.elts[-1], source.args[0] if source.args else source.func.value, env)  # type: ignore[attr-defined]
    if isinstance(source, ast.Call) and word in ("values", "children", "reversed"):
        return _each(target, source.args[0] if source.args else source.func.value, env)  # type: ignore[attr-defined]
    path = _path(source, env)
    return [(target, None if path is None else (*path, "*"))]


def _harmless(tree: ast.AST) -> set[ast.AST]:
    """Expressions of which only the type, the place or the presence is asked for."""
    found: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in HARMLESS:
            found.add(node.value)
        if isinstance(node, ast.Call):
            word = getattr(node.func, "id", "") in ASKING or getattr(node.func, "attr", "") in LIKE
            found.update(node.args if word else ())
        if isinstance(node, ast.Compare) and all(isinstance(op, ast.Is | ast.IsNot) for op in node.ops):
            found.update([node.left, *node.comparators])
    return found


def _compiled(function: Callable[..., Any], me: str) -> Iterator[Path]:
    """The same from the byte code of a function whose source is not there, but for names given to modules."""
    path: Path | None = None
    for step in dis.get_instructions(function):
        if path is not None and step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            path = (*path, str(step.argval))
            continue
        present = "NONE" in step.opname or (step.opname == "LOAD_CONST" and step.argval is None)
        ends = [n for n, word in enumerate(path or ()) if word in PARTS]
        if path and ends and not (present or set(path[ends[0] + 1 :]) & HARMLESS):
            yield path[: ends[0] + 1]
        last = step.argval[-1] if isinstance(step.argval, tuple) and step.argval else step.argval
        path = () if step.opname.startswith("LOAD_FAST") and last == me else None
