"""Twins of ``peftref.continual.adab2n``: the specification in loops, and the layer the way it was published.

The *specification* works on nested lists, one pixel at a time, and knows the step size only as its recursion. The
*published layer* uses tensors and autograd: the centred batch is built and kept, squared, weighted and divided; the
step size is a Python float that follows the recursion. It is the benchmark's peer.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


# --- the specification ------------------------------------------------------------------------------------------------
def loop_weights(psi: list[float], counts: list[int], renormalize: bool = False) -> list[float]:
    total = [math.exp(p) + n for p, n in zip(psi, counts, strict=True)]
    if renormalize:
        total = [t if n > 0 else 0.0 for t, n in zip(total, counts, strict=True)]
    return [t / sum(total) for t in total]


def loop_statistics(x: list[list[list[float]]], w: list[float]) -> tuple[list[float], list[float]]:
    """Images by channels by pixels; the variance around the weighted mean, pixel by pixel."""
    channels = len(x[0])
    pixels = len(x[0][0])
    mu = [sum(w[b] / pixels * sum(x[b][c]) for b in range(len(x))) for c in range(channels)]
    v = [
        sum(w[b] / pixels * sum((value - mu[c]) ** 2 for value in x[b][c]) for b in range(len(x)))
        for c in range(channels)
    ]
    return mu, v


def loop_eta(momentum: float, kappa: float, steps: int) -> list[float]:
    found = [momentum**kappa]
    while len(found) < steps:
        found.append(found[-1] / (found[-1] + (1 - momentum) ** kappa))
    return found


# --- the published layer ----------------------------------------------------------------------------------------------
class PublishedAdaB2N(nn.Module):
    """One layer, told the task of every sample by an attribute, for kappa above 0."""

    def __init__(self, layer: nn.BatchNorm2d, tasks: int, kappa: float) -> None:
        super().__init__()
        self.weight = layer.weight
        self.bias = layer.bias
        self.eps = layer.eps
        self.momentum = layer.momentum
        self.running_mean = layer.running_mean.clone()
        self.running_var = layer.running_var.clone()
        self.psi = nn.Parameter(torch.zeros(tasks).to(layer.weight))
        self.kappa = kappa
        self.task = 0
        self.ids = None
        self.eta = None

    def forward(self, x: Tensor) -> Tensor:
        a = (1 - self.momentum) ** self.kappa
        self.eta = self.momentum**self.kappa if self.eta is None else self.eta / (self.eta + a)
        if self.ids is not None and self.task > 0:
            counts = self.ids.bincount(minlength=self.task + 1)
            omega = self.psi[: self.task + 1].exp() + counts
            omega = omega / omega.sum()
            weight = omega[self.ids] / counts[self.ids]
            mean = (weight[:, None] * x.mean((2, 3))).sum(0)
            centred = x - mean[None, :, None, None]
            var = (weight[:, None] * centred.pow(2).mean((2, 3))).sum(0)
        else:
            mean = x.mean((0, 2, 3))
            centred = x - mean[None, :, None, None]
            var = centred.pow(2).mean((0, 2, 3))
        y = centred / torch.sqrt(var[None, :, None, None] + self.eps)
        with torch.no_grad():
            self.running_mean = (1 - self.eta) * self.running_mean + self.eta * mean
            self.running_var = (1 - self.eta) * self.running_var + self.eta * var
        self.loss = F.mse_loss(mean, self.running_mean) + F.mse_loss(var, self.running_var)
        return y * self.weight[None, :, None, None] + self.bias[None, :, None, None]
