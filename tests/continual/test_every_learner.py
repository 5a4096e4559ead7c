"""Every learner on what streams bring: a rest of one image, autocast, broken images, half precision, wrapped models."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from peftref.adapters.baselines.lora import LoRA
from peftref.adapters.core.injection import inject
from peftref.continual.adab2n import balance, convert
from peftref.continual.baselines.ewc import EWC
from peftref.continual.baselines.rehearsal import ER, ERACE, DERpp
from peftref.continual.classp import CLASSP
from peftref.continual.core.replay import Reservoir
from peftref.continual.core.rule import FineTune
from peftref.continual.core.streams import Task, class_incremental, domain_incremental
from peftref.continual.core.train import joint, learn
from peftref.continual.fsa import FSA, embed
from peftref.continual.lae import LAE
from peftref.data import Dataset, Split, load

DIGITS = load("digits")
BATCH = 10


class Net(nn.Module):
    """A head on a body, as timm speaks of them."""

    num_features = 12

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 12))
        self.fc = nn.Linear(12, 10)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.body(x)

    def forward_head(self, h: Tensor, pre_logits: bool = False) -> Tensor:
        return h if pre_logits else self.fc(h)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def net(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Net()


def cut(tasks: list[Task], sizes: list[int]) -> list[Task]:
    """The first images of each task, of all its classes."""
    found = []
    for task, n in zip(tasks, sizes, strict=False):
        rows = torch.randperm(len(task.train.y), generator=torch.Generator().manual_seed(0))[:n]
        found.append(task._replace(train=Split(task.train.x[rows], task.train.y[rows])))
    return found


def stream(*sizes: int) -> list[Task]:
    return cut(class_incremental(DIGITS, [4, 3, 3]), list(sizes or (30, 30)))


def by_rule(make: Callable[[], FineTune], optimizer=torch.optim.SGD):
    def run(model: nn.Module, tasks: list[Task]) -> nn.Module:
        learn(model, tasks, make(), lr=0.1, batch_size=BATCH, epochs=2, optimizer=optimizer)
        return model

    return run


def balanced(model: nn.Module, tasks: list[Task]) -> nn.Module:
    convert(model, len(tasks), 0.5)
    rule = ER(Reservoir(20))
    learn(model, tasks, rule, lr=0.1, batch_size=BATCH, before=balance(rule, model, tasks, 0.1))
    return model


def mixed(model: nn.Module, tasks: list[Task]) -> nn.Module:
    joint(model, tasks, lr=0.1, batch_size=BATCH, epochs=2)
    return model


def lae(model: nn.Module, tasks: list[Task]) -> nn.Module:
    if not any(isinstance(m, LoRA) for m in model.modules()):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            inject(model, LoRA, r"(.*\.)?body\.[14]", name="online", r=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        learner, generator = LAE(model, alpha=0.9, lr=0.1), torch.Generator().manual_seed(0)
        for t, task in enumerate(tasks):
            learner.begin_task(len(task.classes))
            learner.learn(task.train, generator=generator, epochs=3, frozen_epochs=t, batch_size=BATCH)
    return learner


def fsa(body: str):
    def run(model: nn.Module, tasks: list[Task]) -> nn.Module:
        learner = FSA(model, body, lr=0.05, epochs=4, batch_size=BATCH, ridge_rel=0.1)
        learner.adapt(*tasks[0].train)
        for task in tasks:
            learner.observe(*task.train)
        return learner

    return run


LEARNERS = {
    "fine-tuning": by_rule(FineTune),
    "EWC": by_rule(lambda: EWC(5.0)),
    "ER": by_rule(lambda: ER(Reservoir(20))),
    "DER++": by_rule(lambda: DERpp(Reservoir(20))),
    "ER-ACE": by_rule(lambda: ERACE(Reservoir(20))),
    "CLASSP": by_rule(FineTune, CLASSP),
    "AdaB2N": balanced,
    "joint": mixed,
    "LAE": lae,
    "FSA": fsa("full"),
    "FSA-FiLM": fsa("film"),
}
every = pytest.mark.parametrize("run", LEARNERS.values(), ids=LEARNERS)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- a rest of one image ----------------------------------------------------------------------------------------------
@every
def test_a_rest_of_one_image_comes_with_the_batch_before(run):
    found = weights(run(net(), stream(31, 21)))
    assert all(t.isfinite().all() for t in found.values())


def test_the_images_are_those_that_were_dealt():
    """By a loop; batches of one are taken where one image is no trouble: no BatchNorm, or pixels to average over."""
    seen: list[int] = []

    class Rule(FineTune):
        def observe(self, x: Tensor, y: Tensor) -> None:
            seen.append(len(y))

    tasks, twin = stream(31, 30), net()
    learn(net(), tasks, Rule(), lr=0.1, batch_size=BATCH, epochs=2)
    assert seen == [10, 10, 11] * 2 + [10, 10, 10] * 2
    optimizer, g = torch.optim.SGD(twin.parameters(), lr=0.1), torch.Generator().manual_seed(0)
    for task in tasks:
        twin.train()
        n = len(task.train.y)
        for _ in range(2):
            order = torch.randperm(n, generator=g)
            for i in (order[:10], order[10:20], order[20:]):
                optimizer.zero_grad()
                nn.functional.cross_entropy(twin(task.train.x[i]), task.train.y[i]).backward()
                optimizer.step()
    model = net()
    learn(model, tasks, FineTune(), lr=0.1, batch_size=BATCH, epochs=2)
    assert same(weights(model), weights(twin))
    for easy in (
        nn.Sequential(nn.Flatten(), nn.Linear(64, 10)),
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)),
    ):
        seen.clear()
        learn(easy, tasks[:1], Rule(), lr=0.1, batch_size=1)
        assert seen == [1] * 31


@pytest.mark.parametrize(("sizes", "batch"), [((30, 1), BATCH), ((30, 30), 1)])
def test_one_image_with_none_before_it_is_refused_at_once(sizes, batch):
    model, rule, tasks = net(), FineTune(), stream(*sizes)
    before, random = weights(model), torch.get_rng_state()
    with pytest.raises(ValueError, match="tasks: expected two images or more in every batch .*Expected more than 1"):
        learn(model, tasks, rule, lr=0.1, batch_size=batch)
    assert same(weights(model), before) and model.training and rule.classes == 0
    assert torch.equal(torch.get_rng_state(), random)


# --- autocast ---------------------------------------------------------------------------------------------------------
@every
def test_one_region_of_autocast_around_all_is_one_for_each_call(run):
    """Without autocast's cache every call takes the weights as they are."""
    found = []
    for cached in (True, False):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cached):
            found.append(weights(run(net(), stream())))
    for name, t in found[0].items():
        assert_close(t, found[1][name], rtol=0, atol=0, msg=name)


