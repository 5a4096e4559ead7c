"""Normalisation layers exchanged: what is put where, and that nothing is when something cannot be."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from peftref.continual.adab2n import AdaB2N, convert
from peftref.continual.baselines.norms import continual_norm, group_norm, replace_batch_norms
from peftref.models import SmallCNN


def test_group_norm_has_no_memory_of_a_batch():
    net = replace_batch_norms(SmallCNN(width=4), group_norm)
    assert [m.num_groups for m in net.modules() if isinstance(m, nn.GroupNorm)] == [4, 4, 8, 8, 16]
    x = torch.rand(5, 1, 14, 14)
    assert_close(net(x)[:2], net(x[:2]))
    assert group_norm(nn.BatchNorm2d(6)).num_groups == 2 and group_norm(nn.BatchNorm2d(128)).num_groups == 32
    assert group_norm(nn.BatchNorm2d(6), groups=3).num_groups == 3
    assert group_norm(nn.BatchNorm2d(6, eps=0.1)).eps == 0.1


def test_continual_norm_is_groups_then_batch():
    layer = nn.BatchNorm2d(6)
    layer.weight.data.uniform_(1, 2)
    made = continual_norm(layer)
    x = torch.randn(4, 6, 3, 3)
    grouped = F.group_norm(x, 2)
    assert_close(made(x), F.batch_norm(grouped, None, None, layer.weight, layer.bias, training=True))
    assert made[1] is layer and sum(p.numel() for p in made.parameters()) == 12


def test_every_layer_is_exchanged_once_in_its_mode():
    net = SmallCNN(width=4).eval()
    net.one = net.two = nn.BatchNorm1d(3)
    made = []

    def make(layer):
        made.append(layer)
        return nn.Identity()

    assert replace_batch_norms(net, make) is net
    assert len(made) == 6 and net.one is net.two and isinstance(net.stages[4][1], nn.Identity)
    assert not net.stages[4][1].training and net.one.training  # as the layer that was there
    assert isinstance(replace_batch_norms(nn.BatchNorm2d(2), make), nn.Identity)


def test_failures_change_nothing():
    net = SmallCNN(width=4)

    def make(layer):
        if layer.num_features == 16:
            raise KeyError
        return nn.Identity()

    with pytest.raises(KeyError):
        replace_batch_norms(net, make)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in net.modules()) == 5
    with pytest.raises(ValueError, match="model: expected at least one BatchNorm layer"):
        replace_batch_norms(nn.Linear(1, 1), make)


# --- layers that do more than to normalise ----------------------------------------------------------------------------
NORM_ACTS = [
    kind
    for kind in vars(timm.layers).values()
    if isinstance(kind, type) and issubclass(kind, nn.modules.batchnorm._BatchNorm) and hasattr(kind(2), "act")
]
ACTS = [nn.ReLU, nn.SiLU, nn.Hardswish, nn.ReLU6, nn.GELU, nn.Identity]


def used(layer: nn.Module, seed: int = 0) -> nn.Module:
    """With statistics, scale and shift of their own."""
    g = torch.Generator().manual_seed(seed)
    for name, low, high in (("weight", 0.5, 2), ("bias", -1, 1), ("running_mean", -1, 1), ("running_var", 0.5, 2)):
        getattr(layer, name).data.uniform_(low, high, generator=g)
    return layer.eval()


@pytest.mark.parametrize("kind", NORM_ACTS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("act", ACTS, ids=lambda act: act.__name__)
def test_dropout_and_activation_of_timms_layers_stay(kind, act):
    layer, x = used(kind(8)), torch.randn(4, 8, 5, 5, generator=torch.Generator().manual_seed(1))
    layer.drop, layer.act = nn.Dropout(0.3), act()
    net = nn.Sequential(nn.Conv2d(8, 8, 1), copy.deepcopy(layer))
    h = net[0](x)
    plain = F.batch_norm(h, layer.running_mean, layer.running_var, layer.weight, layer.bias, eps=layer.eps)
    assert_close(net.eval()(x), act()(plain))
    grouped = replace_batch_norms(copy.deepcopy(net), lambda m: group_norm(m, 4))
    assert_close(grouped(x), act()(F.group_norm(h, 4)))
    norm = replace_batch_norms(copy.deepcopy(net), lambda m: continual_norm(m, 4))
    per_image = F.group_norm(h, 4)
    plain_of = F.batch_norm(per_image, layer.running_mean, layer.running_var, layer.weight, layer.bias, eps=layer.eps)
    assert_close(norm(x), act()(plain_of))
    if issubclass(kind, nn.SyncBatchNorm):
        with pytest.raises(TypeError, match="layer: expected .* with torch's forward, got SyncBatchNorm"):
            convert(net, 1, 0.5)
    else:
        converted = convert(copy.deepcopy(net), 1, 0.5)
        assert torch.equal(converted(x), net(x)) and converted[1][0].weight.shape == (8,)
        assert converted.train()(x).isfinite().all() and converted[1][1].training
    with pytest.raises(TypeError, match=f"layer: expected a BatchNorm of torch, got {kind.__name__}; use replace"):
        group_norm(layer)
    with pytest.raises(TypeError, match=f"layer: expected a BatchNorm layer with torch's forward, got {kind.__name__}"):
        AdaB2N(layer, 1, 0.5)


@pytest.mark.parametrize("name", ["test_efficientnet", "mobilenetv3_small_050", "regnety_002", "densenet121"])
def test_timms_networks_are_the_same_in_eval_mode(name):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = timm.create_model(name, pretrained=False, num_classes=5).eval()
    g = torch.Generator().manual_seed(1)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.bias.data.uniform_(-0.5, 0.5, generator=g)
    x = torch.randn(2, 3, 32, 32, generator=g)
    want = net(x)
    convert(net, 2, 0.5)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    assert torch.equal(net(x), want)


class Doubled(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Split(timm.layers.SplitBatchNorm2d):
    """Which has a BatchNorm for each part of a batch."""


class Counted(nn.BatchNorm2d):
    """More in training alone, such as a synchronisation of its own."""

    def forward(self, x):
        return super().forward(x)


class ByHand(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x):
        return F.batch_norm(x, self.bn.running_mean, self.bn.running_var, self.bn.weight, self.bn.bias)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (Doubled(3), "layer: expected BatchNorm and then its children, got a Doubled that does more"),
        (Split(3), "layer: expected BatchNorm and then its children, got a Split that does more"),
        (ByHand(), r"model: expected layers that are called, got \['1.bn'\], whose weights are used alone"),
    ],
)
def test_what_cannot_be_exchanged_is_refused_and_stays(layer, message):
    for exchange in (lambda net: convert(net, 2, 0.5), lambda net: replace_batch_norms(net, group_norm)):
        net = nn.Sequential(nn.BatchNorm2d(3), layer)
        with pytest.raises(ValueError, match=message):
            exchange(net)
        assert type(net[0]) is nn.BatchNorm2d and net[1] is layer and layer.training
    net = convert(nn.Sequential(used(Counted(3))), 1, 0.5)
    assert isinstance(net[0], AdaB2N)
