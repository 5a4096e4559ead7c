"""The loop: what it calls when, modes, seeds, hooks, the matrix it returns, and what it refuses."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftref.continual.baselines.rehearsal import ER, ERACE, DERpp
from peftref.continual.core.metrics import evaluate, summary
from peftref.continual.core.replay import Reservoir
from peftref.continual.core.rule import FineTune
from peftref.continual.core.streams import class_incremental, domain_incremental
from peftref.continual.core.train import joint, learn
from peftref.data import Dataset, Split, load
from peftref.fitting import batches

DIGITS = load("digits")
TASKS = class_incremental(DIGITS, [4, 3, 3], per_class=40)


def net(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10))


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def test_the_loop_written_out():
    """Plain SGD on the rule's loss, batch after batch; a row of the matrix after each task."""
    model, twin = net(), net()
    a = learn(model, TASKS, FineTune(), lr=0.2, batch_size=10, epochs=2, seed=3)
    g, rows = torch.Generator().manual_seed(3), []
    for task in TASKS:
        twin.train()
        for x, y in batches(task.train, 10, epochs=2, generator=g):
            gradients = torch.autograd.grad(F.cross_entropy(twin(x), y), [*twin.parameters()])
            with torch.no_grad():
                for p, d in zip(twin.parameters(), gradients, strict=True):
                    p.sub_(0.2 * d)
        rows.append(evaluate(twin.eval(), TASKS))
    assert a.shape == (3, 3) and a.dtype == torch.float64
    torch.testing.assert_close(a, torch.stack(rows))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_what_is_called_when():
    calls = []

    class Rule(FineTune):
        def begin_task(self, task: int, classes: int) -> None:
            super().begin_task(task, classes)
            calls.append(("begin", task, classes))

        def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            calls.append(("loss", len(y), model.training))
            return super().loss(model, x, y)

        def observe(self, x: Tensor, y: Tensor) -> None:
            calls.append(("observe", len(y)))

        def end_task(self, model: nn.Module, x: Tensor, y: Tensor) -> None:
            calls.append(("end", len(y), model.training))

    before, after = (lambda t, name=name: calls.append((name, t)) for name in ("before", "after"))
    learn(net(), TASKS[:2], Rule(), lr=0.1, batch_size=100, before=before, after=after)
    step = [("loss", 100, True), ("observe", 100)]
    assert calls == [
        ("begin", 0, 4), ("before", 0), *step, ("loss", 60, True), ("observe", 60), ("end", 160, False), ("after", 0),
        ("begin", 1, 7), ("before", 1), *step, ("loss", 20, True), ("observe", 20), ("end", 120, False), ("after", 1),
    ]  # fmt: skip


def test_observe_comes_after_the_step():
    model, weights = net(), []

    class Rule(FineTune):
        def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            weights.append(model[1].weight.detach().clone())
            return super().loss(model, x, y)

        def observe(self, x: Tensor, y: Tensor) -> None:
            assert not torch.equal(model[1].weight, weights[-1])

    learn(model, TASKS[:1], Rule(), lr=0.1)
    assert len(weights) == 16


def test_the_hook_before_a_task_acts_on_it():
    """A net whose weights are put back before each task knows the last task only."""
    model = net()
    start = copy.deepcopy(model.state_dict())
    last = learn(model, TASKS, FineTune(), lr=0.2, epochs=3, before=lambda t: model.load_state_dict(start))[-1]
    assert last[2] > 80 and (last[:2] < 5).all()


def test_the_hook_after_a_task_comes_before_the_test():
    model = net()

    def forget(t: int) -> None:
        nn.init.zeros_(model[4].weight)
        nn.init.zeros_(model[4].bias)

    a = learn(model, TASKS, FineTune(), lr=0.2, after=forget)
    assert (a[:, 0] > 0).all() and (a[:, 1:] == 0).all()  # all logits 0: class 0 always wins


def test_modes_and_seeds():
    models = [net() for _ in range(3)]
    a, b, c = (learn(m, TASKS, FineTune(), lr=0.1, seed=s) for m, s in zip(models, (0, 0, 1), strict=True))
    assert torch.equal(a, b) and same(models[0], models[1]) and not same(models[0], models[2])
    assert not any(m.training for m in models[0].modules())
    random = torch.get_rng_state()
    learn(net(), TASKS, DERpp(Reservoir(20)), lr=0.1)
    assert torch.equal(torch.get_rng_state(), random)  # no draw but from the generators that were seeded


