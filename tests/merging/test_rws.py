"""Signatures: the definition in loops, projectors, identities and limits, composition, BatchNorm, refusals."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from peftref.merging.baselines.arithmetic import task_arithmetic
from peftref.merging.core.loop import merge
from peftref.merging.core.patching import apply
from peftref.merging.core.quantise import quantise
from peftref.merging.core.units import first, units
from peftref.merging.rws import average_batchnorm, blend_statistics, compose, signature
from peftref.models import SmallCNN
from tests._naive import rws as naive

SHAPES = {"conv.weight": (4, 3, 2, 2), "conv.bias": (4,), "scalar": ()}
NAMES = list(SHAPES)


def states(n: int = 3, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[dict[str, Tensor]]:
    """Pretrained, clean and n - 2 robust weights that share a part of the clean direction."""
    g = torch.Generator().manual_seed(seed)

    def noise() -> dict[str, Tensor]:
        return {k: torch.randn(s, generator=g, dtype=torch.float64) for k, s in SHAPES.items()}

    zero, task = noise(), noise()
    clean = {k: v + 0.1 * task[k] for k, v in zero.items()}
    robust = [
        {k: v + 0.1 * (1.3 * task[k] + r) for (k, v), r in zip(zero.items(), noise().values(), strict=True)}
        for _ in range(n - 2)
    ]
    return [{k: v.to(dtype) for k, v in state.items()} for state in (zero, clean, *robust)]


def minus(a: dict[str, Tensor], b: dict[str, Tensor], t: float = 1.0) -> dict[str, Tensor]:
    return {k: a[k] - t * b[k] for k in a}


def bits(state: dict[str, Tensor]) -> dict[str, bytes]:
    return {k: v.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes() for k, v in state.items()}


# -- the signature: definition, projector, identities


@settings(max_examples=40, deadline=None)
@given(d=st.integers(1, 9), seed=st.integers(0, 9999), frozen=st.booleans())
def test_equals_the_definition_in_loops(d: int, seed: int, frozen: bool) -> None:
    g = torch.Generator().manual_seed(seed)
    zero, clean, robust = torch.randn(3, d, generator=g, dtype=torch.float64)
    clean = zero if frozen else clean
    expected = naive.loop_signature(zero.tolist(), clean.tolist(), robust.tolist())
    got = signature({"w": zero}, {"w": clean}, {"w": robust}, ["w"])["w"]
    assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)


def test_equals_the_projector_tensor_by_tensor() -> None:
    zero, clean, robust = states()
    names = NAMES[:2]  # a scalar has no complement: its projector is 0
    got = signature(zero, clean, robust, names)
    assert_close(got, naive.published_signature(zero, clean, robust, names), rtol=0, atol=1e-14)
    assert_close(got, naive.vector_signature(zero, clean, robust, names), rtol=0, atol=1e-14)
    # ... and not on the concatenation of all tensors, which differs visibly
    flat = [torch.cat([s[n].flatten() for n in names]) for s in (zero, clean, robust)]
    joint = naive.projector(flat[1] - flat[0]) @ (flat[2] - flat[0])
    assert (joint - torch.cat([got[n].flatten() for n in names])).abs().max() > 0.01


def test_closed_form() -> None:
    zero, clean = {"w": torch.zeros(3)}, {"w": torch.tensor([2.0, 0.0, 0.0])}
    robust = {"w": torch.tensor([5.0, 1.0, -4.0])}
    assert signature(zero, clean, robust, ["w"])["w"].tolist() == [0.0, 1.0, -4.0]
    assert signature(zero, clean, robust, ["w"], project=False)["w"].tolist() == [3.0, 1.0, -4.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_orthogonal_to_the_task_at_real_size(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    zero, task, noise = 0.05 * torch.randn(3, 128 * 128 * 9, generator=g)
    clean, robust = zero + 0.1 * task, zero + 0.13 * task + 0.01 * noise  # the task dominates: the hard case
    s = [{"w": t.to(dtype)} for t in (zero, clean, robust)]
    rho = signature(*s, ["w"])["w"]
    assert rho.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    rho, tau = rho.double(), s[1]["w"].double() - s[0]["w"].double()
    assert abs(rho @ tau) <= 1e-6 * rho.norm() * tau.norm()
    assert rho.norm() > 0.1 * (s[2]["w"].double() - s[1]["w"].double()).norm()  # and something is left


@settings(max_examples=25, deadline=None)
@given(t=st.floats(-20, 20), seed=st.integers(0, 99))
def test_more_or_less_of_the_task_does_not_matter(t: float, seed: int) -> None:
    zero, clean, robust = states(seed=seed)
    moved = minus(robust, minus(clean, zero), t)
    assert_close(signature(zero, clean, moved, NAMES), signature(zero, clean, robust, NAMES), rtol=0, atol=1e-12)
    naive_difference = signature(zero, clean, moved, NAMES, project=False)
    if abs(t) > 0.1:  # the plain difference does feel it
        change = naive_difference["conv.weight"] - (robust["conv.weight"] - clean["conv.weight"])
        assert change.abs().max() > 1e-3


@settings(max_examples=25, deadline=None)
@given(scale=st.sampled_from([1e-12, 1e-3, 7.0, 1e9]), shift=st.floats(-5, 5), seed=st.integers(0, 99))
def test_covariant_under_scaling_and_blind_to_a_common_shift(scale: float, shift: float, seed: int) -> None:
    zero, clean, robust = states(seed=seed)
    expected = {k: scale * v for k, v in signature(zero, clean, robust, NAMES).items()}
    moved = [{k: scale * v for k, v in s.items()} for s in (zero, clean, robust)]
    assert_close(signature(*moved, NAMES), expected, rtol=1e-8, atol=1e-13 * scale)
    shifted = [{k: v + shift for k, v in s.items()} for s in (zero, clean, robust)]
    assert_close(signature(*shifted, NAMES), signature(zero, clean, robust, NAMES), rtol=0, atol=1e-12)


def test_projecting_twice_changes_nothing() -> None:
    zero, clean, robust = states()
    rho = signature(zero, clean, robust, NAMES)
    again = signature(zero, clean, {k: clean[k] + v for k, v in rho.items()}, NAMES)
    assert_close(again, rho, rtol=0, atol=1e-14)


def test_either_base_gives_the_same() -> None:
    """Projecting theta_c - theta_0, as the paper writes it, and projecting theta_c - theta_s."""
    zero, clean, robust = states()
    for name in NAMES[:2]:
        p = naive.projector(clean[name] - zero[name])
        from_zero, from_clean = (p @ (robust[name] - base[name]).flatten() for base in (zero, clean))
        assert_close(from_zero, from_clean, rtol=0, atol=1e-14)
        assert_close(signature(zero, clean, robust, [name])[name].flatten(), from_zero, rtol=0, atol=1e-14)


def test_the_clean_model_has_no_signature() -> None:
    for dtype in (torch.float16, torch.float32, torch.float64):
        zero, clean, _ = states(dtype=dtype)
        assert all((v == 0).all() for v in signature(zero, clean, clean, NAMES).values())


def test_equals_the_difference_where_that_is_orthogonal_already() -> None:
    zero = {"w": torch.tensor([1.0, 2.0, 3.0])}
    clean = {"w": zero["w"] + torch.tensor([0.0, 0.5, 0.0])}
    robust = {"w": clean["w"] + torch.tensor([0.25, 0.0, -1.0])}
    projected, plain = (signature(zero, clean, robust, ["w"], project=p)["w"] for p in (True, False))
    assert torch.equal(projected, plain) and projected.tolist() == [0.25, 0.0, -1.0]


def test_pretrained_and_clean_are_interchangeable_and_robust_is_not() -> None:
    """Both ends of the task direction lie on one line with it, and the projection forgets where on that line."""
    zero, clean, robust = states()
    rho = signature(zero, clean, robust, NAMES)
    assert_close(signature(clean, zero, robust, NAMES), rho, rtol=0, atol=1e-14)
    for other in ((zero, robust, clean), (robust, clean, zero)):
        assert (signature(*other, NAMES)["conv.weight"] - rho["conv.weight"]).abs().max() > 1e-3
    plain, swapped = (signature(*s, NAMES, project=False) for s in ((zero, clean, robust), (clean, zero, robust)))
    assert (plain["conv.weight"] - swapped["conv.weight"]).abs().max() > 1e-3  # the plain difference does not


# -- where clean training changed nothing


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_frozen_tensor_keeps_its_whole_change(dtype: torch.dtype) -> None:
    zero, _, robust = states(dtype=dtype)
    got = signature(zero, zero, robust, NAMES)
    wide = torch.promote_types(dtype, torch.float32)
    for name in NAMES:
        assert torch.equal(got[name], robust[name].to(wide) - zero[name].to(wide))
    published = naive.published_signature(zero, zero, robust, ["conv.bias"])
    assert published["conv.bias"].isnan().all()  # what the guard is for


def test_the_threshold_is_relative() -> None:
    """The last bit of a large weight is no direction; a step as small from nothing is one."""
    large = torch.full((2,), 100.0)
    rounding = torch.nextafter(large, large + 1) - large
    delta = torch.tensor([0.5, 0.25])
    for zero, tau, kept in (
        (large, rounding * torch.tensor([1.0, 0.0]), True),  # 7.6e-6
        (torch.zeros(2), torch.tensor([7.6e-6, 0.0]), False),
        (torch.zeros(2), torch.tensor([1e-12, 0.0]), False),
        (large, torch.tensor([1e-3, 0.0]), False),
    ):
        clean = zero + tau
        rho = signature({"w": zero}, {"w": clean}, {"w": clean + delta}, ["w"])["w"]
        assert_close(rho, torch.tensor([0.5 if kept else 0.0, 0.25]), rtol=0, atol=1e-5)


# -- which tensors, which types


def test_layers_are_a_list_or_a_function_and_keep_their_order() -> None:
    zero, clean, robust = states()
    for s in (zero, clean, robust):
        s["steps"] = torch.tensor(3)
    backwards = signature(zero, clean, robust, ["scalar", "conv.bias"])
    assert list(backwards) == ["scalar", "conv.bias"]
    chosen = signature(zero, clean, robust, lambda name: not name.endswith("bias"))
    assert list(chosen) == ["conv.weight", "scalar"]  # floating-point ones only
    assert torch.equal(chosen["scalar"], backwards["scalar"])
    assert signature(zero, clean, robust, []) == {}


def test_other_tensors_may_differ_in_anything() -> None:
    zero, clean, robust = states()
    zero["head"], clean["head"], robust["tail"] = torch.ones(1000), torch.ones(10), torch.ones(2)
    assert list(signature(zero, clean, robust, NAMES)) == NAMES
    with pytest.raises(ValueError, match=r"(?s)head \(1000,\) for \(10,\).*robust: .*missing: head"):
        signature(zero, clean, robust, ["head"])


def test_half_precision_is_computed_in_float32() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        half = states(dtype=dtype)
        wide = [{k: v.float() for k, v in s.items()} for s in half]
        assert bits(signature(*half, NAMES)) == bits(signature(*wide, NAMES))
    zero, clean, robust = states(dtype=torch.float32)
    mixed = signature({k: v.half() for k, v in zero.items()}, clean, {k: v.double() for k, v in robust.items()}, NAMES)
    assert_close(mixed, signature(zero, clean, robust, NAMES), check_dtype=False, rtol=0, atol=2e-3)


def test_memory_format_does_not_matter() -> None:
    zero, clean, robust = states()
    last = {k: v.to(memory_format=torch.channels_last) if v.ndim == 4 else v for k, v in robust.items()}
    assert_close(signature(zero, clean, last, NAMES), signature(zero, clean, robust, NAMES), rtol=0, atol=1e-15)


def test_no_input_is_changed_and_none_is_shared() -> None:
    four = states(4)
    for s in four:
        s["conv.weight"].requires_grad_()
    before = [bits(s) for s in four]
    rhos = [signature(four[0], four[1], r, NAMES) for r in four[2:]]
    patch = compose(rhos, [1.0, 0.5])
    single = compose(rhos[:1])
    for tensor in (*rhos[0].values(), *patch.values(), *single.values()):
        assert not tensor.requires_grad
    of_rhos = [bits(r) for r in rhos]
    for p in (patch, single):
        for tensor in p.values():
            tensor.add_(1.0)
    assert [bits(r) for r in rhos] == of_rhos
    for rho in rhos:
        for tensor in rho.values():
            tensor.add_(1.0)
    assert [bits(s) for s in four] == before


# -- composition


def test_patch_is_linear_in_strength_and_weights() -> None:
    zero, clean, *robust = states(4)
    a, b = (signature(zero, clean, r, NAMES) for r in robust)
    assert_close(compose([a]), a, rtol=0, atol=0)
    for strength in (-0.5, 0.25, 2.0):
        assert_close(compose([a], strength=strength), {k: strength * v for k, v in a.items()}, rtol=1e-15, atol=0)
    assert_close(compose([a, b]), {k: (a[k] + b[k]) / 2 for k in a}, rtol=0, atol=1e-16)  # 1/n each
    assert_close(compose([a, b], [0.7, -2.0]), {k: 0.7 * a[k] - 2.0 * b[k] for k in a}, rtol=0, atol=1e-15)
    twice = compose([a, b], [0.7, -2.0], strength=2.0)
    assert_close(twice, compose([a, b], [1.4, -4.0]), rtol=0, atol=1e-15)


def test_order_of_corruptions_does_not_matter() -> None:
    zero, clean, *robust = states(6)
    rhos, weights = [signature(zero, clean, r, NAMES) for r in robust], [0.1, 0.5, -1.0, 2.0]
    patch = compose(rhos, weights)
    assert_close(compose(rhos[::-1], weights[::-1]), patch, rtol=0, atol=1e-15)
    assert not torch.allclose(compose(rhos[::-1], weights)["conv.weight"], patch["conv.weight"])


def test_official_scale_is_the_square() -> None:
    zero, clean, *robust = states(4)
    names = NAMES[:2]
    a, b = (signature(zero, clean, r, names) for r in robust)
    two = compose([a, b], official_scale=True)
    assert_close(two, {k: 0.25 * (a[k] + b[k]) for k in a}, rtol=0, atol=1e-16)
    assert_close(compose([a], strength=0.5, official_scale=True), {k: 0.25 * v for k, v in a.items()}, rtol=0, atol=0)
    for weights in ([0.5, 0.5], [0.3, 2.0]):
        published = naive.published_patch(zero, clean, robust, names, weights)
        assert_close(compose([a, b], weights, official_scale=True), published, rtol=0, atol=1e-14)


def test_published_quantisation_agrees_for_one_corruption() -> None:
    zero, clean, robust = states()
    rho = signature(zero, clean, robust, ["conv.weight"])
    for kind in ("linear", "tanh", "log"):
        published = naive.published_patch(zero, clean, [robust], ["conv.weight"], [1.0], 6, kind)
        ours = compose([quantise(rho, 6, kind).dequantise()])
        assert_close(ours, published, rtol=0, atol=1e-12)


def test_nothing_to_add_is_an_empty_patch() -> None:
    """A zero added to -0.0 would change its sign; adding nothing changes no bit."""
    zero, clean, robust = states()
    clean["conv.bias"][0] = -0.0
    rho = signature(zero, clean, robust, NAMES)
    for patch in (compose([]), compose([rho], strength=0.0), compose([rho, rho], [0.0, 0.0]), {}):
        assert patch == {} and bits(apply(clean, patch)) == bits(clean)


def test_signatures_may_cover_different_layers() -> None:
    zero, clean, *robust = states(4)
    short, long = signature(zero, clean, robust[0], NAMES[:1]), signature(zero, clean, robust[1], NAMES)
    patch = compose([short, long], [1.0, 1.0])
    assert_close(patch["conv.weight"], short["conv.weight"] + long["conv.weight"])
    assert torch.equal(patch["conv.bias"], long["conv.bias"])


# -- limiting cases


def test_all_layers_unprojected_is_the_robust_model() -> None:
    zero, clean, robust = states()
    patched = apply(clean, compose([signature(zero, clean, robust, NAMES, project=False)]))
    assert_close(patched, robust, rtol=0, atol=4.5e-16)


def test_without_a_clean_step_it_is_task_arithmetic() -> None:
    zero, _, *robust = states(4)
    patched = apply(zero, compose([signature(zero, zero, r, NAMES) for r in robust], strength=0.8))
    assert_close(patched, merge(zero, robust, task_arithmetic(0.4)), rtol=0, atol=1e-15)


# -- BatchNorm


def test_batchnorm_and_shortcuts_are_averaged_and_nothing_else() -> None:
    net = timm.create_model("resnet18", num_classes=3)
    robust = [timm.create_model("resnet18", num_classes=5).state_dict() for _ in range(3)]  # another head
    for i, s in enumerate(robust):
        for v in s.values():
            v.add_(i + 1)
    before = bits(net.state_dict())
    state = average_batchnorm(net, robust)
    assert_close(state, naive.published_batchnorm(net.state_dict(), robust), rtol=1e-6, atol=1e-6)
    changed = {k for k, v in bits(state).items() if v != before[k]}
    assert any("downsample.0" in k for k in changed) and any("running_var" in k for k in changed)
    assert not any("conv" in k or "fc" in k or "num_batches" in k for k in changed)
    assert bits(net.state_dict()) == before
    net.load_state_dict(state)


def test_batchnorm_is_found_by_structure() -> None:
    """The layers of a plain network have numbers for names."""
    net, robust = SmallCNN(), [SmallCNN().state_dict() for _ in range(2)]
    for i, s in enumerate(robust):
        s["stages.3.1.running_mean"] += 1 + 2 * i
    state = average_batchnorm(net, robust)
    assert_close(state["stages.3.1.running_mean"], torch.full((32,), 2.0))
    assert torch.equal(state["stages.3.0.weight"], net.state_dict()["stages.3.0.weight"])


def two_norms() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Dropout(0.5)).eval()


def test_statistics_are_blended() -> None:
    g = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(12, 2, 6, 6, generator=g) + 1
    first_layer = {"mean": x.mean((0, 2, 3)), "var": x.transpose(0, 1).flatten(1).var(1)}
    full = blend_statistics(two_norms(), [x])
    assert_close(full[0].running_mean, first_layer["mean"])
    assert_close(full[0].running_var, first_layer["var"], rtol=1e-5, atol=0)
    for strength in (0.0, 0.3, 1.0):
        net = two_norms()
        net[0].running_mean.fill_(5.0), net[0].running_var.fill_(2.0), net[2].running_var.fill_(7.0)
        assert blend_statistics(net, [x], strength) is net
        # the statistics before do not enter those re-estimated, so the result is a line between the two
        assert_close(net[0].running_mean, 5.0 + strength * (first_layer["mean"] - 5.0))
        assert_close(net[0].running_var, 2.0 + strength * (first_layer["var"] - 2.0), rtol=1e-5, atol=0)
        assert_close(net[2].running_var, 7.0 + strength * (full[2].running_var - 7.0), rtol=1e-5, atol=1e-6)
        assert not any(m.training for m in net.modules())


def test_the_whole_procedure_on_a_residual_network() -> None:
    """Patch, average, re-estimate: the three steps of the paper's code for networks with BatchNorm."""
    torch.manual_seed(0)
    net = torchvision.models.resnet18(num_classes=4).eval()
    trained = [copy.deepcopy(net) for _ in range(2)]
    for m in trained:
        for p in m.parameters():
            p.data.add_(0.02 * torch.randn_like(p))
    zero, (clean, robust) = net.state_dict(), (m.state_dict() for m in trained)
    names = first(units(net), 2)
    patched = apply(clean, compose([signature(zero, clean, robust, names)]))
    net.load_state_dict(patched)
    net.load_state_dict(average_batchnorm(net, [robust]))
    assert torch.equal(net.bn1.weight, robust["bn1.weight"])  # replaced, though the signature names it too
    assert torch.equal(net.conv1.weight, patched["conv1.weight"])
    x = torch.rand(8, 3, 32, 32)
    blend_statistics(net, [x])
    assert_close(net.bn1.running_mean, net.conv1(x).mean((0, 2, 3)), rtol=1e-4, atol=1e-5)


