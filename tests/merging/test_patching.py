"""Patches: sums and their rounding, bits that come back, ties, refusals."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.testing import assert_close

from peftref.merging.core.checkpoints import Checkpoint
from peftref.merging.core.patching import Patched, apply
from peftref.merging.core.units import units
from peftref.models import SmallCNN

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def bits(state: dict[str, Tensor]) -> dict[str, bytes]:
    return {k: v.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes() for k, v in state.items()}


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return SmallCNN(width=4).to(dtype).eval()


def patch_for(model: nn.Module, size: float = 0.1, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    names = [n for n, _ in model.named_parameters()][:4] + ["stages.0.1.running_mean"]
    state = model.state_dict()
    return {n: (size * torch.randn(state[n].shape, generator=g)).to(dtype) for n in names}


# -- the sum


@pytest.mark.parametrize("dtype", DTYPES)
def test_sum_is_rounded_once(dtype: torch.dtype) -> None:
    host, patch = net(dtype).state_dict(), patch_for(net(), size=1e-3)
    wide = torch.promote_types(dtype, torch.float32)
    result = apply(host, patch)
    assert list(result) == list(host)
    for name, value in host.items():
        expected = (value.to(wide) + patch[name].to(wide)).to(dtype) if name in patch else value
        assert result[name].dtype == value.dtype and torch.equal(result[name], expected), name
    model = net(dtype)
    Patched(model, patch).on()
    assert bits(model.state_dict()) == bits(result)


def test_only_the_named_tensors_change_and_no_input_does() -> None:
    model = net()
    host, patch = model.state_dict(), patch_for(model)
    before, of_patch = bits(host), bits(patch)
    result = apply(host, patch)
    assert {n for n, b in bits(result).items() if b != before[n]} == set(patch)
    assert result["stages.0.1.num_batches_tracked"].dtype == torch.long
    for tensor in result.values():
        tensor.zero_()
    assert bits(host) == before and bits(patch) == of_patch
    assert bits(apply(host, {})) == before


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 9999), size=st.sampled_from([1e-4, 0.1, 1.0, 30.0]))
def test_subtracting_it_again_is_within_two_ulp(seed: int, size: float) -> None:
    g = torch.Generator().manual_seed(seed)
    host, patch = {"w": torch.randn(500, generator=g)}, {"w": size * torch.randn(500, generator=g)}
    back = apply(apply(host, patch), {"w": -patch["w"]})
    ulp = torch.maximum(host["w"].abs(), patch["w"].abs()) * torch.finfo(torch.float32).eps
    assert ((back["w"] - host["w"]).abs() <= 2 * ulp).all()


def test_a_checkpoint_on_disk_can_be_the_host(tmp_path) -> None:
    host = {"a": torch.ones(3), "b": torch.full((3,), 2.0), "c": torch.zeros(3)}
    save_file(host, tmp_path / "model.safetensors")
    opened = Checkpoint(tmp_path / "model.safetensors")
    assert_close(apply(opened, {"b": torch.ones(3)}), host | {"b": torch.full((3,), 3.0)})


# -- a live model


def test_subtracting_is_not_exact() -> None:
    """Which is why a live model's weights are put aside."""
    host, patch = {"w": torch.tensor([1e-8])}, {"w": torch.tensor([1.0])}
    assert apply(apply(host, patch), {"w": -patch["w"]})["w"].item() == 0.0


@pytest.mark.parametrize("dtype", DTYPES)
def test_off_restores_every_bit(dtype: torch.dtype) -> None:
    model = net(dtype)
    with torch.no_grad():
        model.stages[0][1].bias[:2] = torch.tensor([-0.0, 6e-8])  # a sign and a small number that a sum would lose
    before, ids = bits(model.state_dict()), [id(p) for p in model.parameters()]
    patched = Patched(model, patch_for(net(), size=100.0))
    for strength in (1.0, -0.3, 0.0, 1e4 if dtype != torch.float16 else 10.0):
        patched.on(strength)
        assert (bits(model.state_dict()) != before) == (strength != 0)
        patched.off()
        assert bits(model.state_dict()) == before
    assert [id(p) for p in model.parameters()] == ids  # an optimiser's references stay good


def test_strength_replaces_strength() -> None:
    model, patch = net(), patch_for(net())
    patched = Patched(model, patch)
    for strength in (0.5, 2.0, -1.0, 2.0):
        patched.on(strength)
        assert patched.strength == strength
        for name, p in patch.items():
            assert_close(model.state_dict()[name], net().state_dict()[name] + strength * p, rtol=1e-6, atol=1e-6)
    assert patched.on(0.0).strength == 0.0 and bits(model.state_dict()) == bits(net().state_dict())
    assert patched.off().off().strength == 0.0


