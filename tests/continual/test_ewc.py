"""EWC: its Fisher by hand and by loops, the penalty, what measuring leaves behind, and the usual mistakes."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from peftref.continual.baselines.ewc import EWC, diagonal_fisher, ewc_penalty
from peftref.continual.core.rule import FineTune
from peftref.continual.core.streams import class_incremental
from peftref.continual.core.train import learn
from peftref.data import load
from peftref.models import PlainCNN, SmallCNN
from tests._naive import ewc as naive


def built(make, seed: int = 0, dtype: torch.dtype = torch.double) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().to(dtype)


def linear(seed: int = 0) -> nn.Module:
    return built(lambda: nn.Linear(4, 3), seed)


def conv(norm: bool = True) -> nn.Module:
    """With BatchNorm, whose running statistics are not those of a fresh layer, and ReLU in place."""
    net = built(lambda: SmallCNN(width=2, num_classes=4) if norm else PlainCNN(width=2, num_classes=4))
    if norm:
        net(images(40, 1) * 2 + 1)  # in train mode
    return net


def images(n: int = 7, seed: int = 0, shape: tuple[int, ...] = (1, 12, 12)) -> Tensor:
    return torch.randn(n, *shape, dtype=torch.double, generator=torch.Generator().manual_seed(seed))


def labels(n: int = 7, classes: int = 4, seed: int = 0) -> Tensor:
    return torch.randint(classes, (n,), generator=torch.Generator().manual_seed(seed))


def named(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters())


# --- the Fisher -------------------------------------------------------------------------------------------------------
def test_softmax_regression_by_hand_empirical():
    """d log p_y / d W_kj = (1[y = k] - p_k) x_j, and without x_j for the bias."""
    net, x, y = linear(), images(9, shape=(4,)), labels(9, 3)
    residual = F.one_hot(y, 3) - net(x).detach().softmax(-1)
    fisher = diagonal_fisher(net, x, y)
    assert_close(fisher["weight"], (residual[:, :, None] * x[:, None, :]).square().mean(0))
    assert_close(fisher["bias"], residual.square().mean(0))


def test_softmax_regression_by_hand_exact():
    """The mean over classes: p_k (1 - p_k)^2 + (1 - p_k) p_k^2 = p_k (1 - p_k), times x_j^2."""
    net, x = linear(), images(9, shape=(4,))
    p = net(x).detach().softmax(-1)
    fisher = diagonal_fisher(net, x)
    assert_close(fisher["weight"], torch.einsum("nk,nj->kj", p * (1 - p), x.square()) / 9)
    assert_close(fisher["bias"], (p * (1 - p)).mean(0))


def test_exact_fisher_is_the_diagonal_of_the_hessian_of_softmax_regression():
    """Linear in its weights, so the mean Hessian of the loss is the Fisher, whatever the labels."""
    net, x, y = linear(), images(9, shape=(4,)), labels(9, 3)

    def loss(w: Tensor) -> Tensor:
        return F.cross_entropy(x @ w.T + net.bias.detach(), y)

    hessian = torch.func.hessian(loss)(net.weight.detach()).reshape(12, 12)
    assert_close(diagonal_fisher(net, x)["weight"].flatten(), hessian.diagonal())


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("exact", [False, True])
def test_a_backward_pass_per_sample(norm, exact):
    net, x, y = conv(norm), images(), None if exact else labels()
    expected = naive.loop_fisher(net.eval(), x, y)
    fisher = diagonal_fisher(net.train(), x, y)  # whatever mode it is in, it is measured in eval mode
    assert fisher.keys() == expected.keys()
    for name, f in fisher.items():
        assert_close(f, expected[name], msg=name)
        assert f.max() > 0, name


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
@pytest.mark.parametrize("exact", [False, True])
def test_chunks_do_not_matter(chunk, exact):
    net, x, y = conv(), images(), None if exact else labels()
    other = diagonal_fisher(net, x, y, chunk_size=chunk)
    for name, f in diagonal_fisher(net, x, y).items():
        assert_close(other[name], f)


def test_labels_drawn_from_the_network_have_the_exact_fisher_on_average():
    net, x = linear(), images(3, shape=(4,))
    y = torch.multinomial(net(x).softmax(-1), 20_000, True, generator=torch.Generator().manual_seed(0))  # (3, S)
    many = diagonal_fisher(net, x.repeat_interleave(20_000, 0), y.flatten(), chunk_size=60_000)["weight"]
    # the relative error of a mean of 20,000 draws is about 1 / sqrt(20,000), under 1 %
    assert_close(many, diagonal_fisher(net, x)["weight"], rtol=0.05, atol=0)
    plain = diagonal_fisher(net, x, torch.zeros(3, dtype=torch.long))["weight"]
    assert not torch.allclose(plain, many, rtol=0.2)  # other labels, another Fisher


def test_the_square_of_a_batch_gradient_is_another_thing():
    """At labels drawn from the model E g = 0, so the square of a mean of B gradients is B times smaller on average."""
    net, n, b = linear(), 20_000, 20
    x = images(n, shape=(4,))
    y = torch.multinomial(net(x).softmax(-1), 1, generator=torch.Generator().manual_seed(0))[:, 0]
    right = diagonal_fisher(net, x, y, chunk_size=n)
    trap = naive.batch_fisher(net, x, y, b)
    ratio = torch.cat([(right[k] / trap[k]).flatten() for k in right])
    assert ratio.min() > 0.8 * b and ratio.max() < 1.25 * b  # 1,000 batches: a few percent
    for k, f in naive.batch_fisher(net, x[:50], y[:50], 1).items():  # batches of one are right, whoever squares
        assert_close(f, diagonal_fisher(net, x[:50], y[:50])[k])


def test_train_mode_would_measure_something_else():
    """BatchNorm's statistics of one sample are not those of the data: the twin in train mode disagrees."""
    net, x, y = conv(), images(), labels()
    right, wrong = diagonal_fisher(net, x, y), naive.batch_fisher(copy.deepcopy(net).train(), x, y, 7)
    assert not torch.allclose(right["stages.0.0.weight"], 7 * wrong["stages.0.0.weight"], rtol=0.2)


