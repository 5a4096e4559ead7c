"""Normalisation layers exchanged: what is put where, and that nothing is when something cannot be."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

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
