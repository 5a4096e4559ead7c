"""Recipes of training: what a loop promises whatever it trains."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from peftref.data import Split
from peftref.fitting import accuracy, batches, best_rate, fit, minimise, predict, train


def net() -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Linear(3, 2)


def test_minimise_is_adamw_with_one_cycle_and_clipping() -> None:
    ours = net()
    theirs = copy.deepcopy(ours)
    x = torch.randn(16, 3, generator=torch.Generator().manual_seed(1))
    losses = minimise(lambda: ours(x).square().mean(), ours.parameters(), lr=0.05, steps=8, clip=0.3)
    optimizer = torch.optim.AdamW(theirs.parameters(), 0.05, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=8, pct_start=0.1)
    for step in range(8):
        loss = theirs(x).square().mean()
        torch.testing.assert_close(losses[step], loss.detach())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 0.3)
        optimizer.step()
        schedule.step()
    torch.testing.assert_close(list(ours.parameters()), list(theirs.parameters()))


def test_frozen_parameters_stay() -> None:
    model = net()
    model.bias.requires_grad_(False)
    before = model.bias.clone()
    minimise(lambda: model(torch.ones(4, 3)).square().mean(), model.parameters(), lr=0.1, steps=3)
    assert torch.equal(model.bias, before) and model.bias.grad is None


def test_autocast_around_a_loop_sees_the_weights_of_each_step() -> None:
    """Autocast keeps the half-precision copy of a weight until its context ends: steps would then have no effect."""
    x = torch.randn(32, 3, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > 0).long()
    found = []
    for around in (False, True):
        model = net()
        generator = torch.Generator().manual_seed(0)

        def forward(batch: torch.Tensor, inside: nn.Module = model) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return inside(batch).float()

        with torch.autocast("cpu", torch.bfloat16, enabled=around):
            wrapper = nn.Module()
            wrapper.forward = forward  # type: ignore[method-assign]
            wrapper.inner = model
            found.append(train(wrapper, x, y, lr=0.1, steps=10, batch_size=32, generator=generator))
    torch.testing.assert_close(found[0], found[1])
    assert found[1][-1] < found[1][0]


def test_train_draws_with_replacement_from_the_generator_and_leaves_eval_mode() -> None:
    x, y = torch.randn(10, 3), torch.arange(10) % 2
    runs = [train(net(), x, y, lr=0.01, steps=4, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    model = net().train()
    train(model, x, y, lr=0.01, steps=1)
    assert not model.training


@pytest.mark.parametrize("bad", [{"lr": 0.0}, {"lr": float("nan")}, {"steps": 0}, {"steps": 1.5}, {"clip": 0.0}])
def test_bad_settings_change_nothing(bad: dict) -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="lr, steps, clip: expected"):
        train(model, torch.ones(4, 3), torch.zeros(4).long(), **{"lr": 0.1, "steps": 2, **bad})
    torch.testing.assert_close(model.state_dict(), before)


def test_batches_are_a_permutation_in_each_epoch() -> None:
    data = Split(torch.arange(10.0)[:, None], torch.arange(10))
    seen = [b.y for b in batches(data, 4, epochs=2, generator=torch.Generator().manual_seed(0))]
    assert [len(y) for y in seen] == [4, 4, 2] * 2
    first, second = torch.cat(seen[:3]), torch.cat(seen[3:])
    assert first.sort().values.tolist() == second.sort().values.tolist() == list(range(10))
    assert not torch.equal(first, second)


def test_a_last_batch_of_one_can_be_left_out() -> None:
    data = Split(torch.zeros(9, 1), torch.arange(9))
    generator = torch.Generator().manual_seed(0)
    assert [len(b.y) for b in batches(data, 4, drop_last=True, generator=generator)] == [4, 4]
    assert [len(b.y) for b in batches(data, 20, drop_last=True, generator=generator)] == [9]


def test_fit_shifts_by_up_to_two_pixels_and_repeats_itself() -> None:
    x = torch.rand(12, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    y = torch.arange(12) % 3
    seen: list[torch.Tensor] = []

    class Watching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(36, 3)

        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            seen.append(batch.detach())
            return self.fc(batch.flatten(1))

    states = []
    for _ in range(2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            states.append(fit(Watching(), x, y, epochs=2, batch_size=5, seed=3).state_dict())
    torch.testing.assert_close(states[0], states[1])
    shifts = [F.pad(x, (2, 2, 2, 2))[..., a : a + 6, b : b + 6] for a in range(5) for b in range(5)]
    assert all(any((image == s).flatten(1).all(1).any() for s in shifts) for batch in seen for image in batch[:, None])


def test_predict_best_rate_accuracy() -> None:
    model = net()
    x = torch.randn(7, 3)
    torch.testing.assert_close(predict(model, x, 3), model(x).detach())
    assert best_rate((0.1, 0.2, 0.3), lambda lr: (lr == 0.2,)) == 0.2
    assert best_rate([0.5], lambda lr: 1 / 0) == 0.5
    assert accuracy(torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]), torch.tensor([1, 0, 0])) == pytest.approx(
        200 / 3
    )
    for call in (lambda: best_rate([], len), lambda: accuracy(torch.zeros(0, 2), torch.zeros(0))):
        with pytest.raises(ValueError, match="expected"):
            call()


class Normed(nn.Module):
    """A network of images with BatchNorm, whose output may be changed on its way out."""

    def __init__(self, change=lambda z: z) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
        self.change = change

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.change(self.body(x))


def pictures(n: int) -> Split:
    return Split(torch.rand(n, 1, 6, 6, generator=torch.Generator().manual_seed(0)), torch.arange(n) % 3)


@pytest.mark.parametrize(("n", "size", "sizes"), [(9, 4, [4, 5]), (10, 4, [4, 4, 2]), (1, 4, [1]), (3, 1, [1, 1, 1])])
def test_a_last_sample_alone_joins_the_batch_before(n: int, size: int, sizes: list[int]) -> None:
    data = pictures(n)
    seen = [b.y for b in batches(data, size, epochs=2, generator=torch.Generator().manual_seed(0))]
    assert [len(y) for y in seen] == sizes * 2
    assert torch.cat(seen).bincount().tolist() == (2 * data.y.bincount()).tolist()
    inside: list[int] = []
    predict(Normed(lambda z: inside.append(len(z)) or z).eval(), data.x, size)
    assert inside == sizes


def test_fit_with_one_image_left_over_trains_on_all() -> None:
    data = pictures(9)
    seen: list[int] = []
    model = fit(Normed(lambda z: seen.append(len(z)) or z), *data, epochs=2, batch_size=4)
    assert seen == [4, 5, 4, 5] and not model.training


@pytest.mark.parametrize("run", ["fit, one image", "fit, batches of one", "train"])
def test_batches_of_one_are_refused_before_anything_moves(run: str) -> None:
    model = Normed().eval()
    model.body[2].train()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="batch_size: expected at least 2 samples a batch, for BatchNorm, got 1"):
        if run == "train":
            train(model, *pictures(5), lr=0.1, steps=2, batch_size=1)
        else:
            fit(model, *pictures(1 if "image" in run else 3), batch_size=1 if "batches" in run else 4)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert [m.training for m in (model, *model.body)] == [False, False, False, True, False]
    fit(nn.Sequential(nn.Flatten(), nn.Linear(36, 3)), *pictures(3), epochs=1, batch_size=1)  # no BatchNorm, no matter


@pytest.mark.parametrize(
    "change",
    [lambda z: (z, None), lambda z: {"logits": z}, lambda z: torch.stack([z, z], -1), lambda z: z[:, 0]],
)
def test_other_than_logits_is_refused_before_anything_moves(change) -> None:
    model = Normed(change).eval()
    before = copy.deepcopy(model.state_dict())
    for run in (
        lambda: fit(model, *pictures(6)),
        lambda: train(model, *pictures(6), lr=0.1, steps=2, batch_size=4),
        lambda: predict(model, pictures(6).x),
    ):
        with pytest.raises((TypeError, ValueError), match=r"model: expected logits \((\d|N), K\), got"):
            run()
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
        assert not model.training
    with pytest.raises(ValueError, match="logits, y: expected"):
        accuracy(torch.zeros(3, 3, 3), torch.zeros(3, 3).long())


def test_prediction_within_an_autocast_region_takes_no_gradient_from_training() -> None:
    x = torch.randn(32, 3, generator=torch.Generator().manual_seed(0))
    found = []
    for look in (False, True):
        model = net()
        with torch.autocast("cpu", torch.bfloat16):
            if look:
                predict(model, x)
            minimise(lambda inside=model: inside(x).float().square().mean(), model.parameters(), lr=0.1, steps=3)
        found.append(model.weight.detach())
    assert torch.equal(*found) and not torch.equal(found[0], net().weight)
