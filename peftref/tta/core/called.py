"""Whether the BatchNorm layers of a model are called by it, so that what is switched in them has an effect."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .adapted import batch_norms

__all__ = ["check_called"]


def check_called(model: nn.Module, x: Tensor) -> None:
    """Pass a batch and refuse a model that uses the statistics of layers without calling them (``F.batch_norm``).

    A layer that is not used at all, such as one of an auxiliary classifier, does no harm: with NaN for its mean the
    outputs stay what they are.

    Raises:
        ValueError: no BatchNorm layer is called, or one is bypassed.
    """
    layers = {name: m for name, m in model.named_modules() if m in batch_norms(model)}
    seen: set[nn.Module] = set()
    hooks = [m.register_forward_pre_hook(lambda m, _: seen.add(m)) for m in layers.values()]
    try:
        out = model(x)
    finally:
        for hook in hooks:
            hook.remove()
    bypassed = [name for name, m in layers.items() if m not in seen]
    if seen and not any(_matters(model, layers[name], x, out) for name in bypassed):
        return
    raise ValueError(f"model: expected BatchNorm layers that its forward calls, got {bypassed[:3]}, which it bypasses")


def _matters(model: nn.Module, layer: Any, x: Tensor, out: Any) -> bool:
    """Whether a NaN in the layer's running mean reaches the output."""
    if layer.running_mean is None or not isinstance(out, Tensor):
        return False
    kept = layer.running_mean
    layer.running_mean = torch.full_like(kept, math.nan)
    try:
        return not torch.equal(model(x).isnan(), out.isnan())
    finally:
        layer.running_mean = kept
