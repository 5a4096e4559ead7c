"""The host: stands where a frozen module stood, and adds the increments of its active adapters.

>>> import torch
>>> from torch import nn
>>> from peftref.adapters.core.injection import inject
>>> from peftref.adapters.baselines.lora import LoRA
>>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh())
>>> inject(net, LoRA, ["0"], r=2)
['0']
>>> host = net[0]
>>> type(host).__name__, host.active, host.merged, host.out_features
('Host', ['default'], False, 8)
>>> weight, bias = host.fold()                            # what merging would put in place of the frozen ones
>>> torch.equal(weight, host.base_layer.weight)           # B = 0: the same
True
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from .adapter import Adapter
from .bypass import call_with_taps
from .layers import view

__all__ = ["Host"]

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Host(nn.Module):
    """Stands where a module stood, ``y = y0 + sum of f_a(x, y0)``, and holds it with any number of named adapters.

    Everything else that one may ask of it (``in_features``, ``weight``) is answered by the frozen module.

    Attributes:
        base_layer: the frozen module.
        adapters: by name.
        active: names of those whose increments are added.
        merged: whether the weight is, for the time being, the merged one.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.adapters = nn.ModuleDict()
        self.active: list[str] = []
        self._frozen: tuple[nn.Parameter, nn.Parameter | None] | None = None
        self.training = self.adapters.training = base_layer.training

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__"):  # what Python asks for copies and pickles is about the host itself
                raise
            return getattr(super().__getattr__("base_layer"), name)

    @property
    def merged(self) -> bool:
        """Whether the active adapters are in the weight."""
        return self._frozen is not None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        active = [] if self.merged else self._active()
        y = self._whole(active[0], x) if len(active) == 1 else None
        if y is not None:
            return y
        y0, inputs = call_with_taps(self.base_layer, [a.tap for a in active if a.tap], x, *args, **kwargs)
        if not active:
            return y0
        total: Tensor | None = None
        for adapter in active:
            base = view(self.base_layer, adapter.dtype)
            x_a = inputs.get(adapter.tap, x)
            increment = adapter(x_a.to(base.dtype), base.to_rows(y0).to(base.dtype), base)
            total = increment if total is None else total + increment
        assert total is not None
        # eq-adapters-contract: the sum is taken in the adapters' type and rounded once
        return (y0 + base.from_rows(total, y0)).to(y0.dtype)

    def _active(self) -> list[Adapter]:
        return [cast(Adapter, self.adapters[name]) for name in self.active]

    def _whole(self, adapter: Adapter, x: Tensor) -> Tensor | None:
        base: Any = self.base_layer
        plain = type(base) is nn.Linear and x.dtype == base.weight.dtype == adapter.dtype
        # Autocast would round W + dW as one, and hooks on the frozen layer want to see it called.
        if not plain or torch.is_autocast_enabled(x.device.type) or any(getattr(base, name) for name in HOOKS):
            return None
        return adapter.whole(x, view(base, adapter.dtype))

    @torch.no_grad()
    def fold(self) -> tuple[Tensor, Tensor | None]:
        """The merged weight and bias, as the module keeps them; nothing changes."""
        base = view(self.base_layer)
        weight = base.weight
        bias = base.bias
        for adapter in self._active():
            dW, db = adapter.delta(view(self.base_layer, adapter.dtype))
            weight = weight + dW.to(weight.dtype)
            if db is not None:
                bias = db.to(weight.dtype) if bias is None else bias + db.to(weight.dtype)
        like: Tensor = base.module.weight
        return torch.empty_like(like).copy_(base.kept(weight)), None if bias is None else bias.to(like.dtype)

    def put(self, weight: Tensor, bias: Tensor | None) -> None:
        """Use these instead of the frozen ones, which are put aside; whoever shares those keeps them."""
        base: Any = self.base_layer
        self._frozen = base.weight, base.bias
        base.weight = nn.Parameter(weight, requires_grad=False)
        base.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def restore(self) -> None:
        """The frozen parameters again, the same objects."""
        if self._frozen is not None:
            base: Any = self.base_layer
            base.weight, base.bias = self._frozen
            self._frozen = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Host:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call] # .to(device), .half(): what is put aside goes along
        for p in self._frozen or ():
            if p is not None:
                p.data = fn(p.data)
        return self

    def extra_repr(self) -> str:
        return f"active={self.active}, merged={self.merged}"
