"""The baselines: identities, invariances, and equality with mergekit and PEFT."""

from __future__ import annotations

import peft.utils.merge_utils as peft_merge
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mergekit.merge_methods import merge_state_dicts
from torch import Tensor, nn

from peftref.merging.baselines.arithmetic import average, dare, fisher_wise_ft, linear, task_arithmetic, wise_ft
from peftref.merging.baselines.ties import ties
from peftref.merging.core.loop import Rule, merge

RULES: dict[str, Rule] = {
    "average": average(),
    "task_arithmetic": task_arithmetic(0.4),
    "ties": ties(0.5, 0.8),
    "dare": dare(0.5, task_arithmetic(0.4)),
    "dare+ties": dare(0.5, ties(0.7)),
}


def states(n: int, seed: int = 0, spread: float = 0.1) -> list[dict[str, Tensor]]:
    """A base and models near it."""
    g = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (6, 5), "a.bias": (6,), "b.weight": (2, 3, 2, 2), "scalar": ()}
    base = {k: torch.randn(s, generator=g) for k, s in shapes.items()}
    return [base] + [{k: v + spread * torch.randn(v.shape, generator=g) for k, v in base.items()} for _ in range(n - 1)]


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: float) -> None:
    assert list(got) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, **tolerance, msg=lambda m, n=name: f"{n}: {m}")


# -- identities


@pytest.mark.parametrize("name", RULES)
def test_copies_of_the_base_give_the_base_bit_for_bit(name: str) -> None:
    base = states(1)[0]
    merged = merge(base, [base] * 3, RULES[name])
    assert all(torch.equal(merged[k], v) for k, v in base.items())


@pytest.mark.parametrize("rule", [average(), linear([1.0]), task_arithmetic(1.0), ties(1.0), wise_ft(1.0)])
def test_one_model_with_weight_one_is_that_model(rule: Rule) -> None:
    base, model = states(2)
    assert_close(merge(base, [model], rule), model, atol=1e-6, rtol=1e-6)


def test_wise_ft_ends_are_exact_and_the_middle_is_the_average() -> None:
    base, model = states(2)
    assert all(torch.equal(v, base[k]) for k, v in merge(base, [model], wise_ft(0.0)).items())
    assert all(torch.equal(v, model[k]) for k, v in merge(base, [model], wise_ft(1.0)).items())
    assert_close(merge(base, [model], wise_ft(0.5)), merge(base, [base, model], average()), atol=1e-6, rtol=0)
    assert_close(merge(base, [model], wise_ft(0.3)), merge(base, [model], task_arithmetic(0.3)), atol=0, rtol=0)
    assert_close(merge(base, [model], wise_ft(0.3)), merge(base, [base, model], linear([0.7, 0.3])))


@pytest.mark.parametrize("name", RULES)
def test_order_of_the_models_does_not_matter(name: str) -> None:
    if "dare" in name:
        pytest.skip("each place has its own mask")
    base, *models = states(4)
    assert_close(merge(base, models, RULES[name]), merge(base, models[::-1], RULES[name]), atol=1e-6, rtol=1e-5)


@settings(max_examples=15, deadline=None)
@given(c=st.floats(0.05, 20.0), seed=st.integers(0, 1000), name=st.sampled_from([n for n in RULES if n != "average"]))
def test_merged_difference_scales_with_the_differences(c: float, seed: int, name: str) -> None:
    base, *models = ({k: v.double() for k, v in s.items()} for s in states(4, seed))
    base = {k: torch.zeros_like(v) for k, v in base.items()}  # so that scaling rounds alike everywhere
    scaled = [{k: c * v for k, v in m.items()} for m in models]
    got, expected = merge(base, scaled, RULES[name]), merge(base, models, RULES[name])
    assert_close(got, {k: c * v for k, v in expected.items()}, atol=1e-9, rtol=1e-9)


def test_interpolating_a_linear_model_interpolates_its_outputs() -> None:
    torch.manual_seed(0)
    a, b, x = nn.Linear(5, 3), nn.Linear(5, 3), torch.randn(7, 5)
    merged = nn.Linear(5, 3)
    merged.load_state_dict(merge(a.state_dict(), [b.state_dict()], wise_ft(0.3)))
    torch.testing.assert_close(merged(x), 0.7 * a(x) + 0.3 * b(x))
    # ... and through a ReLU it does not, which is what all of this part is about
    torch.manual_seed(1)
    deep = [nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 3)) for _ in range(3)]
    deep[2].load_state_dict(merge(deep[0].state_dict(), [deep[1].state_dict()], wise_ft(0.3)))
    assert not torch.allclose(deep[2](x), 0.7 * deep[0](x) + 0.3 * deep[1](x), atol=1e-2)


