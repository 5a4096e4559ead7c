r"""The one loop that all weight arithmetic shares: state dicts in, state dict out, one tensor at a time.

A *rule* says what happens to one tensor: ``rule(name, w0, ws)`` gets the base's tensor and the same tensor of each of
the N models, all in float32 or wider, and returns the merged one. :func:`merge` does the rest, so that each rule stays
a line of mathematics:

- names and shapes must agree, or a single error lists every disagreement before anything is computed;
- half-precision weights are computed in float32 and rounded once, at the end: a small difference of two bfloat16
  weights survives, which it would not if each step were rounded (a delta below :math:`2^{-8}|w|` vanishes);
- tensors without a gradient meaning (``num_batches_tracked``, masks) are copied from the base; integers that differ and
  count nothing are codes of quantised weights, which no rule can merge: refused (``peftref.merging.core.codes``);
- a number that the base's type cannot hold is refused, not stored as an infinity; where all agree on what is not finite
  (a mask of :math:`-\infty`), so does the result;
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

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from ... import _checks
from ..._checks import at_least_float32
from .aligned import State, check_aligned, check_names, check_states, tied_names
from .storing import all_finite, check_place, same, store

__all__ = ["Rule", "State", "check_aligned", "delta", "elementwise", "fill", "merge", "upcast"]

# Entries that an elementwise rule gets at a time on the CPU; for more, torch would start threads of its own.
BLOCK = 1 << 15
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
        TypeError: ``models`` is one state dict instead of a sequence, something is no state dict, ``rule`` no rule, or
            ``skip`` one name instead of a list.
        ValueError: no models, names or shapes that do not match, integers that differ, a name to skip that nobody has,
            a rule that returns another shape, or a result that the base's type cannot hold.
    """
    made: dict[str, Tensor] = {}

    def place(name: str, like: Tensor) -> Tensor:
        return made.setdefault(name, torch.empty_like(like, memory_format=torch.contiguous_format, requires_grad=False))

    tied = fill(base, models, rule, place, skip=skip, device=device, rehearse=False)
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
    rehearse: bool = True,
) -> dict[str, str]:
    """:func:`merge` into memory of your own: ``place(name, like)`` gives the tensor to fill, of the same shape.

    Args:
        base: as of :func:`merge`, like the other arguments.
        models: N >= 1 state dicts.
        rule: what happens to a tensor.
        place: memory for a tensor, in any layout; it may be the base's own.
        skip: names to copy from the base.
        device: where to compute.
        rehearse: compute everything once before, to see that nothing is refused half-way. False for memory that is
            thrown away then.

    Returns:
        The names that are tied to an earlier one, and to which; for them there was no call.

    Raises:
        TypeError, ValueError: as of :func:`merge`, or memory of another shape, or without a place for each entry.
    """
    skip = set(check_names(skip, "skip"))
    layout = check_aligned(base, models, skip)
    if not callable(rule):
        raise TypeError(f"rule: expected a rule, such as average(), got {type(rule).__name__}")
    if rehearse:
        fill(base, models, rule, lambda _, like: torch.empty_like(like), skip=skip, device=device, rehearse=False)
    tied = tied_names(layout, skip)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for name in layout:
            if name in tied:
                continue
            w0 = base[name].detach()
            target = check_place(name, place(name, w0), w0)
            if name in skip or not w0.is_floating_point():
                target.copy_(w0)
                continue
            tensors = [w0, *(model[name].detach() for model in models)]
            at = torch.device(device or w0.device)
            wide = widest(tensors)
            if at.type == "cpu" and getattr(rule, "elementwise", False):
                _in_pieces(rule, name, target, tensors, wide, pool)
                continue
            first, *rest = (t.to(at, wide) for t in tensors)
            y = rule(name, first, rest)
            if not isinstance(y, Tensor) or y.shape != w0.shape:
                got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
                raise ValueError(f"rule: expected shape {tuple(w0.shape)} for {name}, got {got}")
            store(name, target, y, [first, *rest])
    return tied


@torch.no_grad()
def delta(state: State, base: State, names: Collection[str] | None = None) -> dict[str, Tensor]:
    """The difference ``state - base`` (a task vector), in float32 or wider, on the base's devices.

    It is 0 where both have the same infinity, or no number.

    Args:
        state: a state dict.
        base: another one of the same architecture.
        names: of the tensors wanted (all that are floating-point); only these have to agree.

    Raises:
        TypeError: something is no state dict, or ``names`` is one name instead of a list.
        ValueError: names or shapes that do not match, or integers that differ.
    """
    wanted = None if names is None else check_names(names)
    check_states(base=base, state=state)
    if wanted is not None and (unknown := [name for name in wanted if name not in base]):
        raise ValueError(f"names: expected names of base, got {unknown}")
    ignored = () if wanted is None else (set(base) | set(state)) - set(wanted)
    layout = check_aligned(base, [state], ignored)
    if wanted is None:
        wanted = [name for name, place in layout.items() if place.is_floating_point()]
    return {name: difference(upcast(state[name]).to(base[name].device), upcast(base[name])) for name in wanted}


def difference(w: Tensor, w0: Tensor) -> Tensor:
    """``w - w0``, and 0 where both are the same infinity or both are no number: there, too, nothing changed."""
    tau = w - w0
    if tau.numel() and not all_finite(tau):
        tau = tau.masked_fill(same(w, w0), 0.0)
    return tau


def elementwise(rule: Rule) -> Rule:
    """Mark a rule whose result at an entry needs that entry alone: it may be given any piece of a tensor, flattened."""
    marked: Any = rule  # the type of a function knows no attributes
    marked.elementwise = True
    return rule


def upcast(t: Tensor) -> Tensor:
    """``t`` in float32, or in its own type if that is wider; without a gradient."""
    return at_least_float32(t.detach())


def widest(tensors: Sequence[Tensor]) -> torch.dtype:
    """The type to compute in: float64 if one of them has it, for a smaller type might not hold its numbers."""
    return max((_checks.upcast(t.dtype) for t in tensors), key=lambda dtype: dtype.itemsize)


def _in_pieces(
    rule: Rule, name: str, target: Tensor, tensors: Sequence[Tensor], wide: torch.dtype, pool: Executor
) -> None:
    """An elementwise rule on pieces that stay in the cache, where its steps cost no memory traffic and no new pages."""
    flat = target.detach().view(-1) if target.is_contiguous() else target.new_empty(target.numel())

    def run(share: Sequence[Tensor]) -> None:
        with torch.no_grad():  # a setting of each thread
            for piece, *parts in zip(*(t.split(BLOCK) for t in share), strict=True):
                w0, *ws = (t if t.dtype == wide and t.is_cpu else t.to("cpu", wide) for t in parts)
                store(name, piece, rule(name, w0, ws), [w0, *ws])

    each = -(-target.numel() // torch.get_num_threads()) or 1
    shares = zip(*(t.split(max(each, BLOCK)) for t in (flat, *(t.reshape(-1) for t in tensors))), strict=True)
    for done in [pool.submit(run, share) for share in shares]:
        done.result()
    if not target.is_contiguous():
        target.copy_(flat.view(target.shape))
