r"""What an adapter is, and the host that puts it beside a frozen module.

An adapter (eq-adapters-contract) adds an increment to the output of a frozen module; where the increment is linear in
the input, it also says which change of the weights has the same effect:

.. math:: y = y_0 + \sum_a f_a(x, y_0),\quad y_0 = xW^\top + b; \qquad f_a(x, y_0) = x\,\Delta W_a^\top + \Delta b_a .

Every adapter reads the *frozen* :math:`W`, :math:`b` and :math:`y_0`, never what another adapter made of them. So
increments add in any order, merging is one sum, and unmerging puts the frozen weight back, every bit of it. A method is
a subclass of :class:`Adapter`; here one that scales the outputs of a layer:

>>> import torch
>>> from torch import nn
>>> from peftref.adapters.core.injection import adapters, inject, merge, unload
>>> class Gain(Adapter):
...     kind = "gain"
...     def __init__(self, base):
...         super().__init__()
...         self.gain = nn.Parameter(torch.zeros(base.out_features))
...     def forward(self, x, y0, base):
...         return self.gain * y0
...     def delta(self, base):
...         return self.gain[:, None] * base.weight, None if base.bias is None else self.gain * base.bias
>>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
>>> x, frozen = torch.randn(3, 4), net[2].weight
>>> inject(net, Gain, ["2"])
['2']
>>> before = net(x)
>>> _ = nn.init.constant_(adapters(net)["2"].gain, 0.5)
>>> torch.allclose(net(x), 1.5 * before)
True
>>> merge(net)
>>> torch.allclose(net[2].weight, 1.5 * frozen), torch.allclose(net(x), 1.5 * before)
(True, True)
>>> unload(net)
>>> net[2].weight is frozen
True
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from .layers import Layer, tapped, view

__all__ = ["Adapter", "Host"]

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
KINDS: dict[str, type[Adapter]] = {}  # every method that has been imported, by its slug


class Adapter(nn.Module):
    """Base class of all adapters. A new one must be the identity: its first ``forward`` returns zeros.

    A subclass has ``__init__(self, base, **options)``, which keeps each option as an attribute of its name, and

    - ``forward(x, y0, base) -> increment`` with the input ``x`` as the module got it (``base.rows(x)`` are its rows
      ``(..., i)``), the frozen output's rows ``y0`` of shape ``(..., o)``, and ``base``, the frozen layer as a
      :class:`~peftref.adapters.core.layers.Layer`; the increment has the shape of ``y0``;
    - ``delta(base) -> (dW, db)``, ``(o, i)`` and ``(o,)`` or None, if it is mergeable: outside of training
      ``forward(x, y0, base) == base.rows(x) @ dW.T + db``.

    What is trained is a parameter, and what is saved is the ``state_dict``. What several layers share (a frozen bank, a
    task's index) is an argument of the constructor that ``options`` does not name: it is not saved, and given again to
    :func:`~peftref.adapters.core.files.load`.

    Attributes:
        kind: the method's slug, which is also the name of its module.
        options: the constructor's arguments that a file keeps.
        mergeable: whether there is a ``delta``.
        any_module: sits on any module that returns a tensor, and uses no matrix.
        tap: of an adapter on a whole block, a child of the block: ``x`` is then what this child gets.
        patterns: option -> PEFT's name for its values by layer, for a kind that PEFT knows.
        ignored: options of PEFT -> the values (``...``: all) that do not change a finished adapter.
        renamed: end of a tensor's name in older files -> its end now.
    """

    kind: ClassVar[str] = ""
    options: ClassVar[tuple[str, ...]] = ()
    mergeable: ClassVar[bool] = True
    any_module: ClassVar[bool] = False
    tap: str = ""
    patterns: ClassVar[dict[str, str]] = {}
    ignored: ClassVar[dict[str, Any]] = {}
    renamed: ClassVar[dict[str, str]] = {}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "forward" in vars(cls) and "whole" not in vars(cls):
            this: Any = cls
            this.whole = Adapter.whole  # of another increment, what was inherited is the wrong output
        if "kind" in vars(cls):
            KINDS[cls.kind] = cls

    @classmethod
    def to_peft(cls, options: dict[str, Any]) -> dict[str, Any]:
        """The options as a PEFT configuration names them, with ``peft_type``."""
        return {"peft_type": cls.kind.upper(), **options}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """The options that a PEFT configuration holds."""
        return {name: config[name] for name in cls.options if name in config}

    def delta(self, base: Layer) -> tuple[Tensor, Tensor | None]:
        """What the adapter adds to the weight ``(o, i)`` and to the bias ``(o,)``, where it is linear."""
        raise TypeError(f"delta: expected a linear adapter, got {self.kind}, which cannot be merged")

    def whole(self, x: Tensor, base: Layer) -> Tensor | None:
        """The output of the layer with this adapter, in one product with ``W + dW``; None (the default): by increment.

        For an update that has to be made as a matrix anyway. Asked for where it is alone on an ``nn.Linear`` without
        hooks, and input, weight and adapter are of one type and stay so, so that no sum is rounded too early.
        """
        return None

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return next(self.parameters()).dtype


class Host(nn.Module):
    """Stands where a module stood, and holds it with any number of named adapters.

    Everything else that one may ask of it (``in_features``, ``weight``) is answered by the frozen module.

    Attributes:
        base_layer: the frozen module.
        adapters: by name.
        active: names of those whose increments are added.
        merged: whether the weight is, for the time being, the merged one.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer, self.adapters = base_layer.requires_grad_(False), nn.ModuleDict()
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
        if len(active) == 1 and (y := self._whole(active[0], x)) is not None:
            return y
        y0, inputs = tapped(self.base_layer, [a.tap for a in active if a.tap], x, *args, **kwargs)
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
        weight, bias = base.weight, base.bias
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
