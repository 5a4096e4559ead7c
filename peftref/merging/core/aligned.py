"""What every merge shares: refusing wrong states before anything changes."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..._checks import at_least_float32
from ..._wrapped import WRAPPED
from .codes import other_codes, scaled_codes

State = Mapping[str, Tensor]  # a state dict, or a checkpoint opened lazily


def check_names(names: Iterable[str], label: str = "names") -> list[str]:
    """The names without repetitions.

    Raises:
        TypeError: something else than names; one text is not a list of its letters.
    """
    listed = list(names) if isinstance(names, Iterable) and not isinstance(names, (str, bytes)) else None
    if listed is None or not all(isinstance(name, str) for name in listed):
        source = "names of tensors, as of first(units, k)" if label == "names" else "a list of names of tensors"
        raise TypeError(f"{label}: expected {source}, got {names!r}")
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
            "sparse or without data": [
                n for n, t in floats[label].items() if layout is states[label] and not _dense(t)
            ],
            "shapes": [f"{n} {got} for {expected}" for n, got, expected in pairs if got != expected],
        }
    _raise_lists(found, f"floating-point tensors of the shapes of {label0}")


def check_finite(label: str, state: State) -> None:
    """Refuse floating-point tensors with NaN or infinity.

    Raises:
        ValueError: there are some; the message names them.
    """
    broken = [name for name in state if not at_least_float32(state[name]).isfinite().all()]
    if broken:
        raise ValueError(f"{label}: expected finite numbers, got others in {', '.join(broken)}")


def check_dense(skip: Collection[str] = (), **states: State) -> None:
    """Raise one error that lists what is no tensor, or none with a number for each entry (sparse, on the meta device).

    Raises:
        ValueError: there is something. Checkpoints that are read on demand have neither.
    """
    found = {}
    for label, state in states.items():
        held = {} if layout_of(state) is not state else {n: t for n, t in state.items() if n not in skip}
        tensors = {n: t for n, t in held.items() if isinstance(t, Tensor)}
        found[label] = {
            "no tensors": [f"{n} ({type(t).__name__})" for n, t in held.items() if n not in tensors],
            "sparse or without data": [n for n, t in tensors.items() if not _dense(t)],
        }
    _raise_lists(found, "dense tensors")


def check_aligned(base: State, models: Sequence[State], skip: Collection[str] = ()) -> Mapping[str, Tensor]:
    """Raise one error that lists everything in which ``models`` differ from ``base``; return the base's layout.

    The layout maps names to tensors whose shape, dtype and memory can be asked without reading them from a file.

    Args:
        base: a state dict.
        models: others, at least one.
        skip: names that may differ in anything.

    Raises:
        TypeError: ``models`` is one state dict instead of a sequence, something is no state dict, or ``skip`` no list
            of names.
        ValueError: no models, a name, shape or code that differs, or a name to skip that no state has.
    """
    if isinstance(models, Mapping) or not isinstance(models, Sequence):
        raise TypeError(f"models: expected a sequence of state dicts, got one {type(models).__name__}")
    named = {f"models[{i}]": model for i, model in enumerate(models)}
    check_states(base=base, **named)
    if not models:
        raise ValueError("models: expected at least one state dict, got none")
    skip = set(check_names(skip, "skip"))
    unknown = [name for name in sorted(skip) if not any(name in state for state in (base, *models))]
    if unknown:
        raise ValueError(f"skip: expected names of the state dicts, got {unknown}")
    check_dense(base=base)
    check_dense(skip, **named)
    layout = layout_of(base)
    ties = tied_names(layout, skip)
    _raise_lists(
        {label: _differences(layout, ties, model, skip) for label, model in named.items()},
        "the names and shapes of base",
    )
    _raise_codes(base, named, [name for name in layout if name not in skip])
    return layout


def check_codes(names: Iterable[str], base: State, models: Sequence[State]) -> None:
    """Raise one error that lists codes that differ, in the modules that hold ``names``.

    Raises:
        ValueError: there are some.
    """
    owners = {name.rpartition(".")[0] for name in names}
    layouts = [layout_of(model) for model in models]
    held = [n for n, t in layout_of(base).items() if isinstance(t, Tensor)]
    beside = [n for n in held if n in owners or n.rpartition(".")[0] in owners]  # "weight" of "weight.absmax"
    both = [
        n for n in beside if all(getattr(other.get(n), "shape", None) == layout_of(base)[n].shape for other in layouts)
    ]
    _raise_codes(base, {f"models[{i}]": model for i, model in enumerate(models)}, both)


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
    unexpected = [n for n in model if n not in layout and n not in skip]
    both = [(n, model[n], t) for n, t in layout.items() if n in model and n not in skip]
    kinds = [(n, t, t0) for n, t, t0 in both if _kind(t) != _kind(t0)]
    apart = [(n, first) for n, first in ties.items() if n in model and first in model and not _same(state, n, first)]
    wrapper = _wrapper(missing, unexpected)
    if wrapper:
        missing, unexpected = [], []
    return {
        "names that differ by a wrapper alone (use the state dict of the module inside)": wrapper,
        "missing": missing,
        "unexpected": unexpected,
        "shapes": [f"{n} {tuple(t.shape)} for {tuple(t0.shape)}" for n, t, t0 in both if t.shape != t0.shape],
        "types": [f"{n} {t.dtype} for {t0.dtype}" for n, t, t0 in kinds],
        "tied in base, but different": [f"{n} and {first}" for n, first in apart],
    }


def _wrapper(missing: Sequence[str], unexpected: Sequence[str]) -> list[str]:
    """What alone tells one side's names from the other's: ``module``, of ``DataParallel``, or any common beginning."""
    short, long = sorted((missing, unexpected), key=lambda names: sum(map(len, names)))
    if not short or len(short) != len(long):
        return []
    words = {word for name in long for word in name.split(".")} & {*WRAPPED, "module"}
    plain = {".".join(word for word in name.split(".") if word not in words) for name in (*short, *long)}
    if words and len(plain) == len(short):
        return sorted(words)
    start = long[0].removesuffix(short[0])
    return [start] if start != long[0] and {start + name for name in short} == set(long) else []


def _dense(t: Tensor) -> bool:
    return t.layout == torch.strided and not t.is_meta and not t.is_nested


def _kind(t: Tensor) -> tuple[bool, bool]:
    return t.is_floating_point(), t.is_complex()


def _raise_codes(base: State, models: Mapping[str, State], names: Collection[str]) -> None:
    layout = layout_of(base)
    found = {label: {"different": other_codes(base, model, layout, names)} for label, model in models.items()}
    found["models"] = {"codes and scales that both differ": scaled_codes(base, list(models.values()), layout, names)}
    _raise_lists(found, "the codes of base (dequantise quantised weights first; skip what is no weight)")


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