def test_wise_ft_commutes_with_a_permutation_of_both_parents() -> None:
    base, model = states(2)
    order = torch.tensor([3, 1, 0, 5, 4, 2])
    permuted = [{k: v[order] if k.startswith("a.") else v for k, v in s.items()} for s in (base, model)]
    expected = {k: v[order] if k.startswith("a.") else v for k, v in merge(base, [model], wise_ft(0.4)).items()}
    assert_close(merge(permuted[0], permuted[1:], wise_ft(0.4)), expected, atol=0, rtol=0)


# -- Fisher


def test_fisher_limits() -> None:
    base, model = states(2)
    g = torch.Generator().manual_seed(3)
    fisher = {k: torch.rand(v.shape, generator=g) + 0.1 for k, v in base.items()}
    equal = merge(base, [model], fisher_wise_ft(0.3, fisher, fisher))
    assert_close(equal, merge(base, [model], wise_ft(0.3)), atol=1e-6, rtol=1e-6)
    none, much = {k: torch.zeros_like(v) for k, v in base.items()}, {k: v * 1e9 for k, v in fisher.items()}
    assert_close(merge(base, [model], fisher_wise_ft(0.3, none, much)), model, atol=1e-5, rtol=1e-5)
    assert_close(merge(base, [model], fisher_wise_ft(0.3, much, none)), base, atol=1e-5, rtol=1e-5)
    # without information on either side the floor leaves the plain interpolation
    assert_close(merge(base, [model], fisher_wise_ft(0.3, none, none)), merge(base, [model], wise_ft(0.3)))
    two = {k: 2 * v for k, v in fisher.items()}
    a, f0, f1 = 0.3, fisher["a.bias"], two["a.bias"]
    expected = ((1 - a) * f0 * base["a.bias"] + a * f1 * model["a.bias"]) / ((1 - a) * f0 + a * f1)
    torch.testing.assert_close(merge(base, [model], fisher_wise_ft(a, fisher, two))["a.bias"], expected)
    floored = merge(base, [model], fisher_wise_ft(a, fisher, two, floor=10.0))["a.bias"]
    torch.testing.assert_close(floored, merge(base, [model], wise_ft(a))["a.bias"])


# -- DARE


def test_dare_masks_are_reproducible_and_independent_of_order() -> None:
    base, *models = states(3)
    rule = dare(0.6, task_arithmetic(1.0), seed=5)
    first = merge(base, models, rule)
    reverse = merge(dict(reversed(base.items())), models, rule)
    assert all(torch.equal(first[k], reverse[k]) for k in base)
    other = merge(base, models, dare(0.6, task_arithmetic(1.0), seed=6))
    assert any(not torch.equal(first[k], other[k]) for k in base)
    one = merge(base, models[:1], rule)  # same tensor, two models: two masks
    kept = [(one[k] != base[k]) for k in base]
    two = merge(base, [base, models[0]], rule)
    assert any(not torch.equal(a, two[k] != base[k]) for a, k in zip(kept, base, strict=True))


def test_dare_keeps_the_mean_and_drops_the_share_it_says() -> None:
    base, model = {"w": torch.zeros(4000)}, {"w": torch.linspace(0.5, 1.5, 4000)}
    merged = merge(base, [model], dare(0.75, task_arithmetic(1.0)))["w"]
    kept = merged != 0
    assert abs(kept.float().mean() - 0.25) < 4 * (0.25 * 0.75 / 4000) ** 0.5
    torch.testing.assert_close(merged[kept], 4 * model["w"][kept])
    draws = torch.stack([merge(base, [model], dare(0.75, task_arithmetic(1.0), s))["w"].mean() for s in range(50)])
    assert abs(draws.mean() - 1.0) < 4 * draws.std() / 50**0.5
    none = merge(base, [model], dare(0.0, task_arithmetic(1.0)))["w"]
    assert torch.equal(none, model["w"])


