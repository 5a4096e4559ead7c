"""Modules and names inside torch's wrappers."""

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

from peftref._wrapped import plain_name, unwrapped


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")


def averaged(module: nn.Module) -> nn.Module:
    model = AveragedModel(module)
    model.module = module  # itself, not its copy
    del model.n_averaged
    return model


@pytest.mark.parametrize("wrap", [compiled, nn.DataParallel, checkpoint_wrapper, averaged])
def test_names_without_the_wrapper_whether_outside_or_within(wrap) -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    expected = list(net.state_dict())
    outside, within = wrap(net), nn.Sequential(wrap(net[0]), net[1])
    for model in (outside, within, nn.DataParallel(outside), checkpoint_wrapper(within)):
        names = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
        assert sorted(plain_name(model, name) for name in names) == sorted(expected)
    assert unwrapped(outside) is net and unwrapped(within) is within
    assert unwrapped(nn.DataParallel(outside)) is net


def test_a_module_that_is_called_module_keeps_its_name() -> None:
    net = nn.Sequential()
    net.add_module("module", nn.Linear(2, 2))
    assert plain_name(net, "module.weight") == "module.weight"
    assert unwrapped(net) is net
