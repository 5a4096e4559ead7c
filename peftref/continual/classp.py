r"""CLASSP (continual learning through adjustment suppression and sparsity promotion): an optimiser that remembers.

Ludwig, "CLASSP: a Biologically-Inspired Approach to Continual Learning through Adjustment Suppression and Sparsity
Promotion", 2024, arXiv 2405.09637.

A weight that has seen much gradient moves less; a weight whose gradient is small does not move at all. For each weight
on its own, with gradient g, an accumulator s that starts at 0, threshold :math:`\tau\ge0`, power :math:`p>0`, rate
:math:`\alpha` and :math:`\epsilon>0`, the gate (eq-classp-gate), the memory (eq-classp-accumulate) and the step
(eq-classp-update) are

.. math:: m_t=[\tau<g_t^2<\infty],\qquad s_t=s_{t-1}+m_t|g_t|^p,\qquad
          w_{t+1}=w_t-m_t\frac{\alpha\,g_t}{(\epsilon+s_t)^{1/p}} .

Nothing is reset between tasks: s *is* the memory. With p = 2 and tau = 0 this is AdaGrad.

=================  =====================  ==========================  =================
argument           here                   paper                       shape
=================  =====================  ==========================  =================
``w``              :math:`w`              :math:`w_i`                 list of any
``g``              :math:`g`              :math:`\nabla L`            as w
``s``              :math:`s`              the sum in its formula      as w
``lr``             :math:`\alpha`         same                        scalar
``threshold``      :math:`\tau`           threshold                   scalar, squared g
``power``          :math:`p`              same                        scalar
``eps``            :math:`\epsilon`       same                        scalar
=================  =====================  ==========================  =================

The paper's formula sums the gradients *before* this one, so its first step is :math:`\alpha g/\epsilon^{1/p}`; the
published code (``oswaldoludwig/CLASSP@ea3fe3c:CLASSP.py``) includes this one, and so do we. That code differs from the
paper in two more ways, which ``mode="official"`` reproduces (eq-classp-official): its gate (``#L40``) compares the
*truth value* of "some gradient of this tensor is not zero" with tau, so every tau < 1 lets everything through, and
every tau >= 1 nothing; and it discards the power of :math:`|g|` (``#L42``), so that :math:`s_t=s_{t-1}+|g_t|` for
every p. Three things we do differently in both modes: each parameter group keeps its own settings (there,
``#L23-L27``, those of the first group are used for all); a gradient that is not finite is left
out, weight by weight, as it would spoil s for good (the loss still shows it; :meth:`CLASSP.active_fraction` too); and s
is float32 for half-precision weights, where 256 + 1 is 256 in bfloat16.

>>> w, g, s = [torch.tensor([3.0, -2.0])], [torch.tensor([2.0, -1.0])], [torch.zeros(2)]
>>> classp_step(w, g, s, lr=0.2, power=1, threshold=0.0, eps=0.5)  # 3 - 0.2 * 2/2.5 and -2 + 0.2 * 1/1.5
([tensor([ 2.8400, -1.8667])], [tensor([2., 1.])])
>>> classp_step(w, g, s, lr=0.2, power=1, threshold=1.0, eps=0.5)  # 1 is not above 1: the second weight rests
([tensor([ 2.8400, -2.0000])], [tensor([2., 0.])])
>>> net = torch.nn.Linear(3, 2)
>>> optimizer = CLASSP(net.parameters(), lr=0.1, threshold=0.0)
>>> for x in torch.randn(5, 8, 3):
...     optimizer.zero_grad()
...     net(x).square().mean().backward()
...     _ = optimizer.step()
>>> optimizer.active_fraction()
1.0
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._checks import at_least_float32, number, one_of, upcast
from ..optim import ForeachOptimizer

__all__ = ["CLASSP", "classp_step", "gate"]

MODES = ("paper", "official")


def gate(g: Tensor, threshold: float) -> Tensor:
    r"""The gradient m g, with m = 1 where tau < g^2 < infinity and 0 elsewhere (eq-classp-gate), ``(...) -> (...)``.

    It compares :math:`|g|` with :math:`\sqrt\tau`, as the square of a small number may underflow.

    Args:
        g: gradient.
        threshold: tau.

    >>> gate(torch.tensor([2.0, -2.5, 0.0, float("nan"), float("inf")]), 4.0)
    tensor([ 0.0000, -2.5000,  0.0000,  0.0000,  0.0000])
    """
    # eq-classp-gate:  m g, with m = [tau < g^2 < inf]; at tau = 0 the gate keeps all but zeros, which change nothing
    g = g.nan_to_num(0.0, 0.0, 0.0)
    return torch.hardshrink(g, math.sqrt(threshold)) if threshold else g


def classp_step(
    w: Sequence[Tensor],
    g: Sequence[Tensor],
    s: Sequence[Tensor],
    lr: float = 0.2,
    power: float = 1.0,
    threshold: float = 0.0,
    eps: float = 1e-5,
    suppress: bool = True,
    official: bool = False,
) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and accumulators after one step, as new tensors: s <- s + m |g|^p, w <- w - m lr g / (eps + s)^(1/p).

    The gate m is 1 where tau < g^2 < infinity, else 0; see eq-classp-accumulate and eq-classp-update.

    Args:
        w: weights.
        g: their gradients, alike in shape.
        s: their accumulators, alike in shape; in float32 or float64.
        lr: alpha.
        power: p.
        threshold: tau, in units of a squared gradient.
        eps: epsilon.
        suppress: False moves by ``lr * g`` where the gate is open, and still accumulates.
        official: the published code's gate and accumulator.

    Raises:
        ValueError: a setting out of range, or lists that differ in length or shapes.
    """
    shapes = [[tuple(t.shape) for t in tensors] for tensors in (w, g, s)]
    if shapes[1] != shapes[0] or shapes[2] != shapes[0]:
        raise ValueError(f"w, g, s: expected lists of the same shapes, got {shapes}")
    _check(s, lr=lr, power=power, threshold=threshold, epsilon=eps)
    new_w = [t.clone() for t in w]
    new_s = [t.clone() for t in s]
    _step_(new_w, g, new_s, lr, power, threshold, eps, suppress, official)
    return new_w, new_s


