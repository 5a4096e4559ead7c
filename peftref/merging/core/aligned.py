"""What signatures, patches and codes share: refusing wrong states before anything changes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from .loop import State, layout_of


def check_names(names: Iterable[str]) -> list[str]:
    listed = list(names) if isinstance(names, Iterable) and not isinstance(names, str) else None
    if listed is None or not all(isinstance(name, str) for name in listed):
        raise TypeError(f"names: expected names of tensors, as of first(units, k), got {names!r}")
    return list(dict.fromkeys(listed))


def check_states(**states: State) -> None:
    for label, state in states.items():
        if not isinstance(state, Mapping):
            hint = " (use .state_dict())" if isinstance(state, nn.Module) else ""
            raise TypeError(f"{label}: expected a mapping of names to tensors, got {type(state).__name__}{hint}")


def check_tensors(names: Iterable[str], **states: State) -> None:
    """Raise one error that lists what is missing, integer, or of another shape than in the first of ``states``."""
    problems = []
    (label0, *_) = states
    layouts = {label: layout_of(state) for label, state in states.items()}
    floats = {
        label: {n: t for n in names if n in layout and isinstance(t := layout[n], Tensor) and t.is_floating_point()}
        for label, layout in layouts.items()
    }
    for label, layout in layouts.items():
        pairs = [(n, tuple(t.shape), tuple(floats[label0].get(n, t).shape)) for n, t in floats[label].items()]
        found = {
            "missing": [n for n in names if n not in layout],
            "not floating-point": [n for n in names if n in layout and n not in floats[label]],
            "shapes": [f"{n} {got} for {expected}" for n, got, expected in pairs if got != expected],
        }
        if any(found.values()):
            lists = "; ".join(f"{what}: {', '.join(which)}" for what, which in found.items() if which)
            problems.append(f"{label}: expected floating-point tensors of the shapes of {label0}; {lists}")
    if problems:
        raise ValueError("\n".join(problems))


def finite(name: str, value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected finite numbers, got {value!r}")
    return value
