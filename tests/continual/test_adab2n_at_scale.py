"""The large-scale run of AdaB2N, end to end on files laid out like CIFAR-10 and a thin ResNet-18."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.testing import assert_close

from peftref.at_scale import shifted_crop
from peftref.continual.adab2n import AdaB2N
from peftref.continual.baselines.norms import group_norm, replace_batch_norms
from peftref.continual.baselines.rehearsal import DERpp
from peftref.continual.core.metrics import summary
from peftref.continual.core.replay import Reservoir
from peftref.continual.core.streams import class_incremental
from peftref.continual.core.train import learn
from peftref.continual.experiments.adab2n_at_scale import (
    adab2n,
    batch_norm,
    cifar_resnet18,
    exchange,
    run_at_scale,
)
from peftref.data import load
from tests._cifar import lay_cifar10


def thin() -> nn.Module:
    return cifar_resnet18(channels=(4, 4, 8, 8), stem_width=4)


def test_augmentation_moves_and_mirrors_each_image():
    x = torch.rand(64, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    moved = shifted_crop(x, torch.Generator().manual_seed(0), pad=2)
    assert moved.shape == x.shape
    padded, found = nn.functional.pad(x, (2, 2, 2, 2)), set()
    for before, after in zip(padded, moved, strict=True):
        options = {
            (i, j, flip): before[:, i : i + 8, j : j + 8].flip(-1) if flip else before[:, i : i + 8, j : j + 8]
            for i in range(5) for j in range(5) for flip in (False, True)
        }  # fmt: skip
        match = [key for key, option in options.items() if torch.equal(option, after)]
        assert len(match) == 1
        found |= set(match)
    assert {i for i, _, _ in found} == {j for _, j, _ in found} == set(range(5)) and len({f for *_, f in found}) == 2


def test_the_network_keeps_the_resolution_of_small_images():
    net = thin()
    assert net.model.conv1.stride == (1, 1) and net.model.conv1.kernel_size == (3, 3)
    assert net.forward_features(torch.rand(2, 3, 32, 32)).shape == (2, 8, 4, 4)


def test_end_to_end_on_laid_files(tmp_path):
    tasks = class_incremental(load("cifar10", lay_cifar10(tmp_path, 2)), 5)
    nets = []

    def build():
        nets.append(thin())
        return nets[-1]

    methods = {
        "BatchNorm": batch_norm, "GroupNorm": exchange(partial(replace_batch_norms, make=group_norm)),
        "AdaB2N": adab2n(0.4, 0.1),
    }  # fmt: skip
    table = run_at_scale(build, tasks, methods, buffer=20, seeds=[1], device="cpu")
    assert table.index.tolist() == [(name, 1) for name in methods]
    values = table[["last", "incremental", "plasticity"]].to_numpy()
    assert values.min() >= 0 and values.max() <= 100
    kinds = [{type(m) for m in net.modules()} for net in nets]
    assert AdaB2N in kinds[2] and nn.BatchNorm2d not in kinds[2] | kinds[1] and nn.GroupNorm in kinds[1]
    layer = next(m for m in nets[2].modules() if isinstance(m, AdaB2N))
    assert layer.seen_tasks == 5 and layer.num_batches_tracked == 10 and layer.psi.abs().max() > 0
    assert table.attrs["protocol"]["train"] == 100 and table.attrs["protocol"]["device"] == "cpu"


def test_a_row_is_what_its_pieces_give(tmp_path):
    tasks = class_incremental(load("cifar10", lay_cifar10(tmp_path, 2)), 5)
    table = run_at_scale(thin, tasks, {"BatchNorm": batch_norm}, buffer=20, lr=0.1, seeds=[3], device="cpu")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        net = thin()
    rule, generator = DERpp(Reservoir(20, 3), alpha=0.2, beta=0.5), torch.Generator().manual_seed(3)
    rule.forward = lambda model, x, y: model(shifted_crop(x, generator))
    want = summary(learn(net, tasks, rule, lr=0.1, seed=3))
    assert_close(torch.tensor(table.loc[("BatchNorm", 3)].to_list()), torch.tensor(list(want.values())))
    stored = rule.buffer.rows[0][0]
    assert any(torch.equal(stored, x) for task in tasks for x in task.train.x), "as it came"
