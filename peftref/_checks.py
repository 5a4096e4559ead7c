"""What validators repeat: each returns the checked value, or says what was expected and what came."""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def integer(name: str, value: Any, low: int | None = None, high: int | None = None) -> int:
    """An integer from ``low`` to ``high``, both included; NumPy's and 0-d tensors are.

    Raises:
        ValueError: not an integer (True and False are none), or outside the interval.

    >>> integer("k", 5, 1)
    5
    >>> integer("k", True, 1)
    Traceback (most recent call last):
    ValueError: k: expected an integer >= 1, got True
    """
    value = scalar(value)
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or (low is not None and value < low) or (high is not None and value > high):
        raise ValueError(f"{name}: expected an integer {_interval(low, high)}".rstrip() + f", got {value!r}")
    return int(value)


def number(
    name: str, value: Any, low: float | None = None, high: float | None = None, *, open_low: bool = False
) -> float:
    """A finite real number from ``low`` to ``high``, both included unless ``open_low``; NumPy's and 0-d tensors are.

    Raises:
        ValueError: not a finite real number (True and False are none), or outside the interval.

    >>> number("lr", 0.1, 0.0, open_low=True)
    0.1
    >>> number("lr", torch.tensor(0.5))
    0.5
    >>> number("lr", float("nan"), 0.0)
    Traceback (most recent call last):
    ValueError: lr: expected a finite number >= 0, got nan
    """
    value = scalar(value)
    real = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    if real:
        too_low = low is not None and (value <= low if open_low else value < low)
        real = not too_low and not (high is not None and value > high)
    if not real:
        raise ValueError(
            f"{name}: expected a finite number {_interval(low, high, open_low)}".rstrip() + f", got {value!r}"
        )
    return float(value)


def numbers_of(name: str, values: Any) -> tuple[float, ...]:
    """Finite real numbers, from a sequence, an array or a tensor of one dimension.

    Raises:
        ValueError: no sequence of them.

    >>> numbers_of("weights", torch.tensor([0.5, 0.25]))
    (0.5, 0.25)
    """
    values = values.tolist() if getattr(values, "ndim", None) == 1 and hasattr(values, "tolist") else values
    listed = isinstance(values, Iterable) and not isinstance(values, str | bytes)
    try:
        return tuple(number(name, value) for value in (values if listed else [None]))
    except ValueError:
        raise ValueError(f"{name}: expected finite numbers, got {values!r}") from None


def scalar(value: Any) -> Any:
    """The number in an array or tensor without dimensions; anything else as it is."""
    held = getattr(value, "ndim", None) == 0 and hasattr(value, "item") and not getattr(value, "is_meta", False)
    return value.item() if held else value


def one_of(name: str, value: T, choices: Collection[T]) -> T:
    """One of a few values.

    Raises:
        ValueError: another one.

    >>> one_of("kind", "knn", ("knn", "rbf"))
    'knn'
    """
    if isinstance(value, list | dict | set) or value not in choices:
        raise ValueError(f"{name}: expected one of {list(choices)}, got {value!r}")
    return value


def finite(name: str, value: Tensor) -> Tensor:
    """A tensor without NaN and infinity.

    Raises:
        ValueError: it has one; the message says how many.
    """
    broken = int((~value.isfinite()).sum())
    if broken:
        raise ValueError(f"{name}: expected finite entries, got {broken} that are NaN or infinite")
    return value


def class_scores(name: str, value: Any, n: int | None = None) -> Tensor:
    """Logits ``(N, K)``, of ``n`` samples if given: no dense ones, no tuple, no output object.

    Raises:
        TypeError: no floating-point tensor.
        ValueError: another shape.

    >>> class_scores("model", (torch.zeros(2, 3), None))
    Traceback (most recent call last):
    TypeError: model: expected logits (N, K), got tuple
    >>> class_scores("logits", torch.zeros(2, 5, 6, 7))
    Traceback (most recent call last):
    ValueError: logits: expected logits (N, K), got torch.float32 (2, 5, 6, 7)
    """
    if not isinstance(value, Tensor):
        hint = "; wrap the model so that it returns their .logits" if hasattr(value, "logits") else ""
        raise TypeError(f"{name}: expected logits (N, K), got {type(value).__name__}{hint}")
    got = f"{value.dtype} {tuple(value.shape)}"
    if not value.is_floating_point():
        raise TypeError(f"{name}: expected logits (N, K), got {got}")
    if value.ndim != 2 or n not in (None, len(value)):
        raise ValueError(f"{name}: expected logits ({'N' if n is None else n}, K), got {got}")
    return value


def upcast(dtype: torch.dtype) -> torch.dtype:
    """The type to compute in: float32, or ``dtype`` itself if that is wider.

    >>> upcast(torch.bfloat16), upcast(torch.float64)
    (torch.float32, torch.float64)
    """
    return dtype if dtype == torch.float64 else torch.float32  # float8 has no promotion to ask for


def at_least_float32(value: Tensor) -> Tensor:
    """``value`` in float32, or in its own type if that is wider; the gradient goes through."""
    return value.to(upcast(value.dtype))


def _interval(low: float | None, high: float | None, open_low: bool = False) -> str:
    if low is not None and high is not None:
        return f"in {'(' if open_low else '['}{low:g}, {high:g}]"
    if low is not None:
        return f"{'>' if open_low else '>='} {low:g}"
    return "" if high is None else f"<= {high:g}"