def test_context_manager() -> None:
    model, patch = net(), patch_for(net())
    before, half = bits(model.state_dict()), bits(apply(model.state_dict(), {k: 0.5 * v for k, v in patch.items()}))
    with Patched(model, patch) as patched:
        assert patched.strength == 1.0
    assert bits(model.state_dict()) == before
    with pytest.raises(KeyError), patched.on(0.5) as same:
        assert same is patched and bits(model.state_dict()) == half  # entering does not reset the strength
        raise KeyError
    assert bits(model.state_dict()) == before


def test_predictions_change_and_come_back() -> None:
    model, x = net(), torch.rand(4, 1, 28, 28)
    before = model(x)
    with Patched(model, patch_for(model)):
        assert (model(x) - before).abs().max() > 1e-3
    assert torch.equal(model(x), before)


def test_the_patch_is_added_to_the_weights_of_the_moment() -> None:
    model, patch = net(), patch_for(net())
    patched = Patched(model, patch).on().off()
    with torch.no_grad():
        model.stages[0][0].weight.add_(1.0)
    tuned = bits(model.state_dict())
    patched.on()
    assert_close(model.stages[0][0].weight, net().stages[0][0].weight + 1 + patch["stages.0.0.weight"])
    assert bits(patched.off() and model.state_dict()) == tuned


def test_patches_nest() -> None:
    model, patch = net(), patch_for(net())
    start = bits(model.state_dict())
    with Patched(model, patch):
        outer = bits(model.state_dict())
        with Patched(model, {"stages.0.0.weight": torch.ones(4, 1, 3, 3)}):
            assert_close(model.stages[0][0].weight, net().stages[0][0].weight + patch["stages.0.0.weight"] + 1)
        assert bits(model.state_dict()) == outer
    assert bits(model.state_dict()) == start


def test_no_gradient_and_no_training_flag_is_touched() -> None:
    model = net().train()
    model.stages[0][0].weight.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    patched = Patched(model, patch_for(net())).on()
    assert [p.requires_grad for p in model.parameters()] == flags and model.training
    assert all(p.grad is None and p.grad_fn is None for p in model.parameters())
    patched.off()
    assert [p.requires_grad for p in model.parameters()] == flags


# -- ties


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    return model


@pytest.mark.parametrize("names", [["0.weight"], ["1.weight"], ["0.weight", "1.weight"]])
def test_tied_tensors_are_patched_once(names: list[str]) -> None:
    model, patch = tied(), dict.fromkeys(names, torch.ones(3, 3))
    before = model[0].weight.detach().clone()
    result = apply(model.state_dict(), patch)
    assert_close(result["0.weight"], before + 1)
    assert result["0.weight"].data_ptr() == result["1.weight"].data_ptr()
    with Patched(model, patch):
        assert_close(model[0].weight.detach(), before + 1)
        assert model[0].weight is model[1].weight
    assert torch.equal(model[0].weight, before)


def test_tied_tensors_cannot_get_two_values() -> None:
    model = tied()
    before = bits(model.state_dict())
    patch = {"0.weight": torch.ones(3, 3), "1.weight": torch.zeros(3, 3)}
    for call in (lambda: apply(model.state_dict(), patch), lambda: Patched(model, patch)):
        with pytest.raises(ValueError, match="one value for 0.weight and 1.weight"):
            call()
    assert bits(model.state_dict()) == before


# -- refusals


@pytest.mark.parametrize(
    ("patch", "error", "said"),
    [
        ({"stages.0.0.wait": torch.ones(1), "fc.bias": torch.ones(9)}, ValueError,
         r"missing: stages.0.0.wait; shapes: fc.bias \(10,\) for \(9,\)"),
        ({"stages.0.1.num_batches_tracked": torch.tensor(1.0)}, ValueError, "not floating-point: stages.0.1.num_b"),
        ({"fc.bias": torch.ones(10, dtype=torch.long)}, ValueError, "patch: .*not floating-point: fc.bias"),
        ({"fc.bias": 0.5}, ValueError, "patch: .*not floating-point: fc.bias"),
        ([torch.ones(10)], TypeError, "patch: expected a mapping"),
    ],
)  # fmt: skip
def test_bad_patches_change_nothing(patch, error, said: str) -> None:
    model = net()
    before = bits(model.state_dict())
    for call in (lambda: apply(model.state_dict(), patch), lambda: Patched(model, patch)):
        with pytest.raises(error, match=said):
            call()
    assert bits(model.state_dict()) == before


