"""Every public callable meets bad input: each argument of a valid call is spoilt, one at a time.

What a caller may see then: a result that follows from the numbers (NaN in, NaN out), or a ValueError, TypeError or one
of the errors of ``ALLOWED`` whose message names an argument. What it may not: an error from the depth of torch about
something the caller did not write, or inputs that were changed by a call that failed.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import peftref
from peftref.data import sets
from tests.frame import shared_calls
from tests.frame._inputs import Call, t
from tools import stubs

ROOT = Path(__file__).resolve().parents[2]

# --- The tables: tests/<part>/calls.py, tests/frame/shared_calls.py ---------------------------------------------------

PACKAGES = [folder.name for folder in stubs.packages()]
TABLES = {name: importlib.import_module(f"tests.{name}.calls") for name in PACKAGES if name not in shared_calls.APART}
CASES: dict[str, Callable[[], Call]] = dict(shared_calls.CALLS)
KERNELS: set[str] = set(shared_calls.KERNELS)
SPARED: dict[tuple[str, str, str], str] = dict(shared_calls.SPARED)
NAMELESS: dict[str, str] = dict(shared_calls.NAMELESS)
APART: dict[str, str] = dict(shared_calls.APART)
for _part, _table in TABLES.items():
    CASES |= {f"{_part}.{name}": make for name, make in _table.CALLS.items()}
    KERNELS |= {f"{_part}.{name}" for name in getattr(_table, "KERNELS", ())}
    SPARED |= {(f"{_part}.{name}", *case): why for (name, *case), why in getattr(_table, "SPARED", {}).items()}
    NAMELESS |= {f"{_part}.{name}": why for name, why in getattr(_table, "NAMELESS", {}).items()}
    APART |= {f"{_part}.{name}": why for name, why in getattr(_table, "APART", {}).items()}


# --- What is done to an argument --------------------------------------------------------------------------------------


class Bad:
    """A value, and what is wrong with it: its type, its number, or something about a tensor."""

    def __init__(self, label: str, value: Any) -> None:
        self.label, self.value = label, value


def spoil(value: Any, depth: int = 0) -> list[Bad]:
    """Every bad form of a good argument."""
    wrong = [Bad("None", None)]
    if isinstance(value, bool):
        return []
    if isinstance(value, Tensor):
        wrong += [Bad("text", "text"), Bad("meta", value.to("meta")), Bad("empty", value.new_zeros(0))]
        wrong += [Bad("more dims", value[None])]
        if value.ndim:
            wrong += [Bad("no rows", value[:0]), Bad("fewer dims", value[0])]
        if value.ndim > 1:
            wrong += [Bad("no columns", value[..., :0])]
        if value.is_floating_point():
            wrong += [Bad(f"{bad}", _with(value, bad)) for bad in (math.nan, math.inf)]
            wrong += [Bad("int", value.long()), Bad("complex", torch.complex(value, value))]
        elif value.dtype == torch.long:
            wrong += [Bad("negative", value - 100), Bad("beyond", value + 1000), Bad("halves", value + 0.5)]
        return wrong
    if isinstance(value, int):
        return [*wrong, *(Bad(repr(v), v) for v in ("text", math.nan, math.inf, -1, 0, 1.5))]
    if isinstance(value, float):
        return [*wrong, *(Bad(repr(v), v) for v in ("text", math.nan, math.inf, -1.0))]
    if isinstance(value, str):
        return [*wrong, Bad("3", 3), Bad("no such name", "no such name")]
    if isinstance(value, np.ndarray):
        wrong += [Bad("no rows", value[:0]), Bad("more dims", value[None]), Bad("shorter", value[:-1])]
        return wrong + (
            [Bad("nan", np.where(np.arange(len(value)).reshape(-1, *[1] * (value.ndim - 1)) == 0, np.nan, value))]
        )
    if isinstance(value, pd.Series | pd.DataFrame):
        return [*wrong, Bad("no rows", value[:0]), Bad("shorter", value[:-1])]
    if isinstance(value, sets.Split):
        wrong += [Bad(f"x {b.label}", value._replace(x=b.value)) for b in spoil(value.x)]
        return wrong + [Bad(f"y {b.label}", value._replace(y=b.value)) for b in spoil(value.y)]
    if isinstance(value, list | tuple) and not hasattr(value, "_fields") and depth == 0:
        wrong += [Bad("empty sequence", value[:0]), Bad("5", 5)]
        if value:
            wrong += [Bad(f"[0] {b.label}", type(value)([b.value, *value[1:]])) for b in spoil(value[0], 1)]
        return wrong
    if isinstance(value, dict):
        wrong += [Bad("empty mapping", {}), Bad("5", 5)]
        name = next(iter(value))
        wrong += [Bad(f"{name} {b.label}", value | {name: b.value}) for b in spoil(value[name], 1)]
        return wrong
    return [*wrong, Bad("text", "text")]


def _with(value: Tensor, bad: float) -> Tensor:
    value = value.clone()
    value.view(-1)[:1] = bad
    return value


def picture(value: Any) -> Any:
    """Everything about an argument that a failed call must leave as it was. A generator may have been drawn from."""
    if isinstance(value, Tensor):
        return (
            "tensor",
            tuple(value.shape),
            str(value.dtype),
            None
            if value.is_meta
            else value.detach().numpy().tobytes()
            if not value.is_sparse and value.dtype != torch.bfloat16
            else None,
        )
    if isinstance(value, nn.Module):
        state = {name: picture(v) for name, v in value.state_dict().items() if isinstance(v, Tensor)}
        flags = [(type(m).__name__, m.training) for m in value.modules()]
        return state, flags, [p.requires_grad for p in value.parameters()]
    if isinstance(value, Mapping):
        return {str(name): picture(v) for name, v in value.items()}
    if isinstance(value, list | tuple):
        return [picture(v) for v in value]
    if hasattr(value, "__dict__") and type(value).__module__.startswith("peftref"):
        return {name: picture(v) for name, v in vars(value).items()}
    return repr(value) if isinstance(value, int | float | str) else type(value).__name__


def holder(call: Any) -> Any:
    """Whose state a call may change: the object of a method, or the module that is called."""
    return getattr(call, "__self__", call)


def trial(name: str, argument: str, label: str) -> str | None:
    """What is not acceptable about a call with one spoilt argument; None if it behaves."""
    torch.manual_seed(0)
    call, arguments = CASES[name]()
    bad = next(b for b in spoil(arguments[argument]) if b.label == label)
    arguments[argument] = bad.value
    before = picture(arguments), picture(holder(call))
    try:
        call(**arguments)
    except (
        ValueError,
        TypeError,
        RuntimeError,
        ArithmeticError,
        AttributeError,
        LookupError,
        AssertionError,
        OSError,
    ) as error:
        if (picture(arguments), picture(holder(call))) != before:
            return f"changed before {type(error).__name__}: {error}"
        return complaint(error, name, arguments, bad)
    return None


# What others say about bad input is good enough where it names what came:
TYPES = r"NoneType|\bstr\b|\bint\b|\bfloat\b|\blong\b|integer|literal|None and"  # Python, torch.Generator, torch.tensor
DTYPES = r"dtype|scalar ?type|complex|Long|Float|Half|Int|Double|floating point|data type|Input type"
DEVICES = r"meta|device|scalarType"  # the last: NumPy's bridge
NETWORKS = r"mat1 and mat2|conv2d|input size|negative dimension|(in|out)_channels|running_mean|expected [24]D|"
NETWORKS += r"sizes of tensors|dimension out of range"
OPTIMISERS = r"learning rate|optimizer|can't optimize|total_steps"
SKLEARN = r"PolynomialRidge|contains NaN|contains infinity|Complex data|inconsistent numbers"
# Of sizes that do not fit, with the sizes or the dimension, as torch and NumPy write it; no word that fits anything.
SHAPES = "|".join(
    (
        r"size of (the )?tensor|existing size|dimension size|to have size|size mismatch|matrix sizes|non-empty spatial",
        r"invalid for input of size|cannot reshape|split_sizes|unflatten|einsum\(\)|reduction dim|apart from dimension",
        r"number of (dimensions|sizes|indices)|should (be|contain|have)|too many indices for tensor",
        r"must have (the )?same (size|shape)|must have size|must be a matrix|must be a \dD tensor|to be no larger than",
        r"batch_size \(|of batch\d tensor|\d-?D|all be  at least|with \d or more dimensions|supposed to be a vector",
        r"to unpack \(expected|zip\(\) argument \d|zero-dimensional|must have at least one tensor|to stack|non-empty",
        r"out of bounds|out of range in self|class values|integral inputs|floating point type|tensors used as indices",
        r"probability has to be|padding length|greater or equal to|minlength|from=|failed to converge",
    )
)
# "name: expected this, got that", of an argument, of its part, or of the function inside that takes it.
HOUSE = r"^[\w, .\[\]]+: expected .+"


def complaint(error: Exception, name: str, arguments: dict[str, Any], bad: Bad) -> str | None:
    said, kind = str(error), bad.label.split()[-1]
    named = any(re.search(rf"\b{re.escape(word)}\b", said) for word in arguments)
    if isinstance(error, ValueError | TypeError | FloatingPointError) and (named or re.match(HOUSE, said, re.S)):
        return None
    # A wrong type, which mypy refuses: the first use of it says so.
    if isinstance(error, TypeError | AttributeError) or (
        kind in ("None", "text", "'text'", "nan", "inf", "1.5", "3", "5") and re.search(TYPES, said)
    ):
        return None
    if kind == "meta" and isinstance(error, RuntimeError) and re.search(DEVICES, said, re.I):
        return None
    if kind in ("int", "complex", "halves") and isinstance(error, RuntimeError) and re.search(DTYPES, said, re.I):
        return None
    if re.search(NETWORKS, said, re.I) or re.search(OPTIMISERS, said, re.I):
        return None
    if name in KERNELS and re.search(SHAPES, said, re.I):
        return None
    if name in FITTED and re.search(SKLEARN, said):
        return None
    if isinstance(error, OSError) and name.startswith("data.read_"):
        return None
    return f"{type(error).__name__}: {said[:160]}"


# scikit-learn checks what it is given.
FITTED = ("panel.PolynomialRidge.fit", "panel.crossfit_sklearn")

# --- The tests --------------------------------------------------------------------------------------------------------


def public() -> Iterator[tuple[str, Any]]:
    """Every callable name of an ``__all__``, once, by the module that defines it; no scripts, no recorded runs."""
    for found in pkgutil.walk_packages(peftref.__path__, "peftref."):
        short = found.name.removeprefix("peftref.")
        path = ROOT / f"peftref/{short.replace('.', '/')}.py"
        if any(part.startswith("_") for part in short.split(".")) or {short, short.split(".")[0]} & APART.keys():
            continue
        if "." in short and not found.ispkg and not stubs.is_public(path):
            continue
        module = importlib.import_module(found.name)
        for name in getattr(module, "__all__", []):
            thing = getattr(module, name)
            if callable(thing) and getattr(thing, "__module__", "") == found.name:
                yield f"{short.split('.')[0]}.{name}", thing


def test_the_table_is_complete() -> None:
    things = dict(public())
    records = {n for n, thing in things.items() if hasattr(thing, "_fields") or hasattr(thing, "__dataclass_fields__")}
    missing = set(things) - set(CASES) - set(NAMELESS) - records
    assert not missing, f"no valid call, and no reason: {sorted(missing)}"
    stale = {name for name in (*CASES, *NAMELESS) if not any(name == t or name.startswith(f"{t}.") for t in things)}
    assert not stale, f"nothing public has this name: {sorted(stale)}"


@pytest.mark.parametrize("name", CASES)
def test_a_spoilt_argument(name: str) -> None:
    call, arguments = CASES[name]()
    call(**arguments)  # valid
    arguments = CASES[name]()[1]
    found = [
        f"{argument} = {bad.label}: {said}"
        for argument, value in arguments.items()
        for bad in spoil(value)
        if (name, argument, bad.label) not in SPARED and (said := trial(name, argument, bad.label))
    ]
    assert not found, "\n".join(found)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.mT.contiguous().mT if x.ndim > 1 else x,
    "every other": lambda x: torch.stack([x, x], -1)[..., 0],
    "offset": lambda x: torch.cat([x.new_zeros(3), x.reshape(-1)])[3:].view(x.shape),
    "reversed memory": lambda x: x.permute(*range(x.ndim)[::-1]).contiguous().permute(*range(x.ndim)[::-1]),
}


def numbers(value: Any) -> list[Tensor]:
    """Whatever numbers a result has, in order."""
    if isinstance(value, Tensor):
        return [value.detach().double()] if not value.is_complex() else []
    if isinstance(value, nn.Module):
        return numbers(list(value.state_dict().values()))
    if isinstance(value, pd.DataFrame | pd.Series):
        return [torch.tensor(pd.DataFrame(value).select_dtypes("number").to_numpy(float))]
    if isinstance(value, bool | int | float):
        return [torch.tensor(float(value))]
    if isinstance(value, Mapping):
        return numbers(list(value.values()))
    if isinstance(value, list | tuple):
        return [one for part in value for one in numbers(part)]
    return numbers(vars(value)) if hasattr(value, "__dataclass_fields__") else []


# Results with seconds in them.
TIMED = ("adapters.adapt", "adapters.compare", "tta.run_seeds")


@settings(max_examples=2, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(layouts=st.lists(st.sampled_from(sorted(LAYOUTS)), min_size=8, max_size=8))
@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith(TIMED)])
def test_memory_layout_does_not_matter(name: str, layouts: list[str]) -> None:
    call, arguments = CASES[name]()
    if not any(isinstance(value, Tensor | sets.Split) for value in arguments.values()):
        return
    torch.manual_seed(0)
    expected = numbers((call(**arguments), holder(call) if isinstance(holder(call), nn.Module) else None))
    call, arguments = CASES[name]()
    for (argument, value), layout in zip(arguments.items(), layouts * 2, strict=False):
        if isinstance(value, Tensor):
            arguments[argument] = LAYOUTS[layout](value)
        elif isinstance(value, sets.Split):
            arguments[argument] = sets.Split(LAYOUTS[layout](value.x), value.y)
    torch.manual_seed(0)
    found = numbers((call(**arguments), holder(call) if isinstance(holder(call), nn.Module) else None))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda x: x[:, :, :9].flatten(2)[99], "IndexError"),
        (lambda x: x.view(7, -1), "RuntimeError"),
        (lambda x: {}[x], "KeyError"),
        (lambda x: (x.add_(1), int("nothing"))[1], "changed before ValueError"),
    ],
)
def test_the_judge_can_say_no(monkeypatch: pytest.MonkeyPatch, call: Callable[[Tensor], Any], said: str) -> None:
    monkeypatch.setitem(CASES, "made.up", lambda: (call, {"x": t(3, 4)}))
    assert said in (trial("made.up", "x", "fewer dims") or "")