def _step_(
    w: list[Tensor],
    g: Sequence[Tensor],
    s: list[Tensor],
    lr: float,
    power: float,
    threshold: float,
    eps: float,
    suppress: bool,
    official: bool,
) -> None:
    """:func:`classp_step` in place, on tensors of one device and type. Nothing is asked of the device."""
    exponent = power
    if official:
        # eq-classp-official:  [any g^2] > tau is a truth value against tau; s sums |g| whatever p is
        if threshold >= 1:
            return
        threshold = 0.0
        exponent = 1.0
    gated = [gate(t.to(a.dtype), threshold) for t, a in zip(g, s, strict=True)]
    # eq-classp-accumulate:  s <- s + m |g|^p
    if exponent == 2:
        torch._foreach_addcmul_(s, gated, gated)
    elif exponent == 1:
        torch._foreach_add_(s, torch._foreach_abs(gated))
    else:
        torch._foreach_add_(s, torch._foreach_pow(torch._foreach_abs(gated), exponent))
    if not suppress:
        torch._foreach_add_(w, gated, alpha=-lr)
        return
    # eq-classp-update:  w <- w - m alpha g / (eps + s)^(1/p), where m g is what passed the gate
    root = torch._foreach_add(s, eps)
    if power == 2:
        torch._foreach_sqrt_(root)
    elif power != 1:
        torch._foreach_pow_(root, 1 / power)
    torch._foreach_addcdiv_(w, gated, root, value=-lr)


