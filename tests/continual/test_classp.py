"""CLASSP: the loop twin, hand numbers, AdaGrad and SGD as limits, scale, traps of the published code, the optimiser."""

from __future__ import annotations

import copy
import math
from statistics import NormalDist

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from peftref.continual.classp import CLASSP, classp_step, gate
from tests._naive import classp as naive

DOUBLE = torch.float64


def tensors(seed: int = 0, dtype: torch.dtype = DOUBLE) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Weights, gradients (some exactly 0) and accumulators of three shapes, one of them empty of dimensions."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(4, 3), (5,), ()]
    w, g = ([torch.randn(n, generator=generator, dtype=DOUBLE) for n in shapes] for _ in range(2))
    s = [torch.rand(n, generator=generator, dtype=DOUBLE) for n in shapes]
    g[0][0] = 0.0
    return tuple([t.to(dtype) for t in part] for part in (w, g, s))


def one(*values: float) -> list[Tensor]:
    return [torch.tensor(values, dtype=DOUBLE)]


# --- the loop twin ----------------------------------------------------------------------------------------------------
SETTINGS = {
    "power": st.sampled_from([0.5, 1.0, 1.7, 2.0, 3.0]), "threshold": st.sampled_from([0.0, 0.25, 1.0, 4.0, 1e9]),
    "eps": st.sampled_from([1e-5, 0.3]), "suppress": st.booleans(), "lr": st.sampled_from([0.0, 0.2, 3.0]),
}  # fmt: skip
NUMBER = st.one_of(
    st.floats(-10, 10), st.sampled_from([0.0, -0.0, 0.5, -1.0, 2.0, math.nan, math.inf, -math.inf, 1e-200])
)


@settings(max_examples=80, deadline=None)
@given(
    rows=st.lists(st.tuples(st.floats(-5, 5), NUMBER, st.floats(0, 10)), min_size=1, max_size=9), **SETTINGS,
)  # fmt: skip
def test_equals_the_loop(rows, lr, power, threshold, eps, suppress):
    w, g, s = map(list, zip(*rows, strict=True))
    expected = naive.loop_step(w, g, s, lr, power, threshold, eps, suppress)
    ours = classp_step(one(*w), one(*g), one(*s), lr, power, threshold, eps, suppress)
    assert_close([ours[0][0].tolist(), ours[1][0].tolist()], list(expected), rtol=1e-12, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(seeds=st.lists(st.integers(0, 99), min_size=1, max_size=4), official=st.booleans(), **SETTINGS)
def test_lists_over_several_steps_equal_the_loop_tensor_by_tensor(
    seeds, official, lr, power, threshold, eps, suppress
):  # fmt: skip
    w, _, s = tensors()
    wanted = [(t.flatten().tolist(), a.flatten().tolist()) for t, a in zip(w, s, strict=True)]
    rule = naive.loop_official_step if official else naive.loop_step
    for seed in seeds:
        g = tensors(seed)[1]
        w, s = classp_step(w, g, s, lr, power, threshold, eps, suppress, official)
        wanted = [
            rule(a, t.flatten().tolist(), b, lr, power, threshold, eps, suppress)
            for (a, b), t in zip(wanted, g, strict=True)
        ]
    for i, (a, b) in enumerate(wanted):
        assert_close(w[i].flatten().tolist(), a, rtol=1e-10, atol=1e-10)
        assert_close(s[i].flatten().tolist(), b, rtol=1e-10, atol=1e-10)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 99), step=st.floats(0.01, 2), threshold=st.sampled_from([0.0, 0.3, 1.0]))
def test_a_coordinate_knows_nothing_of_the_others(seed, step, threshold):
    w, g, s = tensors(seed)
    together = classp_step(w, g, s, step, 1.5, threshold)
    flat = [torch.cat([t.flatten() for t in part]) for part in (w, g, s)]
    order = torch.randperm(len(flat[0]), generator=torch.Generator().manual_seed(seed))
    apart = classp_step(*([t[i : i + 1] for i in order] for t in flat), step, 1.5, threshold)
    for joint, single in zip(together, apart, strict=True):
        # a vectorised power and that of a single number may differ in the last bit
        assert_close(torch.cat([t.flatten() for t in joint])[order], torch.cat(single), rtol=1e-13, atol=1e-13)


