"""The experiment that all chapters of the part share: the split, the protocol, what is counted and measured."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from peftref.adapters.baselines.lora import LoRA
from peftref.adapters.core.injection import adapters, inject
from peftref.adapters.experiments.at_scale import held_out, run_at_scale
from peftref.adapters.experiments.transfer import (
    LINEARS,
    SHIFTS,
    adapt,
    compare,
    fresh,
    full,
    probe,
    shifted,
    summary,
    trainable,
    update_rank,
)
from peftref.at_scale import Resized
from peftref.data import load
from peftref.fitting import accuracy, best_rate, minimise, train
from peftref.models import from_timm
from peftref.models.vit import pretrained_vit


def lora(net: nn.Module) -> None:
    inject(net, LoRA, LINEARS, r=2)


def small(name: str = "digits"):
    return shifted(name, n_train=64, n_val=40)


@pytest.mark.parametrize("name", SHIFTS)
def test_parts_are_disjoint_seeded_and_shifted(name: str) -> None:
    task, data = shifted(name), load(SHIFTS[name][0])
    assert (len(task.train.y), len(task.val.y)) == (800, 200)
    rows = torch.cat([task.train.x, task.val.x]).flatten(1)
    assert len(rows.unique(dim=0)) == 1000
    assert torch.equal(task.test.y, data.test.y) and torch.equal(shifted(name).train.x, task.train.x)
    assert not torch.equal(shifted(name, seed=1).train.y, task.train.y)
    assert torch.equal(task.test.x, data.test.x) == (name == "digits")
    assert task.test.x.min() >= 0 and task.test.x.max() <= 1


def test_the_rotation_and_the_inversion_are_what_they_say() -> None:
    x = load("fashion8k").test.x[:5]
    assert torch.equal(shifted("rotated").test.x[:5], x.mT.flip(-2))  # anticlockwise
    assert_close(shifted("inverted").test.x[:5] + x, torch.ones_like(x))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"name": "clothes"}, "name: expected one of"),
        ({"n_train": 0}, "n_train, n_val: expected positive"),
        ({"n_train": 3900}, "4000 at most in all, got 3900 and 200"),
    ],
)
def test_a_task_that_there_is_not_is_refused(bad: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shifted(**{"name": "digits"} | bad)


def test_what_each_baseline_trains() -> None:
    task = small()
    counts = {}
    for build in (probe, full, lora):
        model = adapt(build, task, lr=1e-3, steps=1).model
        counts[build.__name__] = trainable(model)
        assert model.head.weight.requires_grad and not model.training
    blocks = sum(p.numel() for p in pretrained_vit().parameters()) - sum(p.numel() for p in fresh().head.parameters())
    per_block = 2 * (64 + 192 + 64 + 64 + 64 + 256 + 256 + 64)
    assert counts == {"probe": 0, "full": blocks, "lora": 4 * per_block}


def test_the_frozen_stays_and_the_rest_moves() -> None:
    task, before = small(), pretrained_vit().state_dict()
    model = adapt(lora, task, lr=1e-2, steps=3).model
    for name, value in model.state_dict().items():
        if ".adapters." not in name and not name.startswith("head."):
            assert torch.equal(value, before[name.replace(".base_layer", "")]), name
    assert all(adapter.lora_B.weight.any() for adapter in adapters(model).values())


def test_the_seed_decides_everything_and_the_global_generator_is_left_alone() -> None:
    task = small()
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    runs = [adapt(lora, task, lr=3e-3, seed=s, steps=3) for s in (0, 0, 1)]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(runs[0].losses, runs[1].losses) and not torch.equal(runs[0].losses, runs[2].losses)


def test_learning_learns() -> None:
    task = shifted("digits", n_train=200, n_val=40)
    run = adapt(full, task, lr=1e-3, steps=40, batch_size=50)
    assert run.losses[-5:].mean() < 0.7 * run.losses[:5].mean()
    with torch.no_grad():
        logits = run.model(task.val.x)
    assert run.val == pytest.approx(accuracy(logits, task.val.y))
    assert run.val_loss == pytest.approx(F.cross_entropy(logits, task.val.y).item(), rel=1e-4)


def test_the_rate_is_the_best_on_the_validation_images_and_not_by_the_runs_that_count() -> None:
    task, lrs = small(), (1e-5, 1e-2)
    runs = compare({"probe": probe, "LoRA": lora}, task, seeds=(3, 4), lrs=lrs, steps=15)
    assert list(runs.method) == ["probe", "probe", "LoRA", "LoRA"] and list(runs.seed) == [3, 4, 3, 4]
    assert set(runs.lr) == {1e-2}  # 1e-5 moves nothing in 15 steps
    again = adapt(lora, task, lr=1e-2, seed=4, steps=15)
    assert runs.accuracy.iloc[3] == again.test
    table = summary(runs)
    assert table.accuracy["LoRA"] == pytest.approx(runs.accuracy[2:].mean())
    assert table.sd["LoRA"] == pytest.approx(abs(runs.accuracy[2] - runs.accuracy[3]) / math.sqrt(2))


def test_rank_of_the_update() -> None:
    net = fresh()
    assert update_rank(net) == 0
    inject(net, LoRA, LINEARS, r=3)
    assert update_rank(net) == 0  # B is zero
    for adapter in adapters(net).values():
        nn.init.normal_(adapter.lora_B.weight)
    assert update_rank(net) == 3
    assert math.isnan(update_rank(fresh().requires_grad_(True)))


def test_a_class_index_per_label() -> None:
    assert accuracy(torch.eye(4), torch.tensor([0, 1, 2, 0])) == 75


def test_enlarged_network_is_timms_on_enlarged_images() -> None:
    net = from_timm("vit_tiny_patch16_224", num_classes=3, img_size=32)
    x = torch.rand(2, 1, 8, 8)
    big = F.interpolate(x.expand(-1, 3, -1, -1), (32, 32), mode="bicubic").clamp(0, 1)
    assert_close(Resized(net, 32)(x), net(big))
    assert Resized(net, 32).head is net.model.head


def test_held_out_images_are_the_rest() -> None:
    data = load("digits")
    task = held_out(data, n_val=38)
    assert (len(task.train.y), len(task.val.y)) == (1400, 38) and torch.equal(task.test.x, data.test.x)
    joined = torch.cat([task.train.y, task.val.y]).bincount()
    assert torch.equal(joined, data.train.y.bincount())
    with pytest.raises(ValueError, match="n_val: expected a number in \\[1, 1437\\], got 0"):
        held_out(data, n_val=0)


def test_at_scale_every_adapter_finds_its_layers_in_timm() -> None:
    task = small()._replace(test=small().val)
    table = run_at_scale(
        {"probe": probe, "LoRA": lora}, task, tag="vit_tiny_patch16_224", pretrained=False, size=32, epochs=0.1,
        batch_size=32, lrs=(1e-3,), device="cpu",
    )  # fmt: skip
    assert table.trainable.to_dict() == {"probe": 0, "LoRA": 12 * 2 * 16 * 192}
    assert table.attrs["protocol"]["steps"] == 1 and table.attrs["protocol"]["tag"] == "vit_tiny_patch16_224"


def test_descent_is_adamw_on_a_one_cycle_schedule_with_clipped_gradients() -> None:
    """The same steps by hand; a parameter that is frozen stays."""
    torch.manual_seed(0)
    start, frozen, steps = torch.randn(4, dtype=torch.float64), torch.ones(3), 7
    goal = 100 * torch.randn(steps, 4, dtype=torch.float64)
    by_hand, ours = start.clone().requires_grad_(), start.clone().requires_grad_()
    optimizer = torch.optim.AdamW([by_hand], lr=0.1, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps, pct_start=0.1)
    expected = []
    for target in goal:
        expected.append((by_hand - target).square().sum())
        by_hand.grad = torch.autograd.grad(expected[-1], by_hand)[0]
        by_hand.grad *= min(1.0, 1 / (by_hand.grad.norm() + 1e-6))
        optimizer.step()
        schedule.step()
    batches = iter(goal)
    losses = minimise(lambda: (ours - next(batches)).square().sum(), iter([ours, frozen]), lr=0.1, steps=steps)
    assert_close(ours, by_hand)
    assert_close(losses, torch.stack(expected).detach())
    free = start.clone().requires_grad_()
    minimise(lambda: (free - goal[0]).square().sum() * 1e-3, [free], lr=0.1, steps=3, clip=math.inf)
    held = start.clone().requires_grad_()
    minimise(lambda: (held - goal[0]).square().sum() * 1e-3, [held], lr=0.1, steps=3, clip=1e-9)
    assert not torch.equal(free, held)  # Adam's epsilon shows in gradients this small


def test_training_draws_its_batches_from_the_generator_it_is_given() -> None:
    x, y = torch.randn(50, 3), torch.randint(2, (50,))

    def run(seed: int) -> tuple[torch.Tensor, nn.Module]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5))
        return train(net, x, y, lr=1e-2, steps=4, generator=torch.Generator().manual_seed(seed)), net

    (a, net), (b, _), (c, _) = run(1), run(1), run(2)
    assert torch.equal(a, b) and not torch.equal(a, c) and a.shape == (4,) and not net.training


def test_the_first_of_equal_rates_and_no_trial_of_a_single_one() -> None:
    assert best_rate((3, 1, 2), lambda lr: (lr > 1, 0)) == 3
    assert best_rate((1, 3, 2), lambda lr: (0, -lr)) == 1

    def never(lr: float) -> tuple[float]:
        raise AssertionError("tried")

    assert best_rate((5,), never) == 5
