"""The recorded run of AdaB2N: its arms, what its rows add up to, its streams, and the statistics made anew."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from peftref.continual.adab2n import AdaB2N, convert
from peftref.continual.baselines.rehearsal import ERACE, DERpp
from peftref.continual.core.replay import Reservoir
from peftref.continual.experiments import _adab2n_pieces as pieces
from peftref.models import SmallCNN
from peftref.results import recorded


@pytest.mark.parametrize("preset", ["smoke", "cpu"])
@pytest.mark.parametrize(("rule", "passes"), [("DER++", "three"), ("ER-ACE", "two")])
def test_the_published_difference_is_the_sum_of_its_parts(rule, passes, preset):
    found = recorded("continual/adab2n", preset)
    published = found[f"AdaB2N with one pass over BatchNorm with {passes}, {rule}"]
    alone = found[f"one pass over {passes}, BatchNorm, {rule}"]
    equal = found[f"AdaB2N over BatchNorm, both with one pass, {rule}"]
    assert len(published["values"]) == len(found.protocol["orders"])
    for whole, first, second in zip(published["values"], alone["values"], equal["values"], strict=True):
        assert whole == pytest.approx(first + second)
    assert published["paper"] == 7.68 and alone["paper"] is None and equal["paper"] is None


@pytest.mark.parametrize("preset", ["smoke", "cpu"])
def test_the_rates_are_the_best_of_those_tried(preset):
    found = recorded("continual/adab2n", preset)
    rates, chosen = found.protocol["rates"], found.protocol["chosen rates"]
    tuning = found.arrays["tuning"]
    assert chosen.keys() == pieces.ARMS.keys()
    for name, scores in tuning.items():
        assert scores[rates.index(chosen[name])] == max(scores)


def test_the_rule_of_an_arm():
    kept = Reservoir(20)
    three = pieces.rule_of(pieces.ARMS["DER++, BN, three passes"], kept, 0)
    assert isinstance(three, DERpp) and (three.forwards, three.alpha, three.beta, three.batch_size) == (
        "each",
        0.2,
        0.5,
        10,
    )
    half = pieces.rule_of(pieces.Arm("DER++", replay=5), kept, 0)
    assert isinstance(half, DERpp) and (half.forwards, half.batch_size) == ("one", 5)
    ace = pieces.rule_of(pieces.ARMS["ER-ACE, BN, two passes"], kept, 0)
    assert isinstance(ace, ERACE) and ace.forwards == "each"
    torch.manual_seed(0)
    x = torch.rand(16, 1, 8, 8)
    assert not torch.equal(half.forward(nn.Identity(), x, torch.zeros(16)), x), "images are cropped on the way"


def test_psi_has_a_rate_of_its_own():
    net = convert(SmallCNN(width=2), 5, 0.4)
    made = pieces._sgd(net, 100.0, net.parameters(), lr=0.1)
    before = copy.deepcopy(net)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    made.step()
    for (name, new), old in zip(net.named_parameters(), before.parameters(), strict=True):
        assert_close(old - new, torch.full_like(new, 10.0 if name.endswith("psi") else 0.1), msg=name)


def test_the_thin_network_has_three_stages_and_half_the_sides():
    net = pieces.network("cifar10", 4).eval()
    x = torch.rand(2, 3, 32, 32)
    assert net(x).shape == (2, 10)
    assert net.forward_features(x).shape == (2, 16, 4, 4)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in net.modules()) == 16  # 3 of them of shortcuts


def test_the_order_of_the_choice_is_tested_on_held_out_images():
    choice, reported = (pieces.tasks_of("fashion8k", order, 6, None) for order in (0, 1))
    for t, task in enumerate(choice):
        assert len(task.train.y) == 12 and task.test.x.shape[-1] == 14
        assert not (task.test.x.flatten(1)[:, None] == task.train.x.flatten(1)[None]).all(-1).any(), t
    assert {task.names for task in choice} != {task.names for task in reported}


def test_statistics_made_anew_are_the_mean_over_mixed_batches():
    tasks = pieces.tasks_of("fashion8k", 1, 6, None)
    x = torch.cat([task.train.x for task in tasks])
    plain = SmallCNN(width=2)
    balanced = convert(copy.deepcopy(plain), 5, 0.4)
    first: nn.Module | None = None
    for net in (plain, balanced):
        pieces.recalibrated(net, tasks, 3)
        assert not net.training
        first = next(m for m in net.modules() if isinstance(m, nn.BatchNorm2d | AdaB2N))
        seen = []
        hook = first.register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args[0]))
        net(x)
        hook.remove()
        assert_close(first.running_mean, seen[0].mean((0, 2, 3)), rtol=1e-4, atol=1e-5)


def test_an_arm_learns_the_same_twice_and_another_order_differs():
    run = partial(
        pieces.learned, pieces.ARMS["DER++, AdaB2N, fast psi"], 0.03, images="fashion8k", data=None, per_class=6,
        width=2, buffer=20, kappa=0.4, strength=0.1,
    )  # fmt: skip
    one, same, other = run(1), run(1), run(2)
    assert_close(one["psi"], same["psi"], rtol=0, atol=0)
    assert torch.equal(one["running"], same["running"]) and not torch.equal(one["psi"], other["psi"])
    assert one["psi"].shape == (5, 5) and one["psi"].abs().max() > 0
    assert run(0)["fresh"] is None
