r"""A frozen layer seen as the matrix it is, whatever the layer: ``Linear``, ``Conv2d``, or the ``Conv1D`` of GPT-2.

An adapter is written once, for :math:`y = xW^\top + b` with :math:`W` of shape ``(o, i)``. A :class:`Layer` gives it
that :math:`W` and :math:`b` in the adapter's own type, and the rows that the layer multiplies:

==================  ===============================  ======================================  =================
layer               weight as it is kept             as the matrix ``(o, i)``                rows of its input
==================  ===============================  ======================================  =================
``Linear``          ``(o, i)``                       the same                                ``x``
``Conv1D``          ``(i, o)``                       transposed                              ``x``
``Conv2d``          ``(o, c, h, w)``                 flattened, ``i = c * h * w``            its windows
==================  ===============================  ======================================  =================

>>> import torch
>>> from torch import nn
>>> conv, x = nn.Conv2d(3, 5, 2), torch.randn(1, 3, 4, 4)
>>> layer = view(conv)
>>> layer.weight.shape, layer.rows(x).shape                  # 3 x 3 places, windows of 3 * 2 * 2 entries
(torch.Size([5, 12]), torch.Size([1, 9, 12]))
>>> y = layer.rows(x) @ layer.weight.T + layer.bias
>>> torch.allclose(y, layer.to_rows(conv(x)), atol=1e-6)
True
>>> refusal(nn.Conv2d(4, 4, 3, groups=2))
'a Conv2d with groups=2'
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Layer", "refusal", "view", "width"]


class Layer:
    """A frozen module as an adapter sees it. This class is for any module, with no matrix; the others extend it.

    Args:
        module: the frozen module; neither copied nor changed.
        dtype: what the adapter computes in.

    Attributes:
        in_features: ``i``.
        out_features: ``o``.
        window: the shape of one row of the weight as it is kept, with ``i`` entries: ``(i,)`` or ``(c, h, w)``.
        weight: ``(o, i)``, in ``dtype``; its gradient is of use only where the module's is trained, beside the adapter.
        bias: ``(o,)`` or None, likewise.
    """

    in_features: int
    out_features: int
    window: tuple[int, ...]

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        self.module: Any = module  # nn.Module does not say that a weight is a tensor
        self.dtype = dtype

    @property
    def weight(self) -> Tensor:
        """``(o, i)``, in ``dtype``."""
        raise AttributeError(f"weight: expected a layer with a matrix, got a {type(self.module).__name__}")

    @property
    def bias(self) -> Tensor | None:
        """``(o,)`` or None, in ``dtype``."""
        raise AttributeError(f"bias: expected a layer with a matrix, got a {type(self.module).__name__}")

    def kept(self, matrix: Tensor) -> Tensor:
        """An ``(o, i)`` in the form in which the module keeps its weight."""
        return matrix.view_as(self.module.weight)

    def rows(self, x: Tensor) -> Tensor:
        """The input as rows, ``(..., i)``."""
        return x

    def linear(self, x: Tensor, matrix: Tensor) -> Tensor:
        """``rows(x) @ matrix.T`` for any ``(r, i)``, at the cost of a layer with ``r`` outputs: ``(..., r)``."""
        return F.linear(x, matrix)

    def to_rows(self, y: Tensor) -> Tensor:
        """The output as rows, ``(..., o)``."""
        return y

    def from_rows(self, rows: Tensor, y: Tensor) -> Tensor:
        """Rows in the form of the output ``y``."""
        return rows


class _Linear(Layer):
    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__(module, dtype)
        weight: Tensor = self.module.weight
        self.out_features, *window = weight.shape
        self.window = tuple(window)
        self.in_features = weight[0].numel()

    @property
    def weight(self) -> Tensor:
        weight: Tensor = self.module.weight
        return weight.flatten(1).to(self.dtype)

    @property
    def bias(self) -> Tensor | None:
        bias: Tensor | None = self.module.bias
        return None if bias is None else bias.to(self.dtype)


class _Conv1D(_Linear):
    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        Layer.__init__(self, module, dtype)
        self.in_features, self.out_features = self.module.weight.shape
        self.window = (self.in_features,)

    @property
    def weight(self) -> Tensor:
        weight: Tensor = self.module.weight
        return weight.T.to(self.dtype)

    def kept(self, matrix: Tensor) -> Tensor:
        return matrix.T


class _Conv2d(_Linear):
    def rows(self, x: Tensor) -> Tensor:
        conv = self.module
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        x = F.pad(x, conv._reversed_padding_repeated_twice, mode)  # of every padding, "same" too
        return F.unfold(x, conv.kernel_size, conv.dilation, 0, conv.stride).mT  # (n, places, i)

    def linear(self, x: Tensor, matrix: Tensor) -> Tensor:
        return self.to_rows(self.module._conv_forward(x, matrix.unflatten(1, self.window), None))  # needs no windows

    def to_rows(self, y: Tensor) -> Tensor:
        return y.flatten(-2).mT  # (n, o, h, w) -> (n, places, o)

    def from_rows(self, rows: Tensor, y: Tensor) -> Tensor:
        return rows.mT.reshape(y.shape)


def view(module: nn.Module, dtype: torch.dtype | None = None) -> Layer:
    """The module as an adapter sees it; in ``dtype``, or else in its own type, float32 at least.

    Where there is a :func:`refusal` there is no matrix to ask for.
    """
    form = _form(module) or Layer
    weight: Any = next(module.parameters(), torch.empty(0)) if form is Layer else module.weight
    return form(module, dtype or torch.promote_types(weight.dtype, torch.float32))


# Linear layers with a forward of their own that computes the same.
SAME = ("transformers.models.falcon.modeling_falcon.FalconLinear", "timm.layers.linear.Linear")


def refusal(module: nn.Module) -> str | None:
    """Why the module cannot be seen as a matrix; None where it can."""
    form = _form(module)
    if form is None:
        own = isinstance(module, (nn.Linear, nn.Conv2d))
        return f"a {type(module).__name__}" + (", whose forward is its own," if own else "")
    weight = module._parameters.get("weight")
    if weight is None or nn.parameter.is_lazy(weight):
        return f"a {type(module).__name__} whose weight is computed or not there yet"
    if not weight.is_floating_point() or weight.ndim != (4 if form is _Conv2d else 2):
        return f"a {type(module).__name__} with a weight of {weight.dtype} {tuple(weight.shape)}"
    if form is _Conv2d and module.groups != 1:
        return f"a Conv2d with groups={module.groups}"
    return None


def _form(module: nn.Module) -> type[_Linear] | None:
    kind = type(module)
    if kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers."):
        return _Conv1D
    same = kind.forward is nn.Linear.forward or f"{kind.__module__}.{kind.__name__}" in SAME
    if isinstance(module, nn.Linear) and same:
        return _Linear
    if isinstance(module, nn.Conv2d) and kind.forward is nn.Conv2d.forward:
        return _Conv2d if type(module)._conv_forward is nn.Conv2d._conv_forward else None
    return None


def width(child: nn.Module) -> int:
    """How many features a child of a block takes: those its normalisation, or else its first matrix, is made for.

    >>> width(nn.LayerNorm(8)), width(nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)))
    (8, 8)
    """
    for m in child.modules():
        size = getattr(m, "in_features", None)
        if isinstance(size, int):
            return size
        weight = getattr(m, "weight", None)
        shape: tuple[int, ...] = getattr(m, "normalized_shape", ()) or (
            weight.shape if isinstance(weight, Tensor) else ()
        )
        if len(shape) == 1:
            return shape[0]
    raise ValueError(f"tap: expected a normalisation or layers with a matrix, got a {type(child).__name__}")