# -- peers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_to_mergekit(dtype: torch.dtype) -> None:
    base, *models = ({k: v.to(dtype) for k, v in s.items()} for s in states(4))
    with torch.no_grad():
        peer = merge_state_dicts(
            {"base": base, **{str(i): m for i, m in enumerate(models)}}, "task_arithmetic", base="base",
            parameters={"weight": {"0": 0.5, "1": -0.3, "2": 1.2}},
        )  # fmt: skip
        assert_close(merge(base, models, task_arithmetic([0.5, -0.3, 1.2])), peer, atol=1e-6, rtol=1e-6)
        peer = merge_state_dicts(models, "linear", parameters={"weight": [0.2, 0.5, 0.3], "normalize": False})
        assert_close(merge(base, models, linear([0.2, 0.5, 0.3])), peer, atol=1e-6, rtol=1e-6)
        peer = merge_state_dicts(models, "linear", parameters={"weight": [1.0, 1.0, 1.0]})
        assert_close(merge(base, models, average()), peer, atol=1e-6, rtol=1e-6)


def test_equal_to_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    base, *models = ({"w": s["a.weight"]} for s in states(4))
    tau, weights = [m["w"] - base["w"] for m in models], torch.tensor([0.5, -0.3, 1.2])
    peer = base["w"] + peft_merge.task_arithmetic(tau, weights)
    torch.testing.assert_close(merge(base, models, task_arithmetic(weights.tolist()))["w"], peer)
    # DARE: give PEFT the masks that ours draws
    marker = {"w": torch.ones_like(base["w"])}
    zeros = {"w": torch.zeros_like(base["w"])}
    masks = [
        merge(zeros, [zeros] * i + [marker] + [zeros] * (2 - i), dare(0.5, task_arithmetic(1.0)))["w"] / 2
        for i in range(3)
    ]
    drawn = iter(masks)
    monkeypatch.setattr(peft_merge.torch, "bernoulli", lambda p: next(drawn))
    peer = base["w"] + peft_merge.dare_linear(tau, weights, density=0.5)
    torch.testing.assert_close(merge(base, models, dare(0.5, task_arithmetic(weights.tolist())))["w"], peer)


# -- bad input


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: linear([]), "weights: expected finite numbers"),
        (lambda: linear([1.0, float("nan")]), "weights: expected finite numbers"),
        (lambda: task_arithmetic(float("inf")), "scale: expected finite numbers"),
        (lambda: wise_ft(float("nan")), "alpha: expected a finite number"),
        (lambda: fisher_wise_ft(1.5, {}, {}), r"alpha: expected a finite number in \[0, 1\], got 1.5"),
        (lambda: fisher_wise_ft(0.5, {}, {}, floor=0.0), "floor: expected a finite number > 0"),
        (lambda: dare(1.0, average()), r"drop: expected a probability in \[0, 1\), got 1.0"),
    ],
)
def test_settings_out_of_range(make: object, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("rule", "n", "text"),
    [
        (linear([1.0]), 2, "weights: expected one for each of the 2 models, got 1"),
        (task_arithmetic([1.0, 2.0]), 3, "scale: expected one for each of the 3 models, got 2"),
        (wise_ft(0.5), 2, "models: expected one to interpolate with the base, got 2"),
        (fisher_wise_ft(0.5, {}, {}), 1, r"fisher0: expected a tensor of shape \(6, 5\) for a.weight, got none"),
    ],
)
def test_wrong_number_of_models(rule: Rule, n: int, text: str) -> None:
    base, *models = states(n + 1)
    with pytest.raises(ValueError, match=text):
        merge(base, models, rule)


def test_kinds() -> None:
    with pytest.raises(TypeError, match="then: expected a rule, got float"):
        dare(0.5, 0.3)  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="alpha: 1.5 is outside"):
        wise_ft(1.5)


def test_every_setting_changes_the_result() -> None:
    base, *models = states(3)
    for a, b in (
        (task_arithmetic(0.3), task_arithmetic(0.4)),
        (linear([1.0, 2.0]), linear([2.0, 1.0])),
        (dare(0.5, task_arithmetic(1.0)), dare(0.6, task_arithmetic(1.0))),
        (dare(0.5, task_arithmetic(1.0)), dare(0.5, average())),
    ):
        assert not torch.equal(merge(base, models, a)["a.weight"], merge(base, models, b)["a.weight"])
    assert not torch.equal(
        merge(base, models[:1], wise_ft(0.3))["a.bias"], merge(base, models[:1], wise_ft(0.4))["a.bias"]
    )
