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

import functools
import inspect
from collections.abc import Collection, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from ._reads import names_read, weights_read

__all__ = ["bypassed", "call_with_taps"]

# Words in the names of methods that run before or after a model is used, not within.
SETUP = {
    *("convert", "deploy", "export", "fuse", "init", "initialize", "load", "prune"),
    *("quantize", "reparameterize", "repr", "reset", "resize", "set", "tie"),
}


def call_with_taps(
    module: nn.Module, taps: Collection[str], *args: Any, **kwargs: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """The output of a module, and with which input it called some of its children.

    What runs is a shallow copy, which shares every child but the tapped ones. So no hook is set and nothing
    is kept: not by a call that fails, not in another thread, and a compiler sees ordinary modules. Only a module with a
    ``forward`` set on it, which knows no copy, is itself given the tapped children for the time of the call.

    Raises:
        RuntimeError: a child that is not called, or one that the module calls without a graph where a gradient is
            wanted, as within ``checkpoint(use_reentrant=True)``: what it gets would be a constant.
    """
    if not taps:
        return module(*args, **kwargs), {}
    inputs: dict[str, Tensor] = {}
    found = {n: _Tap(cast(nn.Module, module._modules[n]), n, inputs) for n in taps}
    if "forward" in vars(module):
        y = _call_with(module, found, *args, **kwargs)
    else:
        twin = object.__new__(type(module))
        twin.__dict__.update(module.__dict__)
        twin.__dict__["_modules"] = {**module._modules, **found}
        y = twin(*args, **kwargs)
    uncalled = [n for n in taps if n not in inputs]
    if uncalled:
        raise RuntimeError(f"tap: expected a child that the {type(module).__name__} calls, got {', '.join(uncalled)}")
    cut = [n for n, tap in found.items() if torch.is_grad_enabled() and not tap.graph]
    if cut and any(isinstance(t, Tensor) and t.requires_grad for t in (*args, *kwargs.values(), *module.parameters())):
        raise RuntimeError(
            f"tap: expected a gradient for what {', '.join(cut)} gets, got none from a {type(module).__name__} that "
            "runs without a graph, as within checkpoint(use_reentrant=True); set use_reentrant=False"
        )
    return y, inputs


def _call_with(module: nn.Module, children: Mapping[str, nn.Module], *args: Any, **kwargs: Any) -> Tensor:
    before = dict(module._modules)
    try:
        module._modules.update(children)
        y: Tensor = module(*args, **kwargs)
        return y
    finally:
        module._modules.update(before)


class _Tap(nn.Module):
    """Stands for a child during one call, and writes down its input."""

    def __init__(self, child: nn.Module, name: str, inputs: dict[str, Tensor]) -> None:
        super().__init__()
        self.child = child
        self.name = name
        self.inputs = inputs
        self.graph = True

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("child"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        self.inputs[self.name] = args[0] if args else next(iter(kwargs.values()))
        self.graph = torch.is_grad_enabled()
        y: Tensor = self.child(*args, **kwargs)
        return y


@functools.cache
def bypassed(parent: type[nn.Module]) -> frozenset[str]:
    """Layers whose weights the parent's methods use themselves, so that an adapter might never be called.

    Found in the source of ``forward`` and of all other methods, unless they, or those that call them, only set a module
    up (``__init__``, ``reset_parameters``, ``fuse``): ``self.name.weight`` or ``.bias`` for more than to ask its type
    or place, under other names too and in functions that are given the layer. A name may be a path, with ``*`` for each
    of a list.
    """
    own = {n for n, found in inspect.getmembers_static(parent) if inspect.isfunction(found)} - set(dir(nn.Module))
    setup = {n for n in own | {"__init__"} if SETUP & set(n.strip("_").split("_"))}
    only_there = setup.union(*(names_read(parent, n) for n in setup))
    return frozenset().union(*(weights_read(parent, n) for n in {"forward"} | own - only_there))