def test_measuring_leaves_no_trace():
    net, x, y = conv(), images(), labels()
    net.stages[1].eval()  # a mixture of modes
    F.cross_entropy(net(x), y).backward()
    kept = {k: v.clone() for k, v in net.state_dict().items()}
    modes, grads = [m.training for m in net.modules()], [p.grad.clone() for p in net.parameters()]
    random = torch.get_rng_state()
    for target in (y, None):
        fisher = diagonal_fisher(net, x, target)
        assert not any(f.requires_grad for f in fisher.values())
    assert [m.training for m in net.modules()] == modes
    assert all(torch.equal(v, kept[k]) for k, v in net.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), grads, strict=True))
    assert torch.equal(torch.get_rng_state(), random)


def test_modes_return_even_when_the_model_fails():
    net = conv().train()
    with pytest.raises(RuntimeError):
        diagonal_fisher(net, images(shape=(3, 12, 12)), labels())
    assert all(m.training for m in net.modules())


def test_only_trainable_weights():
    net = conv()
    net.stages.requires_grad_(False)
    fisher = diagonal_fisher(net, images(), labels())
    assert fisher.keys() == {"fc.weight", "fc.bias"}
    full = diagonal_fisher(conv(), images(), labels())
    assert_close(fisher["fc.weight"], full["fc.weight"])


def test_tied_weights_count_once():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4, bias=False)
            self.b = nn.Linear(4, 4, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).tanh())

    net, x, y = built(Tied), images(shape=(4,)), labels()
    fisher = diagonal_fisher(net, x, y)
    assert fisher.keys() == {"a.weight"}
    assert_close(fisher["a.weight"], naive.loop_fisher(net, x, y)["a.weight"])


def test_half_precision_is_summed_in_float32():
    net = built(lambda: nn.Linear(4, 3)).bfloat16()
    x, y = images(2000, shape=(4,)).bfloat16(), labels(2000, 3)
    fisher = diagonal_fisher(net, x, y)
    assert {f.dtype for f in fisher.values()} == {torch.float32}
    wide = diagonal_fisher(copy.deepcopy(net).float(), x.float(), y)
    assert_close(fisher["weight"], wide["weight"], rtol=0.02, atol=0)  # bfloat16 gradients: 8 bits each


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), exact=st.booleans())
def test_order_and_repetition_of_samples_do_not_matter(seed, exact):
    net, x, y = linear(seed), images(6, seed, (4,)), labels(6, 3, seed)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed)).repeat(2)
    once = diagonal_fisher(net, x, None if exact else y)["weight"]
    twice = diagonal_fisher(net, x[order], None if exact else y[order])["weight"]
    assert_close(once, twice)
    assert (once >= 0).all()


