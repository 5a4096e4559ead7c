r"""Signatures stored in few levels: each tensor as whole numbers and the two ends of its range.

The official code of Cai, Zhang, Wang, ICML 2023 (:mod:`peftref.merging.rws`), in
``VITA-Group/Robust_Weight_Signatures@4c796da:quantize_utils/func.py``, stores a signature in q *levels* (q = 16
is 4 bits). On a scale g the range of a tensor x is divided evenly, and each entry moves to the nearest of m levels
(eq-rws-quantise):

.. math:: c=\mathrm{round}\Bigl((m-1)\,\frac{g(x)-g(l)}{g(u)-g(l)}\Bigr),\qquad
          \hat x=g^{-1}\Bigl(g(l)+\frac{c}{m-1}\,\bigl(g(u)-g(l)\bigr)\Bigr).

============  =====================  =====================================  =======================  =================
kind          :math:`g(x)`           :math:`l,u`                            m                        values
============  =====================  =====================================  =======================  =================
``"linear"``  :math:`x`              least and largest entry                q                        q
``"tanh"``    :math:`\tanh x`        same                                   q                        q
``"log"``     :math:`\log_2|x|`      same of :math:`|x|`, without zeros     :math:`\lfloor q/2       2m + 1: m of each
                                                                            \rfloor`                 sign, and 0
============  =====================  =====================================  =======================  =================

``"linear"`` errs by at most :math:`(u-l)/2(q-1)`. ``"log"`` keeps sign and order of magnitude, which serves the many
small entries, at the price of the large ones. ``"tanh"`` is made for numbers around 1; on the small ones of a signature
it is nearly linear. The ends of the range come back as they were.

Differs from the official code: the range is that of one signature (there: of all that are combined, after they were
weighted); a constant tensor, a zero and one level of each sign (q = 2 or 3 in ``"log"``: the geometric middle) are
represented (there: NaN, or an error); ``"tanh"`` never leaves the range, though tanh rounds to 1; no input is changed.

>>> import torch
>>> stored = quantise({"w": torch.tensor([-1.0, -0.1, 0.2, 1.0])}, levels=3)
>>> stored.codes["w"]
tensor([0, 1, 1, 2], dtype=torch.uint8)
>>> stored.dequantise()["w"]
tensor([-1.,  0.,  0.,  1.])
>>> quantise({"w": torch.tensor([-1.0, 0.0, 0.3, 4.0])}, levels=6, kind="log").dequantise()["w"]
tensor([-1.0954,  0.0000,  0.3000,  4.0000])
>>> large = quantise({"w": torch.linspace(-1, 1, 9408)}, levels=16)
>>> 4 * 9408, large.nbytes, large.ideal_nbytes  # float32; a byte for each entry; 4 bits for each, were they packed
(37632, 9416, 4712.0)
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..._checks import scalar
from ..._replacing import replacing
from .aligned import check_finite, check_states, check_tensors
from .loop import State, upcast

__all__ = ["Quantised", "quantise"]

MOST = 2**16  # levels; as many as float16 has
Scale = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]  # g and its inverse
SCALES: dict[str, Scale] = {
    "linear": (torch.clone, torch.clone),
    "tanh": (torch.tanh, torch.atanh),
    "log": (torch.log2, torch.exp2),
}


@dataclass(frozen=True)
class Quantised:
    """A signature in few levels, made by :func:`quantise`.

    Attributes:
        codes: c of each tensor, in its shape, in the smallest integer type that holds the levels; in ``"log"`` c + 1
            with the sign of the entry, and 0 for a zero.
        ranges: l and u of each tensor, ``(2,)``, in the type of the signature.
        levels: q.
        kind: of the scale.
    """

    codes: dict[str, Tensor]
    ranges: dict[str, Tensor]
    levels: int
    kind: str

    def dequantise(self) -> dict[str, Tensor]:
        """The signature, each entry at its level; in the type it had."""
        return {name: _decode(codes, self.ranges[name], self.levels, self.kind) for name, codes in self.codes.items()}

    @property
    def nbytes(self) -> int:
        """Bytes held: whole bytes for each code, and the ranges."""
        return sum(t.nbytes for t in (*self.codes.values(), *self.ranges.values()))

    @property
    def ideal_nbytes(self) -> float:
        """Bytes it would take with log2(number of values) bits for each code, and the ranges."""
        values = 2 * (self.levels // 2) + 1 if self.kind == "log" else self.levels
        entries = sum(t.numel() for t in self.codes.values())
        return entries * math.log2(values) / 8 + sum(t.nbytes for t in self.ranges.values())

    def save(self, path: str | Path) -> None:
        """Write a ``.safetensors`` file."""
        parts = {"codes": self.codes, "ranges": self.ranges}
        tensors = {f"{part}/{name}": t.contiguous() for part, held in parts.items() for name, t in held.items()}
        with replacing(path) as part:
            save_file(tensors, part, metadata={"levels": str(self.levels), "kind": self.kind})

    @classmethod
    def load(cls, path: str | Path) -> Quantised:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: another kind of file.
        """
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            if not {"levels", "kind"} <= set(about):
                raise ValueError(f"path: expected a file of Quantised.save, got {path} without levels and kind")
            parts: dict[str, dict[str, Tensor]] = {"codes": {}, "ranges": {}}
            for key in file.keys():  # noqa: SIM118 (no mapping)
                part, _, name = key.partition("/")
                parts[part][name] = file.get_tensor(key)
        levels = _check(int(about["levels"]), about["kind"])
        return cls(parts["codes"], parts["ranges"], levels, about["kind"])


