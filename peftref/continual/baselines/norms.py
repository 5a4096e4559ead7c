r"""Normalisation layers exchanged for one another: the baselines of a network with BatchNorm.

Group normalisation has no running statistics, so nothing of it is recent. Continual normalisation normalises each
image by its groups first, and the batch after that. Sources: Wu and He, "Group Normalization", ECCV 2018, arXiv
1803.08494; Pham, Liu, Hoi, "Continual Normalization: Rethinking Batch Normalization for Online Continual Learning",
ICLR 2022, arXiv 2203.16102.

>>> net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6))
>>> replace_batch_norms(net, group_norm)[1].num_groups  # the largest divisor of 32 that divides 6 channels
2
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Hashable
from typing import cast

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...adapters.core.bypass import bypassed
from ..core._steps import in_mode

__all__ = ["continual_norm", "group_norm", "replace_batch_norms"]


def replace_batch_norms(model: nn.Module, make: Callable[[_BatchNorm], nn.Module]) -> nn.Module:
    """Put ``make(layer)`` in the place of every BatchNorm layer of ``model``; a layer used twice is made once.

    Of a layer that does more than to normalise, such as timm's ``BatchNormAct2d``, ``make`` is given the BatchNorm
    alone, and what its children do afterwards (dropout, activation) comes after what was made.

    Returns:
        The same ``model``, changed in place; or what ``make`` gave, where the model is itself a BatchNorm layer.

    Raises:
        ValueError: no BatchNorm layer, one whose ``forward`` does what nobody knows, or one whose weights are used
            without a call. Nothing is exchanged unless every layer could be made.
    """
    places = [(name, m) for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, _BatchNorm)]
    if not places:
        raise ValueError("model: expected at least one BatchNorm layer, got none")
    bare = {
        f"{name}.{child}".lstrip(".")
        for name, m in model.named_modules()
        for child in bypassed(cast(Hashable, type(m)))
    }
    if uncalled := [name for name, _ in places if name in bare]:
        raise ValueError(f"model: expected layers that are called, got {uncalled}, whose weights are used alone")
    made = {m: _with_the_rest(m, make).train(m.training) for m in dict.fromkeys(m for _, m in places)}
    for name, m in places:
        if not name:
            return made[m]
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, made[m])
    return model


def group_norm(layer: _BatchNorm, groups: int = 32) -> nn.GroupNorm:
    """Group normalisation of the layer's channels, scale and shift starting at 1 and 0.

    Args:
        layer: whose channels are normalised in groups.
        groups: the largest divisor that it has in common with the channels is used (32: both papers). One channel in
            a group makes instance normalisation, whose mean over the pixels says nothing: a thin network needs fewer.

    Raises:
        TypeError: a layer that does more than to normalise; :func:`replace_batch_norms` keeps what it does.
    """
    if not _plain(layer):
        raise TypeError(f"layer: expected a BatchNorm of torch, got {type(layer).__name__}; use replace_batch_norms")
    return nn.GroupNorm(_common(groups, layer.num_features), layer.num_features, layer.eps)


def continual_norm(layer: _BatchNorm, groups: int = 32) -> nn.Sequential:
    """Continual normalisation: the groups of each image, without scale and shift, then ``layer`` itself.

    Args:
        layer: which normalises the batch after them.
        groups: see :func:`group_norm`.
    """
    channels = layer.num_features
    return nn.Sequential(nn.GroupNorm(_common(groups, channels), channels, layer.eps, affine=False), layer)


def _plain(layer: nn.Module) -> bool:
    return not isinstance(layer, _BatchNorm) or type(layer).__module__ == _BatchNorm.__module__


def _with_the_rest(layer: _BatchNorm, make: Callable[[_BatchNorm], nn.Module]) -> nn.Module:
    """``make`` of the BatchNorm alone, and after it the children of a layer that has more to it."""
    if _plain(layer):
        return make(layer)
    alone = copy.copy(layer)
    alone.__class__ = next(kind for kind in type(layer).__mro__ if kind.__module__ == _BatchNorm.__module__)
    alone._modules = {}
    rest = list(layer.children())
    _check_same(layer, nn.Sequential(alone, *rest))
    made = make(alone)
    return nn.Sequential(made, *rest) if rest else made


@torch.no_grad()
def _check_same(layer: _BatchNorm, parts: nn.Module) -> None:
    """Refuse a layer that gives anything else in eval mode than its parts one after the other."""
    pixels = 0 if isinstance(layer, nn.BatchNorm1d) else 3 if isinstance(layer, nn.BatchNorm3d) else 2
    like = next(iter([*layer.parameters(), *layer.buffers()]), torch.empty(0))
    side = torch.linspace(-8, 8, 6 * layer.num_features * 2**pixels, device=like.device, dtype=like.dtype)
    x = side.reshape(6, layer.num_features, *[2] * pixels)
    with in_mode(layer, False), in_mode(parts, False):
        whole = layer(x)
        try:
            same = torch.allclose(whole, parts(x), equal_nan=True)
        except (RuntimeError, TypeError, ValueError):  # a child that is not called, or not like this
            same = False
    if not same:
        kind = type(layer).__name__
        raise ValueError(f"layer: expected BatchNorm and then its children, got a {kind} that does more")


def _common(groups: int, channels: int) -> int:
    if groups < 1:
        raise ValueError(f"groups: expected a positive integer, got {groups!r}")
    return math.gcd(groups, channels)