# --- closed forms and limiting cases ----------------------------------------------------------------------------------
def test_hand_numbers():
    w, s = classp_step(one(3, -2), one(2, -1), one(0, 0), lr=0.2, power=1, threshold=0, eps=0.5)
    assert_close(w, one(3 - 0.4 / 2.5, -2 + 0.2 / 1.5))
    w, s = classp_step(w, one(1, 3), s, lr=0.2, power=1, threshold=0, eps=0.5)
    assert_close(s, one(3, 4))
    assert_close(w, one(2.84 - 0.2 / 3.5, -2 + 0.2 / 1.5 - 0.6 / 4.5))
    assert_close(w, one(2.7828571428571, -2.0), rtol=0, atol=1e-12)


def problem(seed: int = 0, dtype: torch.dtype = DOUBLE) -> tuple[nn.Module, list[Tensor]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
        return net, [torch.randn(10, 6).to(dtype) for _ in range(12)]


def run(net: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Tensor]) -> list[Tensor]:
    for x in batches:
        optimizer.zero_grad()
        net(x).square().sum().backward()
        optimizer.step()
    return [p.detach().clone() for p in net.parameters()]


@pytest.mark.parametrize(("dtype", "tolerance"), [(DOUBLE, 1e-14), (torch.float32, 1e-6)])
def test_power_two_without_threshold_is_adagrad(dtype, tolerance):
    """The accumulators differ in the order of adding epsilon, hence by roundings only."""
    net, batches = problem(dtype=dtype)
    peer = copy.deepcopy(net)
    ours = run(net, CLASSP(net.parameters(), lr=0.1, power=2, threshold=0, epsilon=1e-3), batches)
    adagrad = torch.optim.Adagrad(peer.parameters(), lr=0.1, eps=0, initial_accumulator_value=1e-3)
    assert_close(ours, run(peer, adagrad, batches), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("mode", ["paper", "official"])
def test_without_decay_and_threshold_it_is_sgd_that_remembers(mode):
    net, batches = problem()
    peer = copy.deepcopy(net)
    optimizer = CLASSP(net.parameters(), lr=0.01, threshold=0, apply_decay=False, mode=mode)
    expected = [torch.zeros_like(p) for p in net.parameters()]
    for x in batches:
        ours = run(net, optimizer, [x])
        expected = [s + p.grad.abs() for s, p in zip(expected, net.parameters(), strict=True)]
        assert_close(ours, run(peer, torch.optim.SGD(peer.parameters(), lr=0.01), [x]), rtol=0, atol=1e-15)
    assert_close([optimizer.state[p]["sum"] for p in net.parameters()], expected)


def test_the_gate_is_strict():
    w, s = classp_step(one(1, 1, 1), one(2, -2, 2.0001), one(0, 0, 0), threshold=4.0)
    assert w[0][:2].tolist() == [1, 1] and s[0][:2].tolist() == [0, 0] and s[0][2] == 2.0001 and w[0][2] < 1


@settings(max_examples=40, deadline=None)
@given(g=st.floats(-3, 3), threshold=st.floats(0, 9))
def test_gate_keeps_what_is_above(g, threshold):
    kept = gate(torch.tensor([g], dtype=DOUBLE), threshold).item()
    assert kept == (g if abs(g) > math.sqrt(threshold) else 0.0)


def test_small_gradients_do_not_underflow_in_the_gate():
    g = torch.tensor([1e-30, 1e-24])
    assert ((g**2) == 0).all()
    assert torch.equal(gate(g, 0.0), g) and gate(g, 1e-50).tolist() == [0.0, g[1].item()]


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0, 3.0])
def test_scale_of_the_loss_does_not_matter_without_epsilon(power):
    """g -> c g and tau -> c^2 tau change s by c^p, its root by c; c is a power of 2, so the gate sees no rounding."""
    c, w = 8.0, tensors()[0]
    scaled = [t.clone() for t in w]
    s, big = ([torch.zeros_like(t) for t in w] for _ in range(2))
    for seed in range(4):
        g = tensors(seed)[1]
        w, s = classp_step(w, g, s, 0.2, power, 0.3, 1e-140)
        scaled, big = classp_step(scaled, [c * t for t in g], big, 0.2, power, 0.3 * c**2, 1e-140)
    assert_close(w, scaled, rtol=1e-12, atol=1e-12)
    assert_close([c**power * t for t in s], big)


