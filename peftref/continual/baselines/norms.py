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

import math
from collections.abc import Callable

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["continual_norm", "group_norm", "replace_batch_norms"]


def replace_batch_norms(model: nn.Module, make: Callable[[_BatchNorm], nn.Module]) -> nn.Module:
    """Put ``make(layer)`` in the place of every BatchNorm layer of ``model``; a layer used twice is made once.

    Returns:
        The same ``model``, changed in place; or what ``make`` gave, where the model is itself a BatchNorm layer.

    Raises:
        ValueError: no BatchNorm layer. Nothing is exchanged unless every layer could be made.
    """
    places = [(name, m) for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, _BatchNorm)]
    if not places:
        raise ValueError("model: expected at least one BatchNorm layer, got none")
    made = {m: make(m).train(m.training) for m in dict.fromkeys(m for _, m in places)}
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
    """
    return nn.GroupNorm(_common(groups, layer.num_features), layer.num_features, layer.eps)


def continual_norm(layer: _BatchNorm, groups: int = 32) -> nn.Sequential:
    """Continual normalisation: the groups of each image, without scale and shift, then ``layer`` itself.

    Args:
        layer: which normalises the batch after them.
        groups: see :func:`group_norm`.
    """
    channels = layer.num_features
    return nn.Sequential(nn.GroupNorm(_common(groups, channels), channels, layer.eps, affine=False), layer)


def _common(groups: int, channels: int) -> int:
    if groups < 1:
        raise ValueError(f"groups: expected a positive integer, got {groups!r}")
    return math.gcd(groups, channels)
