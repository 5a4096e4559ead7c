"""The shipped families and what is measured on them: parts that share no image, honest corruptions, honest weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from peftref.data import Split, corrupt, load
from peftref.merging.core.loop import check_aligned
from peftref.merging.experiments.corrupted import DOMAINS, Corrupting, accuracy, corrupted, deal, family

TEST = load("fashion8k").test
KINDS = [("plain", seed) for seed in range(5)] + [("norm", seed) for seed in range(3)]


def rows(x: torch.Tensor) -> list[bytes]:
    return [image.numpy().tobytes() for image in x]


def test_parts_share_no_image_and_lose_none():
    train = load("fashion8k").train
    parts, other = deal(train, 0), deal(train, 1)
    dealt = [row for part in parts.values() for row in rows(part.x)]
    assert sorted(dealt) == sorted(rows(train.x))  # each image once (some occur twice in the data)
    label = dict(zip(rows(train.x), train.y.tolist(), strict=True))
    assert all(label[row] == y for part in parts.values() for row, y in zip(rows(part.x), part.y.tolist(), strict=True))
    assert torch.equal(parts["tune"].x, deal(train, 0)["tune"].x)
    assert not torch.equal(parts["tune"].y, other["tune"].y)
    with pytest.raises(ValueError, match="data: expected 6000 images to deal, got 2000"):
        deal(TEST, 0)


@pytest.mark.parametrize("name", ["contrast", "defocus_blur"])
def test_corruption_without_chance_is_the_published_one(name):
    severity, table = DOMAINS[name]
    few = Split(TEST.x[:20], TEST.y[:20])
    assert_close(corrupted(few, name).x, corrupt(few.x, name, severity, table=table))
    assert torch.equal(corrupted(few, name).y, few.y)


def test_clean_and_inverted():
    few = Split(TEST.x[:20], TEST.y[:20])
    assert torch.equal(corrupted(few, "clean").x, few.x)
    assert_close(corrupted(corrupted(few, "invert"), "invert").x, few.x)
    with pytest.raises(ValueError, match="name: expected 'clean' or one of contrast, .*, got 'rain'"):
        corrupted(few, "rain")


def test_noise_is_new_in_each_batch_and_the_same_for_a_seed():
    x = TEST.x[:10]
    seen = Corrupting(nn.Identity(), "gaussian_noise", 1)
    a, b = seen(x), seen(x)
    assert not torch.equal(a, b)
    assert torch.equal(a, Corrupting(nn.Identity(), "gaussian_noise", 1)(x))
    assert not torch.equal(a, Corrupting(nn.Identity(), "gaussian_noise", 2)(x))


def test_training_behind_a_corruption_reaches_the_model():
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    nn.functional.cross_entropy(Corrupting(net, "invert")(TEST.x[:5]), TEST.y[:5]).backward()
    direct = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    direct.load_state_dict(net.state_dict())
    nn.functional.cross_entropy(direct(1 - TEST.x[:5]), TEST.y[:5]).backward()
    assert_close(net[1].weight.grad, direct[1].weight.grad)


@pytest.mark.parametrize(("kind", "seed"), KINDS)
def test_family_has_what_it_says(kind, seed):
    model, states = family(seed, kind)
    assert not model.training
    domains = list(DOMAINS) if kind == "plain" else ["contrast"]
    more = ["digits", "digits contrast", "far start", "far clean", "far contrast"] if kind == "plain" else []
    assert list(states) == ["start", "clean", *domains, *more]
    check_aligned(model.state_dict(), list(states.values()))
    for state in states.values():  # half precision is all there is, and enough
        assert all(torch.equal(t, t.half().float()) for t in state.values() if t.is_floating_point())
    clean = accuracy(model, states["clean"], TEST)
    assert 75 < accuracy(model, states["start"], TEST) < clean < 90, "better than its start, and not too good"
    for name in domains:
        seen = corrupted(TEST, name, seed=7)
        own = accuracy(model, states[name], seen)
        assert own > 70 and own > accuracy(model, states["clean"], seen) + 15


def test_far_and_digit_networks():
    digits = load("mnist5k").test
    for seed in range(5):
        model, states = family(seed)
        assert accuracy(model, states["digits"], digits) > 93
        assert accuracy(model, states["digits contrast"], corrupted(digits, "contrast")) > 90
        assert accuracy(model, states["far start"], TEST) < 30  # it has never seen a garment
        assert accuracy(model, states["far clean"], TEST) > 74
        heads = {name: state["fc.weight"] for name, state in states.items()}
        for name in ("far clean", "far contrast"):  # one start, head included
            assert torch.dist(heads[name], heads["far start"]) < torch.dist(heads[name], heads["start"])


def test_unknown_family():
    with pytest.raises(ValueError, match=r"seed, kind: .*'norm_0'.*'plain_4'.* got 3 and 'norm'"):
        family(3, "norm")


def test_accuracy_counts_every_image_and_leaves_the_model():
    model, states = family(0)
    few = Split(TEST.x[:601], TEST.y[:601])  # blocks of 250, 250 and 101
    model.load_state_dict(states["invert"])
    before = {name: t.clone() for name, t in model.state_dict().items()}
    got = accuracy(model, states["fog"], few)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    model.load_state_dict(states["fog"])
    assert got == pytest.approx(100 * (model(few.x).argmax(-1) == few.y).float().mean().item(), abs=1e-4)
    assert accuracy(model, {}, few) == got
