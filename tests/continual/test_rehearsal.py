"""ER, DER++ and ER-ACE: losses in loops, what is stored when, one forward pass or three, gradients, random draws."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from peftref.continual.baselines.rehearsal import ER, ERACE, DERpp, ace_mask, derpp_loss, er_ace_loss, er_loss
from peftref.continual.core.growing_head import local_loss
from peftref.continual.core.replay import Reservoir
from peftref.continual.core.rule import FineTune
from peftref.continual.lae import vote
from peftref.models import PlainCNN, SmallCNN
from tests._naive import rehearsal as naive

K = 6


def logits(n: int, seed: int = 0, k: int = K) -> Tensor:
    return 2 * torch.randn(n, k, dtype=torch.double, generator=torch.Generator().manual_seed(seed))


def labels(n: int, seed: int = 0, start: int = 0, end: int = K) -> Tensor:
    return torch.randint(start, end, (n,), generator=torch.Generator().manual_seed(seed))


def net(norm: bool = False, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return (SmallCNN if norm else PlainCNN)(width=2, num_classes=K)


def images(n: int, seed: int = 0) -> Tensor:
    return torch.rand(n, 1, 12, 12, generator=torch.Generator().manual_seed(seed))


# --- the losses -------------------------------------------------------------------------------------------------------
def test_er_in_loops():
    z, y, old, y_old = logits(5), labels(5), logits(3, 1), labels(3, 1)
    expected = naive.loop_cross_entropy(z, y) + naive.loop_cross_entropy(old, y_old)
    assert_close(er_loss(z, y, old, y_old).item(), expected)


def test_derpp_in_loops():
    z, y, first, stored = logits(5), labels(5), logits(3, 1), logits(3, 2)
    second, y2 = logits(4, 3), labels(4, 3)
    ours = derpp_loss(z, y, first, stored, second, y2, alpha=0.3, beta=0.7)
    ce = naive.loop_cross_entropy
    assert_close(ours.item(), ce(z, y) + 0.3 * naive.loop_mse(first, stored) + 0.7 * ce(second, y2))
    default = derpp_loss(z, y, first, stored, second, y2)
    assert_close(default.item(), ce(z, y) + 0.1 * naive.loop_mse(first, stored) + 0.5 * ce(second, y2))


def test_er_ace_in_loops():
    z, y, old, y_old = logits(5), labels(5, start=2, end=4), logits(3, 1), labels(3, 1, end=4)
    allowed = naive.competing(y, K, 4)
    assert 0 not in allowed and 1 not in allowed and {4, 5} <= set(allowed)
    new = naive.loop_cross_entropy(z, y, allowed)
    assert_close(er_ace_loss(z, y, 4).item(), new)
    assert_close(er_ace_loss(z, y, 4, old, y_old).item(), new + naive.loop_cross_entropy(old, y_old))


@pytest.mark.parametrize(("half", "got"), [({"old": logits(3)}, "old"), ({"y_old": labels(3)}, "y_old")])
def test_replayed_logits_come_with_their_labels(half, got):
    with pytest.raises(ValueError, match=f"^old, y_old: expected both or neither, got {got} alone$"):
        er_ace_loss(logits(5), labels(5), 4, **half)


@settings(max_examples=60, deadline=None)
@given(seen=st.integers(1, K), y=st.lists(st.integers(0, K - 1), min_size=1, max_size=5))
def test_the_mask_class_by_class(seen, y):
    y = torch.tensor([k % seen for k in y])
    mask = ace_mask(logits(len(y)), y, seen)
    assert mask.shape == (len(y), K)
    for row in mask.tolist():
        assert [k for k in range(K) if row[k]] == naive.competing(y, K, seen)
    assert mask[torch.arange(len(y)), y].all()  # a label always competes: the loss is finite


def test_the_published_mask():
    """Equal once the last class of the task has come; before, and without it in the batch, its largest class stays."""
    past, whole, part = torch.tensor([0, 1]), torch.tensor([2, 3]), torch.tensor([2, 2])
    ours = [ace_mask(logits(2), y, 4)[0].nonzero()[:, 0].tolist() for y in (whole, part)]
    assert naive.published_competing([past, whole], K) == ours[0] == [2, 3, 4, 5]
    assert naive.published_competing([past, whole, part], K) == [2, 3, 4, 5]
    assert ours[1] == [2, 4, 5]  # 3 is an old class to this batch
    last = torch.tensor([4, 5])  # all seen: only what is present
    assert naive.published_competing([past, whole, last], K) == [4, 5]
    assert ace_mask(logits(2), last, K)[0].nonzero()[:, 0].tolist() == [4, 5]


def test_er_ace_does_not_push_down_old_classes():
    z, y = logits(5).requires_grad_(), labels(5, start=2, end=4)
    (ace,) = torch.autograd.grad(er_ace_loss(z, y, 4), z)
    assert (ace[:, :2] == 0).all() and (ace[:, 4:] > 0).all()
    (er,) = torch.autograd.grad(F.cross_entropy(z, y), z)
    assert (er[:, :2] > 0).all()  # plain cross-entropy does


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_mask_is_finite_in_every_precision(dtype):
    z = logits(5).to(dtype).requires_grad_()
    loss = er_ace_loss(z, labels(5, start=2, end=4), 4)
    loss.backward()
    assert loss.isfinite() and z.grad.isfinite().all()


def test_gradcheck():
    z, old = logits(3).requires_grad_(), logits(2, 1).requires_grad_()
    y, y_old, stored = labels(3, start=2, end=4), labels(2, 1), logits(2, 2)
    assert torch.autograd.gradcheck(lambda a, b: er_loss(a, y, b, y_old), (z, old))
    assert torch.autograd.gradcheck(lambda a, b: er_ace_loss(a, y, 4, b, y_old), (z, old))
    assert torch.autograd.gradcheck(lambda a, b: derpp_loss(a, y, b, stored, b, y_old), (z, old))


def test_limits():
    z, y, old, y_old, stored = logits(5), labels(5), logits(3, 1), labels(3, 1), logits(3, 2)
    assert derpp_loss(z, y, old, stored, old, y_old, 0, 0) == F.cross_entropy(z, y)
    assert_close(derpp_loss(z, y, old, stored, old, y_old, 0, 1), er_loss(z, y, old, y_old))
    assert_close(derpp_loss(z, y, stored, stored, old, y_old, 5, 1), er_loss(z, y, old, y_old))  # nothing drifted
    whole = torch.arange(K)
    assert_close(er_ace_loss(logits(K), whole, K), F.cross_entropy(logits(K), whole))  # all classes present


# --- the rules --------------------------------------------------------------------------------------------------------
RULES = {"ER": ER, "DER++": DERpp, "ER-ACE": ERACE}


def started(make, **options) -> FineTune:
    """A rule in its second task, after 30 samples of the first, which another network saw: its logits are others."""
    rule, model = make(Reservoir(20, seed=1), 4, **options), net(seed=1)
    rule.begin_task(0, 2)
    for i in range(3):
        x, y = images(10, i), labels(10, i, end=2)
        rule.loss(model, x, y)
        rule.observe(x, y)
    rule.begin_task(1, 4)
    return rule


def new_batch() -> tuple[Tensor, Tensor]:
    return images(5, 9), labels(5, 9, 2, 4)


def test_each_rule_is_its_loss_on_its_draws():
    """And in which order the random numbers go: ER one draw, DER++ the draw with logits, then that with labels."""
    model, (x, y) = net(), new_batch()

    def twin(rule: FineTune) -> Reservoir:
        return copy.deepcopy(rule.buffer)

    er = started(ER)
    x1, y1 = twin(er).draw(4)
    assert_close(er.loss(model, x, y), er_loss(model(x), y, model(x1), y1))

    derpp = started(DERpp, alpha=0.3, beta=0.7)
    b = twin(derpp)
    (x1, _, z1), (x2, y2, _) = b.draw(4), b.draw(4)
    assert not torch.equal(x1, x2)
    assert_close(derpp.loss(model, x, y), derpp_loss(model(x), y, model(x1), z1, model(x2), y2, 0.3, 0.7))

    ace = started(ERACE)
    x1, y1 = twin(ace).draw(4)
    assert_close(ace.loss(model, x, y), er_ace_loss(model(x), y, 4, model(x1), y1))


@pytest.mark.parametrize("make", RULES.values(), ids=RULES)
def test_one_forward_or_each_without_batchnorm(make):
    """Loss and gradients agree to float32 rounding: the kernels may sum in another order for another batch size."""
    model, (x, y) = net(), new_batch()
    got = []
    for forwards in ("one", "each"):
        rule = started(make, forwards=forwards)
        loss = rule.loss(model, x, y)
        got.append((loss, torch.autograd.grad(loss, [*model.parameters()])))
    assert_close(got[0][0], got[1][0], rtol=1e-6, atol=1e-6)
    for a, b in zip(got[0][1], got[1][1], strict=True):
        assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("make", RULES.values(), ids=RULES)
def test_one_forward_or_each_with_batchnorm(make):
    """In train mode old and new samples share statistics in one pass and not in three; in eval mode it is all one."""
    (x, y) = new_batch()
    losses = {}
    for mode in (True, False):
        for forwards in ("one", "each"):
            model = net(norm=True)
            rule = started(make, forwards=forwards)
            losses[mode, forwards] = rule.loss(model.train(mode), x, y).item()
    assert abs(losses[True, "one"] - losses[True, "each"]) > 1e-3
    assert abs(losses[False, "one"] - losses[False, "each"]) < 1e-6


@pytest.mark.parametrize("make", RULES.values(), ids=RULES)
def test_how_often_the_network_is_called(make):
    counts = {}
    for forwards in ("one", "each"):
        model, calls = net(), []
        rule = started(make, forwards=forwards)
        model.register_forward_hook(lambda m, inputs, out, calls=calls: calls.append(len(out)))
        rule.loss(model, *new_batch())
        counts[forwards] = calls
    parts = [5, 4, 4] if make is DERpp else [5, 4]  # the new batch first
    assert counts == {"one": [sum(parts)], "each": parts}


def test_derpp_stores_the_logits_of_the_moment():
    """Not those of the network after the step, nor later ones."""
    model = net()
    rule = DERpp(Reservoir(50))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    expected = []
    for i in range(3):
        x, y = images(10, i), labels(10, i, end=2)
        loss = rule.loss(model, x, y)
        expected.append(model(x).detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rule.observe(x, y)
    x, y, z = (rows[:30] for rows in rule.buffer.rows)
    assert_close(z, torch.cat(expected), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(z, model(x), atol=0.1)  # the network has moved on
    assert not z.requires_grad and z.shape == (30, K)  # all logits, also those of classes to come


@pytest.mark.parametrize("make", [ER, DERpp])
def test_with_nothing_to_replay_they_are_fine_tuning(make):
    model, (x, y) = net(), new_batch()
    assert torch.equal(make(Reservoir(5)).loss(model, x, y), FineTune().loss(model, x, y))


def test_er_ace_does_not_replay_in_its_first_task():
    model, (x, y) = net(), new_batch()
    rule = started(ERACE)
    rule.begin_task(0, 4)
    generator = rule.buffer.generator.get_state()
    assert_close(rule.loss(model, x, y), er_ace_loss(model(x), y, 4))
    assert torch.equal(rule.buffer.generator.get_state(), generator)  # not even drawn
    rule.begin_task(1, 4)
    assert rule.loss(model, x, y) > er_ace_loss(model(x), y, 4)  # a cross-entropy is positive
    assert not torch.equal(rule.buffer.generator.get_state(), generator)


def test_er_replays_in_its_first_task():
    model = net()
    rule = started(ER)
    rule.begin_task(0, 2)
    generator = rule.buffer.generator.get_state()
    rule.loss(model, *new_batch())
    assert not torch.equal(rule.buffer.generator.get_state(), generator)


@pytest.mark.parametrize("make", RULES.values(), ids=RULES)
def test_a_new_batch_is_drawn_only_after_its_step(make):
    rule = make(Reservoir(5), 4)
    x, y = new_batch()
    rule.loss(net(), x, y)
    assert len(rule.buffer) == 0
    rule.observe(x, y)
    assert len(rule.buffer) == 5


@pytest.mark.parametrize("make", [lambda: FineTune(), *(lambda m=m: m(Reservoir(20), 4) for m in RULES.values())])
def test_forward_and_regulariser_can_be_replaced(make):
    model, (x, y) = net(), new_batch()
    rule, plain = make(), make()
    for r in (rule, plain):
        for i in range(2):
            r.begin_task(i, 4)
            r.loss(model, x, y)
            r.observe(x, y)
    rule.regulariser = lambda m: m.fc.bias.square().sum() + 0.25
    extra = model.fc.bias.square().sum() + 0.25
    kept = copy.deepcopy(plain)  # the same random numbers for the third loss
    assert_close(rule.loss(model, x, y), plain.loss(model, x, y) + extra)
    seen = []
    kept.forward = lambda m, x, y: (seen.append(y), m(x) * 0)[1]
    zero = kept.loss(model, x, y)
    assert torch.equal(seen[0][:5], y)
    assert not torch.allclose(zero, rule.loss(model, x, y) - extra)


def test_every_setting_matters():
    model, (x, y) = net(), new_batch()
    base = started(DERpp).loss(model, x, y)
    for change in ({"alpha": 0.9}, {"beta": 0.9}):
        assert not torch.allclose(started(DERpp, **change).loss(model, x, y), base)
    for make in RULES.values():
        other = started(make)
        base = started(make).loss(model, x, y)
        other.batch_size = 9
        assert not torch.allclose(other.loss(model, x, y), base)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: ER(Reservoir(3), 0), "batch_size: expected an integer >= 1, got 0"),
        (lambda: ERACE(Reservoir(3), forwards="two"), 'forwards: expected "one" or "each", got \'two\''),
        (lambda: DERpp(Reservoir(3), alpha=-1), "alpha: expected a finite number >= 0, got -1"),
        (lambda: DERpp(Reservoir(3), beta=float("inf")), "beta: expected"),
    ],
)
def test_bad_arguments_are_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call()


# --- pixels, half precision -------------------------------------------------------------------------------------------
def test_losses_of_each_pixel_are_those_of_the_pixels_one_by_one():
    g = torch.Generator().manual_seed(0)
    new, old = torch.randn(2, 3, 4, 5, 2, generator=g)
    y, y_old = torch.randint(4, (2, 3, 5, 2), generator=g)

    def rows(t):
        return t.movedim(1, -1).flatten(0, -2) if t.ndim == 4 else t.flatten()

    for loss in (
        er_loss,
        lambda a, y, b, z: derpp_loss(a, y, b, a, b, z),
        lambda a, y, b, z: er_ace_loss(a, y, 2, b, z),
        lambda a, y, b, z: er_ace_loss(a, y.clamp(max=1), 3),
        lambda a, y, b, z: local_loss(a, y % 2 + 2, 2),
    ):
        torch.testing.assert_close(loss(new, y, old, y_old), loss(*map(rows, (new, y, old, y_old))))
    assert torch.equal(ace_mask(new, y, 2).movedim(1, -1).flatten(0, -2), ace_mask(rows(new), rows(y), 2))
    both = torch.stack([new, old])
    for rule in ("max", "mean"):
        flat = vote(torch.stack([rows(new), rows(old)]), rule)
        torch.testing.assert_close(rows(vote(both, rule)), flat)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_distances_of_half_precision_logits_count(dtype):
    """The square of 1e-4 is no number of float16."""
    new, y = torch.zeros(1, 2).to(dtype), torch.zeros(1).long()
    first, stored = torch.full((2, 1, 2), 1e-3).to(dtype) * torch.tensor([1.1, 1.0]).to(dtype)[:, None, None]
    first.requires_grad_()
    loss = derpp_loss(new, y, first, stored, new, y, alpha=1e4, beta=0.0)
    want = 1e4 * (first.detach().double() - stored.double()).square().mean()
    torch.testing.assert_close(loss.double() - F.cross_entropy(new, y).double(), want, rtol=0.02, atol=1e-6)
    assert want > 0 and torch.autograd.grad(loss, first)[0].abs().max() > 0
