"""Merged numbers are put in their place, in the type of the base, or refused: no infinity is made on the way."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor


def check_place(name: str, target: Tensor, like: Tensor) -> Tensor:
    """Memory with a place of its own for each entry of a tensor.

    Raises:
        TypeError: no tensor.
        ValueError: another shape, another kind of number, or entries that share memory (an expanded tensor).
    """
    if not isinstance(target, Tensor):
        raise TypeError(f"place: expected a tensor for {name}, got {type(target).__name__}")
    kind = (tuple(target.shape), target.is_floating_point())
    if kind != (tuple(like.shape), like.is_floating_point()):
        expected = f"shape {tuple(like.shape)} and {like.dtype}"
        raise ValueError(f"place: expected {expected} for {name}, got {kind[0]} and {target.dtype}")
    reach = 0
    for stride, size in sorted((step, n) for step, n in zip(target.stride(), target.shape, strict=True) if n > 1):
        if stride <= reach and target.numel():
            raise ValueError(f"place: expected memory for each entry of {name}, got a tensor whose entries share it")
        reach += stride * (size - 1)
    return target


def store(name: str, target: Tensor, y: Tensor, tensors: Sequence[Tensor]) -> None:
    """Round ``y``, made of ``tensors``, into ``target``; where it is NaN and they all agree, they have their way.

    Raises:
        ValueError: a number that the target's type cannot hold, or one that is not finite though the weights are.
    """
    if not y.numel() or fits(y, target.dtype):
        target.copy_(y)
        return
    first, *rest = (t.to(y.device) for t in tensors)
    alike = functools.reduce(torch.logical_and, [same(first, t) for t in rest], torch.ones_like(y, dtype=torch.bool))
    y = torch.where(y.isnan() & alike, first.to(y), y)
    finite = functools.reduce(torch.logical_and, [t.isfinite() for t in (first, *rest)])
    stored = y.to(target.dtype).to(y.dtype)
    held = torch.where(y.isinf(), y == stored, stored.isfinite() & (y.abs() <= limit(target.dtype)))
    lost = torch.where(finite, ~held | ~y.isfinite(), ~held & ~y.isnan())
    if lost.any():
        raise ValueError(
            f"rule: expected numbers that {target.dtype} can hold for {name}, got {int(lost.sum())} that it cannot, "
            f"such as {y[lost][0].item():g}"
        )
    target.copy_(y)


def fits(y: Tensor, dtype: torch.dtype) -> bool:
    """Whether every entry is finite, and stays so in another type; one reading of ``y``."""
    low, high = (end.item() for end in y.aminmax())
    most = limit(dtype)
    return -most < low and high < most  # neither of a NaN


@functools.lru_cache
def limit(dtype: torch.dtype) -> float:
    """What rounds to the largest number of a type: that and half a step, where float8 saturates and others overflow."""
    info = torch.finfo(dtype)
    half = info.eps * 2.0 ** (math.floor(math.log2(info.max)) - 1)
    return min(info.max + half, torch.finfo(torch.float64).max)


def all_finite(y: Tensor) -> bool:
    return all(math.isfinite(end.item()) for end in y.aminmax())


def same(a: Tensor, b: Tensor) -> Tensor:
    """Where two tensors have the same number, or both none."""
    return (a == b) | (a.isnan() & b.isnan())
