"""From a user's columns to tensors and back: everything is checked here, before anything is computed.

>>> columns = {"y": [1.0, 2.0, 4.0, 8.0], "w": [0.0, 1.0, 1.0, 0.0], "who": list("abab"), "year": [1, 1, 2, 2]}
>>> frame = pd.DataFrame(columns)
>>> panel, back = read_panel(frame["y"], frame["w"], None, frame["who"], frame["year"], estimator="fe_only")
>>> panel.y  # sorted by unit and period
tensor([[1., 4., 2., 8.]], dtype=torch.float64)
>>> back.align({"y": panel.y}, panel.layout)["y"][0].tolist()  # in the caller's order again
[1.0, 2.0, 4.0, 8.0]
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from .layout import Layout, within

__all__ = ["Frame", "Panel", "read_panel"]

ACROSS = ("simple_ols", "pols", "pooled")  # estimators that compare units with each other
NO_COVARIATES = ("simple_ols", "fe_only")


class Panel(NamedTuple):
    """Variables of one dataset or of a batch, in float64, rows sorted by unit and period.

    Attributes:
        y: outcome, ``(B, n)``.
        w: treatment, ``(B, n)``.
        x: covariates, ``(B, J, n)``.
        layout: of the rows.
    """

    y: Tensor
    w: Tensor
    x: Tensor
    layout: Layout


@dataclass(frozen=True)
class Frame:
    """How to hand numbers back: the caller's index, and the name of the treatment."""

    index: pd.Index
    name: str

    def align(self, columns: Mapping[str, Tensor], layout: Layout) -> pd.DataFrame:
        """Tensors ``(R, n)`` as columns (name, r), in the caller's order; missing where a row was not used."""
        made = {}
        for name, values in columns.items():
            for r, row in enumerate(values):
                full = np.full(len(self.index), np.nan)
                full[layout.order.cpu().numpy()] = row.cpu().numpy()
                made[name, r] = full
        return pd.DataFrame(made, index=self.index)


def read_panel(
    y: Any, w: Any, x: Any, unit: Any, time: Any, *, estimator: str, twoway: bool = False
) -> tuple[Panel, Frame]:
    """Check and sort columns; see :meth:`peftref.panel.dml_panel.PanelDML.fit`, which lists the errors.

    Units with a single row say nothing within units: they are dropped with a warning, except for the estimators that
    compare units with each other.
    """
    if x is None and estimator not in NO_COVARIATES:
        raise TypeError(f"x: expected covariates for the estimator {estimator!r}, got None")
    given = {"y": y, "w": w, "unit": unit, "time": time} | ({} if x is None else {"x": x})
    for name, column in given.items():
        if column is None or np.ndim(column) == 0:  # the name of a column is not a column
            raise TypeError(f"{name}: expected a column, got {column!r}")
    lengths = {name: len(column) for name, column in given.items()}
    if len(set(lengths.values())) > 1 or not len(y):
        raise ValueError(f"{', '.join(given)}: expected equal, positive lengths, got {lengths}")
    indexed = {name: column.index for name, column in given.items() if isinstance(column, (pd.Series, pd.DataFrame))}
    first = next(iter(indexed.values()), pd.RangeIndex(len(y)))
    for name, index in indexed.items():
        if not index.equals(first):
            raise ValueError(f"{name}: expected the index of the other columns, {first[:3]}..., got {index[:3]}...")
    own_name = getattr(w, "name", None)
    frame = Frame(first, "w" if own_name is None else str(own_name))
    table = [_numbers("y", y), _numbers("w", w)]
    names = []
    if x is not None and estimator not in NO_COVARIATES:
        columns = x if isinstance(x, pd.DataFrame) else pd.DataFrame(np.asarray(x))
        if not columns.shape[1]:
            raise ValueError("x: expected at least one covariate, got none")
        names = [f"x[{name!r}]" for name in columns]
        table += [_numbers(name, columns.iloc[:, i]) for i, name in enumerate(names)]
    layout = Layout.of(unit, time)
    single = layout.counts() == 1
    if estimator not in ACROSS and single.any():
        kept = ~single[layout.unit]
        warnings.warn(f"unit: {int(single.sum())} units have one row and are dropped", UserWarning, stacklevel=3)
        if not kept.any():
            raise ValueError("unit: expected units with several rows, got none")
        layout = layout.select(kept)
    values = torch.from_numpy(np.stack(table)[:, layout.order.numpy()])
    panel = Panel(values[:1], values[1:2], values[None, 2:], layout)
    _check_variation(panel, names, estimator, twoway)
    return panel, frame


def _numbers(name: str, column: Any) -> NDArray[Any]:
    try:
        raw = np.asarray(column)
        # NumPy would take dates for nanoseconds, categories and digits in strings for amounts, and drop imaginary parts
        if raw.dtype.kind in "mMcUS" or isinstance(getattr(column, "dtype", None), pd.CategoricalDtype):
            raise TypeError
        if raw.dtype.kind == "O" and any(isinstance(value, str) for value in raw.flat):
            raise TypeError
        values = np.asarray(column, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: expected numbers, got {getattr(column, 'dtype', type(column).__name__)}") from error
    if values.ndim != 1:
        raise ValueError(f"{name}: expected one column, got shape {values.shape}")
    missing = ~np.isfinite(values)
    if np.ma.isMA(column):
        missing |= np.ma.getmaskarray(column)
    broken = int(missing.sum())
    if broken:
        raise ValueError(f"{name}: expected finite numbers, got {broken} that are missing or infinite")
    return values


def _check_variation(panel: Panel, names: list[str], estimator: str, twoway: bool) -> None:
    """A column that the estimator's own transformation wipes out would leave only rounding errors to learn from."""
    across = estimator in ACROSS

    def flat(a: Tensor) -> Tensor:
        left = a - a.mean(-1, keepdim=True) if across else within(a, panel.layout, twoway)
        return left.abs().amax(-1) <= 1e-10 * a.abs().amax(-1)

    if flat(panel.y).any():
        raise ValueError("y: expected an outcome that varies, got one that is constant where the estimator looks")
    if flat(panel.w).any():
        where = "" if across else " within units" + (" and periods" if twoway else "")
        raise ValueError(f"w: expected a treatment that varies{where}, got one that is constant there")
    if estimator not in ("fe", "early"):
        return
    gone = [name for name, constant in zip(names, flat(panel.x)[0], strict=True) if constant]
    if gone:
        raise ValueError(
            f"x: expected covariates that vary within units{' and periods' if twoway else ''} for {estimator!r}, "
            f"got {', '.join(gone)}; leave them out, the fixed effects hold them"
        )