class CLASSP(ForeachOptimizer):
    r"""CLASSP as an optimiser: s <- s + m |g|^p and w <- w - m lr g / (eps + s)^(1/p), gated by m = [tau < g^2 < inf].

    Make one for the whole stream of tasks, and keep it. All settings may differ between parameter groups and may be
    changed between steps, as in the published protocol::

        optimizer = CLASSP(model.parameters(), apply_decay=False)  # first task: plain steps, but s grows
        ...
        for group in optimizer.param_groups:  # from the second task on
            group.update(apply_decay=True, threshold=0.0)

    The threshold is in units of a squared gradient, so it depends on the batch size and on the scaling of the loss.
    With a gradient scaler call ``unscale_`` first; gradients are gated as ``step`` finds them, after any clipping.

    Args:
        params: real parameters, or groups of them; one without gradient is left alone.
        lr: :math:`\alpha` (0.2: published code).
        threshold: :math:`\tau` (0: what the 0.5 of the published code, whose gate is a truth value, amounts to).
        epsilon: :math:`\epsilon` (1e-5: published code).
        power: p (1: published code).
        apply_decay: False moves by ``lr * g`` and still accumulates (``apply_scaling`` in the published code).
        mode: "paper", or "official" for what the published code computes.

    Raises:
        ValueError: a setting out of range, at construction or, if changed later, at ``step``, before any change.
        TypeError: complex parameters (use ``torch.view_as_real``).

    A sparse gradient is treated as the dense one it stands for. ``state[p]["sum"]`` is s, one number for each weight.
    """

    kept = ("sum",)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.2,
        threshold: float = 0.0,
        epsilon: float = 1e-5,
        power: float = 1.0,
        apply_decay: bool = True,
        mode: str = "paper",
    ) -> None:
        defaults = {
            "lr": lr,
            "threshold": threshold,
            "epsilon": epsilon,
            "power": power,
            "apply_decay": apply_decay,
            "mode": mode,
        }
        super().__init__(params, defaults)

    def check(self, group: dict[str, Any]) -> None:
        """Refuse settings out of range.

        Args:
            group: one of ``param_groups``.

        Raises:
            ValueError: a setting out of range, or an unknown mode.
        """
        one_of("mode", group["mode"], MODES)
        _check(group["params"], **{name: group[name] for name in ("lr", "power", "threshold", "epsilon")})

    def update(self, w: list[Tensor], g: list[Tensor], state: dict[str, list[Tensor]], group: dict[str, Any]) -> None:
        """One step in place: eq-classp-accumulate and eq-classp-update on tensors of one device and type.

        Args:
            w: weights that have a gradient.
            g: their gradients, dense.
            state: their sums, under the name "sum".
            group: their settings.
        """
        _step_(
            w,
            g,
            state["sum"],
            group["lr"],
            group["power"],
            group["threshold"],
            group["epsilon"],
            group["apply_decay"],
            group["mode"] == "official",
        )

    @torch.no_grad()
    def active_fraction(self) -> float:
        """Share of the weights that have a gradient which a step would move now: call it before ``zero_grad``."""
        moved = torch.tensor(0)
        total = 0
        for group in self.param_groups:
            threshold = group["threshold"]
            if group["mode"] == "official":  # a truth value is compared with it
                threshold = 0.0 if threshold < 1 else math.inf
            for p in group["params"]:
                if p.grad is not None:
                    g = at_least_float32(p.grad.to_dense())
                    moved = moved + gate(g, threshold).count_nonzero().cpu()
                    total += g.numel()
        return float(moved) / max(total, 1)


def _check(tensors: Iterable[Tensor], *, lr: float, power: float, threshold: float, epsilon: float) -> None:
    number("lr", lr, 0.0)
    if not threshold >= 0:  # infinity freezes
        raise ValueError(f"threshold: expected a number of at least 0, got {threshold!r}")
    number("power", power, 0.0, open_low=True)
    number("epsilon", epsilon, 0.0, open_low=True)
    tiny = max((torch.finfo(upcast(t.dtype)).tiny for t in tensors), default=0.0)
    if tiny and math.log(epsilon) / power < math.log(tiny):  # the root would be 0, and an unused weight move by 0/0
        raise ValueError(f"epsilon: expected epsilon^(1/power) of at least {tiny:.1e}, got {epsilon!r}^(1/{power!r})")
