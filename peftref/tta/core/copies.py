"""A copy of a model that shares nothing with it, as it is without torch's wrappers."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any

from torch import nn

from ..._wrapped import unwrapped

__all__ = ["own_copy"]


def own_copy(model: nn.Module) -> nn.Module:
    """A deep copy without compilation, parallel and checkpoint wrappers, outside and within; in eval mode.

    A compiled graph need not notice a hook or a switched layer, and replicas would each take the statistics of their
    part of a batch.

    Raises:
        TypeError: no module.
        ValueError: a ``forward`` set on an instance that would go on calling the original.

    >>> import torch
    >>> list(own_copy(nn.DataParallel(nn.Linear(2, 1))).state_dict())
    ['weight', 'bias']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    inner = unwrapped(model)
    ours = set(map(id, inner.modules()))
    for name, module in inner.named_modules():
        if unwrapped(module) is module and _captures(module.__dict__.get("forward"), ours):
            raise ValueError(
                "model: expected modules whose copies run themselves, got one with a forward bound to the original, "
                f"{name!r}; compile by torch.compile(model) or model.compile()"
            )
    copied = copy.deepcopy(inner)
    for module in list(copied.modules()):
        for name, child in list(module.named_children()):
            if unwrapped(child) is not child:
                setattr(module, name, unwrapped(child))
    return copied.eval()


def _captures(function: Any, ours: set[int], depth: int = 4) -> bool:
    """Whether a function, which a deep copy shares, holds on to one of the modules; bound methods are copied."""
    if not isinstance(function, types.FunctionType) or not depth:
        return False
    held = [cell.cell_contents for cell in function.__closure__ or () if cell != types.CellType()]
    held += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    held += [value.__self__ for value in held if isinstance(value, types.MethodType)]
    inner: list[Callable[..., Any]] = [value for value in held if isinstance(value, types.FunctionType)]
    return any(id(value) in ours for value in held) or any(_captures(f, ours, depth - 1) for f in inner)