# --- the penalty ------------------------------------------------------------------------------------------------------
def problem() -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    anchor = {k: v.detach().clone() for k, v in named(conv()).items()}
    g = torch.Generator().manual_seed(3)
    theta = {k: v + torch.randn(v.shape, dtype=torch.double, generator=g) for k, v in anchor.items()}
    return theta, anchor, diagonal_fisher(conv(), images(), labels())


def test_penalty_in_a_loop():
    theta, anchor, fisher = problem()
    value = ewc_penalty(theta, anchor, fisher)
    assert value > 0.01
    assert_close(value.item(), naive.loop_penalty(theta, anchor, fisher))


def test_penalty_is_a_parabola_with_its_bottom_at_the_anchor():
    theta, anchor, fisher = problem()
    leaves = {k: v.clone().requires_grad_() for k, v in anchor.items()}
    bottom = ewc_penalty(leaves, anchor, fisher)
    assert bottom == 0
    assert all((g == 0).all() for g in torch.autograd.grad(bottom, [*leaves.values()]))
    leaves = {k: v.clone().requires_grad_() for k, v in theta.items()}
    gradients = torch.autograd.grad(ewc_penalty(leaves, anchor, fisher), [*leaves.values()])
    for g, k in zip(gradients, fisher, strict=True):
        assert_close(g, fisher[k] * (theta[k] - anchor[k]))
    twice = {k: anchor[k] + 2 * (theta[k] - anchor[k]) for k in theta}
    assert_close(ewc_penalty(twice, anchor, fisher), 4 * ewc_penalty(theta, anchor, fisher))


def test_gradcheck():
    g = torch.Generator().manual_seed(0)
    anchor, fisher = (torch.rand(3, dtype=torch.double, generator=g) for _ in range(2))
    theta = torch.rand(3, dtype=torch.double, generator=g, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: ewc_penalty({"w": t}, {"w": anchor}, {"w": fisher}), theta)


def test_penalty_is_second_order_of_the_divergence():
    """KL(p* || p) of softmax regression along a small step of one weight is F delta^2 / 2 for the exact Fisher."""
    net, x = linear(), images(9, shape=(4,))
    fisher, moved = diagonal_fisher(net, x), copy.deepcopy(net)
    with torch.no_grad():
        moved.weight[1, 2] += 1e-3
        p, q = net(x).log_softmax(-1), moved(x).log_softmax(-1)
        kl = (p.exp() * (p - q)).sum(-1).mean()
    assert_close(ewc_penalty(named(moved), named(net), fisher), kl, rtol=3e-3, atol=0)  # third order: 1e-3 relative


# --- the rule ---------------------------------------------------------------------------------------------------------
def stream() -> list:
    return class_incremental(load("digits"), [4, 3, 3], per_class=30)


def net8(seed: int = 0) -> nn.Module:
    layers = lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10))  # noqa: E731
    return built(layers, seed, torch.float)


def trained(rule: FineTune, lr: float = 0.1) -> dict[str, Tensor]:
    net = net8()
    learn(net, stream(), rule, lr=lr)
    return net.state_dict()


def test_strength_0_is_fine_tuning_bit_for_bit():
    a, b = trained(FineTune()), trained(EWC(0.0))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_strong_spring_holds_the_weights_and_fine_tuning_moves_them():
    def moved(rule: FineTune) -> float:
        net, tasks = net8(), stream()
        learn(net, tasks[:1], rule, lr=0.1)
        start = copy.deepcopy(net)
        fisher = diagonal_fisher(start, *tasks[0].train)
        # a step this small is stable: lr lambda F < 2 with F below 1 here
        learn(net, tasks[1:2], rule, lr=0.01, epochs=3)
        return ewc_penalty(named(net), named(start), fisher).item()

    rule, free = EWC(100.0), FineTune()
    held = moved(rule)
    assert 0 < held < 0.2 * moved(free)


