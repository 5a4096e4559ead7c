r"""What an adapter is: an increment to the output of a frozen module.

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
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .layers import Layer

__all__ = ["Adapter", "PeftFormat"]

HELD = ("_parameters", "_former_parameters")  # where a module, and DataParallel's copy of one, keeps its weights
KINDS: dict[str, type[Adapter]] = {}  # every method that has been imported, by its slug


@dataclass(frozen=True)
class PeftFormat:
    """How PEFT's files hold a method that PEFT has too.

    Attributes:
        patterns: option -> PEFT's name for its values by layer.
        ignored: options of PEFT -> the values (``...``: all) that do not change a finished adapter.
        renamed: end of a tensor's name in older files -> its end now.
        write: our options -> PEFT's, with ``peft_type``; by default they have the same names.
        read: PEFT's configuration -> our options; by default those of the same names.
    """

    patterns: Mapping[str, str] = field(default_factory=dict)
    ignored: Mapping[str, Any] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    write: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None
    read: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None


class Adapter(nn.Module):
    """Base class of all adapters, ``y = y0 + f(x, y0)``, and where f is linear ``f(x, y0) = x dW^T + db``.

    A new one must be the identity: its first ``forward`` returns zeros.

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
        peft: of a method that PEFT has too, how its files differ from ours.
    """

    kind: ClassVar[str] = ""
    options: ClassVar[tuple[str, ...]] = ()
    mergeable: ClassVar[bool] = True
    any_module: ClassVar[bool] = False
    tap: str = ""
    peft: ClassVar[PeftFormat] = PeftFormat()

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "forward" in vars(cls) and "whole" not in vars(cls):
            this: Any = cls
            this.whole = Adapter.whole  # of another increment, what was inherited is the wrong output
        if "kind" in vars(cls):
            KINDS[cls.kind] = cls

    def delta(self, base: Layer) -> tuple[Tensor, Tensor | None]:
        """What the adapter adds to the weight ``(o, i)`` and to the bias ``(o,)``, where it is linear."""
        raise TypeError(f"delta: expected a linear adapter, got {self.kind}, which cannot be merged")

    def whole(self, x: Tensor, base: Layer) -> Tensor | None:
        """The output of the layer with this adapter, in one product with ``W + dW``; None (the default): by increment.

        For an update that has to be made as a matrix anyway. Asked for where it is alone on an ``nn.Linear`` without
        hooks, and input, weight and adapter are of one type and stay so, so that no sum is rounded too early.
        A subclass with a ``forward`` of its own does not inherit it: what it inherited is the output with the parent's
        increment, so the layer would answer with another method's update, and only where it goes this way.
        """
        return None

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        kept = (t for m in self.modules() for name in HELD for t in vars(m).get(name, {}).values() if t is not None)
        dtype: torch.dtype = next(kept).dtype
        return dtype
