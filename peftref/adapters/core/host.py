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

from ._calls import WITHOUT_NUMBERS, loses_gradients, on_meta
from .adapter import Adapter
from .bypass import call_with_taps
from .layers import view

__all__ = ["Host"]

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
LOOKING = ("transformers.utils.output_capturing", "peftref.")  # whose hooks keep what they see, and change nothing
OWN = {"active", "adapters", "base_layer", "training"}


class Host(nn.Module):
    """Stands where a module stood, ``y = y0 + sum of f_a(x, y0)``, and holds it with any number of named adapters.

    Everything else that one may ask of it or set (``in_features``, ``weight``, ``stride``) is the frozen module's. What
    begins with an underscore is the host's own, such as the marks that libraries leave on every module. A hook that is
    to see the input or the output with the adapters in it belongs on the host; on the frozen module it sees
    those of the frozen module.

    Attributes:
        base_layer: the frozen module.
        adapters: by name.
        active: names of those whose increments are added.
        merged: whether the weight is, for the time being, the merged one.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.adapters = nn.ModuleDict()
        self.active: list[str] = []
        self._frozen: tuple[nn.Parameter, nn.Parameter | None] | None = None
        self.training = self.adapters.training = base_layer.training

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_"):  # what Python and libraries ask about the host itself
                raise
            return getattr(super().__getattr__("base_layer"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if self._is_own(name):
            super().__setattr__(name, value)
        else:
            self._check_parameter(name, value)
            setattr(self.base_layer, name, value)

    def __delattr__(self, name: str) -> None:
        if self._is_own(name):
            super().__delattr__(name)
        else:
            delattr(self.base_layer, name)

    def _is_own(self, name: str) -> bool:
        empty = "base_layer" not in self.__dict__.get("_modules", ())
        return empty or name.startswith("_") or name in OWN or hasattr(type(self), name)

    def _check_parameter(self, name: str, value: Any) -> None:
        there = self.base_layer._parameters.get(name)
        if there is None or not isinstance(value, Tensor):
            return
        if self.merged:
            raise RuntimeError(f"{name}: expected a model that is not merged, got a merged one; unmerge it first")
        if value.shape != there.shape:
            shapes = f"{tuple(there.shape)}, for which the adapters are made, got {tuple(value.shape)}"
            raise ValueError(f"{name}: expected the shape {shapes}; unload them first")

    @property
    def merged(self) -> bool:
        """Whether the active adapters are in the weight."""
        return self._frozen is not None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        x: Any = args[0] if args else next(iter(kwargs.values()), None)
        active = [] if self.merged else self._active()
        if active:
            self._refuse_what_is_lost(active, x)
        alone = len(active) == 1 and len(args) + len(kwargs) == 1
        y = self._whole(active[0], x) if alone else None
        if y is not None:
            return y
        y0, inputs = call_with_taps(self.base_layer, [a.tap for a in active if a.tap], *args, **kwargs)
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

    def _refuse_what_is_lost(self, active: list[Adapter], x: Any) -> None:
        if any(map(on_meta, (self.base_layer, *active))) and not getattr(x, "is_meta", False):
            raise RuntimeError(f"model: expected weights in memory, got {WITHOUT_NUMBERS}; dispatch it otherwise")
        if self.training and loses_gradients() and any(p.requires_grad for a in active for p in a.parameters()):
            raise RuntimeError(
                "checkpoint: expected use_reentrant=False, or an input that requires a gradient, without which the "
                "adapters within get none; got use_reentrant=True and inputs without"
            )

    def _whole(self, adapter: Adapter, x: Tensor) -> Tensor | None:
        base: Any = self.base_layer
        plain = type(base) is nn.Linear and x.dtype == base.weight.dtype == adapter.dtype
        # Autocast would round W + dW as one.
        if not plain or torch.is_autocast_enabled(x.device.type) or not self._is_plain():
            return None
        return adapter.whole(x, view(base, adapter.dtype))

    def _is_plain(self) -> bool:
        """Whether nobody wants to see the frozen module called: no hook, no ``forward`` set on it, nothing to train."""
        base: Any = self.base_layer
        own = (getattr(base, name, None) for name in ("weight", "bias"))
        trained = any(isinstance(p, Tensor) and p.requires_grad for p in own)
        return not (trained or "forward" in vars(base) or any(getattr(base, name) for name in HOOKS))

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

    def check_mergeable(self, name: str) -> None:
        """Refuse, by the layer's name, what would make the merged layer another one than the unmerged."""
        base: Any = self.base_layer
        if on_meta(base):
            raise ValueError(f"model: expected weights in memory, got {name} with {WITHOUT_NUMBERS}")
        hooks: list[object] = [*base._forward_pre_hooks.values(), *base._forward_hooks.values()]
        if type(vars(base).get("_hf_hook")).__name__ != "AlignDevicesHook":  # accelerate's, which only moves tensors
            hooks += [vars(base)["forward"]] if "forward" in vars(base) else []
        if any(not str(getattr(hook, "__module__", "")).startswith(LOOKING) for hook in hooks):
            raise ValueError(
                f"model: expected frozen layers without hooks, got {name}.base_layer with {len(hooks)}, which would "
                f"see other numbers when merged; remove them, or put them on {name}"
            )

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
