"""Numbers that are no weights by themselves: codes of quantised weights, which mean something with their scale only.

Integers are copied from the base, so a merge of quantised models would put the base's codes beside merged scales. What
can be told is refused: integers or complex numbers that differ between the models, counters apart; and weights in
float8 that have a scale of their own, as soon as both differ (with one scale, merged codes are merged weights).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

COUNTERS = ("tracked", "count", "counts", "counter", "step", "steps")  # ends of names: num_batches_tracked, ...
SCALES = ("scale", "absmax", "amax")  # in the name of a tensor beside the codes
OF_INPUTS = ("input", "output", "act")  # such a scale is not that of the weight


def other_codes(
    base: Mapping[str, Tensor], model: Mapping[str, Tensor], layout: Mapping[str, Tensor], names: Collection[str]
) -> list[str]:
    """Those of ``names`` whose integers, or complex numbers, are others in the model than in the base."""
    found = [n for n in names if not layout[n].is_floating_point() and layout[n].dtype != torch.bool]
    found = [n for n in found if not _counts(n, layout[n])]
    return [f"{n} ({layout[n].dtype})" for n in found if not _equal(base[n], model[n])]


def scaled_codes(
    base: Mapping[str, Tensor],
    models: Sequence[Mapping[str, Tensor]],
    layout: Mapping[str, Tensor],
    names: Collection[str],
) -> list[str]:
    """Those of ``names`` that are float8 and differ between models, with a scale that differs too."""
    narrow = [n for n in names if layout[n].is_floating_point() and layout[n].dtype.itemsize == 1]
    pairs = [(n, scale) for n in narrow for scale in names if _scales(scale, n)]
    return [f"{n} and {s}" for n, s in pairs if all(any(not _equal(base[k], m[k]) for m in models) for k in (n, s))]


def _counts(name: str, t: Tensor) -> bool:
    word = name.rpartition(".")[2]
    return word.endswith(COUNTERS) or (t.numel() <= 1 and t.dtype.itemsize > 1 and "zero" not in word)


def _scales(scale: str, name: str) -> bool:
    """Whether, by its name, one tensor is the scale of another."""
    module, _, _ = name.rpartition(".")
    beside, _, word = scale.rpartition(".")
    if scale.startswith((f"{name}_scale", f"{name}.scale")):
        return True
    told = any(mark in word for mark in SCALES) and not any(mark in word for mark in OF_INPUTS)
    return beside == module and told and scale != name


def _equal(a: Tensor, b: Tensor) -> bool:
    a, b = (t.detach().cpu() for t in (a, b))
    if a.is_floating_point():
        a, b = (t.double() for t in (a, b))
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())  # NaN is the same code
