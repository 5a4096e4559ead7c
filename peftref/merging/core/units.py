"""Which tensors to patch: the layers of a network in order, found from its structure.

>>> from peftref.models import SmallCNN
>>> net = SmallCNN()
>>> len(units(net))
5
>>> first(units(net), 2)
['stages.0.0.weight', 'stages.0.1.weight', 'stages.0.1.bias',
 'stages.1.0.weight', 'stages.1.1.weight', 'stages.1.1.bias']
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..._checks import integer
from ..._wrapped import unwrapped
from .aligned import check_names

__all__ = ["first", "units"]

Conv = nn.modules.conv._ConvNd


def units(model: nn.Module) -> list[list[str]]:
    """The layers that a patch may take, from the input on: lists of parameter names, in order of registration.

    A unit is a convolution with its bias and the normalisation that follows it, or a whole residual block, which is any
    submodule with two or more convolutions of its own and no linear layer. The head is never among them: no linear
    layer is, nor the last convolution of a network that has no linear layer. Where order of registration is not order
    of execution, write the list yourself: all other functions take any names. The names are those of the module itself,
    not of a wrapper such as ``torch.compile``.

    Raises:
        TypeError: no module.
        ValueError: no convolution before the head.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    model = unwrapped(model)
    modules = dict(model.named_modules())
    blocks = [name for name, m in modules.items() if name and _is_block(m)]
    found: dict[str, list[str]] = {}
    unit = None  # the block or layer that parameters which are no convolution's now belong to
    for name, _ in model.named_parameters():  # a tied tensor appears once
        owner = name.rpartition(".")[0]
        block = next((b for b in blocks if f"{owner}.".startswith(f"{b}.")), None)
        if block is not None:
            unit = block
        elif isinstance(modules[owner], Conv):
            unit = owner
        elif isinstance(modules[owner], nn.Linear):
            unit = None
        if unit is not None:
            found.setdefault(unit, []).append(name)
    layers = list(found)
    if layers and isinstance(modules[layers[-1]], Conv) and not any(isinstance(m, nn.Linear) for m in modules.values()):
        del found[layers[-1]]
    if not found:
        raise ValueError("model: expected a convolution before the head, got none; list the tensors' names yourself")
    return list(found.values())


def first(units: Sequence[Sequence[str]], k: int) -> list[str]:
    """Names of the first ``k`` units, in one list; a larger ``k`` than there are units means all of them.

    >>> first([["stem.weight", "stem.bias"], ["conv.weight"], ["last.weight"]], 2)
    ['stem.weight', 'stem.bias', 'conv.weight']
    """
    k = integer("k", k, 0)
    units = [check_names(unit, "units") for unit in units]
    return [name for unit in units[:k] for name in unit]


def _is_block(m: nn.Module) -> bool:
    own = sum(isinstance(child, Conv) for child in m.children())
    container = isinstance(m, (nn.Sequential, nn.ModuleList, nn.ModuleDict))
    return own >= 2 and not container and not any(isinstance(x, nn.Linear) for x in m.modules())
