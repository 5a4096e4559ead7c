"""A step of an optimiser as every learner of this part takes it, and what is made sure of before the first one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..._wrapped import unwrapped


def descend(loss: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    """One step on the loss; returns it without a graph."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    torch.clear_autocast_cache()  # a caller's autocast would go on with the weights of before the step
    return loss.detach()


def finite_images(x: Tensor, name: str = "x") -> None:
    """Refuse images of which one would spoil every weight.

    Raises:
        ValueError: NaN or infinity in one of them.
    """
    if not x.isfinite().all():
        broken = int((~x.isfinite()).flatten(1).any(1).sum()) if x.ndim > 1 else 1
        raise ValueError(f"{name}: expected finite numbers, got NaN or infinity in {broken} of {len(x)} images")


def tensor_of(output: Any, what: str = "logits (N, K)") -> Tensor:
    """What a model gave, if it is a tensor.

    Raises:
        TypeError: a tuple, or an object that holds the tensor.
    """
    if not isinstance(output, Tensor):
        raise TypeError(f"model: expected {what} as a tensor, got {type(output).__name__}")
    return output


def classes_in(logits: Tensor) -> int:
    """K of logits ``(N, K)`` or, of each pixel, ``(N, K, ...)``.

    Raises:
        ValueError: fewer axes.
    """
    if logits.ndim < 2:
        raise ValueError(f"logits: expected shape (N, K) or (N, K, ...), got {tuple(logits.shape)}")
    return logits.shape[1]


def timms(model: nn.Module) -> Any:
    """The model without wrappers, if it speaks timm's protocol, of which ``nn.Module`` says nothing.

    Raises:
        ValueError: it does not.
    """
    inner = unwrapped(model)
    if not (hasattr(inner, "forward_features") and hasattr(inner, "forward_head")):
        raise ValueError(f"model: expected timm's forward_features and forward_head, got a {type(inner).__name__}")
    return inner


def refuse_lonely_images(model: nn.Module, sizes: Sequence[int], batch_size: int, x: Tensor) -> None:
    """Refuse batches of one image where BatchNorm cannot train on one; the model is tried, and left as it was.

    A rest of one image is none: it comes with the batch before it, see :func:`peftref.fitting.batches`.

    Args:
        model: to be trained.
        sizes: images of each task.
        batch_size: of each batch but perhaps the last.
        x: one image, ``(1, ...)``.

    Raises:
        ValueError: it refuses one image.
    """
    normed = any(hasattr(m, "running_mean") for m in model.modules())
    if not normed or (batch_size > 1 and 1 not in sizes):
        return
    inner = unwrapped(model)
    buffers = {name: b.clone() for name, b in inner.named_buffers()}
    try:
        with in_mode(inner, True), torch.no_grad(), torch.random.fork_rng():
            functional_call(inner, buffers, (x,))
    except ValueError as error:
        got = f"batch_size {batch_size} and tasks of {list(sizes)} images"
        raise ValueError(f"tasks: expected two images or more in every batch ({error}), got {got}") from None


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Train or eval mode; afterwards every module is in its own mode again, whatever happened."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