def test_large_power_divides_by_the_largest_gradient_so_far():
    """(1.5^50 + 2^50 + 1.2^50)^(1/50) is 2 up to a factor 1 + 1e-8; and epsilon alone would be (1e-5)^(1/50) = 0.79."""
    w, s = one(0.0), one(0.0)
    for g, largest in ((1.5, 1.5), (2.0, 2.0), (-1.2, 2.0)):
        new, s = classp_step(w, one(g), s, lr=0.1, power=50, threshold=0, eps=1e-300)
        assert_close((w[0] - new[0]).item(), 0.1 * g / largest, rtol=1e-6, atol=0)
        w = new
    floor, _ = classp_step(one(0.0), one(0.01), one(0.0), lr=0.1, power=50, threshold=0, eps=1e-5)
    assert_close(floor[0].item(), -0.1 * 0.01 / 0.794328, rtol=1e-5, atol=0)


def test_constant_gradient_travels_a_harmonic_number():
    lr, eps, g = 0.2, 1e-9, 0.7
    w, s, places = one(0.0), one(0.0), [0.0]
    for _ in range(50):
        w, s = classp_step(w, one(g), s, lr=lr, power=1, threshold=0, eps=eps)
        places.append(w[0].item())
    steps = [a - b for a, b in zip(places, places[1:], strict=False)]
    assert_close(steps, [lr / (n + eps / g) for n in range(1, 51)], rtol=1e-12, atol=0)
    assert_close(-places[-1], lr * sum(1 / n for n in range(1, 51)), rtol=1e-8, atol=0)
    w, s = one(0.0), one(0.0)
    for _ in range(50):  # p = 2 travels farther: 1 / sqrt(n) for 1 / n
        w, s = classp_step(w, one(g), s, lr=lr, power=2, threshold=0, eps=eps)
    assert_close(-w[0].item(), lr * sum(n**-0.5 for n in range(1, 51)), rtol=1e-8, atol=0)


def test_huge_threshold_freezes_and_remembers_nothing():
    w, g, s = tensors()
    for tau in (1e9, math.inf):
        assert_close(classp_step(w, g, s, threshold=tau), (w, s), rtol=0, atol=0)


def test_share_of_moved_weights_for_normal_gradients():
    g = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    w, _ = classp_step([torch.zeros_like(g)], [g], [torch.zeros_like(g)], threshold=2.0)
    share = (w[0] != 0).double().mean().item()
    # the binomial standard deviation of the share is 0.0008
    assert abs(share - 2 * NormalDist().cdf(-math.sqrt(2.0))) < 0.004


