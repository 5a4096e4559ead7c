"""Codes of the labels of units and periods, where the order of the labels can be relied on.

>>> label_codes("time", [2003, 1999, 2003])
tensor([1, 0, 1])
>>> label_codes("time", ["9", "10"])
Traceback (most recent call last):
TypeError: time: expected numbers, dates, periods or an ordered category, got text, whose order is not that of time: \
convert it, as by astype(int), pd.to_datetime or pd.Categorical(..., categories=[...], ordered=True)
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pandas as pd
import torch
from pandas.api.types import infer_dtype
from torch import Tensor

NUMBERS = ("integer", "floating", "mixed-integer-float", "decimal", "boolean")
IN_TIME = (*NUMBERS, "datetime64", "datetime", "date", "timedelta64", "timedelta", "time", "period", "interval")
TEXT = ("string", "bytes")


def label_codes(name: str, labels: Any) -> Tensor:
    """Codes 0, 1, ... ``(n,)`` in the order of the sorted labels.

    Args:
        name: "unit", whose labels may be anything that sorts, or "time", whose labels must have an order in time.
        labels: a column ``(n,)``.

    Raises:
        ValueError: several columns, or missing labels.
        TypeError: labels of several kinds, or periods that are text or a category of text without an order.
    """
    if getattr(labels, "ndim", 1) > 1:
        raise ValueError(f"{name}: expected one column, got shape {tuple(labels.shape)}")
    column = pd.Series(labels.detach().cpu().numpy() if isinstance(labels, Tensor) else labels)
    if column.isna().any():
        raise ValueError(f"{name}: expected no missing labels, got {int(column.isna().sum())}")
    category = column.dtype if isinstance(column.dtype, pd.CategoricalDtype) else None
    if category is not None and not category.ordered:  # the order of the categories is that of their appearance, or any
        column = column.astype(category.categories.dtype)
    if category is None or not category.ordered:
        _check_kind(name, column)
    elif name == "time":
        _check_order(list(category.categories))
    try:
        codes, _ = pd.factorize(column, sort=True)
    except TypeError as error:
        raise TypeError(f"{name}: expected labels that can be sorted, got {infer_dtype(column)!r} ({error})") from error
    return torch.from_numpy(codes.astype(np.int64))


def _check_order(categories: list[Any]) -> None:
    """Refuse "1", "10", "2", as pandas orders text that is given no order."""
    words = [re.fullmatch(r"(.*?)(\d+)", value) if isinstance(value, str) else None for value in categories]
    if None in words or len({word[1] for word in words if word}) > 1:
        return
    numbers = [int(word[2]) for word in words if word]
    if numbers != sorted(numbers) and categories == sorted(categories):
        raise TypeError(
            f"time: expected categories in the order of time, got {categories[:4]}, the order of text; name them in "
            "order, as by pd.Categorical(..., categories=[...], ordered=True)"
        )


def _check_kind(name: str, column: pd.Series) -> None:
    kind = infer_dtype(column, skipna=True)
    if kind == "mixed" and all(isinstance(value, tuple) for value in column):  # such as (year, quarter)
        kind = infer_dtype([part for value in column for part in value])
    if name == "time" and kind not in IN_TIME:
        got = "text, whose order is not that of time" if kind in TEXT else f"labels of the kind {kind!r}"
        raise TypeError(
            f"time: expected numbers, dates, periods or an ordered category, got {got}: "
            "convert it, as by astype(int), pd.to_datetime or pd.Categorical(..., categories=[...], ordered=True)"
        )
    if column.dtype == object and kind not in NUMBERS:
        kinds = {type(value).__name__ for value in column}
        if len(kinds) > 1 and {"str", "bytes"} & kinds:
            raise TypeError(
                f"{name}: expected labels of one kind, got {' and '.join(sorted(kinds))} mixed, among which 1 and '1' "
                "would differ: convert them, as by astype(str)"
            )
