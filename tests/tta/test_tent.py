"""Tent: loops, gradients, limiting cases, which parameters move, broken input, the contract."""

from __future__ import annotations

import functools
import math

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from peftref.tta.baselines.bn_adapt import BNAdapt
from peftref.tta.baselines.tent import Tent, entropy
from peftref.tta.core.adapted import gradient_step

SGD = functools.partial(torch.optim.SGD, momentum=0.9, nesterov=True)


def network(norm=nn.BatchNorm1d, dtype: torch.dtype = torch.double) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 8), norm(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 4))
    return net.to(dtype)


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(2, channels)


def batch(n: int = 10, seed: int = 0, dtype: torch.dtype = torch.double) -> Tensor:
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.double).to(dtype)


def state(model: nn.Module) -> tuple[dict[str, Tensor], list]:
    """Tensors (the optimiser's included) and flags."""
    optimizer = model.optimizer.state_dict()["state"] if hasattr(model, "optimizer") else {}
    moments = {f"{i}.{k}": v for i, entry in optimizer.items() for k, v in entry.items() if isinstance(v, Tensor)}
    flags = [[m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]]
    return {k: v.clone() for k, v in (model.state_dict() | moments).items()}, flags


def same(a: tuple[dict[str, Tensor], list], b: tuple[dict[str, Tensor], list]) -> bool:
    return a[1] == b[1] and a[0].keys() == b[0].keys() and all(torch.equal(v, b[0][k]) for k, v in a[0].items())


# --- the loss ---------------------------------------------------------------------------------------------------------
@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(0, 5), classes=st.integers(1, 8), scale=st.sampled_from([0.0, 1.0, 40.0]), seed=st.integers(0, 999),
    dtype=st.sampled_from([torch.double, torch.float, torch.bfloat16, torch.half]),
)  # fmt: skip
def test_entropy_is_the_naive_sum(n, classes, scale, seed, dtype):
    z = (scale * torch.randn(n, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.double)).to(dtype)
    p = z.double().softmax(-1).tolist()
    expected = torch.tensor([-sum(q * math.log(q) for q in row if q > 0) for row in p], dtype=torch.double)
    h = entropy(z)
    assert h.dtype == (dtype if dtype == torch.double else torch.float) and h.shape == (n,)
    assert_close(h.double(), expected, rtol=0, atol=1e-10 if dtype == torch.double else 1e-5)
    assert (h >= 0).all() and (h <= math.log(classes) + 1e-5).all()


def test_entropy_by_finite_differences():
    assert torch.autograd.gradcheck(entropy, torch.randn(3, 5, dtype=torch.double, requires_grad=True))
    z = torch.tensor([[1e4, 0.0, -1e4]], requires_grad=True)
    entropy(z).sum().backward()
    assert z.grad.isfinite().all()


def test_gradient_in_closed_form():
    """dH/dz_k = p_k (-log p_k - H): zero at the uniform and at every one-hot distribution."""
    z = batch().requires_grad_()
    (g,) = torch.autograd.grad(entropy(z).sum(), z)
    p = z.detach().softmax(-1)
    assert_close(g, p * (-p.log() - entropy(z.detach())[:, None]), rtol=0, atol=1e-14)
    for still in (torch.zeros(1, 4), torch.tensor([[200.0, 0, 0, 0]])):
        still.requires_grad_()
        (g,) = torch.autograd.grad(entropy(still).sum(), still)
        assert_close(g, torch.zeros_like(g), rtol=0, atol=1e-6)


# --- one step ---------------------------------------------------------------------------------------------------------
def test_zero_lr_is_bn_adapt():
    tent, bn = Tent(network(), lr=0.0), BNAdapt(network())
    for seed in range(4):
        assert torch.equal(tent(batch(seed=seed)), bn(batch(seed=seed)))


def test_one_step_is_one_gradient_step():
    """Answer first; then scale and shift go down the gradient of the mean entropy, by autograd of a hand-built net."""
    net, x = network().eval(), batch()
    scale, shift = (p.detach().clone().requires_grad_() for p in net[1].parameters())
    h = net[0](x)
    h = (h - h.mean(0)) / (h.var(0, correction=0) + 1e-5).sqrt() * scale + shift
    z = net[4](h.relu())
    loss = -(z.softmax(-1) * z.log_softmax(-1)).sum(-1).mean()
    gradients = torch.autograd.grad(loss, (scale, shift))
    tent = Tent(net, lr=0.3, optimizer=torch.optim.SGD)
    assert_close(tent(x), z.detach())
    moved = [scale - 0.3 * gradients[0], shift - 0.3 * gradients[1]]
    assert_close(list(tent.model[1].parameters()), moved)


def test_entropy_falls_on_a_repeated_batch():
    tent = Tent(network(), lr=5e-2)
    values = torch.stack([entropy(tent(batch())).mean() for _ in range(30)])
    assert (values.diff() < 0).all() and values[-1] < 0.6 * values[0]


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, group_norm, nn.LayerNorm])
def test_only_normalisation_layers_move(norm):
    tent = Tent(network(norm), lr=0.1)
    tent(batch())
    moved = [name for name, p in tent.model.named_parameters() if (p != tent.source.get_parameter(name)).any()]
    assert moved == ["1.weight", "1.bias"]
    assert [name for name, p in tent.model.named_parameters() if p.requires_grad] == moved


