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
from tests.frame._calls import CASES, t

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
SHAPES = (
    r"size|shape|dimension|subscript|unpack|zip|einsum|indices|index|split|repeat|expand|unflatten|batch|matrix|elements|"
    r"stack|non-empty|division|view|length|domain|range|greater or equal|must be|tensor|bound|argument|"
    r"bincount|probability|target|sequence|device type|^\("
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

# Lines of mathematics whose docstring gives the shapes: torch names the sizes, or the class, that do not fit. Losses
# are among them, since to look at the labels would wait for the accelerator at every step.
KERNELS = {
    f"{part}.{name}"
    for part, names in {
        "adapters": (
            "HyperNet.forward",
            "Stack",
            "affine",
            "bat",
            "bottleneck",
            "branch",
            "error_terms",
            "expand",
            "identity_cores",
            "identity_distance",
            "identity_penalty",
            "multiply",
            "orthogonal_penalty",
            "phm_linear",
            "phm_weight",
            "pool",
            "pooled",
            "product",
            "rank_one",
            "ring_factors",
            "ring_matrix",
            "rows",
            "scaling",
            "tiles",
            "token_mask",
            "train",
            "transform",
            "update",
        ),
        "continual": (
            "DERpp.loss",
            "ER.loss",
            "ERACE.loss",
            "EWC.end_task",
            "FineTune.loss",
            "LAE.learn",
            "LAE.step",
            "balanced_norm",
            "balanced_statistics",
            "classp_step",
            "derpp_loss",
            "diagonal_fisher",
            "er_ace_loss",
            "er_loss",
            "eta",
            "ewc_penalty",
            "gate",
            "heads",
            "local_loss",
            "moments",
            "prefix_attention",
            "prefix_share",
            "task_weights",
            "vote",
        ),
        "merging": (
            "ColourNets.forward",
            "accuracy",
            "distinct",
            "hits",
            "train",
        ),
        "panel": (
            "aipw_score",
            "by_fold",
            "fit",
            "group_sums",
            "inverse_times",
            "means",
            "moments",
            "monomials",
            "over_repeats",
            "plr_score",
            "polynomial",
            "row_weights",
            "solve",
            "standard_error",
            "standardise",
            "standardised",
            "within",
        ),
        "tta": (
            "confidence",
            "consistency_loss",
            "ema",
            "energy",
            "restoration_mask",
            "restore",
        ),
    }.items()
    for name in names
}


# Cases that stay as they are, and why.
SPARED = {
    ("models.fit", "y", "beyond"): "only a pass tells how many classes there are; the first one fails",
    ("models.fit", "x", "meta"): "the first pass fails",
    ("tta.run_seeds", "n_jobs", "-1"): "starts a process for each core",
    ("tta.run_seeds", "n_jobs", "0"): "joblib says so",
    ("panel.monte_carlo", "n_jobs", "0"): "joblib says so",
}


# --- The tests --------------------------------------------------------------------------------------------------------

# Modules without a row in the table, and why.
APART = {
    "plots.charts": "figures, see test_plots",
    "plots.facets": "figures, see test_facets",
    "plots.house": "figures, see test_plots",
    "plots.tradeoffs": "figures, see test_tradeoffs",
    "data.domains": "called by streams, which check",
    "widgets": "pages, see test_widgets",
    "catalog": "the book's own table, which takes no input",
    "adapters.experiments.at_scale": "accelerators",
    "continual.experiments.adab2n_at_scale": "accelerators",
    "continual.experiments.classp_at_scale": "accelerators",
    "continual.experiments.fsa_at_scale": "accelerators",
    "continual.experiments.lae_at_scale": "accelerators",
    "merging.experiments.rws_at_scale": "accelerators",
    "merging.experiments.bang_at_scale": "accelerators",
    "tta.experiments.at_scale": "accelerators",
    "data.fetch": "the network, see data/test_fetch",
    "data.make_fashion8k": "a script beside its product",
}
# Names without a row, and why.
NAMELESS = {
    "adapters.load": "files, see adapters/test_files",
    "adapters.save": "files, see adapters/test_files",
    "adapters.save_as_lora": "files, see adapters/test_hydra",
    "adapters.tapped": "called by a Host alone, with what the network gave it",
    "adapters.swap": "called by install alone, with what it found",
    "adapters.watching": "a context for hooks, without numbers",
    "adapters.Adapter": "abstract",
    "adapters.compare_sharing": "many trainings: learn's checks",
    "adapters.conflict": "takes what learn returns",
    "adapters.learn": "descend's checks",
    "adapters.descend": "by train, adapt and compare",
    "adapters.shifted": "the shipped data",
    "merging.Checkpoint": "files, see merging/test_checkpoints",
    "merging.merge_checkpoints": "files, see merging/test_checkpoints",
    "merging.deal": "the shipped data",
    "merging.family": "the shipped weights",
    "data.read_cifar_c": "files, see data/test_read",
    "data.read_cifar_names": "files, see data/test_read",
    "data.read_cifar_python": "files, see data/test_read",
    "data.read_idx": "files, see data/test_read",
    "models.from_timm": "timm's own arguments",
    "results.hardware": "no input",
    "results.run": "no input",
    "models.pretrained_vit": "no input",
}


def public() -> Iterator[tuple[str, Any]]:
    """Every callable name of an ``__all__``, once, by the module that defines it."""
    for found in pkgutil.walk_packages(peftref.__path__, "peftref."):
        short = found.name.removeprefix("peftref.")
        if any(part.startswith("_") for part in short.split(".")) or short in APART:
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
LAID_OUT = [
    name
    for name, make in CASES.items()
    if any(isinstance(v, Tensor | sets.Split) for v in make()[1].values()) and not name.startswith(TIMED)
]


@settings(max_examples=2, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(layouts=st.lists(st.sampled_from(sorted(LAYOUTS)), min_size=8, max_size=8))
@pytest.mark.parametrize("name", LAID_OUT)
def test_memory_layout_does_not_matter(name: str, layouts: list[str]) -> None:
    call, arguments = CASES[name]()
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