# -- refusals, before anything happens


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda a: a | {"names": "conv.bias"}, TypeError, "names: expected names of tensors"),
        (lambda a: a | {"names": [["conv.bias"]]}, TypeError, "names: expected names of tensors"),
        (lambda a: a | {"names": 3}, TypeError, "names: expected names of tensors"),
        (lambda a: a | {"names": ["conv.bais"]}, ValueError, "(?s)clean: .*missing: conv.bais.*robust: "),
        (lambda a: a | {"robust": nn.Linear(1, 1)}, TypeError, "robust: expected a mapping.*state_dict"),
        (lambda a: a | {"pretrained": {**a["pretrained"], "conv.bias": torch.ones(4, dtype=torch.long)}}, ValueError,
         "pretrained: .*not floating-point: conv.bias"),
        (lambda a: a | {"robust": {**a["robust"], "scalar": torch.tensor(float("nan"))}}, ValueError,
         "finite weights.*scalar"),
        (lambda a: a | {"pretrained": {**a["pretrained"], "conv.bias": torch.full((4,), float("inf"))}}, ValueError,
         "finite weights.*conv.bias"),
    ],
)  # fmt: skip
def test_bad_states_and_names(change, error, said: str) -> None:
    zero, clean, robust = states()
    arguments = {"pretrained": zero, "clean": clean, "robust": robust, "names": NAMES}
    with pytest.raises(error, match=said):
        signature(**change(arguments))


