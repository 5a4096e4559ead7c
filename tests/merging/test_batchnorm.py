"""Re-estimation of BatchNorm statistics."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from peftref.merging.core.batchnorm import batchnorms, recalibrate


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.9), nn.Flatten(), nn.Linear(12, 2)
    )


def everything(model: nn.Module) -> list:
    tensors = [v.clone() for v in model.state_dict().values()]
    return [tensors, [m.training for m in model.modules()], [m.momentum for m in batchnorms(model).values()]]


def test_statistics_are_the_weighted_mean_over_batches() -> None:
    model = net().eval()
    g = torch.Generator().manual_seed(1)
    batches = [torch.randn(b, 1, 4, 4, generator=g) * b for b in (8, 8, 3)]
    recalibrate(model, batches)
    h = [model[0](x) for x in batches]
    n = torch.tensor([float(len(x)) for x in h])
    mean = sum(c * x.mean((0, 2, 3)) for c, x in zip(n, h, strict=True)) / n.sum()
    var = sum(c * x.transpose(0, 1).flatten(1).var(1) for c, x in zip(n, h, strict=True)) / n.sum()
    torch.testing.assert_close(model[1].running_mean, mean.detach())
    torch.testing.assert_close(model[1].running_var, var.detach())


def test_equal_to_torch_with_cumulative_average_on_equal_batches() -> None:
    ours, theirs = net(), net()
    batches = torch.randn(5, 6, 1, 4, 4, generator=torch.Generator().manual_seed(2))
    recalibrate(ours, batches)
    theirs.eval()
    theirs[1].reset_running_stats()
    theirs[1].momentum = None
    theirs[1].train()
    for x in batches:
        theirs(x)
    torch.testing.assert_close(ours[1].running_mean, theirs[1].running_mean)
    torch.testing.assert_close(ours[1].running_var, theirs[1].running_var)


@pytest.mark.parametrize("training", [True, False])
def test_modes_momenta_and_weights_stay(training: bool) -> None:
    model = net().train(training)
    model[1].momentum = 0.37
    before = everything(model)
    recalibrate(model, [torch.randn(4, 1, 4, 4)])
    after = everything(model)
    assert before[1:] == after[1:]
    names = list(model.state_dict())
    changed = {n for n, a, b in zip(names, before[0], after[0], strict=True) if not torch.equal(a, b)}
    assert changed == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}


def test_dropout_does_not_reach_later_layers() -> None:
    model = nn.Sequential(nn.Dropout(0.99), nn.BatchNorm1d(2)).train()
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0)) + 3
    model.eval()
    recalibrate(model, [x])
    torch.testing.assert_close(model[1].running_mean, x.mean(0))


def test_what_fails_midway_leaves_the_model_as_it_was() -> None:
    model = net()
    model(torch.randn(9, 1, 4, 4))  # statistics that are not the initial ones
    before = everything(model)

    def batches() -> list[Tensor]:
        yield torch.randn(4, 1, 4, 4)
        yield torch.randn(4, 2, 4, 4)  # wrong channels

    with pytest.raises(RuntimeError):
        recalibrate(model, batches())
    with pytest.raises(ValueError, match="batches: expected at least one, got none"):
        recalibrate(model, [])
    after = everything(model)
    assert before[1:] == after[1:] and all(map(torch.equal, before[0], after[0]))


def test_layers_without_running_statistics_are_left_out() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False), nn.LayerNorm(2))
    assert batchnorms(model) == {}
    assert recalibrate(model, [torch.randn(3, 2)]) is model


def test_statistics_that_are_not_finite_are_refused_and_the_old_ones_kept() -> None:
    net = nn.Sequential(nn.BatchNorm1d(3))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    x = torch.zeros(4, 3)
    x[0, 1] = float("nan")
    with pytest.raises(ValueError, match="batches: expected finite inputs, got statistics that are not in 0"):
        recalibrate(net, [torch.zeros(4, 3), x])
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
