"""Modules inside a frozen block: what a child is called with, and children whose weights are used without a call.

An adapter on a whole block may read what one of its children gets (:func:`call_with_taps`). An adapter on a child
only acts if the block calls that child; some blocks, such as ``MultiheadAttention``, use its weights themselves, which
:func:`bypassed` finds in their source.

>>> import torch
>>> from torch import nn
>>> block = nn.Sequential(nn.Linear(2, 3), nn.Tanh())
>>> y, inputs = call_with_taps(block, ["1"], torch.ones(4, 2))
>>> torch.equal(inputs["1"].tanh(), y), torch.equal(y, block(torch.ones(4, 2)))
(True, True)
>>> sorted(bypassed(nn.MultiheadAttention)), sorted(bypassed(nn.Sequential))
(['out_proj'], [])
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Collection
from typing import Any, cast

from torch import Tensor, nn

__all__ = ["bypassed", "call_with_taps"]


def call_with_taps(
    module: nn.Module, taps: Collection[str], x: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """The output of a module, and with which input it called some of its children.

    What runs is a shallow copy, which shares every child but the tapped ones. So no hook is set and nothing
    is kept: not by a call that fails, not in another thread, and a compiler sees ordinary modules.

    Raises:
        RuntimeError: a child that is not called.
    """
    if not taps:
        return module(x, *args, **kwargs), {}
    inputs: dict[str, Tensor] = {}
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    taps_by_name = {n: _Tap(cast(nn.Module, module._modules[n]), n, inputs) for n in taps}
    twin.__dict__["_modules"] = {**module._modules, **taps_by_name}
    y = twin(x, *args, **kwargs)
    uncalled = [n for n in taps if n not in inputs]
    if uncalled:
        raise RuntimeError(f"tap: expected a child that the {type(module).__name__} calls, got {', '.join(uncalled)}")
    return y, inputs


class _Tap(nn.Module):
    """Stands for a child during one call, and writes down its input."""

    def __init__(self, child: nn.Module, name: str, inputs: dict[str, Tensor]) -> None:
        super().__init__()
        self.child = child
        self.name = name
        self.inputs = inputs

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("child"), name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.inputs[self.name] = x
        y: Tensor = self.child(x, *args, **kwargs)
        return y


@functools.cache
def bypassed(parent: type[nn.Module]) -> frozenset[str]:
    """Layers of which the parent's ``forward`` uses the weights itself, so that an adapter might never be called.

    Found in its source: ``self.name.weight`` or ``.bias`` for more than to ask its type or place.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(parent.forward)))
    except (OSError, TypeError, SyntaxError):  # no source, so nothing to say
        return frozenset()
    harmless = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ("dtype", "device", "shape", "ndim", "requires_grad"):
            harmless.add(node.value)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "hasattr"):
            harmless.update(node.args)
    return frozenset(
        node.value.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in ("weight", "bias") and node not in harmless
        if isinstance(node.value, ast.Attribute) and getattr(node.value.value, "id", "") == "self"
    )
