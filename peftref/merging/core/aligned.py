"""What every merge shares: refusing wrong states before anything changes."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

State = Mapping[str, Tensor]  # a state dict, or a checkpoint opened lazily


def check_names(names: Iterable[str]) -> list[str]:
    """The names without repetitions.

    Raises:
        TypeError: something else than names.
    """
    listed = list(names) if isinstance(names, Iterable) and not isinstance(names, str) else None
    if listed is None or not all(isinstance(name, str) for name in listed):
        raise TypeError(f"names: expected names of tensors, as of first(units, k), got {names!r}")
    return list(dict.fromkeys(listed))


def check_states(**states: State) -> None:
    """Refuse what maps no names to tensors.

    Raises:
        TypeError: one of the states does not.
    """
    for label, state in states.items():
        if not isinstance(state, Mapping):
            hint = " (use .state_dict())" if isinstance(state, nn.Module) else ""
            raise TypeError(f"{label}: expected a mapping of names to tensors, got {type(state).__name__}{hint}")


def check_tensors(names: Iterable[str], **states: State) -> None:
    """Raise one error that lists what is missing, integer, or of another shape than in the first of ``states``.

    Raises:
        ValueError: something is.
    """
    (label0, *_) = states
    layouts = {label: layout_of(state) for label, state in states.items()}
    floats = {label: _floating_point(names, layout) for label, layout in layouts.items()}
    found = {}
    for label, layout in layouts.items():
        pairs = [(n, tuple(t.shape), tuple(floats[label0].get(n, t).shape)) for n, t in floats[label].items()]
        found[label] = {
            "missing": [n for n in names if n not in layout],
            "not floating-point": [n for n in names if n in layout and n not in floats[label]],
            "shapes": [f"{n} {got} for {expected}" for n, got, expected in pairs if got != expected],
        }
    _raise_lists(found, f"floating-point tensors of the shapes of {label0}")


def check_aligned(base: State, models: Sequence[State], skip: Collection[str] = ()) -> Mapping[str, Tensor]:
    """Raise one error that lists everything in which ``models`` differ from ``base``; return the base's layout.

    The layout maps names to tensors whose shape, dtype and memory can be asked without reading them from a file.

    Args:
        base: a state dict.
        models: others, at least one.
        skip: names that may differ in anything.

    Raises:
        TypeError: ``models`` is one state dict instead of a sequence, or something is no state dict.
        ValueError: no models, or a name or shape that differs.
    """
    if isinstance(models, Mapping) or not isinstance(models, Sequence):
        raise TypeError(f"models: expected a sequence of state dicts, got one {type(models).__name__}")
    check_states(base=base, **{f"models[{i}]": model for i, model in enumerate(models)})
    if not models:
        raise ValueError("models: expected at least one state dict, got none")
    layout = layout_of(base)
    ties = tied_names(layout, skip)
    found = {f"models[{i}]": _differences(layout, ties, model, skip) for i, model in enumerate(models)}
    _raise_lists(found, "the names and shapes of base")
    return layout


def tied_names(layout: Mapping[str, Tensor], skip: Collection[str]) -> dict[str, str]:
    """Each name whose memory has been seen under an earlier name -> that name; a skipped name ties to none."""
    seen: dict[tuple[Hashable, ...], str] = {}
    first = {name: seen.setdefault(memory_of(t), name) for name, t in layout.items() if name not in skip}
    return {name: other for name, other in first.items() if other != name}


def layout_of(state: State) -> Mapping[str, Tensor]:
    return getattr(state, "layout", state)  # of a lazily opened checkpoint: tensors on the meta device


def memory_of(t: Tensor) -> tuple[Hashable, ...]:
    """Equal for tensors that are the same memory, seen in the same way."""
    if t.device.type == "meta" or t.numel() == 0:
        return (id(t),)
    return (t.data_ptr(), t.device, t.dtype, t.shape, t.stride())


def _floating_point(names: Iterable[str], layout: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tensors = {n: layout[n] for n in names if n in layout and isinstance(layout[n], Tensor)}
    return {n: t for n, t in tensors.items() if t.is_floating_point()}


def _differences(
    layout: Mapping[str, Tensor], ties: Mapping[str, str], state: State, skip: Collection[str]
) -> dict[str, list[str]]:
    """Kind of difference -> what differs."""
    model = layout_of(state)
    missing = [n for n in layout if n not in model and n not in skip]
    both = [(n, model[n], t) for n, t in layout.items() if n in model and n not in skip]
    kinds = [(n, t, t0) for n, t, t0 in both if t.is_floating_point() != t0.is_floating_point()]
    apart = [(n, first) for n, first in ties.items() if n in model and first in model and not _same(state, n, first)]
    return {
        "missing": missing,
        "unexpected": [n for n in model if n not in layout and n not in skip],
        "shapes": [f"{n} {tuple(t.shape)} for {tuple(t0.shape)}" for n, t, t0 in both if t.shape != t0.shape],
        "types": [f"{n} {t.dtype} for {t0.dtype}" for n, t, t0 in kinds],
        "tied in base, but different": [f"{n} and {first}" for n, first in apart],
    }


def _raise_lists(found: Mapping[str, Mapping[str, list[str]]], expected: str) -> None:
    """One error with a line for each state that differs.

    Raises:
        ValueError: there is one.
    """
    problems = []
    for label, differences in found.items():
        lists = [f"{what}: {', '.join(names)}" for what, names in differences.items() if names]
        if lists:
            problems.append(f"{label}: expected {expected}; {'; '.join(lists)}")
    if problems:
        raise ValueError("\n".join(problems))


def _same(state: State, a: str, b: str) -> bool:
    return memory_of(layout_of(state)[a]) == memory_of(layout_of(state)[b]) or torch.equal(state[a], state[b])
