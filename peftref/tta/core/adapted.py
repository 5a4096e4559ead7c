"""What the methods of this part share: normalisation layers found and switched, the frame of an adapting model."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..._checks import class_scores
from .copies import own_copy

__all__ = [
    "Adapted",
    "Learning",
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

    The copy is taken without the wrappers of torch, see :func:`~peftref.tta.core.copies.own_copy`.
    The network inside always runs in eval mode, whatever ``train()`` is called with: dropout and stochastic depth would
    add noise to every prediction, and normalisation is decided by :func:`use_batch_statistics`, not by the flag.
    """

    smallest = 1  # samples that a batch must have

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.source = own_copy(model)
        self.training = False

    def train(self, mode: bool = True) -> Adapted:
        return self  # see the class docstring

    def reset(self) -> None:
        """Forget every batch: parameters, buffers, flags, optimiser and random state are those of construction."""
        raise NotImplementedError

    def check(self, x: Tensor) -> None:
        """Refuse, before anything changes, an input the method cannot adapt to."""
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = f"a tensor of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"x: expected a floating-point tensor (N, ...), got {got}")
        if x.ndim < 2:
            raise ValueError(f"x: expected a batch (N, ...), got shape {tuple(x.shape)}")
        if 0 < len(x) < self.smallest:
            raise ValueError(
                f"x: expected at least {self.smallest} samples, because BatchNorm takes the statistics of the batch; "
                f"got {len(x)}"
            )

    def empty(self, model: nn.Module, x: Tensor) -> Tensor:
        """Logits ``(0, K)`` of an empty batch: the width is read off two blank samples, and nothing adapts."""
        with torch.no_grad():
            logits = self.logits(model, x.new_zeros(2, *x.shape[1:]))
        torch.clear_autocast_cache()  # it would go on using weights cast here, without a gradient
        return logits[:0]

    def logits(self, model: nn.Module, x: Tensor) -> Tensor:
        """What ``model`` says of ``x``, known to be logits ``(N, K)``."""
        return class_scores("model", model(x), len(x))


class Learning(Adapted):
    """A method that has an ``optimizer``: its state, and that of random generators, is part of the ``state_dict``.

    So a run that is saved, loaded into a method built with the same settings, and resumed, goes on as it would have.
    Random are ``self.generator`` and ``self.views.generator``, where they exist. The state is a tensor of the bytes of
    a file: what copies, moves or stores the tensors of a ``state_dict`` (safetensors) takes it as well.
    """

    optimizer: torch.optim.Optimizer
    wide: tuple[str, ...] = ()  # parts that keep their precision when the method is moved to a narrower type

    def get_extra_state(self) -> Tensor:
        """State of optimiser and generators, uint8, for ``state_dict``."""
        states = [generator.get_state() for generator in self._generators()]
        file = io.BytesIO()
        torch.save({"optimizer": self.optimizer.state_dict(), "generators": states}, file)
        return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """What :meth:`get_extra_state` gave.

        Args:
            state: uint8, on any device.

        Raises:
            ValueError: another number of generators, as a method with other views has.
        """
        saved = torch.load(io.BytesIO(state.cpu().numpy().tobytes()), map_location="cpu", weights_only=True)
        generators = self._generators()
        if len(saved["generators"]) != len(generators):
            got = f"{len(saved['generators'])} for {len(generators)}"
            raise ValueError(f"state: expected a state for each random generator of the method, got {got}")
        self.optimizer.load_state_dict(saved["optimizer"])
        for generator, its_state in zip(generators, saved["generators"], strict=True):
            generator.set_state(its_state)

    def _generators(self) -> list[torch.Generator]:
        found = (getattr(owner, "generator", None) for owner in (self, getattr(self, "views", None)))
        return [generator for generator in found if isinstance(generator, torch.Generator)]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Learning:
        for name, part in self.named_children():
            part._apply(functools.partial(_no_narrower, fn) if name in self.wide else fn, recurse)
        self.optimizer.load_state_dict(self.optimizer.state_dict())  # moments follow their weights in device and type
        return self


def _no_narrower(fn: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    moved = fn(t)
    return t.to(moved.device) if t.is_floating_point() and moved.element_size() < t.element_size() else moved


def gradient_step(loss: Tensor, optimizer: torch.optim.Optimizer) -> bool:
    """One optimiser step on ``loss``; where the loss or a gradient is not finite, the weights are left alone.

    Returns:
        Whether the step was taken.

    Raises:
        ValueError: the loss depends on none of the weights.
        FloatingPointError: float16 weights that are not finite after the step; they are what they were before it.
    """
    narrow = [p for group in optimizer.param_groups for p in group["params"] if p.dtype == torch.float16]
    before = [p.detach().clone() for p in narrow]
    try:
        finite = bool(loss.isfinite())  # one broken batch must not poison the model for the rest of the stream
        if finite:
            gradients = _gradients(loss, optimizer)
            finite = bool(torch.nn.utils.get_total_norm(gradients, math.inf).isfinite())
        if finite:
            optimizer.step()
            torch.clear_autocast_cache()  # a caller's autocast would go on using the weights of before the step
        if not all(p.isfinite().all() for p in narrow):  # Adam's squared gradients vanish in float16
            with torch.no_grad():
                torch._foreach_copy_(narrow, before)
            raise FloatingPointError(
                "model: expected weights that stay finite, got a step in float16 after which some are not; adapt in "
                "bfloat16, or in float32 under autocast"
            )
    finally:
        optimizer.zero_grad(set_to_none=True)
    return finite


def _gradients(loss: Tensor, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    if loss.requires_grad:
        loss.backward()
    gradients = [p.grad for p in weights if p.grad is not None]
    if not gradients:
        raise ValueError("model: expected logits that depend on the weights to adapt, got some that depend on none")
    return gradients


def freeze(parameters: Iterable[nn.Parameter], trainable: Iterable[nn.Parameter]) -> None:
    """Only ``trainable`` keep gradients."""
    for p in parameters:
        p.requires_grad_(False)
    for p in trainable:
        p.requires_grad_(True)