def test_bad_compositions() -> None:
    rho = {"w": torch.ones(2)}
    for arguments, error, said in (
        ((rho,), TypeError, "signatures: expected a sequence"),
        (([rho], [1.0, 2.0]), ValueError, "weights: expected 1, one for each signature, got 2"),
        (([rho], [float("nan")]), ValueError, "weights: expected a finite number"),
        (([rho, {"w": torch.ones(3)}],), ValueError, r"signatures\[1\]: .*w \(3,\) for \(2,\)"),
        (([rho, {"w": torch.ones(2, dtype=torch.long)}],), ValueError, r"signatures\[1\]: .*not floating-point: w"),
        (([rho, torch.ones(2)],), TypeError, r"signatures\[1\]: expected a mapping"),
    ):
        with pytest.raises(error, match=said):
            compose(*arguments)
    with pytest.raises(ValueError, match="strength: expected a finite number"):
        compose([rho], strength=float("inf"))


def test_bad_blends_leave_the_statistics_alone() -> None:
    net = two_norms()
    before = bits(net.state_dict())
    for batches, strength in (([torch.rand(4, 2, 6, 6)], 1.5), ([], 1.0), ([torch.rand(4, 9, 6, 6)], 1.0)):
        with pytest.raises((ValueError, RuntimeError)):
            blend_statistics(net, batches, strength)
        assert bits(net.state_dict()) == before
