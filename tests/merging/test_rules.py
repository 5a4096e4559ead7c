"""Every rule with inputs that real checkpoints have: the formula in float64, or refused with nothing changed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from peftref.merging import apply, compose, signature
from peftref.merging.baselines.arithmetic import average, dare, fisher_wise_ft, linear, task_arithmetic, wise_ft
from peftref.merging.baselines.ties import ties, trim_thresholds
from peftref.merging.core.checkpoints import merge_checkpoints
from peftref.merging.core.loop import BLOCK, Rule, delta, elementwise, fill, merge

State = dict[str, Tensor]
Number = Callable[[float], Any]


class Ones(dict):
    """Fisher information of any tensor: the same number in every entry."""

    def __init__(self, value: float, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.value, self.shape = value, shape

    def get(self, name: str, default: object = None) -> Tensor:
        return torch.full(self.shape, self.value)


def blended(w0: float, ws: list[float], share: float) -> float:
    return (1 - share) * w0 + share * ws[0]


# rule, made with numbers of any type; number of models; the formula of one entry
RULES: dict[str, tuple[Callable[[Number, tuple[int, ...]], Rule], int, Callable[[float, list[float]], float]]] = {
    "average": (lambda f, s: average(), 3, lambda w0, ws: sum(ws) / 3),
    "linear": (lambda f, s: linear([f(0.75), f(0.5)]), 2, lambda w0, ws: 0.75 * ws[0] + 0.5 * ws[1]),
    "task_arithmetic": (
        lambda f, s: task_arithmetic(f(0.75)), 2, lambda w0, ws: w0 + 0.75 * (ws[0] - w0) + 0.75 * (ws[1] - w0)
    ),
    "task_arithmetic, each": (
        lambda f, s: task_arithmetic([f(1.0), f(0.25)]), 2, lambda w0, ws: w0 + ws[0] - w0 + 0.25 * (ws[1] - w0)
    ),
    "wise_ft": (lambda f, s: wise_ft(f(0.75)), 1, lambda w0, ws: blended(w0, ws, 0.75)),
    "wise_ft, bang": (lambda f, s: wise_ft(f(0.5)), 1, lambda w0, ws: blended(w0, ws, 0.5)),
    "fisher_wise_ft": (
        lambda f, s: fisher_wise_ft(f(0.5), Ones(1.0, s), Ones(3.0, s), floor=f(1e-6)),
        1,
        lambda w0, ws: blended(w0, ws, 0.75),
    ),
    "ties": (
        lambda f, s: ties(f(1.0), f(0.5), weights=[f(1.0)]), 1, lambda w0, ws: w0 + 0.5 * (ws[0] - w0)
    ),
    "dare": (lambda f, s: dare(f(0.0), task_arithmetic(f(0.75))), 1, lambda w0, ws: w0 + 0.75 * (ws[0] - w0)),
}  # fmt: skip
each_rule = pytest.mark.parametrize("name", RULES)


def tensors(n: int, shape: tuple[int, ...] = (4, 3), scale: float = 1.0) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [scale * torch.randn(shape, generator=g) for _ in range(n + 1)]


def expected(name: str, w0: Tensor, ws: list[Tensor]) -> Tensor:
    """The formula, entry by entry, in Python's numbers."""
    formula = RULES[name][2]
    rows = zip(*(t.double().flatten().tolist() for t in (w0, *ws)), strict=True)
    return torch.tensor([formula(a, b) for a, *b in rows], dtype=torch.float64).view(w0.shape)


def rule_of(name: str, shape: tuple[int, ...] = (4, 3), number: Number = float) -> Rule:
    return RULES[name][0](number, shape)


def states(name: str, **kwargs: Any) -> tuple[State, list[State]]:
    w0, *ws = tensors(RULES[name][1], **kwargs)
    return {"w": w0}, [{"w": w} for w in ws]