@torch.no_grad()
def quantise(signature: State, levels: int, kind: str = "linear") -> Quantised:
    """Store each tensor in few levels (eq-rws-quantise); every tensor has its own range.

    Args:
        signature: of :func:`~peftref.merging.rws.signature`, or any patch.
        levels: q, a count, not bits (the official code's ``quantization``). In ``"log"`` 255 is the most that fits in
            a byte.
        kind: ``"linear"``, ``"tanh"`` or ``"log"``, as in the table above.

    Raises:
        TypeError: ``signature`` is no mapping, or ``levels`` no integer.
        ValueError: fewer than 2 or more than 65536 levels, an unknown kind, or entries that are not finite.
    """
    levels = _check(levels, kind)
    check_states(signature=signature)
    check_tensors(signature, signature=signature)
    check_finite("signature", signature)
    encoded = {name: _encode(upcast(x), levels, kind) for name, x in signature.items()}
    codes, ranges = ({name: pair[i] for name, pair in encoded.items()} for i in (0, 1))
    return Quantised(codes, ranges, levels, kind)


def _encode(x: Tensor, levels: int, kind: str) -> tuple[Tensor, Tensor]:
    log = kind == "log"
    (g, _) = SCALES[kind]
    size, m = (x.abs(), levels // 2) if log else (x, levels)
    graded = size[size > 0] if log else size  # a zero has no logarithm
    ends = torch.stack(graded.aminmax()) if graded.numel() else x.new_zeros(2)
    low, high = g(ends)
    # eq-rws-quantise:  c = round((m - 1) (g(x) - g(l)) / (g(u) - g(l)));  a constant tensor is all l
    share = (g(size) - low) / (high - low) if high > low else torch.zeros_like(x)
    code = share.clamp(0, 1).mul(m - 1).round()
    code = x.sign() * (code + 1) if log else code  # a zero has no sign: 0
    smallest, largest = (-m, m) if log else (0, m - 1)
    kinds = (torch.uint8, torch.int8, torch.int16, torch.int32)
    fits = (t for t in kinds if torch.iinfo(t).min <= smallest and largest <= torch.iinfo(t).max)
    return code.to(next(fits)), ends


def _decode(codes: Tensor, ends: Tensor, levels: int, kind: str) -> Tensor:
    log = kind == "log"
    (g, inverse) = SCALES[kind]
    m = levels // 2 if log else levels
    low, high = g(ends)
    # eq-rws-quantise:  x = g^-1(g(l) + c / (m - 1) (g(u) - g(l)));  a single level lies in the middle
    share = torch.arange(m).to(ends) / (m - 1) if m > 1 else ends.new_full((1,), 0.5)
    grid = inverse(torch.lerp(low, high, share)).clamp(*ends)  # g^-1 may round past an end (atanh(1) is infinite) ...
    if m > 1:
        grid[[0, -1]] = ends  # ... or short of it
    # Looked up, not computed for each entry: vectorised functions differ in the last bit from place to place.
    index = codes.int()
    return torch.where(index == 0, 0, index.sign() * grid[index.abs() - 1]) if log else grid[index]


def _check(levels: int, kind: str) -> int:
    levels = scalar(levels)
    if not isinstance(levels, numbers.Integral) or isinstance(levels, bool):
        raise TypeError(f"levels: expected an integer, the number of levels, got {levels!r}")
    if not 2 <= levels <= MOST:
        raise ValueError(f"levels: expected 2 to {MOST}, got {levels}")
    if kind not in SCALES:
        raise ValueError(f"kind: expected one of {', '.join(SCALES)}, got {kind!r}")
    return int(levels)
