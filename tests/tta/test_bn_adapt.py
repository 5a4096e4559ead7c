"""BN-adapt: torch's own batch normalisation at both ends, a naive mixture between them, statelessness."""

from __future__ import annotations

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from peftref.tta.baselines.bn_adapt import BNAdapt

LAYERS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def layer(ndim: int = 4, channels: int = 3, affine: bool = True, seed: int = 0) -> nn.Module:
    g = torch.Generator().manual_seed(seed)
    bn = LAYERS[ndim](channels, affine=affine, eps=1e-3).double()
    bn.running_mean.copy_(torch.randn(channels, generator=g))
    bn.running_var.copy_(torch.rand(channels, generator=g) + 0.2)
    if affine:
        bn.weight.data.copy_(torch.randn(channels, generator=g))
        bn.bias.data.copy_(torch.randn(channels, generator=g))
    return bn


def batch(*shape: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double) + 1


def naive(bn: nn.Module, x: Tensor, alpha: float) -> Tensor:
    """Channel by channel, straight from eq-tta-bn."""
    out = torch.empty_like(x)
    for c in range(x.shape[1]):
        values = x[:, c].flatten().tolist()
        mean_b = sum(values) / len(values)
        var_b = sum((v - mean_b) ** 2 for v in values) / len(values)
        mean = (1 - alpha) * bn.running_mean[c].item() + alpha * mean_b
        var = (1 - alpha) * bn.running_var[c].item() + alpha * var_b
        scale, shift = (1.0, 0.0) if bn.weight is None else (bn.weight[c].item(), bn.bias[c].item())
        out[:, c] = (x[:, c] - mean) / math.sqrt(var + bn.eps) * scale + shift
    return out


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = nn.Sequential(nn.ReLU(), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))
    return nn.Sequential(layer(seed=1), nn.ReLU(), layer(seed=2), *head).double()


@settings(max_examples=40, deadline=None)
@given(
    ndim=st.integers(2, 5), n=st.integers(2, 5), side=st.integers(1, 3), channels=st.integers(1, 4),
    alpha=st.sampled_from([0.0, 0.1, 0.5, 0.99, 1.0]), affine=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_equals_the_loops(ndim, n, side, channels, alpha, affine, seed):
    bn, x = layer(ndim, channels, affine, seed), batch(n, channels, *[side] * (ndim - 2), seed=seed)
    assert_close(BNAdapt(bn, alpha)(x), naive(bn, x, alpha), rtol=1e-9, atol=1e-9)


def test_one_is_torchs_training_mode():
    bn, x = layer(), batch(5, 3, 4, 4)
    expected = F.batch_norm(x, None, None, bn.weight, bn.bias, training=True, eps=bn.eps)
    assert torch.equal(BNAdapt(bn)(x), expected)


def test_zero_is_the_source():
    net, x = network(), batch(5, 3, 4, 4)
    assert torch.equal(BNAdapt(net, 0.0)(x), net.eval()(x))


def test_the_ends_are_continuous():
    net, x = network(), batch(5, 3, 4, 4)
    for end, near in ((0.0, 1e-9), (1.0, 1 - 1e-9)):
        assert_close(BNAdapt(net, near)(x), BNAdapt(net, end)(x), rtol=0, atol=1e-6)


def test_alpha_matters():
    outs = [BNAdapt(network(), alpha)(batch(5, 3, 4, 4)) for alpha in (0.0, 0.1, 0.5, 1.0)]
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(outs) for b in outs[:i])


def test_adapts_away_an_affine_shift_of_every_channel():
    """What batch statistics are for: a change of brightness and contrast per channel disappears."""
    x, net = batch(6, 3, 4, 4), network()
    gain, offset = torch.tensor([2.0, 0.5, 3.0]).view(1, 3, 1, 1), torch.tensor([1.0, -2.0, 0.3]).view(1, 3, 1, 1)
    net[0].eps = 1e-12
    assert_close(BNAdapt(net)(x * gain + offset), BNAdapt(net)(x), rtol=0, atol=1e-8)
    assert (BNAdapt(net, 0.0)(x * gain + offset) - BNAdapt(net, 0.0)(x)).abs().max() > 0.1


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_no_batch_leaves_a_trace(alpha):
    net = network().train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    method = BNAdapt(net, alpha)
    inside = {k: v.clone() for k, v in method.state_dict().items()}
    first = method(batch(5, 3, 4, 4))
    method(batch(4, 3, 4, 4, seed=1)), method(batch(4, 3, 4, 4) * math.nan)
    assert torch.equal(method(batch(5, 3, 4, 4)), first)
    method.reset()
    assert torch.equal(method(batch(5, 3, 4, 4)), first)
    for kept, model in ((before, net), (inside, method)):
        now = model.state_dict()
        assert kept.keys() == now.keys() and all(torch.equal(v, now[k]) for k, v in kept.items())
    assert net.training and not any(m.training for m in method.train().modules())
    assert all(p.requires_grad for p in net.parameters()) and not net[0]._forward_pre_hooks


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_order_of_the_samples_does_not_matter(alpha):
    x, order, method = batch(6, 3, 4, 4), torch.tensor([3, 0, 5, 1, 4, 2]), BNAdapt(network(), alpha)
    assert_close(method(x[order]), method(x)[order])


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_tiny_batches(alpha):
    method = BNAdapt(network(), alpha)
    assert method(batch(0, 3, 4, 4)).shape == (0, 4)
    if alpha == 1:
        with pytest.raises(ValueError, match="x: expected at least 2 samples"):
            method(batch(1, 3, 4, 4))
    else:
        assert method(batch(1, 3, 4, 4)).isfinite().all()


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_half_precision_and_autocast(alpha):
    x = batch(6, 3, 4, 4)
    expected = BNAdapt(network().float(), alpha)(x.float())
    narrow = BNAdapt(network().bfloat16(), alpha)(x.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        cast = BNAdapt(nn.Sequential(nn.Conv2d(3, 3, 1), network()).float(), alpha)(x.float())
    assert narrow.dtype == cast.dtype == torch.bfloat16 and cast.isfinite().all()
    assert_close(narrow.float(), expected, rtol=0.05, atol=0.1)  # 8 bits of mantissa, five layers


def test_timm_model_untouched():
    net = timm.create_model("mobilenetv3_small_050", pretrained=False, num_classes=4).eval()
    x = torch.rand(4, 3, 64, 64)
    with torch.no_grad():
        source = net(x)
    assert_close(BNAdapt(net, 0.0)(x), source)
    mixed, full = BNAdapt(net, 0.5)(x), BNAdapt(net)(x)
    assert mixed.isfinite().all() and not torch.allclose(mixed, source) and not torch.allclose(mixed, full)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="model: expected at least one BatchNorm layer"):
        BNAdapt(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="running statistics"):
        BNAdapt(nn.BatchNorm1d(2, track_running_stats=False), 0.5)
    for alpha in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="alpha: expected"):
            BNAdapt(network(), alpha)
    with pytest.raises(TypeError, match="x: expected"):
        BNAdapt(network())(torch.zeros(2, 3, 4, 4, dtype=torch.long))
