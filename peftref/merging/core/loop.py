r"""The one loop that all weight arithmetic shares: state dicts in, state dict out, one tensor at a time.

A *rule* says what happens to one tensor: ``rule(name, w0, ws)`` gets the base's tensor and the same tensor of each of
the N models, all in float32 or wider, and returns the merged one. :func:`merge` does the rest, so that each rule stays
a line of mathematics:

- names and shapes must agree, or a single error lists every disagreement before anything is computed;
- half-precision weights are computed in float32 and rounded once, at the end: a small difference of two bfloat16
  weights survives, which it would not if each step were rounded (a delta below :math:`2^{-8}|w|` vanishes);
- tensors without a gradient meaning (``num_batches_tracked``, masks) are copied from the base;
- tensors that share memory in the base (tied embeddings) are merged once and share memory in the result;
- no input is changed, and a result never shares memory with an input;
- no more than N + 2 tensors are alive at a time, and a rule marked :func:`elementwise` works on pieces that stay in the
  processor's cache. With checkpoints that are read from disk on demand
  (:mod:`peftref.merging.core.checkpoints`) a model larger than memory can be merged.

>>> import torch
>>> base, model = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, 2.0])}
>>> merge(base, [model], lambda name, w0, ws: w0 + 0.5 * (ws[0] - w0))
{'w': tensor([2., 2.])}
>>> delta(model, base)
{'w': tensor([2., 0.])}
>>> merge(base, [{"v": torch.ones(2)}], lambda name, w0, ws: w0)
Traceback (most recent call last):
ValueError: models[0]: expected the names and shapes of base; missing: w; unexpected: v
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from ... import _checks
from ..._checks import at_least_float32

__all__ = ["Rule", "State", "check_aligned", "delta", "elementwise", "fill", "merge", "upcast"]

BLOCK = (
    1 << 15
)  # entries that an elementwise rule gets at a time on the CPU; for more, torch would start threads of its own
State = Mapping[str, Tensor]  # a state dict, or a checkpoint opened lazily
Rule = Callable[[str, Tensor, Sequence[Tensor]], Tensor]


def merge(
    base: State,
    models: Sequence[State],
    rule: Rule,
    *,
    skip: Collection[str] = (),
    device: torch.device | str | None = None,
) -> dict[str, Tensor]:
    """Apply ``rule`` to each floating-point tensor of ``base`` and of the ``models``.

    Args:
        base: the host: gives names, order, dtypes, devices, and every tensor that is not merged.
        models: N >= 1 state dicts with the names and shapes of the base.
        rule: of :mod:`peftref.merging.baselines.arithmetic`, :mod:`peftref.merging.baselines.ties`, or your own.
        skip: names to copy from the base, such as a head with other classes; the models need not have them.
        device: where to compute (the device of each base tensor); results return to the base's.

    Returns:
        A state dict of new tensors, in the base's order.

    Raises:
        TypeError: ``models`` is one state dict instead of a sequence, or something is no state dict.
        ValueError: no models, names or shapes that do not match, or a rule that returns another shape.
    """
    made: dict[str, Tensor] = {}

    def place(name: str, like: Tensor) -> Tensor:
        return made.setdefault(name, torch.empty_like(like, memory_format=torch.contiguous_format, requires_grad=False))

    tied = fill(base, models, rule, place, skip=skip, device=device)
    return {name: made[tied.get(name, name)] for name in base}


@torch.no_grad()
def fill(
    base: State,
    models: Sequence[State],
    rule: Rule,
    place: Callable[[str, Tensor], Tensor],
    *,
    skip: Collection[str] = (),
    device: torch.device | str | None = None,
) -> dict[str, str]:
    """:func:`merge` into memory of your own: ``place(name, like)`` gives the tensor to fill, of the same shape.

    Returns:
        The names that are tied to an earlier one, and to which; for them there was no call.
    """
    layout = check_aligned(base, models, skip)
    tied = _tied(layout, skip)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for name in layout:
            if name in tied:
                continue
            w0 = base[name].detach()
            target = place(name, w0)
            if name in skip or not w0.is_floating_point():
                target.copy_(w0)
                continue
            tensors = [w0, *(model[name].detach() for model in models)]
            at = torch.device(device or w0.device)
            wide = _checks.upcast(w0.dtype)
            if at.type == "cpu" and getattr(rule, "elementwise", False):
                _in_pieces(rule, name, target, tensors, wide, pool)
                continue
            first, *rest = (t.to(at, wide) for t in tensors)
            y = rule(name, first, rest)
            if y.shape != w0.shape:
                raise ValueError(f"rule: expected shape {tuple(w0.shape)} for {name}, got {tuple(y.shape)}")
            target.copy_(y)
    return tied


@torch.no_grad()
def delta(state: State, base: State, names: Collection[str] | None = None) -> dict[str, Tensor]:
    """The difference ``state - base`` (a task vector), in float32 or wider, on the base's devices.

    Args:
        state, base: two state dicts of one architecture.
        names: of the tensors wanted (all that are floating-point); only these have to agree.

    Raises:
        ValueError: names or shapes that do not match.
    """
    layout = check_aligned(base, [state], () if names is None else (set(base) | set(state)) - set(names))
    if names is None:
        names = [name for name, place in layout.items() if place.is_floating_point()]
    elif unknown := [name for name in names if name not in layout]:
        raise ValueError(f"names: expected names of base, got {unknown}")
    return {name: upcast(state[name]).to(base[name].device) - upcast(base[name]) for name in names}


def elementwise(rule: Rule) -> Rule:
    """Mark a rule whose result at an entry needs that entry alone: it may be given any piece of a tensor, flattened."""
    marked: Any = rule  # the type of a function knows no attributes
    marked.elementwise = True
    return rule


def upcast(t: Tensor) -> Tensor:
    """``t`` in float32, or in its own type if that is wider; without a gradient."""
    return at_least_float32(t.detach())


def check_aligned(base: State, models: Sequence[State], skip: Collection[str] = ()) -> Mapping[str, Tensor]:
    """Raise one error that lists everything in which ``models`` differ from ``base``; return the base's layout.

    The layout maps names to tensors whose shape, dtype and memory can be asked without reading them from a file.
    """
    if isinstance(models, Mapping) or not isinstance(models, Sequence):
        raise TypeError(f"models: expected a sequence of state dicts, got one {type(models).__name__}")
    for name, state in [("base", base), *((f"models[{i}]", model) for i, model in enumerate(models))]:
        if not isinstance(state, Mapping):
            hint = " (use .state_dict())" if isinstance(state, torch.nn.Module) else ""
            raise TypeError(f"{name}: expected a mapping of names to tensors, got {type(state).__name__}{hint}")
    if not models:
        raise ValueError("models: expected at least one state dict, got none")
    layout = layout_of(base)
    problems = []
    tied = _tied(layout, skip)
    for i, state in enumerate(models):
        model = layout_of(state)
        both = [n for n in layout if n in model and n not in skip]
        found = {
            "missing": [n for n in layout if n not in model and n not in skip],
            "unexpected": [n for n in model if n not in layout and n not in skip],
            "shapes": [
                f"{n} {tuple(model[n].shape)} for {tuple(layout[n].shape)}"
                for n in both
                if model[n].shape != layout[n].shape
            ],
            "types": [
                f"{n} {model[n].dtype} for {layout[n].dtype}"
                for n in both
                if model[n].is_floating_point() != layout[n].is_floating_point()
            ],
            "tied in base, but different": [
                f"{n} and {first}"
                for n, first in tied.items()
                if n in model and first in model and not _same(state, n, first)
            ],
        }
        if any(found.values()):
            lists = "; ".join(f"{what}: {', '.join(names)}" for what, names in found.items() if names)
            problems.append(f"models[{i}]: expected the names and shapes of base; {lists}")
    if problems:
        raise ValueError("\n".join(problems))
    return layout


def _in_pieces(
    rule: Rule, name: str, target: Tensor, tensors: Sequence[Tensor], wide: torch.dtype, pool: Executor
) -> None:
    """An elementwise rule on pieces that stay in the cache, where its steps cost no memory traffic and no new pages."""

    def run(share: Sequence[Tensor]) -> None:
        with torch.no_grad():  # a setting of each thread
            for piece, *parts in zip(*(t.split(BLOCK) for t in share), strict=True):
                w0, *ws = (t if t.dtype == wide and t.is_cpu else t.to("cpu", wide) for t in parts)
                piece.copy_(rule(name, w0, ws))

    each = -(-target.numel() // torch.get_num_threads()) or 1
    shares = zip(*(t.reshape(-1).split(max(each, BLOCK)) for t in (target, *tensors)), strict=True)
    for done in [pool.submit(run, share) for share in shares]:
        done.result()


def layout_of(state: State) -> Mapping[str, Tensor]:
    return getattr(state, "layout", state)  # of a lazily opened checkpoint: tensors on the meta device


def memory_of(t: Tensor) -> tuple[Hashable, ...]:
    """Equal for tensors that are the same memory, seen in the same way."""
    if t.device.type == "meta" or t.numel() == 0:
        return (id(t),)
    return (t.data_ptr(), t.device, t.dtype, t.shape, t.stride())


def _tied(layout: Mapping[str, Tensor], skip: Collection[str]) -> dict[str, str]:
    """Each name whose memory has been seen under an earlier name -> that name; a skipped name ties to none."""
    seen: dict[tuple[Hashable, ...], str] = {}
    first = {name: seen.setdefault(memory_of(t), name) for name, t in layout.items() if name not in skip}
    return {name: other for name, other in first.items() if other != name}


def _same(state: State, a: str, b: str) -> bool:
    return memory_of(layout_of(state)[a]) == memory_of(layout_of(state)[b]) or torch.equal(state[a], state[b])
