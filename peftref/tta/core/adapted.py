"""What the methods of this part share: normalisation layers found and switched, the frame of an adapting model."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = [
    "Adapted",
    "OptimizerFactory",
    "adapting",
    "batch_norms",
    "freeze",
    "gradient_step",
    "norm_affine",
    "use_batch_statistics",
]

OptimizerFactory = Callable[..., torch.optim.Optimizer]
Method = TypeVar("Method", bound=nn.Module)


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """Every BatchNorm layer (1d, 2d, 3d, synchronised) of ``model``, in ``modules()`` order."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm)]


def norm_affine(model: nn.Module) -> list[nn.Parameter]:
    """Scales and shifts of every batch, group, layer and instance normalisation layer, each tied tensor once."""
    kinds = (_BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.modules.instancenorm._InstanceNorm)
    found = (p for m in model.modules() if isinstance(m, kinds) for p in m.parameters(recurse=False))
    return list(dict.fromkeys(found))


def use_batch_statistics(model: nn.Module) -> nn.Module:
    """Make BatchNorm normalise by the statistics of the batch, in ``train()`` and in ``eval()`` alike. In place."""
    for m in batch_norms(model):
        m.track_running_stats = False
        m.running_mean = m.running_var = m.num_batches_tracked = None  # BatchNorm's sign for "of the batch"
    return model


def adapting(forward: Callable[[Method, Tensor], Tensor]) -> Callable[[Method, Tensor], Tensor]:
    """Let ``forward`` take gradients even inside a caller's ``no_grad`` or ``inference_mode`` evaluation loop."""

    @functools.wraps(forward)
    def wrapper(self: Method, x: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            return forward(self, x.clone() if isinstance(x, Tensor) and x.is_inference() else x)

    return wrapper


class Adapted(nn.Module):
    """Frame of a method that adapts a copy of ``model``: the source is kept aside, untouched, for ``reset()``.

    The network inside always runs in eval mode, whatever ``train()`` is called with: dropout and stochastic depth would
    add noise to every prediction, and normalisation is decided by :func:`use_batch_statistics`, not by the flag.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        self.source = copy.deepcopy(model).eval()
        self.training = False

    def train(self, mode: bool = True) -> Adapted:
        return self  # see the class docstring

    def reset(self) -> None:
        """Forget every batch: parameters, buffers, flags, optimiser and random state are those of construction."""
        raise NotImplementedError

    def check(self, x: Tensor, smallest: int = 1) -> None:
        """Refuse, before anything changes, an input the method cannot adapt to."""
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = f"a tensor of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"x: expected a floating-point tensor (N, ...), got {got}")
        if x.ndim < 2:
            raise ValueError(f"x: expected a batch (N, ...), got shape {tuple(x.shape)}")
        if 0 < len(x) < smallest:
            raise ValueError(
                f"x: expected at least {smallest} samples, because BatchNorm takes the statistics of the batch; "
                f"got {len(x)}"
            )

    def empty(self, model: nn.Module, x: Tensor) -> Tensor:
        """Logits ``(0, K)`` of an empty batch: the width is read off two blank samples, and nothing adapts."""
        with torch.no_grad():
            logits: Tensor = model(x.new_zeros(2, *x.shape[1:]))
        return logits[:0]


def gradient_step(loss: Tensor, optimizer: torch.optim.Optimizer) -> bool:
    """One optimiser step on ``loss``; where the loss or a gradient is not finite, the weights are left alone.

    Returns:
        Whether the step was taken.
    """
    try:
        finite = bool(loss.isfinite())  # one broken batch must not poison the model for the rest of the stream
        if finite:
            loss.backward()
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            finite = bool(torch.nn.utils.get_total_norm(gradients, math.inf).isfinite())
        if finite:
            optimizer.step()
    finally:
        optimizer.zero_grad(set_to_none=True)
    return finite


def freeze(parameters: Iterable[nn.Parameter], trainable: Iterable[nn.Parameter]) -> None:
    """Only ``trainable`` keep gradients."""
    for p in parameters:
        p.requires_grad_(False)
    for p in trainable:
        p.requires_grad_(True)