# --- broken images ----------------------------------------------------------------------------------------------------
@every
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_image_is_refused_with_nothing_changed(run, value):
    model, tasks = net(), stream()
    if run is balanced:
        convert(model, 2, 0.5)
    elif run is lae:
        inject(model, LoRA, ["body.1"], name="online", r=2)
    before = weights(model)
    tasks[0].train.x[7, 0, 3, 3] = value
    with pytest.raises(ValueError, match=r"x: expected finite numbers, got NaN or infinity in 1 of (30|60) images"):
        (LEARNERS["ER"] if run is balanced else run)(model, tasks)
    assert same(weights(model), before)


def test_a_broken_image_of_a_later_task_is_refused_before_the_first_step():
    model, tasks = net(), stream()
    before = weights(model)
    tasks[1].train.x[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"tasks\[1\].train.x: expected finite numbers"):
        learn(model, tasks, FineTune(), lr=0.1)
    assert same(weights(model), before) and model.training


def test_a_broken_image_of_one_step_or_session_is_refused():
    x, y = stream()[0].train
    x = x.clone()
    x[3] = float("nan")
    model = net()
    inject(model, LoRA, ["body.1"], name="online", r=2)
    learner = LAE(model)
    learner.begin_task(4)
    before = weights(learner)
    with pytest.raises(ValueError, match="x: expected finite numbers, got NaN or infinity in 1 of 30 images"):
        learner.step(x, y)
    assert same(weights(learner), before)
    other = FSA(net(), "none").observe(*stream()[0].train)
    before = weights(other)
    with pytest.raises(ValueError, match="features: expected finite numbers"):
        other.observe(x, y)
    assert same(weights(other), before)