# --- the published code -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("suppress", [True, False])
@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.99, 1.0])
def test_official_mode_is_the_published_form(power, suppress, threshold):
    w, _, s = tensors()
    theirs, sums = [t.clone() for t in w], [t.clone() for t in s]
    for seed in range(3):
        g = tensors(seed)[1]
        g[1].zero_()  # a tensor without any gradient
        w, s = classp_step(w, g, s, 0.2, power, threshold, 1e-5, suppress, official=True)
        naive.published_step(theirs, g, sums, 0.2, power, threshold, 1e-5, suppress)
    assert_close((w, s), (theirs, sums), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("suppress", [True, False])
def test_paper_mode_is_the_published_form_with_the_papers_gate(power, suppress):
    w, _, s = tensors()
    theirs, sums = [t.clone() for t in w], [t.clone() for t in s]
    for seed in range(3):
        g = tensors(seed)[1]
        w, s = classp_step(w, g, s, 0.2, power, 0.3, 1e-5, suppress)
        naive.published_paper_step(theirs, g, sums, 0.2, power, 0.3, 1e-5, suppress)
    assert_close((w, s), (theirs, sums), rtol=1e-13, atol=1e-13)


def test_official_threshold_is_a_switch():
    w, g, s = tensors()
    every = [classp_step(w, g, s, threshold=tau, official=True) for tau in (0.0, 0.5, 0.99)]
    assert_close(every[0], every[1], rtol=0, atol=0)
    assert_close(every[0], every[2], rtol=0, atol=0)
    assert_close(classp_step(w, g, s, threshold=1.0, official=True), (w, s), rtol=0, atol=0)
    assert not torch.equal(classp_step(w, g, s, threshold=0.5)[0][0], every[1][0][0])


def test_official_power_is_lost_in_the_sum_and_kept_in_the_root():
    w, s = classp_step(one(0.0), one(3.0), one(1.0), lr=1.0, power=2, threshold=0, eps=1e-12, official=True)
    assert s[0].item() == 4.0  # 1 + 3, where the paper has 1 + 9
    assert_close(w[0].item(), -3.0 / 2.0)


def test_modes_agree_at_power_one_without_threshold():
    w, g, s = tensors()
    assert_close(classp_step(w, g, s, power=1, threshold=0), classp_step(w, g, s, power=1, threshold=0, official=True))


def test_groups_do_not_leak_into_each_other():
    """In the published code the settings of the first group serve all that follow."""
    net, batches = problem()
    first, second = net[0], net[2]
    groups = [
        {"params": first.parameters(), "lr": 0.3, "threshold": 0.1, "power": 2.0, "epsilon": 0.1},
        {"params": second.parameters(), "lr": 0.01, "threshold": 0.0, "power": 1.0, "apply_decay": False},
    ]
    together, apart = CLASSP(groups), copy.deepcopy(net)
    single = [
        CLASSP(apart[0].parameters(), lr=0.3, threshold=0.1, power=2.0, epsilon=0.1),
        CLASSP(apart[2].parameters(), lr=0.01, threshold=0.0, power=1.0, apply_decay=False),
    ]
    for x in batches:
        run(net, together, [x])
        apart.zero_grad()
        apart(x).square().sum().backward()
        for optimizer in single:
            optimizer.step()
    assert_close(list(net.parameters()), list(apart.parameters()), rtol=0, atol=0)


# --- the optimiser ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", ["paper", "official"])
def test_optimiser_is_the_kernel(mode):
    net, batches = problem()
    w = [p.detach().clone() for p in net.parameters()]
    s = [torch.zeros_like(t) for t in w]
    optimizer = CLASSP(net.parameters(), 0.05, 0.2, 1e-3, 1.5, mode=mode)
    for x in batches:
        run(net, optimizer, [x])
        w, s = classp_step(w, [p.grad for p in net.parameters()], s, 0.05, 1.5, 0.2, 1e-3, official=mode == "official")
    assert_close([p.detach() for p in net.parameters()], w, rtol=0, atol=0)
    assert_close([optimizer.state[p]["sum"] for p in net.parameters()], s, rtol=0, atol=0)


def test_defaults_are_those_of_the_published_code():
    """But for its threshold of 0.5, which does there what 0 does: see the test of the official mode."""
    group = CLASSP([torch.zeros(1, requires_grad=True)]).param_groups[0]
    names = ("lr", "threshold", "epsilon", "power", "apply_decay", "mode")
    assert [group[name] for name in names] == [0.2, 0.0, 1e-5, 1.0, True, "paper"]


def test_kernel_leaves_its_inputs_alone_and_optimiser_the_gradients():
    w, g, s = tensors()
    kept = copy.deepcopy((w, g, s))
    classp_step(w, g, s)
    assert_close((w, g, s), kept, rtol=0, atol=0)
    net, batches = problem()
    optimizer = CLASSP(net.parameters())
    net(batches[0]).square().sum().backward()
    gradients = [p.grad.clone() for p in net.parameters()]
    optimizer.step()
    assert_close([p.grad for p in net.parameters()], gradients, rtol=0, atol=0)


@pytest.mark.parametrize(
    "change", [{"lr": 0.1}, {"threshold": 0.5}, {"epsilon": 0.1}, {"power": 2.0}, {"apply_decay": False}]
)
def test_every_setting_matters(change):
    results = []
    for options in ({}, change):
        net, batches = problem()
        results.append(run(net, CLASSP(net.parameters(), **{"lr": 0.05, "threshold": 0.0, **options}), batches)[0])
    assert not torch.allclose(*results, rtol=0, atol=1e-4)


def test_mode_matters():
    results = []
    for mode in ("paper", "official"):
        net, batches = problem()
        results.append(run(net, CLASSP(net.parameters(), power=2.0, mode=mode), batches)[0])
    assert not torch.allclose(*results, rtol=0, atol=1e-4)


def test_the_memory_outlives_a_change_of_settings():
    net, batches = problem()
    optimizer = CLASSP(net.parameters(), lr=0.01, threshold=0.0, apply_decay=False)
    run(net, optimizer, batches[:6])
    before = [optimizer.state[p]["sum"].clone() for p in net.parameters()]
    for group in optimizer.param_groups:
        group.update(apply_decay=True, lr=0.2)
    w = [p.detach().clone() for p in net.parameters()]
    run(net, optimizer, batches[6:7])
    for p, old, s in zip(net.parameters(), w, before, strict=True):
        assert_close(p.detach(), old - 0.2 * p.grad / (s + p.grad.abs() + 1e-5))


def test_closure_is_evaluated_once_with_gradients_and_returned():
    net, batches = problem()
    optimizer, losses = CLASSP(net.parameters(), lr=0.01), []

    def closure() -> Tensor:
        optimizer.zero_grad()
        losses.append(net(batches[0]).square().sum())
        losses[-1].backward()
        return losses[-1]

    assert optimizer.step(closure) is losses[0] and len(losses) == 1
    assert optimizer.step() is None


def test_new_group_starts_empty_and_frozen_parameters_rest():
    net, batches = problem()
    optimizer = CLASSP(net[0].parameters(), lr=0.01, threshold=0.5)
    run(net, optimizer, batches[:2])
    optimizer.add_param_group({"params": net[2].parameters(), "lr": 0.5})
    net[0].bias.requires_grad_(False)
    net[0].bias.grad = None
    bias, s = net[0].bias.clone(), optimizer.state[net[0].bias]["sum"].clone()
    net[2].weight.grad = net[2].bias.grad = None
    assert net[2].weight not in optimizer.state
    net(batches[2]).square().sum().backward()
    optimizer.step()
    assert torch.equal(net[0].bias, bias) and torch.equal(optimizer.state[net[0].bias]["sum"], s)
    assert torch.equal(optimizer.state[net[2].weight]["sum"], gate(net[2].weight.grad, 0.5).abs())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("mode", ["paper", "official"])
@pytest.mark.parametrize("threshold", [0.0, 0.01])
def test_gradients_that_are_not_finite_leave_no_trace(bad, mode, threshold):
    w, clean = torch.zeros(4, requires_grad=True), torch.zeros(4, requires_grad=True)
    optimizer, peer = (CLASSP([t], threshold=threshold, mode=mode) for t in (w, clean))
    w.grad, clean.grad = torch.tensor([1.0, bad, -1.0, bad]), torch.tensor([1.0, 0.0, -1.0, 0.0])
    assert optimizer.active_fraction() == 0.5
    optimizer.step()
    peer.step()
    assert torch.equal(w, clean) and torch.equal(optimizer.state[w]["sum"], peer.state[clean]["sum"])
    assert w[0] != 0 and w[1] == 0


def test_active_fraction_counts_what_moves_next():
    net, batches = problem()
    for options in ({"threshold": 0.5}, {"threshold": 1.0}, {"threshold": 0.5, "mode": "official"}):
        optimizer = CLASSP(net.parameters(), lr=1e-3, **options)
        net.zero_grad()
        net(batches[0]).square().sum().backward()
        before = torch.cat([p.detach().flatten() for p in net.parameters()])
        share = optimizer.active_fraction()
        optimizer.step()
        after = torch.cat([p.detach().flatten() for p in net.parameters()])
        assert_close(share, (after != before).double().mean().item(), rtol=0, atol=1e-12)
        assert 0 < share < 1 or "mode" in options
    optimizer.param_groups[0]["threshold"] = 1.0  # official: nothing moves
    assert optimizer.active_fraction() == 0.0
    optimizer.zero_grad()
    assert optimizer.active_fraction() == 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, DOUBLE])