def test_other_bad_arguments() -> None:
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got OrderedDict"):
        Patched(net().state_dict(), {})
    with pytest.raises(TypeError, match=r"host: expected a mapping.*use .state_dict\(\)"):
        apply(net(), {})
    model = net()
    patched = Patched(model, patch_for(model)).on(0.5)
    state = bits(model.state_dict())
    for strength in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="strength: expected a finite number"):
            patched.on(strength)
    assert bits(model.state_dict()) == state and patched.strength == 0.5


def test_an_empty_patch_does_nothing() -> None:
    model = net()
    before = bits(model.state_dict())
    with Patched(model, {}) as patched:
        assert bits(model.state_dict()) == before and patched.strength == 1.0
    assert bits(copy.deepcopy(model).state_dict()) == before


def test_replaced_tensors_are_noticed() -> None:
    net = nn.Linear(2, 2)
    patch = Patched(net, {"bias": torch.ones(2)})
    net.load_state_dict({k: v.clone() for k, v in net.state_dict().items()}, assign=True)
    before = net.bias.clone()
    with pytest.raises(RuntimeError, match="^model: expected the tensors it had, got others for bias"):
        patch.on()
    assert torch.equal(net.bias, before) and patch.strength == 0


# -- more than a type can hold


def test_a_sum_that_a_type_cannot_hold_is_refused() -> None:
    for dtype, weight, add in (
        (torch.float16, 60000.0, 9000.0),
        (torch.bfloat16, 3e38, 3e38),
        (torch.float32, 3e38, 3e38),
        (torch.float8_e4m3fn, 448.0, 100.0),
        (torch.float8_e5m2, 57344.0, 9000.0),
    ):
        model = nn.Module()
        model.w = nn.Parameter(torch.tensor([1.0, weight]).to(dtype), requires_grad=False)
        model.v = nn.Parameter(torch.ones(2), requires_grad=False)
        before = bits(model.state_dict())
        patch = {"v": torch.ones(2), "w": torch.tensor([1.0, add])}
        said = rf"patch: expected sums that the weights' types can hold, got larger ones in w \({dtype}\)"
        with pytest.raises(ValueError, match=said):
            apply(model.state_dict(), patch)
        patched = Patched(model, patch)
        with pytest.raises(ValueError, match=said):
            patched.on()
        assert bits(model.state_dict()) == before and patched.strength == 0
        half = bits(patched.on(-0.5) and model.state_dict())
        with pytest.raises(ValueError, match=said):
            patched.on(2.0)
        assert bits(model.state_dict()) == half != before and patched.strength == -0.5
        patched.off()
        assert bits(model.state_dict()) == before


def test_a_mask_of_infinities_in_the_host_stays() -> None:
    mask = torch.full((3, 3), float("-inf")).triu(1)
    host = {"mask": mask, "w": torch.ones(2)}
    patched = apply(host, {"mask": torch.zeros(3, 3), "w": torch.ones(2)})
    assert torch.equal(patched["mask"], mask) and patched["w"].tolist() == [2.0, 2.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_patch_that_is_not_finite_is_refused(bad: float) -> None:
    model = net()
    before = bits(model.state_dict())
    patch = {"fc.bias": torch.full((10,), bad)}
    for call in (lambda: apply(model.state_dict(), patch), lambda: Patched(model, patch)):
        with pytest.raises(ValueError, match="patch: expected finite numbers, got others in fc.bias"):
            call()
    assert bits(model.state_dict()) == before


def test_float8_is_patched_and_comes_back() -> None:
    host = {"w": torch.tensor([1.0, -2.0, 0.5]).to(torch.float8_e4m3fn)}
    assert apply(host, {"w": torch.tensor([0.25, 0.5, 1.0])})["w"].float().tolist() == [1.25, -1.5, 1.5]


# -- wrappers


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager"), lambda m: m])
def test_names_are_those_of_the_module_inside(wrap) -> None:
    model = net()
    wrapped, patch = wrap(model), patch_for(model)
    assert units(wrapped) == units(model)
    before, wanted = bits(model.state_dict()), bits(apply(model.state_dict(), patch))
    outside = dict(zip(wrapped.state_dict(), model.state_dict(), strict=True))
    for named in (patch, {name: patch[inside] for name, inside in outside.items() if inside in patch}):
        with Patched(wrapped, named):
            assert bits(model.state_dict()) == wanted
        assert bits(model.state_dict()) == before


def test_numbers_of_numpy_and_torch() -> None:
    model, patch = net(), patch_for(net())
    patched = Patched(model, patch)
    wanted = bits(patched.on(0.5) and model.state_dict())
    for strength in (np.float32(0.5), np.float64(0.5), torch.tensor(0.5), np.array(0.5)):
        patched.off()
        assert bits(patched.on(strength) and model.state_dict()) == wanted and type(patched.strength) is float
