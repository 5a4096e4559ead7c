r"""What AdaB2N computes in a layer: statistics under weights, and a batch normalised by them, in one step.

Weights :math:`w_b` of the samples give the statistics of eq-adab2n-statistics; they need not sum to 1. With
:math:`r=(v+\epsilon)^{-1/2}` the output is :math:`y=\gamma(x-\mu)r+\beta`. For an upstream gradient g of y, and
:math:`\dot\mu,\dot v` of the two statistics, let sums run over samples and the :math:`n` pixels of each. Then
(eq-adab2n-gradient)

.. math::
   \partial_v&=\dot v-\tfrac12\gamma r^3\sum g(x-\mu),\qquad
   \partial_\mu=\dot\mu-\gamma r\sum g-2\,\partial_v\,\mu\Big(1-\sum_bw_b\Big)\\
   \frac{\partial L}{\partial x}&=\gamma rg+\frac{w_b}n\big[\partial_\mu+2\,\partial_v\,(x-\mu)\big],\qquad
   \frac{\partial L}{\partial w_b}=\sum_c\partial_\mu m_{bc}+\partial_v\big[u_{bc}+(m_{bc}-\mu_c)^2\big].

Equal weights :math:`1/B` make both the formulas of BatchNorm.

>>> x = torch.tensor([[1.0], [1.0], [4.0]])
>>> balanced_statistics(x, torch.tensor([0.25, 0.25, 0.5]))  # two samples of one task count as much as one of another
(tensor([2.5000]), tensor([2.2500]))
>>> balanced_norm(x, torch.tensor([0.25, 0.25, 0.5]), eps=0.0)[0].mT
tensor([[-1., -1.,  1.]])
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..._checks import at_least_float32

__all__ = ["balanced_norm", "balanced_statistics"]


def balanced_statistics(x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted mean and biased variance: mu = sum_b w_b m_b, v = sum_b w_b [u_b + (m_b - mu)^2] (eq-adab2n-statistics).

    Of each channel, ``(B, C, ...), (B,) -> (C,), (C,)``, in float32 at least. The variance is taken around the weighted
    mean, also where the weights do not sum to 1.

    Args:
        x: ``(B, C, ...)``.
        weights: ``(B,)``.
    """
    return _mix(*_moments(at_least_float32(x)), weights)


def balanced_norm(
    x: Tensor, weights: Tensor, scale: Tensor | None = None, shift: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    """The batch normalised, y = scale (x - mu) / sqrt(v + eps) + shift, and its :func:`balanced_statistics` mu and v.

    Differentiable once, in all tensors (eq-adab2n-gradient).

    Args:
        x: ``(B, C, ...)``; half precision is normalised in float32, where squares do not overflow, and returned as is.
        weights: ``(B,)``.
        scale: ``(C,)``; default 1.
        shift: ``(C,)``; default 0.
        eps: added to the variance (1e-5: BatchNorm).
    """
    wide = at_least_float32(x).contiguous()
    scale = wide.new_ones(x.shape[1]) if scale is None else scale.to(wide)
    shift = wide.new_zeros(x.shape[1]) if shift is None else shift.to(wide)
    y, mu, v, _, _ = _BalancedNorm.apply(wide, weights.to(wide), scale, shift, eps)
    return y.to(x.dtype), mu, v


def check_batch(x: Tensor, channels: int) -> None:
    """Refuse what has no statistics to train on.

    Raises:
        ValueError: not a batch of this many channels, or one value in each, whose variance would be 0.
    """
    if x.ndim < 2 or x.shape[1] != channels or not x.numel():
        raise ValueError(f"x: expected a batch (B, {channels}, ...), got shape {tuple(x.shape)}")
    if x.numel() == channels:
        raise ValueError(f"x: expected more than 1 value per channel when training, got shape {tuple(x.shape)}")


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel of each image, ``(B, C)`` each: all that is read off the pixels.

    The squares are taken around the mean: E x^2 - (E x)^2 would lose all digits of a channel far from 0.
    """
    x = x.reshape(*x.shape[:2], -1)  # (B, C, n)
    mean = x.mean(-1)
    return mean, torch.linalg.vector_norm(x - mean[..., None], dim=-1).square() / x.shape[-1]


def _mix(mean: Tensor, var: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    w = weights[:, None]
    # eq-adab2n-statistics:  mu = sum_b w_b m_b,  v = sum_b w_b [u_b + (m_b - mu)^2]
    mu = (w * mean).sum(0)
    return mu, (w * (var + (mean - mu).square())).sum(0)


class _BalancedNorm(torch.autograd.Function):
    """By hand: autograd would keep a centred copy of the batch, and pass over it several times more."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, w: Tensor, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, ...]:
        mean, var = _moments(x)
        mu, v = _mix(mean, var, w)
        return F.batch_norm(x, mu, v, scale, shift, False, 0.0, eps), mu, v, mean, var

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, w, scale, _, ctx.eps = inputs
        _, mu, v, mean, var = output
        ctx.mark_non_differentiable(mean, var)
        ctx.save_for_backward(x, w, scale, mean, var, mu, v)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, g_mu: Tensor, g_v: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, w, scale, mean, var, mu, v = ctx.saved_tensors
        r = (v + ctx.eps).rsqrt()
        # As if mu and v were constants: scale r g, and the sums of g (x - mu) r and of g.
        gx, g_scale, g_shift = torch.ops.aten.native_batch_norm_backward(
            g.contiguous(), x, scale, mu, v, mu, r, False, ctx.eps, [True, True, True]
        )
        slope = scale * r
        # eq-adab2n-gradient:  the whole derivatives by v and mu, then what these send to x and to w
        d_v = torch.addcmul(g_v, slope * r, g_scale, value=-0.5)
        d_mu = torch.addcmul(g_mu, slope, g_shift, value=-1) - 2 * (1 - w.sum()) * d_v * mu
        each = w[:, None] / x[0, 0].numel()  # (B, 1)
        by_x = 2 * each * d_v  # (B, C)
        pixels = (..., *[None] * (x.ndim - 2))
        gx.addcmul_(x, by_x[pixels]).add_((each * d_mu - by_x * mu)[pixels])
        if not ctx.needs_input_grad[1]:
            return gx, None, g_scale, g_shift, None
        return gx, (mean * d_mu + (var + (mean - mu).square()) * d_v).sum(1), g_scale, g_shift, None