@pytest.mark.parametrize("power", [1.0, 1.5, 2.0])
def test_any_precision(dtype, power):
    """The accumulator is that of the same numbers in float32 to the bit; the weight differs by its own rounding."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(50, generator=generator).to(dtype).requires_grad_()
    wide = w.detach().to(DOUBLE if dtype == DOUBLE else torch.float32).requires_grad_()
    optimizer, peer = (CLASSP([t], power=power, threshold=0.25, epsilon=1e-3) for t in (w, wide))
    for _ in range(3):
        w.grad = torch.randn(50, generator=generator).to(dtype)
        wide.grad = w.grad.to(wide.dtype)
        wide.data.copy_(w.data)
        optimizer.step()
        peer.step()
        assert w.dtype == dtype and torch.equal(optimizer.state[w]["sum"], peer.state[wide]["sum"])
        assert_close(w, wide.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)


def test_accumulator_does_not_stagnate_in_bfloat16():
    w = torch.zeros(1, dtype=torch.bfloat16, requires_grad=True)
    optimizer = CLASSP([w], lr=0.0)
    for _ in range(300):
        w.grad = torch.ones_like(w)
        optimizer.step()
    assert optimizer.state[w]["sum"].item() == 300.0
    assert (torch.full((1,), 256.0, dtype=torch.bfloat16) + 1).item() == 256.0


def test_mixed_precisions_in_one_group():
    net, batches = problem(dtype=torch.float32)
    net[0].to(DOUBLE)
    with torch.no_grad():
        w = [p.clone() for p in net.parameters()]
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    CLASSP(net.parameters(), lr=0.1).step()
    for p, old in zip(net.parameters(), w, strict=True):
        assert_close(p.detach(), old - 0.1 / (1 + 1e-5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, DOUBLE])
def test_state_survives_a_round_trip_through_a_file(dtype, tmp_path):
    net, batches = problem(dtype=dtype)
    optimizer = CLASSP(net.parameters(), lr=0.02, threshold=0.1)
    run(net, optimizer, batches[:5])
    torch.save(optimizer.state_dict(), tmp_path / "classp.pt")
    other = copy.deepcopy(net)
    loaded = CLASSP(other.parameters())
    loaded.load_state_dict(torch.load(tmp_path / "classp.pt"))
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        s, t = optimizer.state[p]["sum"], loaded.state[q]["sum"]
        assert torch.equal(s, t) and t.dtype == (DOUBLE if dtype == DOUBLE else torch.float32)
    assert loaded.param_groups[0]["lr"] == 0.02
    assert_close(run(net, optimizer, batches[5:]), run(other, loaded, batches[5:]), rtol=0, atol=0)


def test_loaded_state_shares_no_memory():
    net, batches = problem()
    optimizer = CLASSP(net.parameters())
    run(net, optimizer, batches[:2])
    kept = copy.deepcopy(optimizer.state_dict())
    other = copy.deepcopy(net)
    loaded = CLASSP(other.parameters())
    loaded.load_state_dict(optimizer.state_dict())
    run(other, loaded, batches[2:4])
    for i, entry in optimizer.state_dict()["state"].items():
        assert torch.equal(entry["sum"], kept["state"][i]["sum"])


def test_state_of_some_parameters_only():
    net, batches = problem()
    optimizer = CLASSP(net.parameters())
    net[0].weight.grad = torch.ones_like(net[0].weight)
    optimizer.step()
    other = CLASSP(copy.deepcopy(net).parameters())
    other.load_state_dict(optimizer.state_dict())
    assert len(other.state) == 1


def test_sparse_gradient_is_the_dense_one():
    dense = nn.Embedding(7, 3)
    sparse = nn.Embedding(7, 3, sparse=True)
    sparse.load_state_dict(dense.state_dict())
    optimizers = [CLASSP(net.parameters(), threshold=0.1) for net in (dense, sparse)]
    for rows in ([0, 2, 2], [2, 5, 6]):
        for net, optimizer in zip((dense, sparse), optimizers, strict=True):
            optimizer.zero_grad()
            net(torch.tensor(rows)).square().sum().backward()
        assert sparse.weight.grad.is_sparse
        assert optimizers[0].active_fraction() == optimizers[1].active_fraction() > 0
        for optimizer in optimizers:
            optimizer.step()
    assert_close(sparse.weight, dense.weight)


def test_schedulers_and_channels_last():
    net = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    peer = copy.deepcopy(net).to(memory_format=torch.contiguous_format)
    for layer in (net, peer):
        optimizer = CLASSP(layer.parameters(), threshold=0.01)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            optimizer.zero_grad()
            layer(torch.randn(2, 3, 6, 6, generator=generator)).square().mean().backward()
            optimizer.step()
            scheduler.step()
        assert optimizer.param_groups[0]["lr"] == 0.2 / 8
    assert_close(net.weight, peer.weight.detach(), rtol=1e-4, atol=1e-5)  # float32 convolutions of two layouts


W = [torch.zeros(2)]


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: classp_step(W, W, W, power=0), ValueError, "power: expected a finite number > 0, got 0"),
        (lambda: classp_step(W, W, W, power=math.inf), ValueError, "power: expected"),
        (lambda: classp_step(W, W, W, threshold=-1e-9), ValueError, "threshold: expected a number of at least 0"),
        (lambda: classp_step(W, W, W, threshold=math.nan), ValueError, "threshold: expected"),
        (lambda: classp_step(W, W, W, lr=-1), ValueError, "lr: expected a finite number >= 0, got -1"),
        (lambda: classp_step(W, W, W, lr=math.nan), ValueError, "lr: expected"),
        (lambda: classp_step(W, W, W, eps=0), ValueError, "epsilon: expected a finite number > 0, got 0"),
        (lambda: classp_step(W, W, W, power=0.1), ValueError, r"epsilon: expected epsilon\^\(1/power\) of at least"),
        (lambda: classp_step(W, W * 2, W), ValueError, "w, g, s: expected lists of the same shapes"),
        (lambda: classp_step(W, W, [torch.zeros(1)]), ValueError, "w, g, s: expected"),
        (lambda: CLASSP(W, lr=-1), ValueError, "lr: expected"),
        (lambda: CLASSP(W, threshold=-1), ValueError, "threshold: expected"),
        (lambda: CLASSP(W, power=-1), ValueError, "power: expected"),
        (lambda: CLASSP(W, epsilon=0), ValueError, "epsilon: expected"),
        (lambda: CLASSP(W, mode="Paper"), ValueError, "mode: expected one of .* got 'Paper'"),
        (lambda: CLASSP([torch.zeros(2, dtype=torch.complex64)]), TypeError, "params: expected real tensors"),
    ],
)
def test_bad_arguments_are_refused(call, error, says):
    with pytest.raises(error, match=says):
        call()


def test_a_refused_step_or_group_changes_nothing():
    net, batches = problem()
    optimizer = CLASSP([{"params": net[0].parameters()}, {"params": net[2].parameters()}])
    net(batches[0]).square().sum().backward()
    optimizer.param_groups[1]["power"] = 0
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(ValueError, match="power"):
        optimizer.step()
    assert_close([p.detach() for p in net.parameters()], before, rtol=0, atol=0)
    assert not optimizer.state
    with pytest.raises(ValueError, match="threshold"):
        optimizer.add_param_group({"params": [torch.zeros(1, requires_grad=True)], "threshold": -1})
    assert len(optimizer.param_groups) == 2


def test_small_epsilon_is_refused_where_the_root_would_vanish():
    """In float32 (1e-5)^(1/0.1) is 0, and a weight without gradient would become 0/0; float64 still holds it."""
    with pytest.raises(ValueError, match="epsilon"):
        CLASSP([torch.zeros(1)], power=0.1)
    w = torch.zeros(2, dtype=DOUBLE, requires_grad=True)
    w.grad = torch.tensor([0.0, 1.0], dtype=DOUBLE)
    CLASSP([w], power=0.1).step()
    assert w.isfinite().all() and w[0] == 0 and w[1] != 0


def test_parameters_of_any_form_take_over_a_state():
    """A generator, named pairs, groups, the parameters of a compiled module: the same steps, settings and sums."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(torch.bfloat16)
    x = torch.randn(5, 3).to(torch.bfloat16)

    def step(model: nn.Module, optimizer: CLASSP) -> None:
        optimizer.zero_grad()
        model(x).float().square().mean().backward()
        optimizer.step()

    first = CLASSP((p for p in net.parameters()), lr=0.1, power=2.0)
    step(net, first)
    state, start = copy.deepcopy(first.state_dict()), copy.deepcopy(net)
    step(net, first)
    for form in (
        lambda m: m.named_parameters(),
        lambda m: [{"params": m.parameters(), "lr": 9.0}],
        lambda m: torch.compile(m, backend="eager").parameters(),
    ):
        other = copy.deepcopy(start)
        again = CLASSP(form(other), lr=0.7)
        again.load_state_dict(state)
        step(other, again)
        assert again.param_groups[0]["lr"] == 0.1 and again.param_groups[0]["power"] == 2.0
        assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters(), strict=True))
        for p, q in zip(net.parameters(), other.parameters(), strict=True):
            assert again.state[q]["sum"].dtype == torch.float32
            assert torch.equal(first.state[p]["sum"], again.state[q]["sum"])