def close(got: Tensor, wanted: Tensor, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(got.double(), wanted, atol=tolerance, rtol=tolerance, equal_nan=True)


def picture(state: State) -> dict[str, bytes]:
    return {k: v.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for k, v in state.items() if v.numel()}


def on_disk(folder: Path, base: State, models: list[State], rule: Rule) -> State:
    for i, state in enumerate((base, *models)):
        save_file({k: v.contiguous() for k, v in state.items()}, folder / f"{i}.safetensors")
    paths = [folder / f"{i + 1}.safetensors" for i in range(len(models))]
    return load_file(merge_checkpoints(folder / "0.safetensors", paths, rule, folder / "out") / "model.safetensors")


def refused(base: State, models: list[State], rule: Rule, folder: Path, said: str) -> None:
    """In memory, into memory of one's own and on the disk, with nothing changed."""
    memory = {k: v.clone() for k, v in base.items()}
    before = picture(base)
    with pytest.raises(ValueError, match=said):
        merge(base, models, rule)
    with pytest.raises(ValueError, match=said):
        fill(base, models, rule, lambda name, like: memory[name])
    with pytest.raises(ValueError, match=said):
        on_disk(folder, base, models, rule)
    assert picture(base) == picture(memory) == before
    assert not (folder / "out").exists() and not list(folder.glob(".out*"))


# -- the formula


@each_rule
@pytest.mark.parametrize("shape", [(4, 3), (), (0, 3), (2, 3, 2, 2)])
def test_the_formula(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    base, models = states(name, shape=shape)
    got = merge(base, models, rule_of(name, shape))
    close(got["w"], expected(name, base["w"], [m["w"] for m in models]))
    assert picture(on_disk(tmp_path, base, models, rule_of(name, shape))) == picture(got)


@each_rule
@pytest.mark.parametrize("number", [np.float32, np.float64, torch.tensor, np.array], ids=lambda f: f.__name__)
def test_numbers_of_numpy_and_torch(name: str, number: Number) -> None:
    base, models = states(name)
    got = merge(base, models, rule_of(name, number=number))
    assert torch.allclose(got["w"], merge(base, models, rule_of(name))["w"], rtol=1e-7)


def test_arrays_of_numbers() -> None:
    base, models = states("linear")
    for made in (np.array, torch.tensor, tuple, lambda v: [torch.tensor(c) for c in v]):
        for rule in (linear, task_arithmetic, lambda c: ties(1.0, weights=c), lambda c: ties(thresholds=c)):
            assert torch.equal(
                merge(base, models, rule(made([0.5, 0.25])))["w"], merge(base, models, rule([0.5, 0.25]))["w"]
            )
    for bad in ("0.5", [None], [math.nan], ["0.5"], torch.ones(1, 1), None):
        with pytest.raises(ValueError, match="weights: expected finite numbers"):
            linear(bad)  # type: ignore[arg-type]


# -- not finite


@each_rule
def test_what_all_agree_on_stays(name: str, tmp_path: Path) -> None:
    """A causal mask that is registered as a buffer; the entries beside it are merged as without it."""
    base, models = states(name)
    clean = [{"w": s["w"].clone()} for s in (base, *models)]
    for state in clean:
        state["w"].view(-1)[:3] = 0.0
    for state in (base, *models):
        state["w"].view(-1)[:3] = torch.tensor([-math.inf, math.inf, math.nan])
    got = merge(base, models, rule_of(name))
    plain = merge(clean[0], clean[1:], rule_of(name))["w"]
    assert got["w"].view(-1)[0] == -math.inf and got["w"].view(-1)[1] == math.inf and got["w"].view(-1)[2].isnan()
    assert torch.equal(got["w"].view(-1)[3:], plain.view(-1)[3:])
    assert picture(on_disk(tmp_path, base, models, rule_of(name))) == picture(got)


def test_what_all_agree_on_stays_under_rules_of_ones_own() -> None:
    state = {"w": torch.tensor([-math.inf, math.inf, math.nan, 2.0])}
    got = merge(state, [state], lambda name, w0, ws: w0 + 0.5 * (ws[0] - w0))
    assert picture(got) == picture(state)


@each_rule
@pytest.mark.parametrize("bad", [-math.inf, math.inf, math.nan])
def test_what_one_model_has_follows_the_formula(name: str, bad: float) -> None:
    base, models = states(name)
    models[0]["w"][1, 1] = bad
    got = merge(base, models, rule_of(name))["w"]
    close(got, expected(name, base["w"], [m["w"] for m in models]))
    assert got.isfinite().sum() == 11 and not got[1, 1].isfinite()


def test_a_coefficient_of_zero_leaves_its_tensor_out_bit_for_bit() -> None:
    base = {"w": torch.tensor([1.0, -0.0, -math.inf, math.nan])}
    model = {"w": torch.tensor([math.nan, 3.0, 2.0, math.inf])}
    for none in (0, 0.0, np.float32(0), torch.tensor(0.0)):
        for rule in (
            wise_ft(none),
            task_arithmetic(none),
            ties(1.0, none),
            fisher_wise_ft(0.0, Ones(1, (4,)), Ones(1, (4,))),
        ):
            assert picture(merge(base, [model], rule)) == picture(base)
    assert picture(merge(base, [model], wise_ft(1.0))) == picture(model)
    assert torch.equal(merge(base, [{"w": torch.ones(4)}, model], linear([2.0, 0.0]))["w"], torch.full((4,), 2.0))
    one = fisher_wise_ft(1.0, Ones(1, (4,)), Ones(1, (4,)))
    assert picture(merge(base, [model], one)) == picture(model)


def test_no_number_in_a_model_does_not_move_the_others_thresholds() -> None:
    base, models = states("linear", shape=(50,))
    for state in (base, *models):
        state["w"] = torch.cat([torch.full((10,), -math.inf), state["w"]])
    for density in (0.1, 0.5):
        whole = trim_thresholds(base, models, density)
        plain = [{"w": s["w"].nan_to_num(neginf=0.0)} for s in (base, *models)]
        assert whole == trim_thresholds(plain[0], plain[1:], density)
    change = delta(models[0], base)["w"]
    assert (change[:10] == 0).all() and torch.equal(change[10:], models[0]["w"][10:] - base["w"][10:])


# -- more than a type can hold


@each_rule
@pytest.mark.parametrize(
    "types", [(torch.float16, torch.bfloat16), (torch.float16, torch.float64), (torch.float16,) * 2]
)
def test_no_infinity_is_made_in_half_precision(name: str, types: tuple[torch.dtype, ...], tmp_path: Path) -> None:
    base, models = states(name)
    base = {"first": torch.ones(4, 3, dtype=types[0]), "w": torch.full((4, 3), 6e4, dtype=types[0])}
    high = 1e5 if types[1] != torch.float16 else 65504.0
    models = [{"first": torch.ones(4, 3).to(types[1]), "w": torch.full((4, 3), high).to(types[1])} for _ in models]
    exact = expected(name, base["w"], [m["w"] for m in models])
    if exact.max() < 65520:
        close(merge(base, models, rule_of(name))["w"], exact.half().double())
    else:
        refused(base, models, rule_of(name), tmp_path, "rule: expected numbers that torch.float16 can hold for w")


def test_every_rule_meets_more_than_half_precision_holds() -> None:
    for name in RULES:
        assert expected(name, torch.tensor([6e4]), [torch.tensor([1e5])] * RULES[name][1]).item() > 65520, name


@pytest.mark.parametrize(
    ("base", "model"),
    [(torch.float32, torch.float64), (torch.bfloat16, torch.float64), (torch.float8_e5m2, torch.float32),
     (torch.float8_e4m3fn, torch.float32)],
)  # fmt: skip
def test_no_infinity_is_made_in_other_types(base: torch.dtype, model: torch.dtype, tmp_path: Path) -> None:
    most = torch.finfo(base).max
    low = {"w": torch.ones(3).to(base)}
    high = {"w": torch.tensor([1.0, 2.0, 4.0 * most], dtype=torch.float64).to(model)}
    refused(low, [high], average(), tmp_path, f"rule: expected numbers that {base} can hold for w, got 1")
    fits = {"w": torch.tensor([1.0, 2.0, most], dtype=torch.float64).to(model)}
    assert merge(low, [fits], average())["w"].double().tolist() == [1.0, 2.0, most]


def test_infinities_of_a_rule_that_computes_in_its_own_type_are_refused(tmp_path: Path) -> None:
    base, model = {"w": torch.full((3,), 3e38)}, {"w": torch.full((3,), -3e38)}
    refused(base, [model], task_arithmetic(3.0), tmp_path, "torch.float32 can hold for w, got 3")
    refused(base, [model], lambda name, w0, ws: w0 * math.nan, tmp_path, "torch.float32 can hold for w, got 3")


def test_mixed_types_are_computed_in_the_widest() -> None:
    small = {"w": torch.tensor([1.0], dtype=torch.float64) + 1e-12}
    seen = []

    def rule(name: str, w0: Tensor, ws: list[Tensor]) -> Tensor:
        seen.append((w0.dtype, ws[0].dtype))
        return ws[0]

    for base in (torch.bfloat16, torch.float32):
        merge({"w": torch.ones(1, dtype=base)}, [small], rule)
    assert seen == [(torch.float64, torch.float64)] * 2
    merge({"w": torch.ones(1).bfloat16()}, [{"w": torch.ones(1)}], rule)
    assert seen[-1] == (torch.float32, torch.float32)


# -- memory


def layouts() -> dict[str, Callable[[Tensor], Tensor]]:
    def strided(t: Tensor) -> Tensor:
        return torch.zeros(*t.shape[:-1], 2 * t.shape[-1])[..., ::2].copy_(t)

    return {
        "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
        "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        "strided": strided,
        "part of another": lambda t: torch.zeros(9, *t.shape)[4].copy_(t),
    }


@each_rule
@pytest.mark.parametrize("layout", layouts())
@pytest.mark.parametrize("shape", [(3, 4, 2, 2), (3, BLOCK // 4, 2, 2)], ids=["small", "pieces"])
def test_any_layout_is_read_and_filled(name: str, layout: str, shape: tuple[int, ...]) -> None:
    if shape[1] > 4 and name not in ("average", "wise_ft", "ties"):
        pytest.skip("the same loop")
    base, models = states(name, shape=shape)
    wanted = merge(base, models, rule_of(name, shape))["w"]
    there = [{"w": layouts()[layout](s["w"])} for s in (base, *models)]
    assert torch.equal(merge(there[0], there[1:], rule_of(name, shape))["w"], wanted)
    memory = layouts()[layout](torch.full(shape, math.nan))
    fill(base, models, rule_of(name, shape), lambda _, like: memory)
    assert torch.equal(memory, wanted)
    fill(there[0], there[1:], rule_of(name, shape), lambda _, like: there[0]["w"])  # in place
    assert torch.equal(there[0]["w"], wanted)


@each_rule
def test_expanded_tensors_are_read_but_not_filled(name: str) -> None:
    base, models = states(name)
    wide = {"w": base["w"][:1].expand(4, 3)}
    assert torch.equal(
        merge(wide, models, rule_of(name))["w"], merge({"w": wide["w"].clone()}, models, rule_of(name))["w"]
    )
    memory = torch.zeros(1, 3)
    for place in (memory.expand(4, 3), torch.zeros(6).as_strided((4, 3), (1, 1))):
        with pytest.raises(ValueError, match="place: expected memory for each entry of w"):
            fill(base, models, rule_of(name), lambda _, like, place=place: place)
    for place in (torch.zeros(3, 4), torch.zeros(4, 3, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"place: expected shape \(4, 3\) and torch.float32 for w"):
            fill(base, models, rule_of(name), lambda _, like, place=place: place)
    assert (memory == 0).all()


@each_rule
def test_tied_tensors(name: str, tmp_path: Path) -> None:
    base, models = states(name)
    wanted = merge(base, models, rule_of(name))["w"]
    tied = {"a": base["w"], "b": base["w"]}
    others = [{"a": m["w"], "b": m["w"].clone()} for m in models]
    merged = merge(tied, others, rule_of(name))
    assert merged["a"] is merged["b"]
    if "dare" not in name:  # which draws by name
        assert torch.equal(merged["b"], wanted)
    others[-1]["b"] = others[-1]["b"] + 1
    with pytest.raises(ValueError, match="tied in base, but different: b and a"):
        merge(tied, others, rule_of(name))


@each_rule
def test_memory_is_filled_whole_or_not_at_all(name: str) -> None:
    base, models = states(name)
    base = {"a": base["w"], "b": base["w"].clone()}
    models = [{"a": m["w"], "b": m["w"].clone()} for m in models]
    good = rule_of(name)

    def rule(key: str, w0: Tensor, ws: list[Tensor]) -> Tensor:
        if key == "b":
            raise ArithmeticError
        return good(key, w0, ws)

    memory = {k: torch.zeros_like(v) for k, v in base.items()}
    for one in (rule, *([elementwise(rule)] if hasattr(good, "elementwise") else [])):
        with pytest.raises(ArithmeticError):
            fill(base, models, one, lambda key, like: memory[key])
        assert not any(t.any() for t in memory.values())
    with pytest.raises(ArithmeticError):
        fill(base, models, rule, lambda key, like: memory[key], rehearse=False)
    assert memory["a"].any()


# -- codes


def quantised(layer: str, seed: int) -> State:
    g = torch.Generator().manual_seed(seed)

    def codes(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.randint(0, 99, shape, generator=g).to(dtype)

    def scale(*shape: int) -> Tensor:
        return torch.rand(shape, generator=g) + 0.5

    return {
        "GPTQ": {"l.qweight": codes(torch.int32, 4, 3), "l.scales": scale(1, 3), "l.g_idx": torch.arange(4).int(),
                 "l.qzeros": torch.zeros(1, 3).int()},
        "GPTQ zeros": {"l.qzeros": codes(torch.int32, 1, 3), "l.scales": scale(1, 3)},
        "bitsandbytes int8": {"l.weight": codes(torch.int8, 4, 3), "l.SCB": scale(4), "l.w_format": torch.tensor(0)},
        "bitsandbytes 4-bit": {"l.weight": codes(torch.uint8, 6, 1), "l.weight.absmax": scale(2)},
        "MLX": {"l.weight": codes(torch.uint32, 4, 3), "l.scales": scale(4, 1), "l.biases": scale(4, 1)},
        "affine": {"l.weight": torch.zeros(4, 3).to(torch.int8), "l.scale": scale(1),
                   "l.zero_point": codes(torch.int32, 1)},
        "float8": {"l.weight": scale(4, 3).to(torch.float8_e4m3fn), "l.weight_scale": scale(1)},
        "float8 inverse": {"l.weight": scale(4, 3).to(torch.float8_e5m2), "l.weight_scale_inv": scale(1)},
        "float8 beside": {"l.weight": scale(4, 3).to(torch.float8_e4m3fn), "l.scale": scale(1)},
    }[layer]  # fmt: skip


LAYERS = (
    "GPTQ",
    "GPTQ zeros",
    "bitsandbytes int8",
    "bitsandbytes 4-bit",
    "MLX",
    "affine",
    "float8",
    "float8 inverse",
    "float8 beside",
)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", ["average", "task_arithmetic", "wise_ft", "ties", "dare"])
def test_codes_of_quantised_weights_are_refused(layer: str, name: str, tmp_path: Path) -> None:
    base, *models = (quantised(layer, s) for s in range(RULES[name][1] + 1))
    refused(base, models, rule_of(name), tmp_path, "expected the codes of base .*: l[.]")
    for call in (lambda: delta(models[0], base), lambda: trim_thresholds(base, models)):
        with pytest.raises(ValueError, match="expected the codes of base"):
            call()
    chosen = [key for key in base if "cale" in key or "SCB" in key or "absmax" in key]
    with pytest.raises(ValueError, match="expected the codes of base"):
        signature(base, models[0], models[-1], chosen, project=False) if len(models) > 1 else delta(models[0], base)


@pytest.mark.parametrize("layer", LAYERS)
def test_equal_codes_are_merged_by_their_scales(layer: str) -> None:
    base = quantised(layer, 0)
    model = {k: v if v.dtype.itemsize == 1 or not v.is_floating_point() else 2 * v for k, v in base.items()}
    merged = merge(base, [model], wise_ft(0.5))
    for key, value in base.items():
        same = value.dtype.itemsize == 1 or not value.is_floating_point()
        torch.testing.assert_close(merged[key].double(), value.double() * (1 if same else 1.5))
    assert merge(base, [quantised(layer, 1)], average(), skip=list(base)).keys() == base.keys()


def test_counters_and_masks_may_differ() -> None:
    def state(n: int) -> State:
        return {
            "w": torch.ones(2) * n,
            "bn.num_batches_tracked": torch.tensor(n),
            "many.num_batches_tracked": torch.arange(3) + n,  # networks that are stacked
            "step": torch.tensor([n]),
            "mask": torch.tensor([True, n > 1]),
            "position_ids": torch.arange(5),
            "none": torch.zeros(0, 3, dtype=torch.long),
        }

    merged = merge(state(1), [state(3)], wise_ft(0.5))
    assert merged.pop("w").tolist() == [2.0, 2.0]
    assert all(torch.equal(v, state(1)[k]) for k, v in merged.items())


def test_complex_weights_are_refused_and_equal_ones_copied(tmp_path: Path) -> None:
    angles = torch.polar(torch.ones(3), torch.arange(3.0))
    base, model = {"freqs": angles, "w": torch.ones(2)}, {"freqs": angles.clone(), "w": torch.zeros(2)}
    merged = on_disk(tmp_path, base, [model], average())
    assert torch.equal(merged["freqs"], angles) and (merged["w"] == 0).all()
    (tmp_path / "again").mkdir()
    refused(base, [{**model, "freqs": angles * 2}], average(), tmp_path / "again", r"freqs \(torch.complex64\)")
    with pytest.raises(ValueError, match="types: w torch.complex64 for torch.float32"):
        merge(base, [{**model, "w": torch.ones(2, dtype=torch.complex64)}], average())


# -- names


def test_names_to_skip_are_a_list_and_all_known() -> None:
    base, model = ({"fc.weight": torch.ones(2) * i, "weight": torch.ones(2) * i} for i in (1, 3))
    for call in (
        lambda skip: merge(base, [model], average(), skip=skip),
        lambda skip: fill(base, [model], average(), lambda n, like: torch.empty_like(like), skip=skip),
        lambda skip: trim_thresholds(base, [model], skip=skip),
        lambda skip: delta(model, base, skip),
    ):
        for skip in ("fc.weight", b"fc.weight", [1], 5):
            with pytest.raises(TypeError, match="^(skip|names): expected"):
                call(skip)
        with pytest.raises(ValueError, match=r"^(skip|names): expected names of .*, got \['fc.wieght'\]"):
            call(["fc.weight", "fc.wieght"])
    merged = merge(base, [{**model, "extra": torch.ones(1)}], average(), skip=iter(["fc.weight", "extra"]))
    assert merged["fc.weight"].tolist() == [1, 1] and merged["weight"].tolist() == [3, 3]


@pytest.mark.parametrize(
    ("renamed", "said"),
    [
        (lambda name: f"module.{name}", r"\): module"),
        (lambda name: f"_orig_mod.{name}", r"\): _orig_mod"),
        (lambda name: f"module._orig_mod.{name}", r"\): _orig_mod, module"),
        (lambda name: name.replace("a.", "a._orig_mod."), r"\): _orig_mod"),
        (lambda name: f"backbone.{name}", r"\): backbone."),
    ],
)
def test_names_that_differ_by_a_wrapper(renamed: Callable[[str], str], said: str) -> None:
    base = {"a.weight": torch.ones(2), "a.bias": torch.ones(2)}
    other = {renamed(name): t for name, t in base.items()}
    for host, model in ((base, other), (other, base)):
        with pytest.raises(ValueError, match="names that differ by a wrapper alone .*" + said) as error:
            merge(host, [model], average())
        assert "missing" not in str(error.value)
    with pytest.raises(ValueError, match="missing: a.bias; unexpected: module.c"):
        merge(base, [{"a.weight": torch.ones(2), "module.c": torch.ones(2)}], average())


# -- what is no tensor with numbers


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (torch.ones(2).to_sparse(), "sparse or without data: w"),
        (torch.eye(2).to_sparse_csr(), "sparse or without data: w"),
        (torch.ones(2, device="meta"), "sparse or without data: w"),
        ({"weight": torch.ones(2)}, r"no tensors: w \(dict\)"),
        (3, r"no tensors: w \(int\)"),
    ],
)
def test_only_dense_tensors(value: object, said: str) -> None:
    good = {"w": torch.ones(2), "v": torch.ones(2)}
    bad: Any = {**good, "w": value}
    for base, model, label in ((bad, good, "base"), (good, bad, r"models\[0\]")):
        with pytest.raises(ValueError, match=f"{label}: expected dense tensors; {said}"):
            merge(base, [model], average())
    assert torch.equal(merge(good, [bad], average(), skip=["w"])["w"], good["w"])
    with pytest.raises(ValueError, match=f"host: expected dense tensors; {said}"):
        apply(bad, {"v": torch.ones(2)})


def test_no_rule() -> None:
    base, model = {"w": torch.ones(2)}, {"w": torch.ones(2)}
    with pytest.raises(TypeError, match="rule: expected a rule, such as average"):
        merge(base, [model], "average")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"rule: expected shape \(2,\) for w, got NoneType"):
        merge(base, [model], lambda name, w0, ws: None)  # type: ignore[arg-type, return-value]


# -- patches


@pytest.mark.parametrize("names", [["nowhere"], lambda name: False])
def test_signatures_want_something(names: Any) -> None:
    a, b, c = ({"w": t} for t in tensors(2))
    with pytest.raises(ValueError, match="nowhere|names: expected a function that wants some"):
        signature(a, b, c, names)
    assert signature(a, b, c, []) == {}  # the first 0 layers


def test_compositions_that_are_not_finite_are_refused() -> None:
    good, bad = {"w": torch.ones(2)}, {"w": torch.tensor([1.0, math.nan])}
    with pytest.raises(ValueError, match=r"signatures\[1\]: expected finite numbers, got others in w"):
        compose([good, bad])
    with pytest.raises(ValueError, match="weights, strength: expected finite numbers, got others in w"):
        compose([{"w": torch.full((2,), 3e38)}], [1.0], strength=3.0)
    for f in (np.float32, torch.tensor, np.array):
        assert torch.equal(compose([good], [f(0.5)], strength=f(0.5))["w"], torch.full((2,), 0.25))


def test_the_tables_of_this_file_are_whole() -> None:
    from peftref.merging.baselines import arithmetic

    assert {name.split(",")[0] for name in RULES} == {*arithmetic.__all__, "ties"}
    assert json.dumps(sorted(LAYERS))