def test_loss_is_cross_entropy_plus_half_strength_times_the_springs():
    net, rule, (first, second, _) = net8(), EWC(7.0), stream()
    x, y = second.train.x[:10], second.train.y[:10]
    assert_close(rule.loss(net, x, y), F.cross_entropy(net(x), y))  # no task yet
    rule.end_task(net, *first.train)
    fisher, anchor = naive.loop_fisher(net, *first.train), {k: v.detach().clone() for k, v in named(net).items()}
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1)
    spring = 7.0 * naive.loop_penalty(named(net), anchor, fisher)
    assert spring > 0.01
    assert_close(rule.penalty(net).item(), spring, rtol=1e-4, atol=0)
    assert_close(rule.loss(net, x, y), F.cross_entropy(net(x), y) + spring)
    rule.regulariser = lambda model: torch.tensor(0.5)
    assert_close(rule.loss(net, x, y), F.cross_entropy(net(x), y) + spring + 0.5)


@pytest.mark.parametrize("decay", [1.0, 0.3, 0.0])
def test_two_tasks_add_up(decay):
    net, rule, (first, second, _) = net8(), EWC(1.0, decay=decay), stream()
    old = diagonal_fisher(net, *first.train)
    rule.end_task(net, *first.train)
    assert all(torch.equal(rule.fisher[k], old[k]) for k in old)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1)
    new = diagonal_fisher(net, *second.train)
    rule.end_task(net, *second.train)
    for k in old:
        assert_close(rule.fisher[k], decay * old[k] + new[k])
        assert torch.equal(rule.anchor[k], named(net)[k].detach())  # the last weights alone
    assert rule.penalty(net) == 0


def test_what_it_keeps_does_not_follow_the_model():
    net, rule, first = net8(), EWC(1.0), stream()[0]
    rule.end_task(net, *first.train)
    kept = {k: v.clone() for k, v in rule.anchor.items()}
    with torch.no_grad():
        net[1].weight.add_(1)
    assert all(torch.equal(rule.anchor[k], kept[k]) for k in kept)
    assert not any(t.requires_grad for t in (*rule.anchor.values(), *rule.fisher.values()))


def test_every_setting_matters():
    base = trained(EWC(30.0))
    for other in (EWC(10.0), EWC(30.0, decay=0.2), EWC(30.0, empirical=False)):
        changed = trained(other)
        assert any(not torch.allclose(base[k], changed[k], atol=1e-4) for k in base)
    same = trained(EWC(30.0, chunk_size=7))  # what only saves memory does not
    assert all(torch.allclose(base[k], same[k], atol=1e-4) for k in base)


F1, ONE = {"w": torch.ones(1)}, torch.zeros(1, 4, dtype=torch.double)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: EWC(-1.0), "strength: expected .* got -1"),
        (lambda: EWC(float("nan")), "strength: expected"),
        (lambda: EWC(1.0, decay=1.1), "decay: expected .* got 1.1"),
        (lambda: EWC(1.0, chunk_size=0), "chunk_size: expected"),
        (lambda: diagonal_fisher(linear(), ONE, chunk_size=0), "chunk_size: expected"),
        (lambda: diagonal_fisher(linear(), ONE[:0]), "x, y: expected n > 0 images"),
        (lambda: diagonal_fisher(linear(), ONE, torch.zeros(2, dtype=torch.long)), "x, y: expected"),
        (lambda: diagonal_fisher(linear().requires_grad_(False), ONE), "model: expected trainable weights"),
        (lambda: ewc_penalty({}, F1, F1), "theta: expected"),
        (lambda: ewc_penalty(F1, {"w": torch.ones(2)}, F1), "anchor: expected"),
    ],
)
def test_bad_arguments_are_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call()