# --- domains, half precision, wrappers --------------------------------------------------------------------------------
@every
def test_the_same_classes_again(run):
    inverted = Dataset("i", Split(1 - DIGITS.train.x, DIGITS.train.y), DIGITS.test, DIGITS.classes, "")
    tasks, model = cut(domain_incremental(DIGITS, inverted), [40, 40]), net()
    if run in (balanced, lae):
        with pytest.raises(ValueError, match="expected new classes in each" if run is balanced else "of the new block"):
            run(model, tasks)
        return
    assert all(t.isfinite().all() for t in weights(run(model, tasks)).values())


@every
def test_half_precision_weights_learn(run):
    def halved(split: Split) -> Split:
        return Split(split.x.bfloat16(), split.y)

    tasks = [t._replace(train=halved(t.train), test=halved(t.test)) for t in stream()]
    found = run(net().bfloat16(), tasks)
    values = weights(found)
    assert all(t.isfinite().all() for t in values.values())
    start = net().bfloat16().state_dict()
    moved = [n for n in start if any(v.shape == start[n].shape and not torch.equal(v.to(start[n]), start[n])
                                     for k, v in values.items() if k.endswith(n))]  # fmt: skip
    assert moved or run is lae  # of which the adapter moves


@every
@pytest.mark.parametrize(
    "wrap", [lambda m: torch.compile(m, backend="eager"), nn.DataParallel], ids=["compiled", "parallel"]
)
def test_a_wrapped_model_learns_the_same(run, wrap):
    plain, model = run(net(), stream()), net()
    if run is lae:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            inject(model, LoRA, r"body\.[14]", name="online", r=2)
    found = run(wrap(model), stream())
    want, got = weights(plain), weights(found)
    if run not in (lae, *[LEARNERS[name] for name in ("FSA", "FSA-FiLM")]):
        got = weights(model)  # which is trained in place
    assert same(got, want)  # under the same names, so that either state loads into the other


# --- what models return -----------------------------------------------------------------------------------------------
class Pair(nn.Linear):
    """As many models of transformers do, logits or features come in something."""

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return super().forward(x.flatten(1)), None


def test_what_is_no_tensor_is_refused_in_one_sentence():
    x, y = stream()[0].train
    for run in ("fine-tuning", "EWC", "ER", "DER++", "ER-ACE", "CLASSP"):
        with pytest.raises(TypeError, match=r"model: expected logits \(N, K\) as a tensor, got tuple"):
            LEARNERS[run](Pair(64, 10), stream())
    for body in ("full", "film", "none"):
        with pytest.raises(TypeError, match=r"model: expected features \(N, d\) as a tensor, got tuple"):
            FSA(nn.Sequential(nn.LayerNorm(8), Pair(64, 10)), body).adapt(x, y).observe(x, y)
    with pytest.raises(TypeError, match="features"):
        embed(Pair(64, 10), x)
    model = nn.Sequential(nn.Linear(64, 10))
    inject(model, LoRA, ["0"], name="online", r=2)
    with pytest.raises(ValueError, match="model: expected timm's forward_features and forward_head"):
        LAE(model, features=10)
    model = net()
    inject(model, LoRA, ["body.1"], name="online", r=2)
    learner = LAE(model)
    learner.begin_task(4)
    model.forward_head = lambda h, pre_logits: (h, None)
    with pytest.raises(TypeError, match=r"model: expected features \(N, d\) as a tensor, got tuple"):
        learner.step(x, y)
