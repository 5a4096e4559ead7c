"""CoTTA's experiment: streams that share no image with validation, arms that are what their names say."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from peftref.data import ORDERS
from peftref.models import pretrained
from peftref.tta import BNAdapt, CoTTA, RandomViews, Tent, entropy
from peftref.tta.experiments import _cotta_streams as streams
from peftref.tta.experiments._cotta_arms import ARMS, Setting, ViewedTent, WholeTent

SIZE = streams.Size("shipped", images=30, batch=10, domains=2, visit=10, rounds=2, views=3, jobs=1)


@pytest.fixture(scope="module")
def batch():
    x, _ = streams.images(SIZE, None)
    return x[:10]


def found(x, pool):
    """Rows of the images ``x`` in the pool."""
    return {int((pool == one).flatten(1).all(1).nonzero()[0]) for one in x}


def test_a_seed_has_its_own_images_and_none_are_for_validation(monkeypatch):
    monkeypatch.setattr(streams, "ORDERS", [("clean",)] * len(ORDERS))
    monkeypatch.setattr(streams, "EXTRA", ("clean",))
    pool, labels = streams.images(SIZE, None)
    rows = [found(streams.stream(SIZE, None, seed).x, pool) for seed in range(3)]
    held = found(streams.validation(SIZE, None).x, pool)
    visits = list(streams.long_stream(SIZE._replace(domains=1, rounds=3), None, 0))
    assert [len(one) for one in rows] == [30, 30, 30] and len(set.union(*rows)) == 90
    assert held == set(range(len(labels) - 30, len(labels))) and not held & set.union(*rows)
    seen = [found(visit.x, pool) for visit in visits]
    assert len(seen) == 3 and not set.union(*seen) & held and seen[0] != seen[1]


def test_corruptions_come_in_the_published_orders():
    assert streams.stream(SIZE._replace(domains=15), None, 3).names == ORDERS[3]
    names = [visit.names[0] for visit in streams.long_stream(SIZE, None, 4)]
    assert names == [*ORDERS[4][:2]] * 2


def test_views_alone_are_the_mean_over_views_of_bn_adapt(batch):
    net = pretrained("fashion8k")
    method = ARMS["views alone"].wrap(net, Setting(), 3)
    views, bn = RandomViews(), BNAdapt(net)
    for _ in range(2):  # nothing is learned in between
        with torch.no_grad():
            expected = torch.stack([bn(views(batch)) for _ in range(3)]).mean(0)
        assert_close(method(batch), expected)


def test_tent_with_views_learns_what_tent_learns(batch):
    net = pretrained("fashion8k")
    ours, tent, views = ViewedTent(net, 1e-2, 3), Tent(net, 1e-2), RandomViews()
    for _ in range(2):
        with torch.no_grad():
            expected = torch.stack([tent.model(views(batch)) for _ in range(3)]).mean(0)
        tent(batch)
        assert_close(ours(batch), expected)
    for a, b in zip(ours.model.parameters(), tent.model.parameters(), strict=True):
        assert_close(a, b)


def test_whole_tent_steps_down_the_entropy_in_every_parameter(batch):
    net = pretrained("fashion8k").double()
    method = WholeTent(net, 0.1, optimizer=torch.optim.SGD)
    before = [p.detach().clone().requires_grad_() for p in method.model.parameters()]
    names = [name for name, _ in method.model.named_parameters()]
    x = batch.double()
    logits = torch.func.functional_call(method.model, dict(zip(names, before, strict=True)), (x,))
    gradients = torch.autograd.grad(entropy(logits).mean(), before)
    method(x)
    for new, old, gradient in zip(method.model.parameters(), before, gradients, strict=True):
        assert_close(new, old - 0.1 * gradient)


@pytest.mark.parametrize(
    ("name", "holds"),
    [
        ("without views", lambda m: m.n_views == 0 and m.symmetric and m.restore_p == 0.01),
        ("without average", lambda m: m.momentum == 0 and m.n_views == 3 and m.restore_p == 0.01),
        ("without restoration", lambda m: m.restore_p == 0 and m.n_views == 3 and m.momentum == 0.99),
        ("CoTTA", lambda m: m.threshold > 1 and m.n_views == 3 and m.restore_p == 0.01 and not m.symmetric),
    ],
)
def test_each_arm_lacks_what_its_name_says(name, holds):
    setting = Setting(1e-3, 0.0 if name == "without average" else 0.99)
    method = ARMS[name].wrap(pretrained("fashion8k"), setting, 3)
    assert isinstance(method, CoTTA) and holds(method) and method.lr == 1e-3


def test_the_published_setting_is_tried():
    assert Setting(1e-3, 0.999) in ARMS["CoTTA"].grid and Setting(1e-3) in ARMS["Tent"].grid


def test_drift_and_moves_are_those_of_the_student():
    done = streams._long("without views", Setting(1e-2, 0.9), SIZE, None, 0)
    assert len(done["drift"]) == len(done["move"]) == 4 and len(done["rounds"]) == 2
    assert done["drift"][0] == done["move"][0] > 0
    assert all(
        abs(a - b) <= m + 1e-3 for a, b, m in zip(done["drift"], done["drift"][1:], done["move"][1:], strict=False)
    )


def test_bfloat16_changes_few_answers(batch):
    net = pretrained("fashion8k")
    with torch.no_grad():
        exact, rough = net(batch), streams.InBfloat16(net)(batch)
    assert rough.dtype == torch.float32
    assert_close(rough, exact, rtol=0.05, atol=0.1)
    assert (rough != exact).any()


def test_a_missing_folder_is_named():
    with pytest.raises(ValueError, match="data: expected the folder"):
        streams.source(SIZE._replace(network="resnet20"), None)
