"""Several tasks at once: what is drawn, what is trained, what a head can reach, and the angles between gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from peftref.adapters.core.files import load, save
from peftref.adapters.core.injection import activate, adapters, inject
from peftref.adapters.core.switch import Tasks
from peftref.adapters.experiments.multitask import (
    EVEN,
    SUBLAYERS,
    Heads,
    TaskToken,
    compare_sharing,
    conflict,
    learn,
    relabelled,
)  # fmt: skip
from peftref.adapters.experiments.transfer import Task, fresh, shifted
from peftref.adapters.vl_adapter import VLAdapter


@pytest.fixture(scope="module")
def suite() -> dict[str, Task]:
    digits, even = shifted("digits", 60, 20), relabelled(shifted("digits", 20, 20, seed=1), EVEN, "even")
    return {t.name: t._replace(test=t.val) for t in (digits, even)}


def multiple(net: nn.Module, tasks: Tasks) -> None:
    inject(net, VLAdapter, SUBLAYERS, sharing="multiple", tasks=tasks)


def test_relabelled() -> None:
    task = shifted("digits", 30, 10)
    even = relabelled(task, EVEN, "even")
    for old, new in zip(task[1:], even[1:], strict=True):
        assert torch.equal(old.x, new.x) and torch.equal(new.y, 1 - old.y % 2)


def test_heads_reach_their_own_classes_alone() -> None:
    tasks = Tasks(["a", "b"])
    heads, h = Heads(4, [3, 2], tasks), torch.randn(5, 4)
    plain = F.linear(h, heads.weight, heads.bias)
    tasks.use("b")
    y = heads(h)
    assert (y[:, :3] == -torch.inf).all() and torch.equal(y[:, 3:], plain[:, 3:])
    tasks.use(["a", "b", "a", "a", "b"])
    y = heads(h)
    assert y.isinf().sum(1).tolist() == [2, 3, 2, 2, 3]
    F.cross_entropy(y, torch.tensor([0, 3, 2, 1, 4])).backward()
    assert heads.weight.grad.isfinite().all() and heads.start.tolist() == [0, 3]
    assert "mask" not in heads.state_dict()


def test_token_tells_the_task(tmp_path) -> None:
    net, tasks, x = fresh(), Tasks(["a", "b"]), torch.rand(2, 1, 28, 28)
    inject(net, TaskToken, ["patch_embed.proj"], tasks=tasks)
    token = adapters(net)["patch_embed.proj"].token
    before = fresh().patch_embed.proj(x)
    tasks.use("b")
    assert torch.equal(net.patch_embed.proj(x), before)
    nn.init.normal_(token)
    assert_close(net.patch_embed.proj(x), before + token[1][None, :, None, None])
    tasks.use(["b", "a"])
    assert_close(net.patch_embed.proj(x), before + token[[1, 0]][:, :, None, None])
    save(net, tmp_path)
    with pytest.raises(ValueError, match=r"tasks: expected those .* made for, \['a', 'b'\], got \['b', 'a'\]"):
        load(fresh(), tmp_path, tasks=Tasks(["b", "a"]))
    load(fresh(), tmp_path, tasks=tasks)


def test_learning_is_repeatable_and_leaves_the_body_alone(suite: dict[str, Task]) -> None:
    state = torch.random.get_rng_state()
    runs = [learn(multiple, suite, lr=1e-2, seed=seed, steps=4, batch_size=8) for seed in (0, 0, 1)]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(runs[0].losses, runs[1].losses) and runs[0].test == runs[1].test
    assert not torch.equal(runs[0].losses, runs[2].losses)
    assert list(runs[0].val) == ["digits", "even"] and not runs[0].model.training
    source = fresh().state_dict()
    kept = {n: p for n, p in runs[0].model.named_parameters() if not p.requires_grad}
    assert kept and all(torch.equal(p, source[n.replace("base_layer.", "")]) for n, p in kept.items())
    adapter = next(iter(adapters(runs[0].model).values()))
    assert (adapter.up.weight != 0).flatten(1).any(1).all()  # each task's own has moved


def test_it_learns(suite: dict[str, Task]) -> None:
    run = learn(multiple, suite, lr=1e-2, steps=40, batch_size=16)
    assert run.losses[-5:].mean() < 0.8 * run.losses[:5].mean()


def test_accuracy_and_loss_are_those_of_the_model(suite: dict[str, Task]) -> None:
    run = learn(multiple, suite, lr=1e-2, steps=3, batch_size=8)
    losses = []
    with torch.no_grad():
        for name, first in (("digits", 0), ("even", 10)):
            run.tasks.use(name)
            logits, y = run.model(suite[name].val.x), suite[name].val.y + first
            assert run.val[name] == pytest.approx(100 * (logits.argmax(1) == y).double().mean().item())
            losses.append(F.cross_entropy(logits, y).item())
    assert run.val_loss == pytest.approx(sum(losses) / 2, rel=1e-5)


def test_a_common_head(suite: dict[str, Task]) -> None:
    with pytest.raises(ValueError, match=r"common_head: expected tasks with the same .*, got \[10, 2\]"):
        learn(multiple, suite, lr=1e-2, steps=1, common_head=True)
    swapped = {"even": suite["even"], "odd": relabelled(suite["even"], (1, 0), "odd")}
    run = learn(multiple, swapped, lr=1e-2, steps=2, batch_size=8, common_head=True)
    assert type(run.model.head) is nn.Linear and run.model.head.out_features == 2


def test_opposite_tasks_pull_in_opposite_directions(suite: dict[str, Task]) -> None:
    """With one head that says 1/2 to everything the gradients of swapped labels are exact opposites."""

    def single(net: nn.Module, tasks: Tasks) -> None:
        inject(net, VLAdapter, SUBLAYERS, init="paper")

    swapped = {"even": suite["even"], "odd": relabelled(suite["even"], (1, 0), "odd"), "again": suite["even"]}
    run = learn(single, swapped, lr=1e-9, steps=1, batch_size=8, common_head=True)
    nn.init.zeros_(run.model.head.bias)
    with torch.no_grad():
        run.model.head.weight.mul_(1e-4)
    cosines = conflict(run, swapped)
    assert_close(cosines.diagonal(), torch.ones(3), rtol=0, atol=1e-4)
    assert_close(cosines[0, 2], torch.tensor(1.0), rtol=0, atol=1e-4)
    assert cosines[0, 1] < -0.99
    assert_close(cosines, cosines.T)


def test_own_adapters_have_no_common_gradient(suite: dict[str, Task]) -> None:
    run = learn(multiple, suite, lr=1e-2, steps=2, batch_size=8)
    cosines = conflict(run, suite)
    assert cosines[0, 1] == 0 and cosines[0, 0] == pytest.approx(1, abs=1e-5)
    one = next(iter(adapters(run.model).values())).up.bias
    assert_close(conflict(run, suite, [one]), torch.eye(2))


def test_comparison_chooses_a_rate_for_each_method(suite: dict[str, Task]) -> None:
    def token(net: nn.Module, tasks: Tasks) -> None:
        inject(net, VLAdapter, SUBLAYERS)
        inject(net, TaskToken, ["patch_embed.proj"], name="token", tasks=tasks)
        activate(net, "default", "token")

    methods = {"multiple": multiple, "token": token}
    table = compare_sharing(methods, suite, seeds=(0, 1), lrs=(1e-6, 1e-2), steps=20, batch_size=16)
    assert list(table.columns) == ["method", "seed", "lr", "trainable", "digits", "even"] and len(table) == 4
    assert set(table["lr"]) == {1e-2}
    one = 8 * (2 * 64 * 8 + 64 + 8)
    assert table.groupby("method")["trainable"].first().to_dict() == {"multiple": 2 * one, "token": one + 2 * 64}


def test_frozen_blocks_are_computed_once_and_nothing_else_changes(suite: dict[str, Task]) -> None:
    """Adapters in the last blocks alone: the same run with and without the short cut."""

    def last(net: nn.Module, tasks: Tasks) -> None:
        inject(net, VLAdapter, r"blocks\.[23]\.mlp\.fc2", sharing="multiple", tasks=tasks)

    def long_way(net: nn.Module, tasks: Tasks) -> None:
        last(net, tasks)
        net.pos_embed.requires_grad_(True)  # something to train before the blocks, though by next to nothing
        net.pos_embed.register_hook(torch.zeros_like)

    short, long = (learn(build, suite, lr=1e-2, steps=5, batch_size=8) for build in (last, long_way))
    assert (short.frozen, long.frozen) == (2, 0)
    assert_close(short.losses, long.losses, rtol=1e-4, atol=1e-5)
    assert short.test == long.test and short.val_loss == pytest.approx(long.val_loss, rel=1e-4)
    params = [p for n, p in short.model.named_parameters() if p.requires_grad and n.startswith("head.")]
    twins = [p for n, p in long.model.named_parameters() if p.requires_grad and n.startswith("head.")]
    assert_close(conflict(short, suite, params), conflict(long, suite, twins), rtol=1e-3, atol=1e-4)
    assert learn(lambda net, tasks: None, suite, lr=1e-2, steps=1).frozen == 4
