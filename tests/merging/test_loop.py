"""The loop of all weight arithmetic: what it copies, ties, casts, refuses, and leaves alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from peftref.merging.baselines.arithmetic import average, linear, task_arithmetic, wise_ft
from peftref.merging.core.loop import BLOCK, delta, elementwise, fill, merge


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3))
    model(torch.randn(5, 2, 4, 4))  # running statistics that are not the initial ones
    return model


def states(n: int = 3, dtype: torch.dtype = torch.float32) -> list[dict[str, Tensor]]:
    return [{k: v.to(dtype) if v.is_floating_point() else v for k, v in net(s).state_dict().items()} for s in range(n)]


def fingerprint(state: dict[str, Tensor]) -> dict[str, tuple]:
    return {k: (v.data_ptr(), v.dtype, v.clone()) for k, v in state.items()}


def test_result_loads_into_a_module_and_keeps_order_types_and_integers() -> None:
    a, b, c = states()
    b["1.num_batches_tracked"] += 7
    merged = merge(a, [b, c], average())
    assert list(merged) == list(a)
    assert [v.dtype for v in merged.values()] == [v.dtype for v in a.values()]
    assert merged["1.num_batches_tracked"] == a["1.num_batches_tracked"] != b["1.num_batches_tracked"]
    model = net()
    model.load_state_dict(merged)
    torch.testing.assert_close(model[3].weight.data, (b["3.weight"] + c["3.weight"]) / 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_inputs_stay_as_they_were_and_share_no_memory_with_the_result(dtype: torch.dtype) -> None:
    inputs = states(dtype=dtype)
    before = [fingerprint(s) for s in inputs]
    for rule in (average(), linear([1.0, 0.0]), lambda name, w0, ws: w0, lambda name, w0, ws: ws[1]):
        merged = merge(inputs[0], inputs[1:], rule, skip={"3.weight", "3.bias"})
        pointers = {v.data_ptr() for s in inputs for v in s.values()}
        assert not pointers & {v.data_ptr() for v in merged.values()}
    for state, old in zip(inputs, before, strict=True):
        for name, (pointer, kind, value) in old.items():
            assert state[name].data_ptr() == pointer and state[name].dtype == kind
            assert torch.equal(state[name], value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_the_float32_result_rounded_once(dtype: torch.dtype) -> None:
    low = states(dtype=dtype)
    high = [{k: v.float() if v.is_floating_point() else v for k, v in s.items()} for s in low]
    rule = task_arithmetic([0.3, -1.7])
    got, expected = merge(low[0], low[1:], rule), merge(high[0], high[1:], rule)
    for name, value in expected.items():
        assert torch.equal(got[name], value.to(low[0][name].dtype)), name
    stepwise = low[0]["3.weight"] + 0.3 * (low[1]["3.weight"] - low[0]["3.weight"])
    stepwise = stepwise - 1.7 * (low[2]["3.weight"] - low[0]["3.weight"])
    assert not torch.equal(got["3.weight"], stepwise), "rounding each step would show"


def test_float64_stays_float64() -> None:
    base, model = {"w": torch.tensor([1.0], dtype=torch.float64)}, {"w": torch.tensor([1.0 + 1e-12]).double()}
    model["w"][0] = 1.0 + 1e-12
    merged = merge(base, [model], wise_ft(0.5))["w"]
    assert merged.dtype == torch.float64 and 0 < (merged - 1).item() < 1e-12


def test_base_decides_the_type_when_models_differ() -> None:
    base, model = {"w": torch.ones(3, dtype=torch.bfloat16)}, {"w": torch.full((3,), 2.0, dtype=torch.float64)}
    assert merge(base, [model], average())["w"].dtype == torch.bfloat16


def test_tied_tensors_are_merged_once_and_stay_tied() -> None:
    calls: list[str] = []

    def rule(name: str, w0: Tensor, ws: list[Tensor]) -> Tensor:
        calls.append(name)
        return (w0 + ws[0]) / 2

    def tied(value: float) -> dict[str, Tensor]:
        w = torch.full((2, 2), value)
        return {"embed": w, "other": torch.zeros(1), "head": w}

    untied = {"embed": torch.full((2, 2), 3.0), "other": torch.zeros(1), "head": torch.full((2, 2), 3.0)}
    for model in (tied(3.0), untied):
        calls.clear()
        merged = merge(tied(1.0), [model], rule)
        assert merged["embed"] is merged["head"] and calls == ["embed", "other"]
        assert torch.equal(merged["head"], torch.full((2, 2), 2.0))
    different = {**untied, "head": torch.zeros(2, 2)}
    with pytest.raises(ValueError, match=r"models\[0\].*tied in base, but different: head and embed"):
        merge(tied(1.0), [different], rule)
    assert merge(tied(1.0), [different], rule, skip=["head"])["head"].equal(torch.ones(2, 2))
    transposed = torch.arange(4.0).view(2, 2)  # the same memory, but not the same tensor
    views = {"a": transposed, "b": transposed.T}
    merged = merge(views, [views], average())
    assert torch.equal(merged["a"].T, merged["b"]) and merged["a"] is not merged["b"]


def test_one_error_lists_every_mismatch_before_anything_is_computed() -> None:
    base, model = states(2)
    model["3.weight"] = torch.zeros(5, 16)
    model["0.bias"] = model["0.bias"].int()
    del model["1.weight"]
    model["extra"] = torch.zeros(1)
    other = {**states(2)[1], "more": torch.zeros(1)}

    def never(name: str, w0: Tensor, ws: list[Tensor]) -> Tensor:
        raise AssertionError("computed before the check")

    with pytest.raises(ValueError) as error:
        merge(base, [model, other], never)
    text = str(error.value)
    for part in (
        "models[0]", "missing: 1.weight", "unexpected: extra", "3.weight (5, 16) for (3, 16)",
        "0.bias torch.int32 for torch.float32", "models[1]", "unexpected: more",
    ):  # fmt: skip
        assert part in text
    # What is left out need not agree.
    merged = merge(base, [model], wise_ft(1.0), skip=["3.weight", "0.bias", "1.weight", "extra"])
    assert torch.equal(merged["3.weight"], base["3.weight"]) and torch.equal(merged["0.weight"], model["0.weight"])


@pytest.mark.parametrize(
    ("base", "models", "error", "text"),
    [
        ({"w": torch.ones(1)}, [], ValueError, "models: expected at least one"),
        ({"w": torch.ones(1)}, {"w": torch.ones(1)}, TypeError, "models: expected a sequence of state dicts, got one"),
        ({"w": torch.ones(1)}, [nn.Linear(1, 1)], TypeError, r"models\[0\]: expected a mapping .* \(use .state_dict"),
        (nn.Linear(1, 1), [{"w": torch.ones(1)}], TypeError, "base: expected a mapping"),
        ([1], [{"w": torch.ones(1)}], TypeError, "base: expected a mapping .* got list"),
    ],
)
def test_wrong_kinds_of_input(base: object, models: object, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        merge(base, models, average())  # type: ignore[arg-type]


def test_a_rule_that_changes_the_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rule: expected shape \(2,\) for w, got \(1,\)"):
        merge({"w": torch.ones(2)}, [{"w": torch.ones(2)}], lambda name, w0, ws: w0[:1])


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (BLOCK + 5,), (3, BLOCK)])
def test_elementwise_rules_in_pieces_equal_the_whole(shape: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(0)
    base, *models = ({"w": torch.randn(shape, generator=g)} for _ in range(3))

    def rule(name: str, w0: Tensor, ws: list[Tensor]) -> Tensor:
        return w0 + 0.5 * (ws[0] - w0) * ws[1].abs().sqrt()

    whole = merge(base, models, rule)["w"]
    pieces = merge(base, models, elementwise(copy.copy(rule)))["w"]
    assert whole.shape == shape and torch.equal(pieces, whole)


def test_non_contiguous_inputs() -> None:
    g = torch.Generator().manual_seed(1)
    base, model = ({"w": torch.randn(4, 6, generator=g).T} for _ in range(2))
    plain = {k: v.contiguous() for k, v in base.items()}
    assert torch.equal(merge(base, [model], wise_ft(0.3))["w"], merge(plain, [model], wise_ft(0.3))["w"])


def test_parameters_with_gradients_give_results_without() -> None:
    a, b = (dict(net(s).named_parameters()) for s in (0, 1))
    for rule in (wise_ft(0.5), lambda name, w0, ws: w0 * 2):
        merged = merge(a, [b], rule)
        assert not any(v.requires_grad or v.is_inference() for v in merged.values())


def test_fill_writes_where_it_is_told() -> None:
    a, b = states(2, torch.bfloat16)
    mine = {k: torch.zeros_like(v) for k, v in a.items()}
    for rule in (wise_ft(0.5), lambda name, w0, ws: (w0 + ws[0]) / 2):
        assert fill(a, [b], rule, lambda name, like: mine[name]) == {}
        assert all(torch.equal(mine[k], v) for k, v in merge(a, [b], rule).items())


def test_an_elementwise_rule_that_fails_raises() -> None:
    @elementwise
    def rule(name: str, w0: Tensor, ws: list[Tensor]) -> Tensor:
        raise ArithmeticError(name)

    with pytest.raises(ArithmeticError, match="w"):
        merge({"w": torch.ones(3 * BLOCK)}, [{"w": torch.ones(3 * BLOCK)}], rule)


def test_delta() -> None:
    base, model = states(2, torch.bfloat16)
    difference = delta(model, base)
    assert set(difference) == {k for k, v in base.items() if v.is_floating_point()}
    assert all(v.dtype == torch.float32 for v in difference.values())
    for name, value in difference.items():
        assert torch.equal(value, model[name].float() - base[name].float())
    assert list(delta(model, base, ["3.bias", "0.weight"])) == ["3.bias", "0.weight"]
    model["3.weight"] = torch.zeros(1, 1)
    delta(model, base, ["3.bias"])
    with pytest.raises(ValueError, match="3.weight"):
        delta(model, base)
    with pytest.raises(ValueError, match="names: expected names of base, got .'nowhere'"):
        delta(model, base, ["nowhere"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_equals_cpu() -> None:
    a, *rest = states()
    expected = merge(a, rest, task_arithmetic(0.7))
    for device in ("cuda", None):
        moved = [{k: v.cuda() for k, v in s.items()} for s in (a, *rest)] if device is None else [a, *rest]
        got = merge(moved[0], moved[1:], task_arithmetic(0.7), device=device)
        for name, value in expected.items():
            assert got[name].device == moved[0][name].device
            torch.testing.assert_close(got[name].cpu(), value, atol=1e-6, rtol=1e-6)