# --- half precision, frozen parts, wrappers ---------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_distances_of_half_precision_weights_count(dtype):
    """The square of 1e-4 is no number of float16; both bytes of the distance are."""
    anchor = torch.full((4,), 1.0).to(dtype) * 2**-10
    theta = (anchor + 1e-4).to(dtype).requires_grad_()
    fisher = torch.full((4,), 1e6)
    loss = ewc_penalty({"w": theta}, {"w": anchor}, {"w": fisher})
    d = theta.detach().double() - anchor.double()
    assert d.abs().min() > 5e-5 and loss.dtype == torch.float32
    assert_close(loss.double(), (1e6 * d.square()).sum() / 2, rtol=1e-6, atol=0)
    loss.backward()
    assert_close(theta.grad.double(), 1e6 * d, rtol=1e-2, atol=0)


def test_distances_beyond_half_precision():
    theta, anchor = (torch.tensor([v]).half() for v in (60000.0, -60000.0))
    assert ewc_penalty({"w": theta}, {"w": anchor}, {"w": torch.tensor([1e-10])}).item() == pytest.approx(0.72)


def test_a_part_that_is_frozen_for_a_task_keeps_its_springs():
    """As if it had been trainable all the time, for it has not moved."""
    nets = [built(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))) for _ in range(2)]
    rules = [EWC(2.0, decay=0.5) for _ in nets]
    for task in range(3):
        nets[0][0].requires_grad_(task != 1)
        for net, rule in zip(nets, rules, strict=True):
            with torch.no_grad():
                net[2].weight.add_(0.1)  # task 1 moves the head alone
                net[0].weight.add_(0.1 * (task != 1))
            rule.end_task(net, images(7, task, (4,)), labels(7, 3, task))
        nets[0][0].requires_grad_(True)
        assert rules[0].fisher.keys() == rules[1].fisher.keys() == dict(nets[0].named_parameters()).keys()
        for name, f in rules[1].fisher.items():
            assert_close(rules[0].fisher[name], f, rtol=0, atol=0)
            assert_close(rules[0].anchor[name], rules[1].anchor[name], rtol=0, atol=0)
        with torch.no_grad():
            nets[0][0].bias.add_(0.2)
            nets[1][0].bias.add_(0.2)
        assert_close(rules[0].penalty(nets[0]), rules[1].penalty(nets[1]))


WRAPPERS = {
    "compiled": lambda net: torch.compile(net, backend="eager"),
    "parallel": nn.DataParallel,
    "a compiled part": lambda net: nn.Sequential(torch.compile(net[0], backend="eager"), *net[1:]),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("first", [True, False])
def test_names_know_no_wrapper(wrap, first):
    """Measured on the wrapped model and used on the plain one, and the other way round."""
    net = built(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))
    wrapped, x, y = wrap(net), images(7, shape=(4,)), labels(7, 3)
    assert list(diagonal_fisher(wrapped, x, y)) == list(named(wrapped))
    rule, want = EWC(3.0), EWC(3.0)
    want.end_task(net, x, y)
    rule.end_task(wrapped if first else net, x, y)
    assert list(rule.fisher) == list(rule.anchor) == list(named(net))
    with torch.no_grad():
        net[0].weight.add_(0.3)
    assert_close(rule.penalty(net if first else wrapped), want.penalty(net))
    rule.end_task(net if first else wrapped, x, y)
    want.end_task(net, x, y)
    for name, f in want.fisher.items():
        assert_close(rule.fisher[name], f)


def test_weights_to_measure_by_name():
    net, x, y = linear(), images(5, shape=(4,)), labels(5, 3)
    every = diagonal_fisher(net, x, y)
    net.requires_grad_(False)
    found = diagonal_fisher(net, x, y, names=["bias"])
    assert list(found) == ["bias"] and torch.equal(found["bias"], every["bias"])
    with pytest.raises(ValueError, match=r"names: expected some of the model's weights, got \['b'\] too"):
        diagonal_fisher(net, x, y, names=["bias", "b"])


class Pair(nn.Linear):
    def forward(self, x):
        return super().forward(x), None


def test_other_outputs_are_refused():
    with pytest.raises(TypeError, match=r"model: expected logits \(N, K\) as a tensor, got tuple"):
        diagonal_fisher(Pair(4, 3), torch.zeros(2, 4), torch.zeros(2).long())
    with pytest.raises(ValueError, match=r"model: expected logits \(N, K\), got shape \(1, 3, 12, 12\)"):
        diagonal_fisher(nn.Conv2d(1, 3, 1).double(), images(2), labels(2))
