r"""The frame of an optimiser: what a rule for one step needs around it before a training loop can use it.

A subclass says what it keeps for each parameter, what a valid group is, and how tensors of one device and type move:

>>> from peftref._checks import number
>>> class SignDescent(ForeachOptimizer):
...     def __init__(self, params, lr=0.1):
...         super().__init__(params, {"lr": lr})
...
...     def check(self, group):
...         number("lr", group["lr"], 0.0)
...
...     def update(self, w, g, state, group):
...         torch._foreach_add_(w, torch._foreach_sign(g), alpha=-group["lr"])
>>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
>>> optimizer = SignDescent([w], lr=0.5)
>>> w.square().sum().backward()
>>> optimizer.step()
>>> w.data
tensor([ 0.5000, -1.5000])
>>> optimizer.param_groups[0]["lr"] = -1.0
>>> optimizer.step()
Traceback (most recent call last):
ValueError: lr: expected a finite number >= 0, got -1.0
>>> w.data
tensor([ 0.5000, -1.5000])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._checks import upcast

__all__ = ["ForeachOptimizer"]


class ForeachOptimizer(torch.optim.Optimizer):
    """An optimiser whose rule, ``update``, gets lists of tensors of one device and type.

    Settings are checked when a group is added, which leaves nothing behind if it is refused, and at every step before
    the closure runs and before anything moves, since they may be changed in between. Parameters without gradient are
    left alone; a sparse gradient is treated as the dense one it stands for. What is kept for a parameter is zero at
    first and has float32 at least, also after ``load_state_dict``, where torch would cast it to the parameter's type.

    Attributes:
        kept: names of the tensors that are kept for each parameter, in its shape: ``state[p][name]``.

    Raises:
        TypeError: complex parameters (use ``torch.view_as_real``).
    """

    kept: tuple[str, ...] = ()

    def check(self, group: dict[str, Any]) -> None:
        """Refuse settings out of range; parameters are real here.

        Args:
            group: one of ``param_groups``.

        Raises:
            ValueError: a setting out of range.
        """
        raise NotImplementedError

    def update(self, w: list[Tensor], g: list[Tensor], state: dict[str, list[Tensor]], group: dict[str, Any]) -> None:
        """One step in place, on tensors of one device and type; nothing should be asked of the device.

        Args:
            w: parameters that have a gradient.
            g: their gradients, dense.
            state: name -> what is kept for each of them, changed in place.
            group: their settings.
        """
        raise NotImplementedError

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """A further group, such as the head of a new task; what is kept for it is zero."""
        super().add_param_group(param_group)
        try:
            self._check(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on the gradients that are there; returns what ``closure`` returns."""
        for group in self.param_groups:
            self._check(group)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for w in _alike(group["params"]):
                g = [_dense(p.grad) for p in w if p.grad is not None]
                state = {name: [self._kept(p, name) for p in w] for name in self.kept}
                self.update(w, g, state, group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As any optimiser's, but what is kept stays in its precision."""
        super().load_state_dict(state_dict)
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        ours = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(saved, ours, strict=True):
            for name in self.kept:
                if name in state_dict["state"].get(i, {}):
                    value = state_dict["state"][i][name]
                    self.state[p][name] = value.to(p.device, upcast(p.dtype), copy=True)

    def _check(self, group: dict[str, Any]) -> None:
        if any(p.is_complex() for p in group["params"]):
            raise TypeError("params: expected real tensors, got a complex one; optimise its torch.view_as_real instead")
        self.check(group)

    def _kept(self, p: Tensor, name: str) -> Tensor:
        if name not in self.state[p]:
            self.state[p][name] = torch.zeros_like(p, dtype=upcast(p.dtype))
        value: Tensor = self.state[p][name]
        return value


def _alike(params: Sequence[Tensor]) -> list[list[Tensor]]:
    """Those that have a gradient, in lists of one device and type: what one foreach call can take."""
    found: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for p in params:
        if p.grad is not None:
            found.setdefault((p.device, p.dtype), []).append(p)
    return list(found.values())


def _dense(g: Tensor) -> Tensor:
    """A gradient as a strided tensor."""
    return g if g.layout == torch.strided else g.to_dense()
