"""LAE: closed forms, the loop twin, one doubled batch, the frozen phase and its cache, what is restored and refused."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from peftref.adapters.baselines.lora import LoRA
from peftref.adapters.core.injection import adapters, inject, merge
from peftref.continual.core.growing_head import DynamicHead, local_loss
from peftref.continual.core.metrics import evaluate
from peftref.continual.core.prefix import inject_prefix
from peftref.continual.core.small_modules import KVLoRA, ParallelAdapter
from peftref.continual.core.streams import class_incremental
from peftref.continual.lae import LAE, alpha_for, ema_, vote
from peftref.data import Split, load
from peftref.models.vit import ViT, pretrained_vit
from tests._naive import lae as naive

ATTENTIONS, QKV = r"blocks\.\d+\.attn", r"blocks\.\d+\.attn\.qkv"


def vit(seed: int = 0) -> ViT:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ViT(embed_dim=16, depth=2, num_heads=2).eval()


def images(n: int = 4, seed: int = 0) -> Tensor:
    return torch.rand(n, 1, 28, 28, generator=torch.Generator().manual_seed(seed))


def task(first: int = 0, n: int = 24, seed: int = 0, classes: int = 2) -> Split:
    g = torch.Generator().manual_seed(seed)
    y = first + torch.arange(n) % classes
    return Split((torch.rand(n, 1, 28, 28, generator=g) + y.view(-1, 1, 1, 1) * 0.2).clamp(0, 1), y)


def learner(kind: str = "lora", net: nn.Module | None = None, **options) -> LAE:
    net = vit() if net is None else net
    torch.manual_seed(0)
    if kind == "prefix":
        inject_prefix(net, ATTENTIONS, name="online")
    else:
        inject(net, *((KVLoRA, QKV) if kind == "lora" else (ParallelAdapter, ATTENTIONS)), name="online")
    return LAE(net, **{"alpha": 0.9, "lr": 1e-2} | options)


def taught(kind: str = "lora", tasks: int = 2, frozen: int = 1, **options) -> LAE:
    method = learner(kind, **options)
    for t in range(tasks):
        torch.manual_seed(t)
        method.begin_task(2)
        method.learn(task(2 * t, seed=t), epochs=2, frozen_epochs=frozen if t else 0, batch_size=8, generator=gen(t))
    return method


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weights(method: LAE, name: str = "online") -> list[Tensor]:
    return [t.clone() for a in adapters(method.model, name).values() for t in a.state_dict().values()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


# --- local loss and head ----------------------------------------------------------------------------------------------
@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 5), old=st.integers(0, 4), new=st.integers(1, 4), seed=st.integers(0, 99))
def test_local_loss_is_the_loops_and_ignores_old_logits(n, old, new, seed):
    z = torch.randn(n, old + new, generator=gen(seed), dtype=torch.double)
    y = torch.randint(old, old + new, (n,), generator=gen(seed))
    loss = local_loss(z, y, old)
    assert_close(loss.item(), naive.loop_local_loss(z.tolist(), y.tolist(), old), rtol=1e-12, atol=1e-12)
    z[:, :old] += 100.0
    assert torch.equal(local_loss(z, y, old), loss)


def test_old_blocks_get_exactly_zero_and_new_ones_do_not():
    head = DynamicHead(6)
    head.grow(3), head.grow(2)
    local_loss(head(torch.randn(8, 6, generator=gen())), torch.tensor([3, 4] * 4), 3).backward()
    old, new = head.blocks
    assert not old.weight.grad.any() and not old.bias.grad.any() and new.weight.grad.any()


def test_one_class_teaches_the_module_nothing():
    method = taught(tasks=1)
    method.begin_task(1)
    before = weights(method)
    losses = method.learn(task(2, classes=1), epochs=2, batch_size=8, generator=gen())
    assert not losses.any() and same(weights(method), before)


@pytest.mark.parametrize("y", [[1, 2], [2, 4]])
def test_labels_outside_of_the_new_block_are_refused(y):
    with pytest.raises(ValueError, match="y: expected labels of the new block, from 2 to 3, got"):
        local_loss(torch.zeros(2, 4), torch.tensor(y), 2)


def test_head_grows_at_the_official_start():
    head = DynamicHead(400)
    assert (head.grow(50), head.grow(1), head.classes) == (range(50), range(50, 51), 51)
    block = head.blocks[0]
    assert 0.0009 < block.weight.std() < 0.0011 and not block.bias.any()
    assert_close(head(torch.eye(400))[:, :50], block.weight.T)
    for classes in (0, 2.0, True):
        with pytest.raises(ValueError, match="classes: expected a positive integer"):
            head.grow(classes)
    assert head.classes == 51 and len(head.blocks) == 2


def test_head_is_wide_where_the_features_are_half():
    head = DynamicHead(4)
    head.grow(2, like=torch.zeros(1, dtype=torch.bfloat16))
    assert head(torch.zeros(1, 4, dtype=torch.bfloat16)).dtype == torch.float32


# --- accumulation -----------------------------------------------------------------------------------------------------
@settings(max_examples=30, deadline=None)
@given(n=st.integers(0, 6), alpha=st.floats(0, 1), seed=st.integers(0, 99))
def test_accumulation_is_the_loops_and_the_closed_form(n, alpha, seed):
    start, states = torch.randn(5, generator=gen(seed)).double(), torch.randn(n, 5, generator=gen(seed + 1)).double()
    off = start.clone()
    for state in states:
        ema_([off[:2], off[2:]], [state[:2], state[2:]], alpha)
    want = torch.tensor(naive.loop_ema(start.tolist(), states.tolist(), alpha), dtype=torch.double)
    closed = alpha**n * start + (1 - alpha) * sum(alpha ** (n - i) * s for i, s in enumerate(states, 1))
    assert_close(off, want, rtol=1e-12, atol=1e-12)
    assert_close(off, closed, rtol=1e-12, atol=1e-12)


def test_accumulation_equals_the_published_loop():
    slow, fast = nn.Linear(4, 3), nn.Linear(4, 3)
    twin = copy.deepcopy(slow)
    naive.published_ema(twin, fast, 0.99)
    ema_(list(slow.parameters()), list(fast.parameters()), 0.99)
    for p, q in zip(slow.parameters(), twin.parameters(), strict=True):
        assert_close(p, q)


def test_alpha_one_keeps_and_zero_copies_to_the_bit():
    off, on = torch.randn(9, generator=gen()), torch.randn(9, generator=gen(1))
    kept = off.clone()
    ema_([off], [on], 1.0)
    assert torch.equal(off, kept)
    ema_([off], [on], 0.0)
    assert torch.equal(off, on)


def test_integers_are_copied_and_half_precision_is_not_lost():
    count, slow = torch.tensor(3), torch.ones(4)
    fast = torch.full((4,), 2.0, dtype=torch.bfloat16)
    for _ in range(100):
        ema_([count, slow], [torch.tensor(7), fast], 0.9999)
    assert count == 7
    assert_close(slow, torch.full((4,), 2 - 0.9999**100), rtol=1e-5, atol=0)  # in bfloat16 it would still be 1
    with pytest.raises(ValueError, match="offline: expected float32 or wider"):
        ema_([torch.ones(2, dtype=torch.bfloat16)], [torch.ones(2)], 0.9)


def test_bad_accumulations_are_refused_before_they_change_anything():
    off = [torch.zeros(2), torch.zeros(3)]
    for alpha in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"alpha: expected a finite number in \[0, 1\]"):
            ema_(off, off, alpha)
    with pytest.raises(ValueError, match="online: expected 2 tensors"):
        ema_(off, [torch.ones(2), torch.ones(4)], 0.5)
    assert not any(t.any() for t in off)


def test_alpha_for_keeps_what_it_says():
    assert alpha_for(0.9, 60) ** 60 == pytest.approx(0.9)
    assert alpha_for(0.9, 1040) == pytest.approx(0.9999, abs=2e-6)  # the official schedule: a tenth moves in a task
    with pytest.raises(ValueError, match="steps: expected a finite number >= 1"):
        alpha_for(0.9, 0)
    with pytest.raises(ValueError, match="kept: expected"):
        alpha_for(1.9, 3)


# --- ensemble ---------------------------------------------------------------------------------------------------------
def test_vote_by_hand():
    logits = torch.tensor([[[0.6, 0.4]], [[0.1, 0.9]]]).log()
    assert vote(logits).argmax(-1).item() == 1  # p = (0.6, 0.4) and (0.1, 0.9)
    assert_close(vote(logits).exp(), torch.tensor([[0.6, 0.9]]))
    assert_close(vote(logits, "mean").exp(), torch.tensor([[0.35, 0.65]]))
    assert vote(torch.zeros(2, 1, 3)).argmax(-1).item() == 0  # ties: the lowest


@settings(max_examples=30, deadline=None)
@given(e=st.integers(1, 3), n=st.integers(1, 4), k=st.integers(1, 4), seed=st.integers(0, 99))
def test_vote_is_the_loops_whatever_the_order_of_the_experts(e, n, k, seed):
    logits = 3 * torch.randn(e, n, k, generator=gen(seed), dtype=torch.double)
    assert vote(logits).argmax(-1).tolist() == naive.loop_vote(logits.softmax(-1).tolist())
    assert torch.equal(vote(logits.flip(0)), vote(logits))
    assert_close(vote(logits, "mean").exp(), logits.softmax(-1).mean(0))
    assert_close(vote(logits + 5), vote(logits))  # each expert's softmax is its own


def test_max_and_mean_can_disagree_and_other_rules_are_refused():
    logits = torch.tensor([[[0.5, 0.5, 1e-3]], [[1e-3, 0.35, 0.65]]]).log()
    assert vote(logits).argmax() == 2 and vote(logits, "mean").argmax() == 1
    with pytest.raises(ValueError, match="rule: expected one of"):
        vote(logits, "product")
    assert vote(logits.bfloat16()).dtype == torch.float32


# --- the learner ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["adapter", "lora", "prefix"])
def test_both_experts_from_one_doubled_batch(kind):
    method, x = taught(kind), images()
    together = method.experts(x)
    assert together.shape == (2, 4, 4)
    with torch.no_grad():
        online = method.head(method.features(x))
    assert_close(together[0], online, rtol=1e-4, atol=1e-5)  # float32: products of another batch size
    swapped = copy.deepcopy(method)
    for n, a in adapters(swapped.model, "online").items():
        a.load_state_dict(adapters(swapped.model, "offline")[n].state_dict())
    with torch.no_grad():
        assert_close(together[1], swapped.head(swapped.features(x)), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-3)
    assert_close(method(x), vote(together))


def test_a_run_of_one_task_has_no_offline_copy():
    method, x = taught(tasks=1), images()
    assert method.experts(x).shape == (1, 4, 2) and not method.pairs
    with pytest.raises(ValueError, match="name: expected one of"):
        adapters(method.model, "offline")
    assert torch.equal(method(x), method.experts(x)[0].log_softmax(-1))


def test_the_offline_copy_starts_as_what_task_one_left():
    method = taught(tasks=1)
    before = weights(method)
    method.begin_task(2)
    assert same(weights(method, "offline"), before) and same(weights(method), before)


def test_alpha_one_keeps_the_end_of_task_one_and_alpha_zero_is_the_online_copy():
    one = taught(tasks=1)
    kept = weights(one)
    assert same(weights(taught(tasks=3, alpha=1.0), "offline"), kept)
    method, x = taught(tasks=3, alpha=0.0), images()
    assert same(weights(method, "offline"), weights(method))
    assert_close(method(x), method.experts(x)[0].log_softmax(-1))


def test_the_offline_copy_is_the_mean_of_all_that_the_online_copy_was():
    method = taught(tasks=1)
    method.begin_task(2)
    n, alpha = 5, method.alpha
    want = [alpha**n * t for t in weights(method, "offline")]
    for i in range(1, n + 1):
        method.step(*task(2, n=6, seed=i))
        want = [w + (1 - alpha) * alpha ** (n - i) * t for w, t in zip(want, weights(method), strict=True)]
    for a, b in zip(weights(method, "offline"), want, strict=True):
        assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert any(not torch.allclose(a, b, atol=1e-4) for a, b in zip(want, weights(method), strict=True))


# --- the frozen phase -------------------------------------------------------------------------------------------------
def test_frozen_epochs_leave_the_module_bitwise_and_move_the_head():
    method = taught(tasks=1)
    torch.manual_seed(5)
    method.begin_task(2)
    before, old, new = weights(method), *(copy.deepcopy(b.state_dict()) for b in method.head.blocks)
    method.learn(task(2), epochs=2, frozen_epochs=2, batch_size=8, generator=gen())
    assert same(weights(method), before)
    assert all(torch.equal(t, old[n]) for n, t in method.head.blocks[0].state_dict().items())
    assert not torch.equal(method.head.blocks[1].weight, new["weight"])


@pytest.mark.parametrize("kind", ["adapter", "lora", "prefix"])
def test_the_cache_changes_nothing(kind):
    """Features once, against features anew for every batch (which ``augment`` asks for) and one step each."""
    cached, anew = (learner(kind) for _ in range(2))
    losses = []
    for method, augment in ((cached, None), (anew, lambda x: x)):
        for t in range(2):
            torch.manual_seed(t)
            method.begin_task(2)
            frozen = {"frozen_epochs": 2 * t, "augment": augment if t else None}
            found = method.learn(task(2 * t, seed=t), epochs=3, batch_size=8, generator=gen(t), **frozen)
        losses.append(found)
    assert len(losses[0]) == 9
    assert_close(*losses, rtol=1e-4, atol=1e-5)  # float32: features of one batch of 24, and of three of 8
    for name in ("online", "offline"):
        for a, b in zip(weights(cached, name), weights(anew, name), strict=True):
            assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_frozen_epochs_count_for_the_offline_copy():
    method = taught(tasks=2)
    method.begin_task(2)
    on, off = weights(method), weights(method, "offline")
    steps = len(method.learn(task(4), epochs=2, frozen_epochs=2, batch_size=8, generator=gen()))
    kept = method.alpha**steps
    for a, b, c in zip(weights(method, "offline"), off, on, strict=True):
        assert_close(a, kept * b + (1 - kept) * c)
    assert steps == 6


def test_augmentation_sees_every_batch():
    method, seen = taught(tasks=1), []
    method.begin_task(2)
    method.learn(
        task(2), epochs=2, frozen_epochs=1, batch_size=8, generator=gen(), augment=lambda x: seen.append(len(x)) or x
    )
    assert seen == [8] * 6


# --- what stays as it is ----------------------------------------------------------------------------------------------
def test_backbone_and_old_blocks_stay_with_decay_and_the_network_in_eval_mode():
    net = timm.create_model(
        "resnet18", pretrained=False, num_classes=2, block=timm.models.resnet.BasicBlock, layers=(1, 1, 1, 1)
    )
    torch.manual_seed(0)
    inject(net, LoRA, [r"layer1.0.conv1"], r=2, name="online")
    before = {n: t.clone() for n, t in net.state_dict().items() if ".adapters." not in n}
    method = LAE(net, lr=1e-2, alpha=0.5, optimizer=lambda p, lr: torch.optim.Adam(p, lr=lr, weight_decay=0.1))
    method.train()
    assert not any(m.training for m in method.modules())
    for t in range(2):
        method.begin_task(2)
        old = [b.weight.clone() for b in method.head.blocks[:-1]]
        method.step(torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 0, 1]) + 2 * t)
        assert all(torch.equal(b.weight, w) for b, w in zip(method.head.blocks, old, strict=False))
    assert method.experts(torch.rand(2, 3, 32, 32)).shape == (2, 2, 4)
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items() if n in before)


def test_measuring_changes_nothing():
    method, x = taught(), images()
    before = {n: t.clone() for n, t in method.state_dict().items()}
    flags = [(p.requires_grad, p.grad is None) for p in method.parameters()]
    first = method(x)
    method.experts(x)
    assert torch.equal(method(x), first)
    assert all(torch.equal(t, before[n]) for n, t in method.state_dict().items())
    assert [(p.requires_grad, p.grad is None) for p in method.parameters()] == flags
    assert not first.requires_grad


def test_the_online_copy_is_back_after_a_failure():
    method, x = taught(), images()
    flags, first = [p.requires_grad for p in method.parameters()], method.features(x)
    with pytest.raises(RuntimeError):
        method.experts(torch.zeros(2, 3, 28, 28))
    hosts = [m for m in method.modules() if hasattr(m, "active")]
    assert hosts and all(host.active == ["online"] for host in hosts)
    assert [p.requires_grad for p in method.parameters()] == flags
    assert torch.equal(method.features(x), first)


def test_only_online_copy_and_new_block_train():
    method = taught(tasks=2)
    trained = {n for n, p in method.named_parameters() if p.requires_grad}
    assert all(".adapters.online." in n or n.startswith("head.blocks.1.") for n in trained) and len(trained) == 14
    method.local = False
    method.begin_task(2)
    assert "head.blocks.0.weight" in {n for n, p in method.named_parameters() if p.requires_grad}


def test_copies_are_independent():
    method, x = taught(), images()
    twin, before = copy.deepcopy(method), method(images())
    twin.step(*task(2, n=6))
    assert torch.equal(method(x), before) and not torch.equal(twin(x), before)
    assert twin.pairs[0][0] is next(iter(adapters(twin.model, "offline").values()))


# --- settings and refusals --------------------------------------------------------------------------------------------
def test_every_setting_matters():
    x, base = images(), taught()(images())
    changes = [
        {"alpha": 0.5}, {"lr": 1e-3}, {"local": False}, {"rule": "mean"}, {"frozen": 0},
        {"optimizer": torch.optim.SGD}, {"kind": "adapter"},
    ]  # fmt: skip
    for change in changes:
        assert not torch.allclose(taught(**change)(x), base, atol=1e-5), change


def test_an_epoch_drops_what_does_not_fill_a_batch_unless_told():
    method = taught(tasks=1)
    method.begin_task(2)
    options = {"epochs": 1, "batch_size": 22, "generator": gen()}
    assert len(method.learn(task(2), **options)) == 1
    assert len(method.learn(task(2), drop_last=False, **options)) == 2  # the last batch has two images
    assert len(method.learn(task(2), epochs=0, generator=gen())) == 0


def test_bad_use_is_refused_and_leaves_no_trace():
    with pytest.raises(ValueError, match="name: expected one of"):
        LAE(vit())
    for options, message in [({"alpha": 1.5}, "alpha: expected"), ({"lr": -1.0}, "lr: expected"),
                             ({"rule": "x"}, "rule: expected")]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            learner(**options)
    net = vit()
    inject(net, KVLoRA, QKV, name="offline")
    with pytest.raises(ValueError, match="model: expected no adapter of these names"):
        learner(net=net)
    method = learner()
    with pytest.raises(RuntimeError, match="learn: expected begin_task before"):
        method.learn(task(), generator=gen())
    method.begin_task(2)
    before = weights(method)
    with pytest.raises(ValueError, match="frozen_epochs: expected from 0 to 1, got 2"):
        method.learn(task(), epochs=1, frozen_epochs=2, generator=gen())
    for bad in (task(2), task(0, classes=3)):
        with pytest.raises(ValueError, match="y: expected labels of the new block"):
            method.learn(bad, epochs=1, generator=gen())
        with pytest.raises(ValueError, match="y: expected labels of the new block"):
            method.step(*bad)
    with pytest.raises(ValueError, match="classes: expected"):
        method.begin_task(0)
    assert same(weights(method), before) and method.head.classes == 2 and method.tasks == 1


def test_a_merged_model_is_refused():
    net = vit()
    inject(net, KVLoRA, QKV, name="online")
    merge(net)
    with pytest.raises(RuntimeError, match="merged"):
        LAE(net)


def test_half_precision_model_with_half_precision_adapter():
    net = vit()
    inject(net, KVLoRA, QKV, name="online")
    net.to(torch.bfloat16)
    method = LAE(net, alpha=0.9999, lr=1e-2)
    for t in range(2):
        method.begin_task(2)
        x, y = task(2 * t, n=6)
        for _ in range(3):
            method.step(x.bfloat16(), y)
    off = weights(method, "offline")
    assert all(t.dtype == torch.float32 for t in off)
    assert any(not torch.equal(t, t.bfloat16().float()) for t in off)  # moved by less than bfloat16 can hold
    assert method(x.bfloat16()).isfinite().all()


@pytest.mark.parametrize("kind", ["adapter", "lora"])
def test_it_learns_what_the_frozen_network_cannot(kind):
    first = class_incremental(load("mnist5k"), 5, per_class=48)[0]
    method = learner(kind, pretrained_vit(), lr=3e-3)
    method.begin_task(2)
    losses = method.learn(first.train, epochs=6, generator=gen())
    assert losses[-1] < 0.5 * losses[0] and evaluate(method, [first]) > 90