def test_tied_scales_are_stepped_once():
    net = nn.Sequential(*network()[:3], nn.BatchNorm1d(8), nn.Linear(8, 4)).double()
    net[3].weight, net[3].bias = net[1].weight, net[1].bias
    tent = Tent(net, lr=0.1)
    tent(batch())
    assert sum(len(group["params"]) for group in tent.optimizer.param_groups) == 2
    assert tent.model[3].weight is tent.model[1].weight


# --- broken and unusual input -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.LayerNorm])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_batch_leaves_the_model_as_it_was(norm, value):
    tent = Tent(network(norm))
    tent(batch())
    before, x = state(tent), batch(seed=1)
    x[0, 0] = value
    tent(x)
    assert same(state(tent), before)
    assert tent(batch(seed=2)).isfinite().all()


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_no_step_on_a_broken_loss_or_gradient(broken):
    """Each can be infinite without the other; a skipped step does not count for the optimiser's moments either."""
    p = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([p], lr=0.1)
    infinite = (0 * p).sum() + math.inf if broken == "loss" else (p - 1).sqrt().sum()
    assert not gradient_step(infinite, optimizer)
    assert torch.equal(p, torch.ones(2)) and not optimizer.state and p.grad is None
    assert gradient_step((p**2).sum(), optimizer) and not torch.equal(p, torch.ones(2))


def test_tiny_batches():
    tent = Tent(network())
    tent(batch())
    before = state(tent)
    assert tent(batch(0)).shape == (0, 4)
    with pytest.raises(ValueError, match="x: expected at least 2 samples"):
        tent(batch(1))
    assert same(state(tent), before)
    assert Tent(network(nn.LayerNorm))(batch(1)).shape == (1, 4)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {"img_size": 32, "depth": 1}),
        ("resnet18", {"block": timm.models.resnet.BasicBlock, "layers": (1, 1, 1, 1)}),
        ("mobilenetv3_small_050", {}),
    ],
)
def test_timm_models_untouched(name, options):
    """Layer normalisation, BatchNorm, and BatchNorm fused with its activation."""
    net = timm.create_model(name, pretrained=False, num_classes=4, **options)
    nn.init.normal_(net.get_classifier().weight)  # almost zero as it comes, and then without a gradient below
    before, x = state(net), torch.rand(4, 3, 32 if "vit" in name else 64, 32 if "vit" in name else 64)
    tent = Tent(net, lr=1e-2)
    first, second = tent(x), tent(x)
    assert first.isfinite().all() and not torch.equal(first, second)
    assert same(state(net), before)
    tent.reset()
    assert torch.equal(tent(x), first)


def test_bfloat16():
    tent = Tent(network(dtype=torch.bfloat16), lr=0.1)
    outs = [tent(batch(dtype=torch.bfloat16)) for _ in range(3)]
    assert all(z.dtype == torch.bfloat16 and z.isfinite().all() for z in outs) and not torch.equal(outs[0], outs[2])


# --- the contract -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("optimizer", [torch.optim.Adam, SGD])
def test_reset_restores_every_tensor_and_flag(optimizer):
    tent = Tent(network(), optimizer=optimizer)
    fresh = state(tent)
    first = [tent(batch(seed=s)) for s in range(3)]
    assert not same(state(tent), fresh)
    tent.reset()
    assert same(state(tent), fresh)
    assert all(torch.equal(z, tent(batch(seed=s))) for s, z in enumerate(first))


def test_source_model_is_never_changed():
    net = network().train()
    net[0].weight.requires_grad_(False)
    before = state(net)
    tent = Tent(net, lr=1.0)
    for seed in range(3):
        tent(batch(seed=seed))
    assert same(state(net), before)


def test_the_callers_mode_does_not_matter():
    """No dropout, and the statistics of the batch, in train and in eval mode alike."""
    a, b, c = Tent(network()), Tent(network()).train(), Tent(network().eval()).eval()
    for seed in range(3):
        z = a(batch(seed=seed))
        assert torch.equal(z, b(batch(seed=seed))) and torch.equal(z, c(batch(seed=seed)))
    assert not any(m.training for m in b.modules())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_learns_inside_the_callers_evaluation_loop(context):
    outside = Tent(network())
    expected = [outside(batch(seed=s)) for s in range(3)]
    with context():
        inside = Tent(network())
        inside.reset()
        answers = [inside(batch(seed=s)) for s in range(3)]
    assert all(map(torch.equal, answers, expected))
    assert not answers[0].requires_grad


def test_every_setting_matters():
    def last(**options) -> Tensor:
        tent = Tent(network(), **options)
        return [tent(batch(seed=s)) for s in range(3)][-1]

    usual = last()
    assert torch.equal(last(), usual)
    assert not torch.allclose(last(lr=1e-2), usual) and not torch.allclose(last(optimizer=SGD), usual)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="model: expected at least one normalisation layer"):
        Tent(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="model: expected at least one normalisation layer"):
        Tent(nn.Sequential(nn.BatchNorm1d(2, affine=False)))
    with pytest.raises(ValueError, match="lr: expected .* got -1"):
        Tent(network(), lr=-1)
    with pytest.raises(TypeError, match="model: expected"):
        Tent("resnet")
    with pytest.raises(TypeError, match="x: expected"):
        Tent(network())([[1.0]])