def test_rehearsal_forgets_less():
    """Means of three seeds; the gap is tens of points."""

    def mean(make) -> dict[str, float]:
        runs = [summary(learn(net(s), TASKS, make(s), lr=0.1, epochs=3, seed=s)) for s in range(3)]
        return {k: sum(r[k] for r in runs) / 3 for k in runs[0]}

    plain = mean(lambda s: FineTune())
    for rule in (ER, DERpp, ERACE):
        kept = mean(lambda s, rule=rule: rule(Reservoir(100, s)))
        assert kept["last"] > plain["last"] + 15, rule
        assert kept["forgetting"] < plain["forgetting"] - 20, rule


@pytest.mark.parametrize(
    "change",
    [{"lr": 0.05}, {"batch_size": 20}, {"epochs": 2}, {"seed": 1}, {"optimizer": torch.optim.Adam}],
    ids=lambda c: next(iter(c)),
)
def test_every_setting_matters(change):
    a, b = net(), net()
    learn(a, TASKS[:2], FineTune(), **{"lr": 0.1})
    learn(b, TASKS[:2], FineTune(), **{"lr": 0.1, **change})
    assert not torch.allclose(a[1].weight, b[1].weight, atol=1e-4)
    if "seed" not in change:
        joint(a := net(), TASKS[:2], lr=0.1)
        joint(b := net(), TASKS[:2], **{"lr": 0.1, **change})
        assert not torch.allclose(a[1].weight, b[1].weight, atol=1e-4)


def test_lr_0_and_no_epoch_learn_nothing():
    for change in ({"lr": 0.0}, {"lr": 0.1, "epochs": 0}):
        model = net()
        learn(model, TASKS, FineTune(), **change)
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), net().parameters(), strict=True))


def test_frozen_weights_stay():
    model = net()
    model[1].requires_grad_(False)
    learn(model, TASKS, FineTune(), lr=0.1)
    assert torch.equal(model[1].weight, net()[1].weight) and not torch.equal(model[4].weight, net()[4].weight)


def test_joint_is_one_task_of_all_images():
    model, twin = net(), net()
    row = joint(model, TASKS, lr=0.2, seed=2)
    order = torch.cat([task.train.y for task in TASKS])
    whole = class_incremental(DIGITS, 1, per_class=40)[0]
    whole = whole._replace(train=Split(torch.cat([task.train.x for task in TASKS]), order))
    learn(twin, [whole], FineTune(), lr=0.2, seed=2)
    assert same(model, twin)
    assert row.shape == (3,) and torch.equal(row, evaluate(model, TASKS))
    assert not model.training
    assert row.mean() > learn(net(), TASKS, FineTune(), lr=0.2)[-1].mean() + 20


def test_domains_have_all_classes_from_the_start():
    inverted = Split(1 - DIGITS.train.x, DIGITS.train.y), Split(1 - DIGITS.test.x, DIGITS.test.y)
    tasks = domain_incremental(DIGITS, Dataset("inverted", *inverted, DIGITS.classes, ""))
    rule = FineTune()
    a = learn(net(), tasks, rule, lr=0.1)
    assert rule.classes == 10 and a.shape == (2, 2)
    assert joint(net(), tasks, lr=0.1).shape == (2,)
    assert a[0, 0] > 70 and a[1, 1] > 70


EMPTY = TASKS[0]._replace(train=Split(torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.long)))


@pytest.mark.parametrize("call", [lambda m, t, **o: learn(m, t, FineTune(), **o), joint], ids=["learn", "joint"])
@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"model": lambda x: x}, TypeError, "model: expected a torch.nn.Module, got function"),
        ({"model": net().requires_grad_(False)}, ValueError, "model: expected trainable weights"),
        ({"tasks": []}, ValueError, "tasks: expected some"),
        ({"tasks": [TASKS[0], EMPTY]}, ValueError, "tasks: expected some, each with images"),
        ({"lr": -0.1}, ValueError, "lr: expected a finite number >= 0, got -0.1"),
        ({"lr": math.nan}, ValueError, "lr: expected"),
        ({"batch_size": 0}, ValueError, "batch_size: expected an integer >= 1, got 0"),
        ({"epochs": -1}, ValueError, "epochs: expected an integer >= 0"),
    ],
)
def test_errors_come_before_effects(call, change, error, says):
    model = net().train()
    options = {"model": model, "tasks": TASKS, "lr": 0.1, **change}
    with pytest.raises(error, match=says):
        call(options.pop("model"), options.pop("tasks"), **options)
    assert same(model, net()) and model.training
