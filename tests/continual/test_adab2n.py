"""AdaB2N: loop twin, published layer, limits that are BatchNorm, step sizes, gradients, state of a run, bad input."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from peftref.continual.adab2n import (
    AdaB2N,
    adaptation_loss,
    balance,
    begin_task,
    convert,
    eta,
    parameter_groups,
    task_batch,
    task_weights,
)  # fmt: skip
from peftref.continual.baselines.rehearsal import ER, ERACE, DERpp
from peftref.continual.core.balanced_norm import balanced_norm, balanced_statistics
from peftref.continual.core.metrics import evaluate
from peftref.continual.core.replay import Reservoir
from peftref.continual.core.rule import FineTune
from peftref.continual.core.streams import Task, class_incremental, domain_incremental
from peftref.continual.core.train import learn
from peftref.data import Split, load
from peftref.models import SmallCNN
from tests._naive import adab2n as naive

T = 3
IDS = torch.tensor([0, 0, 1, 2, 2, 2, 2])  # counts 2, 1, 4


def close(a, b, tol=1e-12):
    assert_close(a, b, rtol=tol, atol=tol)


def images(b: int = 7, c: int = 4, side: int = 3, seed: int = 0, dtype=torch.double, requires_grad=False) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(b, c, side, side, generator=g, dtype=torch.double)
    return (
        (x * torch.linspace(0.5, 2, c, dtype=torch.double)[:, None, None] + 1).to(dtype).requires_grad_(requires_grad)
    )


def bn(c: int = 4, seed: int = 0, momentum: float = 0.1, **kwargs) -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(c, momentum=momentum, dtype=torch.double, **kwargs)
    g = torch.Generator().manual_seed(seed)
    if layer.affine:
        layer.weight.data.uniform_(0.5, 2, generator=g)
        layer.bias.data.normal_(generator=g)
    layer.running_mean.normal_(generator=g)
    layer.running_var.uniform_(0.5, 2, generator=g)
    return layer


def layer(kappa: float = 1.0, seen: int = T, psi=(0.3, -0.7, 1.1), **kwargs) -> AdaB2N:
    made = AdaB2N(bn(**kwargs), len(psi), kappa).double()
    made.psi.data.copy_(torch.tensor(psi))
    begin_task(made, seen - 1)
    return made


def run(module: nn.Module, x: Tensor, ids: Tensor = IDS) -> Tensor:
    with task_batch(module, ids):
        return module(x)


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- the loop twin and the published layer ----------------------------------------------------------------------------
@settings(max_examples=40, deadline=None)
@given(
    ids=st.lists(st.integers(0, 3), min_size=1, max_size=8), channels=st.integers(1, 3), pixels=st.integers(1, 4),
    psi=st.lists(st.floats(-30, 19), min_size=4, max_size=4), renormalize=st.booleans(), seed=st.integers(0, 999),
)  # fmt: skip
def test_equals_the_loops(ids, channels, pixels, psi, renormalize, seed):
    ids = torch.tensor(ids)
    counts = ids.bincount(minlength=4)
    omega = task_weights(torch.tensor(psi, dtype=torch.double), counts, renormalize=renormalize)
    close(omega, torch.tensor(naive.loop_weights(psi, counts.tolist(), renormalize), dtype=torch.double))
    x = 3 + torch.randn(len(ids), channels, pixels, generator=torch.Generator().manual_seed(seed)).double()
    w = omega[ids] / counts[ids]
    found, wanted = balanced_statistics(x, w), naive.loop_statistics(x.tolist(), w.tolist())
    for ours, twin in zip(found, wanted, strict=True):
        close(ours, torch.tensor(twin, dtype=torch.double), 1e-11)


@pytest.mark.parametrize("kappa", [0.25, 1.0])
def test_equals_the_published_layer_over_a_stream(kappa):
    """Outputs, gradients, running statistics and losses, through task 0, balanced batches and absent tasks."""
    ours, theirs = AdaB2N(bn(), T, kappa).double(), naive.PublishedAdaB2N(bn(), T, kappa)
    for step, (task, ids) in enumerate([(0, [0] * 7), (0, [0] * 7), (1, [1] * 7), (1, [0, 1] * 3 + [1]), (2, IDS)]):
        ids = torch.as_tensor(ids)
        begin_task(ours, task)
        theirs.task, theirs.ids = task, ids
        x, twin = images(seed=step, requires_grad=True), images(seed=step, requires_grad=True)
        g = images(seed=99)
        for module, inputs, y in ((ours, x, run(ours, x, ids)), (theirs, twin, theirs(twin))):
            loss = adaptation_loss(ours) if module is ours else module.loss
            module.zero_grad()
            ((y * g).sum() + 3 * loss).backward()
            module.seen = (y.detach(), loss.detach(), inputs.grad, module.weight.grad, module.bias.grad)
            module.seen += (module.running_mean, module.running_var)
        for a, b in zip(ours.seen, theirs.seen, strict=True):
            close(a, b, 1e-10)
        # In task 0 the only weight is 1 whatever psi is: its gradient vanishes here, and is missing there.
        close(ours.psi.grad, torch.zeros(T).double() if theirs.psi.grad is None else theirs.psi.grad, 1e-10)
        with torch.no_grad():
            for module in (ours, theirs):
                module.psi -= 0.1 * ours.psi.grad


# --- limits that are BatchNorm ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("case", ["one task", "psi = -30", "proportional", "no context"])
def test_batchnorm_is_a_limiting_case(case, affine):
    peer = bn(affine=affine)
    tasks = 1 if case == "one task" else T
    ours = AdaB2N(bn(affine=affine), tasks, kappa=1.0).double()
    begin_task(ours, tasks - 1)
    ours.psi.data = {
        "one task": torch.tensor([0.7]), "psi = -30": torch.full((T,), -30.0), "no context": torch.tensor([1.0, 0, 2]),
        "proportional": (IDS.bincount() * 5.0).double().log(),  # exp(psi) is: the frequencies stay
    }[case].double()  # fmt: skip
    x, twin = images(requires_grad=True), images(requires_grad=True)
    ids = torch.zeros(7, dtype=torch.long) if case == "one task" else IDS
    y, want = ours(x) if case == "no context" else run(ours, x, ids), peer(twin)
    close(y, want)
    y.backward(images(seed=1))
    want.backward(images(seed=1))
    close(x.grad, twin.grad)
    before = bn(affine=affine)
    close(ours.running_mean, peer.running_mean)
    n = x.numel() / 4
    close(ours.running_var - 0.9 * before.running_var, (peer.running_var - 0.9 * before.running_var) * (n - 1) / n)


def test_one_value_per_channel_has_no_variance():
    """As BatchNorm says; the running variance would fall by a tenth of itself each time."""
    ours, x = AdaB2N(bn(), 1, 1.0).double(), torch.ones(1, 4, 1, 1, dtype=torch.double)
    before = state(ours)
    for module in (ours, bn()):
        with pytest.raises(ValueError, match="xpected more than 1 value per channel when training, got .*1, 4, 1, 1"):
            module(x)
    assert same(state(ours), before)
    assert ours.eval()(x).isfinite().all() and ours.train()(x.expand(2, 4, 1, 1)).isfinite().all()


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_derivatives_under_functorch():
    """``torch.func.grad``, and of each of several batches by ``vmap``: as autograd, batch by batch."""
    xs = torch.stack([images(5, seed=s) for s in range(3)])
    w, g = torch.tensor([0.1, 0.3, 0.2, 0.2, 0.1]).double(), images(5, seed=9)
    scale, shift = images(2, seed=10)[:, :, 0, 0]

    def loss(x, w, scale, shift):
        y, mu, v = balanced_norm(x, w, scale, shift)
        return (y * g).sum() + mu.square().sum() + v.square().sum()

    found = torch.func.vmap(torch.func.grad(loss, (0, 1, 2, 3)), (0, None, None, None))(xs, w, scale, shift)
    for i, x in enumerate(xs):
        leaves = [t.clone().requires_grad_() for t in (x, w, scale, shift)]
        for ours, want in zip(found, torch.autograd.grad(loss(*leaves), leaves), strict=True):
            close(ours[i], want)


def test_eval_is_batchnorm_and_knows_no_psi():
    ours = layer(0.5)
    run(ours, images())
    ours.eval()
    x = images(seed=5)
    want = F.batch_norm(x, ours.running_mean, ours.running_var, ours.weight, ours.bias, False, 0.0, ours.eps)
    assert torch.equal(ours(x), want)
    with torch.no_grad():
        ours.psi.add_(5)
    assert torch.equal(ours(x), want)


def test_equal_weights_are_the_mean_of_the_task_means():
    x = images()
    omega = task_weights(torch.full((T,), 30.0), IDS.bincount())  # clamped to 20: still 5e8 against 4
    close(omega, torch.full((T,), 1 / 3), 1e-7)
    mu, _ = balanced_statistics(x, torch.full((7,), 1 / 3, dtype=torch.double) / IDS.bincount()[IDS])
    close(mu, torch.stack([x[t == IDS].mean((0, 2, 3)) for t in range(T)]).mean(0))


def test_rational_weights_are_repeated_samples():
    x, times = images(4), torch.tensor([1, 3, 2, 4])
    y, mu, v = balanced_norm(x, times.double() / 10)
    repeated = x.repeat_interleave(times, 0)
    peer = F.batch_norm(repeated, None, None, training=True)
    close(y.repeat_interleave(times, 0), peer)
    close(mu, repeated.mean((0, 2, 3)))
    close(v, repeated.var((0, 2, 3), correction=0))


def test_an_absent_task_keeps_its_weight_or_deals_it_out():
    psi, counts = torch.zeros(2, dtype=torch.double), torch.tensor([0, 9])
    close(task_weights(psi, counts), torch.tensor([1 / 11, 10 / 11], dtype=torch.double))
    close(task_weights(psi, counts, renormalize=True), torch.tensor([0.0, 1.0], dtype=torch.double))
    x, ids = images(), torch.ones(7, dtype=torch.long)
    shrunk, dealt = (AdaB2N(bn(), 2, 1.0, renormalize=r).double() for r in (False, True))
    for module in (shrunk, dealt):
        module.running_mean.zero_()
        begin_task(module, 1)
        run(module, x, ids)
    close(shrunk.running_mean, 0.1 * 8 / 9 * x.mean((0, 2, 3)))  # towards 0
    close(dealt.running_mean, 0.1 * x.mean((0, 2, 3)))
    w = torch.full((7,), 0.8 / 7, dtype=torch.double)
    mu, v = balanced_statistics(x, w)
    close(v, 0.8 * (x - mu[:, None, None]).square().mean((0, 2, 3)))  # around the mean that was shrunk


# --- step sizes and running statistics --------------------------------------------------------------------------------
@settings(max_examples=40, deadline=None)
@given(momentum=st.floats(0.01, 0.99), kappa=st.floats(0, 1))
def test_eta_solves_its_recursion(momentum, kappa):
    k = torch.arange(1, 401, dtype=torch.double)
    close(eta(k, momentum, kappa), torch.tensor(naive.loop_eta(momentum, kappa, 400), dtype=torch.double), 1e-10)


def test_eta_in_closed_cases():
    k = torch.arange(1, 2000)
    close(eta(k.double(), 0.1, 1.0), torch.full((1999,), 0.1, dtype=torch.double))
    close(eta(k, 0.1, 0.0), 1 / k)
    assert float(eta(10**7, 0.1, 0.5)) == pytest.approx(1 - 0.9**0.5, rel=1e-6)  # the limit 1 - a
    assert [round(float(eta(i, 0.1, 0.5)), 4) for i in (1, 2, 3, 4)] == [0.3162, 0.25, 0.2086, 0.1802]
    # small kappa is close to the mean, without cancellation, in float32
    assert_close(eta(k, 0.1, 1e-7), eta(k.double(), 0.1, 1e-7).float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kappa", [0.0, 0.25, 0.5, 1.0])
def test_running_statistics_weigh_batches_by_powers_of_a(kappa):
    ours = layer(kappa, momentum=0.3)
    old_mean, old_var = ours.running_mean.clone(), ours.running_var.clone()
    found = []
    for step in range(12):
        x = images(seed=step)
        run(ours, x)
        omega = task_weights(ours.psi.detach(), IDS.bincount())
        found.append(balanced_statistics(x, omega[IDS] / IDS.bincount()[IDS]))
    means, variances = (torch.stack(some) for some in zip(*found, strict=True))
    a = 0.7**kappa
    w = eta(torch.tensor(12.0).double(), 0.3, kappa) * a ** torch.arange(11, -1, -1).double()  # the last has eta_12
    left = 1 - w.sum()  # of what was there before
    close(ours.running_mean, left * old_mean + w @ means)
    close(ours.running_var, left * old_var + w @ variances)
    if kappa == 0:
        close(ours.running_mean, means.mean(0))
    assert ours.num_batches_tracked == 12


def test_checkpoint_continues_the_sequence():
    whole, first = layer(0.5), layer(0.5)
    for step in range(3):
        run(whole, images(seed=step))
        run(first, images(seed=step))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = AdaB2N(bn(seed=3), T, 0.5).double()
    second.load_state_dict(torch.load(file))
    for step in range(3, 6):
        run(whole, images(seed=step))
        run(second, images(seed=step))
    assert same(state(whole), state(second))
    assert second.seen_tasks == T and second.num_batches_tracked == 6


def test_a_trained_batchnorm_is_taken_over_and_counting_starts():
    source = bn()
    source(images())
    ours = AdaB2N(source, T, 0.0)
    assert ours.weight is source.weight and ours.bias is source.bias
    assert torch.equal(ours.running_mean, source.running_mean) and ours.running_mean is not source.running_mean
    assert source.num_batches_tracked == 1 and ours.num_batches_tracked == 0
    x = images(seed=1)
    ours(x)
    close(ours.running_mean, x.mean((0, 2, 3)))  # eta_1 = 1


# --- the loss that ties -----------------------------------------------------------------------------------------------
def test_loss_is_the_distance_to_the_updated_constants():
    ours, x = layer(0.5), images(requires_grad=True)
    run(ours, x)
    omega = task_weights(ours.psi, IDS.bincount())
    mu, v = balanced_statistics(x, omega[IDS] / IDS.bincount()[IDS])
    want = ((mu - ours.running_mean) ** 2).mean() + ((v - ours.running_var) ** 2).mean()
    close(adaptation_loss(ours), want)
    got, expected = (torch.autograd.grad(loss, (x, ours.psi)) for loss in (adaptation_loss(ours), want))
    for a, b in zip(got, expected, strict=True):
        assert a.abs().max() > 1e-4
        close(a, b)


def test_loss_sums_over_layers():
    net = convert(nn.Sequential(bn(), bn(seed=1)), T, 0.5)
    begin_task(net, T - 1)
    run(net, images())
    close(adaptation_loss(net), adaptation_loss(net[0]) + adaptation_loss(net[1]))


def test_two_forward_passes_before_one_backward():
    ours = layer(0.5)
    with task_batch(ours, IDS):
        losses = []
        for step in range(2):
            ours(images(seed=step))
            losses.append(adaptation_loss(ours))
    targets = [loss.item() for loss in losses]
    sum(losses).backward()
    assert targets == [loss.item() for loss in losses] and ours.psi.grad.abs().sum() > 0


# --- gradients --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(4, 2, 2, 3), (4, 3), (4, 2, 3), (1, 2, 1, 2)])
@pytest.mark.parametrize("sums_to", [1.0, 0.7])
def test_gradients_of_the_kernel(shape, sums_to):
    g = torch.Generator().manual_seed(0)
    x = 2 + torch.randn(shape, generator=g, dtype=torch.double)
    w = torch.rand(shape[0], generator=g, dtype=torch.double)
    w = sums_to * w / w.sum()
    scale, shift = (torch.randn(shape[1], generator=g, dtype=torch.double) for _ in range(2))
    inputs = [t.requires_grad_() for t in (x, w, scale, shift)]
    assert torch.autograd.gradcheck(balanced_norm, inputs)


def test_gradients_of_the_layer():
    ours = layer(0.5)

    def loss(x, psi, weight, bias):
        with task_batch(ours, torch.tensor([0, 1, 1])):  # task 2 is absent
            y = torch.func.functional_call(ours, {"psi": psi, "weight": weight, "bias": bias}, (x,))
        ours.num_batches_tracked.zero_()  # each call is the first; its target is a constant, so it is left out
        return y

    x = images(3, side=2, requires_grad=True)
    assert torch.autograd.gradcheck(loss, (x, ours.psi, ours.weight, ours.bias))


def test_jacobian_of_the_weights():
    psi, counts = torch.tensor([0.3, -1.0, 2.0], dtype=torch.double), torch.tensor([3, 0, 5])
    omega = task_weights(psi, counts)
    found = torch.autograd.functional.jacobian(lambda p: task_weights(p, counts), psi)
    total = (psi.exp() + counts).sum()
    close(found, psi.exp() / total * (torch.eye(3) - omega[:, None]))


def test_a_layer_whose_inputs_need_no_gradient():
    ours = layer()
    run(ours, images()).sum().backward()
    assert ours.bias.grad is not None and ours.psi.grad is not None
    frozen = layer().requires_grad_(False)
    x = images(requires_grad=True)
    run(frozen, x).square().sum().backward()
    assert x.grad is not None and frozen.psi.grad is None


# --- invariances and precision ----------------------------------------------------------------------------------------
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), shift=st.floats(-5, 5), scale=st.floats(0.1, 9))
def test_invariances(seed, shift, scale):
    x, w = images(seed=seed), task_weights(torch.tensor([0.3, -0.7, 1.1]), IDS.bincount())[IDS] / IDS.bincount()[IDS]
    w = w.double() / w.double().sum()
    mu, v = balanced_statistics(x, w)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(seed))
    for a, b in zip(balanced_statistics(x[order], w[order]), (mu, v), strict=True):
        close(a, b)
    moved, same_v = balanced_statistics(x + shift, w)
    close(moved, mu + shift)
    close(same_v, v, 1e-11)
    larger = balanced_statistics(scale * x, w)
    close(larger[0], scale * mu, 1e-11)
    close(larger[1].sqrt(), scale * v.sqrt(), 1e-11)


@pytest.mark.parametrize("sums_to", [1.0, 0.8])
@pytest.mark.parametrize("far", [1e2, 1e4])
def test_a_large_mean_costs_no_digits(far, sums_to):
    """Against two passes in float64 over the same float32 numbers."""
    x = (images() + far).float()
    w = torch.full((7,), sums_to / 7)
    mu, v = balanced_statistics(x, w)
    exact = x.double()
    mean = sums_to * exact.mean((0, 2, 3))
    var = sums_to * (exact - mean[:, None, None]).square().mean((0, 2, 3))
    assert_close(mu.double(), mean, rtol=1e-6, atol=0)
    # The error grows as far * eps, that of rounding the mean; E x^2 - (E x)^2 as its square: no digit left at 1e4.
    assert_close(v.double(), var, rtol=3e-7 * far, atol=0)
    y, want = (F.batch_norm(x.to(t.dtype), None, None, training=True) for t in (x, exact))
    ours = balanced_norm(x, torch.full((7,), 1 / 7))[0]
    assert (ours - want).abs().max() < 2 * (y - want).abs().max() + 1e-4  # no worse than BatchNorm in float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    x = 300 * images(dtype=torch.float32)  # squares beyond 65504
    ours = layer().float()
    want = run(ours, x.to(dtype).float())
    half = layer().float().to(dtype)
    half.weight.data, half.bias.data = ours.weight.data.to(dtype), ours.bias.data.to(dtype)
    got = run(half, x.to(dtype))
    assert got.dtype == dtype
    assert_close(got.float(), want, rtol=0.02, atol=0.02)  # of the output's and the parameters' rounding
    mixed = layer().float()  # float32 layer, half input, as under autocast
    assert torch.equal(run(mixed, x.to(dtype)), want.to(dtype))
    assert torch.equal(mixed.running_mean, ours.running_mean)


def test_autocast_leaves_the_statistics_alone():
    a, b, x = layer().float(), layer().float(), images(dtype=torch.float32)
    y = run(a, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(run(b, x), y)
    assert same(state(a), state(b))


def test_any_memory_layout_and_1d_and_3d():
    x = images()
    a, b = layer(), layer()
    close(run(a, x), run(b, x.to(memory_format=torch.channels_last)))
    y = run(a, x)
    g = images(seed=1)
    first = torch.autograd.grad((y * g).sum(), a.weight, retain_graph=True)[0]
    channels_last = torch.autograd.grad(y, a.weight, g.to(memory_format=torch.channels_last))[0]
    close(first, channels_last)
    for kind, shape in ((nn.BatchNorm1d, (7, 4)), (nn.BatchNorm1d, (7, 4, 5)), (nn.BatchNorm3d, (7, 4, 2, 2, 2))):
        peer = kind(4, dtype=torch.double)
        ours = AdaB2N(copy.deepcopy(peer), 1, 1.0).double()
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.double)
        close(ours(x), peer(x))


def test_huge_psi_does_not_overflow():
    for dtype in (torch.float16, torch.float32):
        omega = task_weights(torch.tensor([1000.0, 0.0], dtype=dtype), torch.tensor([3, 4]))
        assert omega.isfinite().all() and omega[0] > 0.99 and omega.dtype == torch.float32


# --- no side effects --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_a_broken_batch_leaves_no_trace(value):
    ours = layer(0.5)
    run(ours, images())
    before = state(ours)
    x = images(dtype=torch.float32)
    x[3, 1, 0, 0] = value  # 1e30: its square overflows
    run(ours, x)
    assert same(before, state(ours))
    run(ours, images(seed=1))
    assert not same(before, state(ours)) and all(t.isfinite().all() for t in ours.state_dict().values())


def test_measuring_changes_nothing():
    net = net_of(0.5)
    tasks = stream()
    net.eval()
    before = state(net)
    evaluate(net, tasks)
    with task_batch(net, torch.zeros(5, dtype=torch.long)):
        net(tasks[0].test.x[:5])
    assert same(before, state(net)) and not any(m.training for m in net.modules())


def test_wrong_batch_size_is_refused_before_any_change():
    ours = layer(0.5)
    before = state(ours)
    with pytest.raises(ValueError, match="expected the 7 samples that task_batch was told of, got 5"):
        run(ours, images(5))
    assert same(before, state(ours))
    with pytest.raises(ValueError, match=r"x: expected a batch \(B, 4, ...\), got shape \(7, 3, 3, 3\)"):
        run(ours, images(7, c=3))
    with pytest.raises(ValueError, match="expected a batch"):
        ours(torch.zeros(0, 4, 2, 2))
    assert same(before, state(ours))
    run(ours, images())  # the failure cleared the context


def test_context_ends_with_its_block():
    a, b, x = layer(0.5), layer(0.5), images()
    run(a, x)
    y = a(images(5, seed=1))  # outside: a plain batch of any size
    assert not torch.equal(run(b, x), b(x))
    close(y, F.batch_norm(images(5, seed=1), None, None, a.weight, a.bias, training=True))
    with pytest.raises(ZeroDivisionError), task_batch(a, IDS):
        raise ZeroDivisionError
    a(images(5))


def test_one_inside_another_is_refused():
    net = convert(nn.Sequential(bn(), bn(seed=1)), T, 0.5)
    begin_task(net, T - 1)
    with task_batch(net, IDS):
        with pytest.raises(RuntimeError, match="one inside another"), task_batch(net[1], IDS):
            pass
        net(images())  # the outer one is still there


def test_copies_and_pickles_leave_a_step_under_way_behind():
    ours = layer(0.5)
    with task_batch(ours, IDS):
        ours(images(requires_grad=True))
        twin = copy.deepcopy(ours)  # a graph could not be copied
        file = io.BytesIO()
        torch.save(ours, file)
        assert adaptation_loss(ours) > 0
    assert same(state(ours), state(twin))
    twin(images(5))
    with pytest.raises(RuntimeError, match="adaptation_loss: expected a forward pass in train mode"):
        adaptation_loss(layer())


def test_loss_of_an_earlier_batch_is_forgotten():
    ours = layer(0.5)
    run(ours, images())
    with task_batch(ours, IDS), pytest.raises(RuntimeError, match="expected a forward pass"):
        adaptation_loss(ours)


# --- conversion -------------------------------------------------------------------------------------------------------
def test_convert_replaces_every_layer_in_place():
    net = SmallCNN(width=2)
    shared = nn.BatchNorm2d(2)
    net.one = net.two = shared
    weights = {id(p) for p in net.parameters()}
    assert convert(net, 5, 0.5) is net
    kinds = [type(m) for m in net.modules()]
    assert nn.BatchNorm2d not in kinds and kinds.count(AdaB2N) == 6 and net.one is net.two
    assert weights <= {id(p) for p in net.parameters()}
    assert net.stages[0][1].psi.shape == (5,) and "psi" not in str([n for n, _ in net.named_buffers()])
    assert isinstance(convert(nn.BatchNorm2d(3), 2, 1.0), AdaB2N)
    assert not convert(SmallCNN(width=2).eval(), 2, 1.0).stages[0][1].training


def test_convert_changes_nothing_when_it_fails():
    net = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(2, momentum=None))
    with pytest.raises(ValueError, match="running statistics and a momentum"):
        convert(net, 2, 0.5)
    assert isinstance(net[0], nn.BatchNorm2d)


@pytest.mark.parametrize(
    ("args", "error", "match"),
    [
        ((nn.LayerNorm(3), 2, 0.5), TypeError, "layer: expected a BatchNorm layer .*got LayerNorm"),
        ((nn.SyncBatchNorm(3), 2, 0.5), TypeError, "got SyncBatchNorm"),
        ((nn.BatchNorm2d(3, track_running_stats=False), 2, 0.5), ValueError, "running statistics"),
        ((nn.BatchNorm2d(3, momentum=1.0), 2, 0.5), ValueError, r"a momentum in \(0, 1\)"),
        ((nn.BatchNorm2d(3), 0, 0.5), ValueError, "tasks: expected an integer >= 1, got 0"),
        ((nn.BatchNorm2d(3), 2, 1.5), ValueError, r"kappa: expected a finite number in \[0, 1\], got 1.5"),
        ((nn.BatchNorm2d(3), 2, math.nan), ValueError, "kappa"),
    ],
)
def test_layers_that_are_refused(args, error, match):
    with pytest.raises(error, match=match):
        AdaB2N(*args)


def test_bad_task_numbers_are_refused():
    ours = layer(seen=2)
    before = state(ours)
    for ids, match in (([0, 2], "numbers from 0 to 1, the task begun, got 0 to 2"), ([-1, 0], "got -1 to 0")):
        with pytest.raises(ValueError, match=match):
            run(ours, images(2), torch.tensor(ids))
    with pytest.raises(TypeError, match="task_ids: expected integers, got torch.float32"):
        run(ours, images(2), torch.zeros(2))
    for ids in (torch.zeros(2, 1, dtype=torch.long), torch.zeros(0, dtype=torch.long)):
        with pytest.raises(ValueError, match="task_ids: expected one for each sample"):
            run(ours, images(2), ids)
    for task in (-1, T):
        with pytest.raises(ValueError, match="task: expected a number from 0 to 2"):
            begin_task(ours, task)
    with pytest.raises(ValueError, match="model: expected AdaB2N layers"):
        begin_task(nn.Linear(1, 1), 0)
    assert same(before, state(ours))


# --- every hyper-parameter changes the result -------------------------------------------------------------------------
def test_psi_kappa_momentum_and_renormalize_matter():
    x, absent = images(), torch.tensor([0, 0, 1, 1, 1, 1, 1])
    assert not torch.equal(run(layer(), x), run(layer(psi=(0.3, -0.7, 2.0)), x))
    running = []
    for kappa, momentum in ((1.0, 0.1), (0.5, 0.1), (0.5, 0.3)):
        ours = layer(kappa, momentum=momentum)
        run(ours, x)
        running.append(ours.running_mean)
    assert not torch.equal(running[0], running[1]) and not torch.equal(running[1], running[2])
    a, b = layer(), layer()
    b.renormalize = True
    assert not torch.equal(run(a, x, absent), run(b, x, absent)) and torch.equal(run(a, x), run(b, x))


# --- rehearsal --------------------------------------------------------------------------------------------------------
def stream(per_class: int = 20, tasks: int = 5) -> list[Task]:
    found = class_incremental(load("fashion8k"), tasks, per_class=per_class)

    def small(split: Split) -> Split:
        return Split(F.avg_pool2d(split.x, 2), split.y)

    return [Task(t.names, t.classes, small(t.train), small(t.val), small(t.test)) for t in found]


def net_of(kappa: float | None, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = SmallCNN(width=4)
    return net if kappa is None else convert(net, 5, kappa)


RULES = {
    "ER": lambda: ER(Reservoir(30)), "DER++": lambda: DERpp(Reservoir(30)), "ER-ACE": lambda: ERACE(Reservoir(30)),
    "fine-tuning": FineTune,
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_a_rule_tells_the_tasks_and_adds_the_loss(name):
    tasks, net, rule = stream(), net_of(0.5), RULES[name]()
    seen: list[tuple[int, list[int]]] = []
    inner = rule.forward

    def spy(model, x, y):
        ids, counts, each = model.stages[0][1]._batch
        assert torch.equal(ids, y // 2) and torch.equal(each, counts[ids]) and len(x) == len(y)
        seen.append((int(model.stages[0][1].seen_tasks), counts.tolist()))
        return inner(model, x, y)

    rule.forward = spy
    learn(net, tasks, rule, lr=0.03, before=balance(rule, net, tasks, 0.1))
    assert {s for s, _ in seen} == {1, 2, 3, 4, 5} and all(len(c) == s for s, c in seen)
    mixed = any(sum(n > 0 for n in c) > 1 for _, c in seen)
    assert mixed == (name != "fine-tuning")
    layers = [m for m in net.modules() if isinstance(m, AdaB2N)]
    assert all(int(m.num_batches_tracked) == len(seen) and m._batch is None for m in layers)
    if mixed:
        assert all(m.psi.abs().max() > 0 for m in layers)


def test_psi_of_tasks_to_come_does_not_move():
    tasks, net, rule = stream(), net_of(0.5), DERpp(Reservoir(30))
    learn(net, tasks[:3], rule, lr=0.05, before=balance(rule, net, tasks, 1.0))
    for m in net.modules():
        if isinstance(m, AdaB2N):
            assert (m.psi[:3] != 0).all() and (m.psi[3:] == 0).all()


def test_strength_and_start_matter_and_add_what_they_say():
    tasks, finals = stream(), {}
    for strength, start in ((0.0, 0), (0.5, 0), (0.5, 1), (0.5, 9)):
        net, rule = net_of(0.5), DERpp(Reservoir(30))
        learn(net, tasks[:2], rule, lr=0.03, before=balance(rule, net, tasks, strength, start))
        finals[strength, start] = torch.cat([p.detach().flatten() for p in net.parameters()])
    assert torch.equal(finals[0.0, 0], finals[0.5, 9])
    values = [finals[0.0, 0], finals[0.5, 0], finals[0.5, 1]]
    assert not any(torch.equal(a, b) for i, a in enumerate(values) for b in values[:i])
    net, rule = net_of(0.5), FineTune()
    rule.regulariser = lambda model: 7.0  # one that was there stays
    balance(rule, net, tasks, 0.5)(0)
    x, y = tasks[0].train.x[:10], tasks[0].train.y[:10]
    logits = rule.forward(net, x, y)
    close(rule.regulariser(net), 7 + 0.5 * adaptation_loss(net))
    assert logits.shape == (10, 10)


def test_in_task_0_with_kappa_1_the_network_is_batchnorm():
    """To the first difference there may be: balanced weights need a second task."""
    tasks = stream()
    plain, net = net_of(None), net_of(1.0)
    rules = DERpp(Reservoir(30)), DERpp(Reservoir(30))
    learn(plain, tasks[:1], rules[0], lr=0.03)
    learn(net, tasks[:1], rules[1], lr=0.03, before=balance(rules[1], net, tasks, 0.0))
    for (name, a), b in zip(
        plain.named_parameters(), (p for n, p in net.named_parameters() if "psi" not in n), strict=True
    ):
        assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)  # 4 steps in float32, the same sums in another order


def test_bad_rules_are_refused_and_left_alone():
    tasks, net = stream(), net_of(0.5)
    rule = DERpp(Reservoir(30), forwards="each")
    before = rule.forward
    with pytest.raises(ValueError, match='rule: expected forwards="one"'):
        balance(rule, net, tasks, 0.1)
    rule = DERpp(Reservoir(30))
    before = rule.forward
    for strength in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="strength: expected a finite number >= 0"):
            balance(rule, net, tasks, strength)
    with pytest.raises(ValueError, match="model: expected AdaB2N layers"):
        balance(rule, SmallCNN(), tasks, 0.1)
    again = domain_incremental(load("digits"), load("digits"))
    with pytest.raises(ValueError, match=r"tasks: expected new classes in each, got .*\(0, 10\), range\(0"):
        balance(rule, net, again, 0.1)
    with pytest.raises(ValueError, match="tasks: expected classes from 0 on without a gap, got"):
        balance(rule, net, tasks[1:], 0.1)
    with pytest.raises(ValueError, match="model: expected layers for 5 tasks, got 3"):
        balance(rule, convert(SmallCNN(), 3, 0.5), tasks, 0.1)
    assert rule.forward is before


def test_weight_decay_spares_psi():
    net = net_of(0.5)
    net.fc.requires_grad_(False)
    groups = parameter_groups(net, 0.1)
    every = [p for g in groups for p in g["params"]]
    assert len(every) == len({id(p) for p in every}) == sum(p.requires_grad for p in net.parameters())
    layers = [m for m in net.modules() if isinstance(m, AdaB2N)]
    for m in layers:
        m.psi.data.fill_(1.0)
    optimizer = torch.optim.SGD(groups, lr=0.1)
    for p in every:
        p.grad = torch.zeros_like(p)
    before = net.stages[0][0].weight.detach().clone()
    optimizer.step()
    assert all((m.psi == 1).all() for m in layers)
    assert_close(net.stages[0][0].weight, 0.99 * before)


def test_the_norm_under_vmap() -> None:
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(3, 5, 2, 4, generator=g).double(), torch.rand(5, generator=g).double()

    def loss(x: Tensor, w: Tensor) -> Tensor:
        y, mu, v = balanced_norm(x, w)
        return y.pow(3).sum() + mu.square().sum() + v.sum()

    got = torch.func.vmap(torch.func.grad(loss, (0, 1)), (0, None))(x, w)
    for n, one in enumerate(x):
        assert_close([part[n] for part in got], list(torch.func.grad(loss, (0, 1))(one, w)))
