r"""What all estimators share: the rows of a panel in one order, and means, demeaning and differences over its units.

A :class:`Layout` says which unit and which period each row belongs to; variables are float64 tensors whose last
dimension is the rows, with any batch dimensions (datasets, repetitions) in front. Covariates have one more dimension at
the end, ``(..., n, J)``. No function loops over units, and none builds a matrix of rows by units.

The within transformation takes the mean of each unit away (eq-dml_panel-within),

.. math:: \ddot a_{it}=a_{it}-\bar a_i,\qquad\bar a_i=\tfrac1{T_i}\sum_ta_{it},

and with ``twoway`` also those of the periods: in a balanced panel
:math:`a_{it}-\bar a_i-\bar a_t+\bar a`, in others what least squares on a dummy for each unit and period leaves. Its
period effects are found by conjugate gradients: projecting on units and on periods in turn, the usual way, needs
many thousands of rounds where units overlap in few periods.

>>> layout = Layout.of(["b", "a", "a", "b"], [2, 1, 2, 1])
>>> layout.order, layout.unit  # rows sorted by unit and period, and the unit of each
(tensor([1, 2, 3, 0]), tensor([0, 0, 1, 1]))
>>> y = torch.tensor([1.0, 3.0, 10.0, 20.0], dtype=torch.float64)
>>> means(y, layout.unit)
tensor([ 2.,  2., 15., 15.], dtype=torch.float64)
>>> within(y, layout)
tensor([-1.,  1., -5.,  5.], dtype=torch.float64)
>>> now, before = layout.consecutive()
>>> y[now] - y[before]
tensor([ 2., 10.], dtype=torch.float64)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .labels import label_codes

__all__ = ["Layout", "group_sums", "means", "within"]


@dataclass(frozen=True, eq=False)
class Layout:
    """Which unit and period each row of a panel belongs to; rows are sorted by unit, then period.

    Attributes:
        unit: codes 0, 1, ... of each row's unit, ``(n,)``, in the order of the sorted labels.
        time: codes of its period.
        order: where each row stood in the caller's data, ``(n,)``.
        n_units: number of different units.
        n_periods: number of different periods.
        step: like ``time``, but counted among the periods of the whole data: :meth:`select` keeps it, so that a gap
            stays one.
    """

    unit: Tensor
    time: Tensor
    order: Tensor
    n_units: int
    n_periods: int
    step: Tensor | None = None

    def __post_init__(self) -> None:
        if self.step is None:
            object.__setattr__(self, "step", self.time)

    @classmethod
    def of(cls, unit: Any, time: Any) -> Layout:
        """The layout of two columns of labels: units of any sortable type, periods that have an order in time.

        Args:
            unit: labels ``(n,)``.
            time: labels ``(n,)``: numbers, dates, ``pandas.Period`` or an ordered category. As text "10" comes before
                "9", and April before January.

        Raises:
            ValueError: columns of unequal length, missing labels, or two rows of one unit in one period.
            TypeError: periods without an order in time, or text and numbers mixed.
        """
        if len(unit) != len(time) or len(unit) == 0:
            raise ValueError(f"unit, time: expected equal, positive lengths, got {len(unit)} and {len(time)}")
        codes = {name: label_codes(name, labels) for name, labels in (("unit", unit), ("time", time))}
        u = codes["unit"]
        t = codes["time"]
        key = u * (int(t.max()) + 1) + t
        key, order = key.sort(stable=True)
        twice = order[1:][key[1:] == key[:-1]]
        if len(twice):
            where = int(twice[0])
            raise ValueError(
                f"unit, time: expected one row for each unit and period, got several for unit {_label(unit, where)!r}, "
                f"period {_label(time, where)!r}"
            )
        return cls(u[order], t[order], order, int(u.max()) + 1, int(t.max()) + 1)

    def __len__(self) -> int:
        return len(self.unit)

    @property
    def balanced(self) -> bool:
        """Whether every unit has a row in every period."""
        return len(self) == self.n_units * self.n_periods

    def select(self, rows: Tensor) -> Layout:
        """The layout of some rows (a mask ``(n,)``), with units and periods that have none left taken out."""
        assert self.step is not None
        unit, time = (torch.unique(t[rows], return_inverse=True)[1] for t in (self.unit, self.time))
        return Layout(unit, time, self.order[rows], _count(unit), _count(time), self.step[rows])

    def counts(self) -> Tensor:
        """Number of rows of each unit, ``(n_units,)``."""
        return self.unit.bincount(minlength=self.n_units)

    def consecutive(self) -> tuple[Tensor, Tensor]:
        """Positions of the rows with a row of the same unit one period earlier, and of those earlier rows.

        One period is one step among all periods of the data, so a gap in a unit is not differenced across.
        """
        assert self.step is not None
        follows = (self.unit[1:] == self.unit[:-1]) & (self.step[1:] == self.step[:-1] + 1)
        now = follows.nonzero().squeeze(1) + 1
        return now, now - 1

    def to(self, device: torch.device | str) -> Layout:
        """The same on a device."""
        assert self.step is not None
        unit, time, order, step = (t.to(device) for t in (self.unit, self.time, self.order, self.step))
        return Layout(unit, time, order, self.n_units, self.n_periods, step)


def group_sums(a: Tensor, group: Tensor, size: int, dim: int = -1) -> Tensor:
    """Sums of ``a`` along ``dim`` over rows with the same code: that dimension becomes ``size``."""
    shape = list(a.shape)
    shape[dim] = size
    return a.new_zeros(shape).index_add_(dim, group, a)


def means(a: Tensor, group: Tensor, dim: int = -1) -> Tensor:
    """For each row the mean over its group, in the shape of ``a``; ``dim`` is that of the rows."""
    size = _count(group)
    each = len(group) // max(size, 1)
    if dim == -1 and torch.equal(group, torch.arange(size, device=group.device).repeat_interleave(each)):
        # the units of a balanced panel: a mean of equal blocks is three times as fast
        of_unit: Tensor = a.unflatten(-1, (size, each)).mean(-1, keepdim=True)
        return of_unit.expand(*a.shape[:-1], size, each).flatten(-2)
    return _Groups(a, group, size, dim).means(a)


def within(a: Tensor, layout: Layout, twoway: bool = False, dim: int = -1, tol: float = 1e-12) -> Tensor:
    """Subtract the mean of each unit, and with ``twoway`` the effects of the periods too (eq-dml_panel-within).

    Args:
        a: ``(..., n)``, or ``(..., n, J)`` with ``dim=-2``.
        layout: of the rows.
        twoway: units and periods.
        dim: the dimension of the rows.
        tol: of the period effects in an unbalanced panel: the residual of their normal equations, relative to the
            variation within units.
    """
    result = a - means(a, layout.unit, dim)
    # Again: the first means are rounded to the digits of a, not of its variation.
    result = result - means(result, layout.unit, dim)
    if not twoway or not a.numel():
        return result
    if layout.balanced:
        return result - means(result, layout.time, dim)  # the two projections commute: once is all
    units = _Groups(a, layout.unit, layout.n_units, dim)
    periods = _Groups(a, layout.time, layout.n_periods, dim)
    left = periods.means(result)
    # Period effects g with P_t (g - P_u g) = P_t (a - P_u a), P the means of units and of periods: on period effects
    # P_t (1 - P_u) is symmetric, and singular only where they cannot be told from unit effects.
    effects = torch.zeros_like(a)
    direction = left
    size = _square(left, left, dim)
    enough = tol**2 * _square(result, result, dim)
    for i in range(10_000):
        # Convergence is looked up now and then: each look makes the host wait for the device.
        if i % 4 == 0 and not (size > enough).any():
            break
        image = periods.means(direction - units.means(direction))
        # What has converged rests: a further step would divide rounding by rounding, and could lead anywhere.
        rate = _ratio(size * (size > enough), _square(direction, image, dim))
        effects = effects + rate * direction
        left = left - rate * image
        before = size
        size = _square(left, left, dim)
        direction = left + _ratio(size, before) * direction
    else:
        raise RuntimeError(f"within: expected period effects within tol={tol}, got no convergence in 10000 steps")
    result = result - effects
    return result - units.means(result)


class _Groups:
    """Means over groups, for tensors in the shape of ``like``; rows are counted once."""

    def __init__(self, like: Tensor, group: Tensor, size: int, dim: int) -> None:
        counts = group.bincount(minlength=size).to(like.dtype)
        self.group = group
        self.size = size
        self.dim = dim
        self.counts = counts.unsqueeze(-1) if dim == -2 else counts

    def means(self, a: Tensor) -> Tensor:
        return (group_sums(a, self.group, self.size, self.dim) / self.counts).index_select(self.dim, self.group)


def _square(a: Tensor, b: Tensor, dim: int) -> Tensor:
    return (a * b).sum(dim, keepdim=True)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b > 0, a / b, 0.0)  # 0 / 0 where a column is done before the others


def _count(codes: Tensor) -> int:
    return int(codes.max()) + 1 if len(codes) else 0


def _label(labels: Any, i: int) -> Any:
    return labels.iloc[i] if hasattr(labels, "iloc") else labels[i]
