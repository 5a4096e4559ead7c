"""Robust weight signatures twice over: as a specification, and with the arithmetic of the published code.

``loop_signature`` is the definition in lists of Python numbers, with exact sums. ``published_*`` follow what the
official code computes, written from a description of it: a d x d projector for each tensor, weights that act before the
projection and again after it, one quantisation range for all corruptions, BatchNorm found by the names of its tensors.
``vector_signature`` is the projection in two dot products, one tensor at a time with a new tensor at each step. The
benchmark's peers are ``published_signature`` and ``vector_signature``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

State = Mapping[str, Tensor]


# --- the specification ------------------------------------------------------------------------------------------------
def loop_signature(pretrained: list[float], clean: list[float], robust: list[float]) -> list[float]:
    """tau_c less its part along tau_s, both measured from the pretrained weights; tau_c where tau_s is zero."""
    tau_s = [s - z for s, z in zip(clean, pretrained, strict=True)]
    tau_c = [c - z for c, z in zip(robust, pretrained, strict=True)]
    square = math.fsum(s * s for s in tau_s)
    share = math.fsum(c * s for c, s in zip(tau_c, tau_s, strict=True)) / square if square else 0.0
    return [c - share * s for c, s in zip(tau_c, tau_s, strict=True)]


def loop_quantise(x: list[float], levels: int, kind: str) -> list[float]:
    """Each entry moved to the nearest of the levels, by comparing it with all of them on the scale of ``kind``."""
    g, inverse = {
        "linear": (lambda v: v, lambda v: v),
        "tanh": (math.tanh, math.atanh),
        "log": (math.log2, lambda v: 2.0**v),
    }[kind]
    sizes = [abs(v) for v in x if v] if kind == "log" else x
    if not sizes:
        return list(x)
    m = levels // 2 if kind == "log" else levels
    low, high = g(min(sizes)), g(max(sizes))
    grid = [low + i * (high - low) / (m - 1) for i in range(m)] if m > 1 else [(low + high) / 2]

    def nearest(v: float) -> float:
        return inverse(min(grid, key=lambda level: abs(level - g(v))))

    return [math.copysign(nearest(abs(v)), v) if v else 0.0 for v in x] if kind == "log" else [nearest(v) for v in x]


# --- the published arithmetic -----------------------------------------------------------------------------------------
def projector(a: Tensor) -> Tensor:
    """The d x d matrix that removes what is parallel to ``a``: NaN for a zero vector, 4 d^2 bytes for any."""
    a = a.flatten()
    return torch.eye(len(a), dtype=a.dtype) - torch.outer(a, a) / torch.dot(a, a)


def published_signature(pretrained: State, clean: State, robust: State, names: Sequence[str]) -> dict[str, Tensor]:
    result = {}
    for name in names:
        tau_s, tau_c = clean[name] - pretrained[name], robust[name] - pretrained[name]
        result[name] = (projector(tau_s) @ tau_c.flatten()).view_as(tau_c)
    return result


def published_patch(
    pretrained: State, clean: State, robust: Sequence[State], names: Sequence[str], weights: Sequence[float],
    levels: int | None = None, kind: str = "linear",
) -> dict[str, Tensor]:  # fmt: skip
    """What the official code adds to a host: tau_c times its weight, projected, quantised together, weighted again."""
    w = torch.tensor(weights, dtype=torch.float64)
    patch = {}
    for name in names:
        tau_c = torch.stack([(r[name] - pretrained[name]).double().flatten() for r in robust])  # (n, d)
        stack = (w[:, None] * tau_c) @ projector((clean[name] - pretrained[name]).double())
        if levels is not None:
            stack = published_quantise(stack, levels, kind)
        patch[name] = (w @ stack).view_as(clean[name])
    return patch


def published_quantise(stack: Tensor, levels: int, kind: str) -> Tensor:
    """One range for the whole stack."""
    return torch.tensor(loop_quantise(stack.flatten().tolist(), levels, kind), dtype=stack.dtype).view_as(stack)


def published_batchnorm(host: State, robust: Sequence[State]) -> dict[str, Tensor]:
    """The mean of the robust models wherever the tensor's name says BatchNorm or shortcut."""
    result = dict(host)
    for name in host:
        if ("bn" in name or "downsample" in name) and "num_batches_tracked" not in name:
            result[name] = torch.stack([r[name] for r in robust]).mean(0)
    return result


# --- two dot products, tensor by tensor -------------------------------------------------------------------------------
def vector_signature(pretrained: State, clean: State, robust: State, names: Sequence[str]) -> dict[str, Tensor]:
    result = {}
    for name in names:
        tau_s, tau_c = clean[name] - pretrained[name], robust[name] - pretrained[name]
        result[name] = tau_c - (tau_c * tau_s).sum() / (tau_s * tau_s).sum() * tau_s
    return result
