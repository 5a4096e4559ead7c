"""CoTTA: the published schedule as twin, closed forms of its parts, limiting cases, broken input, the contract."""

from __future__ import annotations

import copy
import functools
import itertools
import math

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from peftref.tta import cotta
from peftref.tta.baselines.bn_adapt import BNAdapt
from peftref.tta.baselines.tent import entropy
from peftref.tta.core.views import RandomViews
from peftref.tta.cotta import CoTTA, confidence, consistency_loss, ema, restoration_mask, restore
from tests._naive import cotta as naive

SGD = functools.partial(torch.optim.SGD, momentum=0.9, nesterov=True)
ALWAYS, NEVER = 2.0, 0.0


def network(seed: int = 0, dtype: torch.dtype = torch.double, norm=nn.BatchNorm2d) -> nn.Sequential:
    """Convolutions without bias: before BatchNorm its gradient is pure rounding, which Adam would blow up."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2, bias=False), norm(4), nn.ReLU(),
            nn.Conv2d(4, 6, 3, bias=False), norm(6), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5),
        )  # fmt: skip
        for p in net[1].parameters():
            nn.init.normal_(p, 1.0, 0.3)
        nn.init.normal_(net[-1].weight, 0.0, 1.0)
    return net.to(dtype).eval()


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(2, channels)


def images(n: int = 8, seed: int = 0, dtype: torch.dtype = torch.double, channels: int = 1, size: int = 12) -> Tensor:
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def logits(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def tensors(model: nn.Module) -> list[Tensor]:
    return [t.detach().clone() for t in model.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def state(method: nn.Module) -> tuple:
    """Everything ``reset()`` promises to restore, and what no batch may change in a user's model."""
    optimizer = getattr(method, "optimizer", None)
    generators = (getattr(owner, "generator", None) for owner in (method, getattr(method, "views", None)))
    return (
        {k: v.clone() for k, v in method.state_dict().items()},
        [m.training for m in method.modules()],
        [(name, p.requires_grad, p.grad is None, p.dtype) for name, p in method.named_parameters()],
        optimizer and copy.deepcopy(optimizer.state_dict()),
        [g.get_state() for g in generators if g],
    )


def equal(a: object, b: object) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


class Uniform:
    """The draws of the masks, tensor by tensor, from a sequence of the same seed as the module's."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, shape: torch.Size) -> Tensor:
        return torch.rand(shape, generator=self.generator)


class Fixed:
    """The same few views of every batch, in turn; counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        return (x * (1 + 0.1 * (self.calls % 3)) + 0.05 * (self.calls % 2)).clamp(0, 1)


def brightness(x: Tensor) -> Tensor:
    return x * 0.7


# --- the published schedule -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "options",
    [
        {"threshold": ALWAYS},
        {"threshold": ALWAYS, "symmetric": True, "restore_p": 0.3, "momentum": 0.9},
        {"threshold": ALWAYS, "steps": 2, "n_views": 3, "lr": 1e-2},
        {"threshold": NEVER, "symmetric": True, "lr": 0.05, "optimizer": SGD},
        {"threshold": ALWAYS, "restore_p": 1.0},
        {"threshold": ALWAYS, "restore_p": 0.0, "momentum": 0.0},
    ],
)
def test_equals_the_published_schedule(options):
    """Six batches: every answer, and student, teacher, anchor at the end. The same views and draws on both sides."""
    options = {"n_views": 4, "restore_p": 0.05} | options
    net = network()
    ours = CoTTA(net, views=RandomViews(7), seed=3, **options)
    peer = naive.PublishedCoTTA(net, views=RandomViews(7), uniform=Uniform(3), **options)
    for seed in range(6):
        x = images(seed=seed)
        assert_close(ours(x), peer.step(x), rtol=1e-8, atol=1e-9)
    for a, b in ((ours.student, peer.student), (ours.teacher, peer.teacher), (ours.source, peer.anchor)):
        assert_close(tensors(a), tensors(b), rtol=1e-8, atol=1e-9)
    moved = max((p - q).abs().max() for p, q in zip(ours.student.parameters(), ours.source.parameters(), strict=True))
    assert (moved == 0) == (options["restore_p"] == 1)


def test_augments_exactly_the_batches_the_published_code_does():
    """Batches of growing contrast straddle the threshold: the same decisions, views drawn for half of them only."""
    net = network()
    batches = [images(seed=s) * (0.1 + 0.15 * s) for s in range(6)]
    each = [confidence(BNAdapt(net)(x)).item() for x in batches]
    threshold = sum(sorted(each)[2:4]) / 2  # three batches on either side
    options = {"n_views": 4, "threshold": threshold, "optimizer": torch.optim.SGD, "lr": 0.05, "restore_p": 0.05}
    used = []
    ours = CoTTA(net, views=lambda x: used.append(1) or brightness(x), seed=1, **options)
    peer = naive.PublishedCoTTA(net, views=brightness, uniform=Uniform(1), **options)
    for x, c in zip(batches, each, strict=True):
        used.clear()
        assert_close(ours(x), peer.step(x), rtol=1e-8, atol=1e-10)
        assert len(used) == (4 if c < threshold else 0)
    assert peer.augmented == [c < threshold for c in each] and sum(peer.augmented) == 3
    assert_close(tensors(ours.student), tensors(peer.student), rtol=1e-8, atol=1e-10)


def test_plain_teacher_pass_runs_only_when_used():
    passes = []
    for threshold in (NEVER, ALWAYS):
        method = CoTTA(network(), n_views=3, threshold=threshold, views=brightness)
        ran = []
        for name in ("source", "teacher", "student"):
            getattr(method, name).register_forward_hook(lambda *_, ran=ran, name=name: ran.append(name))
        method(images())
        passes.append(ran)
    assert passes == [["teacher", "student"], ["source", "teacher", "teacher", "teacher", "student"]]


# --- oracles ----------------------------------------------------------------------------------------------------------
def test_without_average_the_teacher_is_the_student_before_its_restoration(monkeypatch):
    """Oracle 1a: m = 0, no views. The next answer is that student's, not the restored one's."""
    method = CoTTA(network(), momentum=0.0, restore_p=0.5, n_views=0, symmetric=True, lr=0.1, optimizer=SGD)
    unrestored = []
    draw = cotta.restoration_mask

    def spy(params, p, generator):
        unrestored.append([t.detach().clone() for t in params])
        return draw(params, p, generator)

    monkeypatch.setattr(cotta, "restoration_mask", spy)
    for seed in range(4):
        method(images(seed=seed))
        assert same(tensors(method.teacher), unrestored[-1])
        assert not same(tensors(method.student), unrestored[-1])


@pytest.mark.parametrize("options", [{"n_views": 0}, {"threshold": ALWAYS, "n_views": 2}])
def test_certain_restoration_keeps_the_student_at_the_source(options):
    """Oracle 1b: r = 1, bit for bit, however large the steps."""
    method = CoTTA(network(), restore_p=1.0, lr=3.0, symmetric=True, momentum=0.9, **options)
    source = tensors(method.source)
    for seed in range(3):
        method(images(seed=seed))
        assert same(tensors(method.student), source)
        assert not same(tensors(method.teacher), source)


@pytest.mark.parametrize("symmetric", [False, True])
def test_zero_lr_is_bn_adapt(symmetric):
    """Oracle 2: teacher = student = source for all t, through every average and restoration."""
    method, bn = CoTTA(network(), lr=0.0, threshold=NEVER, symmetric=symmetric), BNAdapt(network())
    for seed in range(4):
        assert torch.equal(method(images(seed=seed)), bn(images(seed=seed)))
    assert same(tensors(method.student), tensors(method.source))
    assert same(tensors(method.teacher), tensors(method.source))


def test_plain_loss_without_views_never_moves():
    """Oracle 3a: agreement of student and teacher is a fixed point of the cross-entropy, for ever."""
    method = CoTTA(network(), lr=0.1, threshold=NEVER, optimizer=SGD)
    bn = BNAdapt(network())
    for seed in range(20):
        assert_close(method(images(seed=seed)), bn(images(seed=seed)), rtol=0, atol=1e-10)
    assert_close(tensors(method.student), tensors(method.source), rtol=0, atol=1e-10)


def test_first_step_of_the_symmetric_loss_is_half_of_tents():
    """Oracle 3b: one SGD step against autograd of half the mean entropy."""
    method = CoTTA(network(), lr=0.5, restore_p=0.0, symmetric=True, threshold=NEVER, optimizer=torch.optim.SGD)
    params = list(copy.deepcopy(method.student).parameters())
    net = copy.deepcopy(method.student)
    loss = 0.5 * entropy(net(images())).mean()
    gradients = torch.autograd.grad(loss, list(net.parameters()))
    method(images())
    expected = [p - 0.5 * g for p, g in zip(params, gradients, strict=True)]
    assert_close(list(method.student.parameters()), expected, rtol=0, atol=1e-12)
    assert max(g.abs().max() for g in gradients) > 1e-3


@pytest.mark.parametrize("momentum", [0.0, 0.7, 0.999, 1.0])
def test_average_in_closed_form(momentum):
    """Oracle 4: m^t theta_0 + (1 - m) sum_s m^(t-s) theta_s, in one call and along a run with restoration off."""
    options = {"restore_p": 0.0, "n_views": 2, "threshold": ALWAYS, "lr": 0.05}
    method = CoTTA(network(), momentum=momentum, **options)
    students, steps = [], 5
    for seed in range(steps):
        method(images(seed=seed))
        students.append(tensors(method.student))
    for i, (teacher, start) in enumerate(zip(method.teacher.parameters(), tensors(method.source), strict=True)):
        tail = sum(momentum ** (steps - 1 - s) * students[s][i] for s in range(steps))
        assert_close(teacher.detach(), momentum**steps * start + (1 - momentum) * tail, rtol=1e-10, atol=1e-12)
    old, new = tensors(network(0)), tensors(network(1))
    kept = [t.clone() for t in old]
    expected = [momentum * a + (1 - momentum) * b for a, b in zip(old, new, strict=True)]
    assert_close(ema(old, new, momentum), expected, rtol=1e-13, atol=1e-15)
    assert same(old, kept)


def test_average_filters_the_noise_of_the_steps():
    """White noise of variance s^2 leaves the teacher with s^2 (1 - m) / (1 + m)."""
    m, g = 0.9, torch.Generator().manual_seed(0)
    teacher, seen = [torch.zeros(4000, dtype=torch.double)], []
    for t in range(200):
        teacher = ema(teacher, [torch.randn(4000, generator=g, dtype=torch.double)], m)
        if t >= 100:
            seen.append(teacher[0].var().item())
    assert sum(seen) / len(seen) == pytest.approx((1 - m) / (1 + m), rel=0.05)


@pytest.mark.parametrize("p", [0.001, 0.01, 0.3, 0.9])
def test_restoration_is_binomial(p):
    """Oracle 5: fraction of scalars back at the source, within 5 sigma, in each of three tensors and over all."""
    source = [torch.zeros(300, 400), torch.zeros(20_000), torch.zeros(50, 30, 5, 5)]
    out = restore([t + 1 for t in source], source, p, torch.Generator().manual_seed(0))
    assert all(((t == 0) | (t == 1)).all() for t in out)
    for t in (*out, torch.cat([t.flatten() for t in out])):
        n = t.numel()
        assert abs((t == 0).sum().item() - n * p) < 5 * math.sqrt(n * p * (1 - p))


def test_drift_stays_below_its_predicted_level():
    """A step g each time, then restoration: the mean distance settles at (1 - r) |g| / r instead of growing with t."""
    r, g, generator = 0.05, 0.1, torch.Generator().manual_seed(0)
    theta, source = [torch.zeros(20_000)], [torch.zeros(20_000)]
    for _ in range(200):
        theta = restore([theta[0] + g], source, r, generator)
    level = (1 - r) * g / r
    # geometric waiting times: standard deviation g sqrt(1 - r) / r
    assert theta[0].mean().item() == pytest.approx(level, abs=5 * g * math.sqrt(1 - r) / r / math.sqrt(20_000))


@pytest.mark.parametrize("symmetric", [False, True])
def test_gradient_of_the_loss_in_closed_form(symmetric):
    """Oracle 6: (p - q) / B, and the symmetric formula with its pull towards the teacher's modes."""
    z, target = logits(6, 4).requires_grad_(), logits(6, 4, seed=1)
    (gradient,) = torch.autograd.grad(consistency_loss(z, target, symmetric), z)
    p, q = z.detach().softmax(-1), target.softmax(-1)
    expected = (p - q) / 6
    if symmetric:
        surprise = -q.log()
        expected = (p - q + p * (surprise - (p * surprise).sum(-1, keepdim=True))) / 12
    assert_close(gradient, expected, rtol=1e-12, atol=1e-14)


def test_copies_share_no_storage_and_only_the_student_learns():
    """Oracle 7."""
    net = network()
    method = CoTTA(net, n_views=2, threshold=ALWAYS)
    method(images())
    parts = {"net": net, "source": method.source, "teacher": method.teacher, "student": method.student}
    for (_, a), (_, b) in itertools.combinations(parts.items(), 2):
        storages = {t.untyped_storage().data_ptr() for t in a.parameters()}
        assert not storages & {t.untyped_storage().data_ptr() for t in b.parameters()}
    assert not any(p.requires_grad for part in (method.source, method.teacher) for p in part.parameters())
    assert all(p.requires_grad and p.grad is None for p in method.student.parameters())
    for name, part in parts.items():
        others = {k: tensors(v) for k, v in parts.items() if k != name}
        with torch.no_grad():
            for p in part.parameters():
                p.add_(1)
        assert all(same(tensors(parts[k]), before) for k, before in others.items())


def test_identity_views_are_the_plain_teacher():
    """Oracle 8: a mean of equal logits."""
    options = {"symmetric": True, "optimizer": SGD, "lr": 0.1, "n_views": 4}  # a power of two: the mean is exact
    viewed = CoTTA(network(), threshold=ALWAYS, views=lambda x: x, **options)
    plain = CoTTA(network(), threshold=NEVER, **options)
    for seed in range(4):
        assert torch.equal(viewed(images(seed=seed)), plain(images(seed=seed)))
    assert same(tensors(viewed.student), tensors(plain.student))


def test_order_of_the_samples_does_not_matter():
    """Oracle 9: with the same masks and views the answers permute."""
    a, b = (CoTTA(network(), threshold=ALWAYS, n_views=3, views=Fixed(), lr=1e-2) for _ in range(2))
    for seed in range(4):
        order = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
        assert_close(b(images(seed=seed)[order]), a(images(seed=seed))[order], rtol=1e-8, atol=1e-9)


# --- the kernels ------------------------------------------------------------------------------------------------------
@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 6), classes=st.integers(1, 6), symmetric=st.booleans(), scale=st.sampled_from([0.1, 1.0, 30.0]),
    seed=st.integers(0, 999), dtype=st.sampled_from([torch.double, torch.float, torch.bfloat16, torch.half]),
)  # fmt: skip
def test_loss_and_confidence_equal_the_loops(n, classes, symmetric, scale, seed, dtype):
    z, t = (logits(n, classes, seed=seed + i, scale=scale).to(dtype) for i in (0, 1000))
    loss, sure = consistency_loss(z, t, symmetric), confidence(z)
    assert loss.dtype == sure.dtype == (dtype if dtype == torch.double else torch.float)
    rtol = 1e-10 if dtype == torch.double else 1e-4
    expected = naive.loop_consistency(z.tolist(), t.tolist(), symmetric)
    assert_close(loss.double(), torch.tensor(expected, dtype=torch.double), rtol=rtol, atol=1e-5)
    assert_close(sure.double(), torch.tensor(naive.loop_confidence(z.tolist()), dtype=torch.double), rtol=rtol, atol=0)


@pytest.mark.parametrize("symmetric", [False, True])
def test_gradients_by_finite_differences(symmetric):
    z, t = logits(3, 4).requires_grad_(), logits(3, 4, seed=1)
    assert torch.autograd.gradcheck(lambda z: consistency_loss(z, t, symmetric), z)
    assert torch.autograd.gradgradcheck(lambda z: consistency_loss(z, t, symmetric), z)


def test_the_target_is_a_constant():
    z, t = logits(3, 4).requires_grad_(), logits(3, 4, seed=1).requires_grad_()
    consistency_loss(z, t, symmetric=True).backward()
    assert t.grad is None and z.grad is not None


@pytest.mark.parametrize("symmetric", [False, True])
def test_extreme_logits_give_finite_losses_and_gradients(symmetric):
    z = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    loss = consistency_loss(z, -z, symmetric)
    loss.backward()
    assert loss.isfinite() and z.grad.isfinite().all()


@settings(max_examples=25, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(1, 7), min_size=0, max_size=3), min_size=1, max_size=5),
    p=st.sampled_from([0.0, 0.2, 0.5, 1.0]), seed=st.integers(0, 999),
    dtype=st.sampled_from([torch.double, torch.float, torch.bfloat16]),
)  # fmt: skip
def test_one_flat_draw_is_the_draws_tensor_by_tensor(shapes, p, seed, dtype):
    params = [(logits(*s, seed=seed + i)).to(dtype) for i, s in enumerate(shapes)]
    source = [t + 1 for t in params]
    kept = [t.clone() for t in params]
    masks = restoration_mask(params, p, torch.Generator().manual_seed(seed))
    uniform = Uniform(seed)
    assert all(torch.equal(m.bool(), uniform(t.shape) < p) for m, t in zip(masks, params, strict=True))
    out = restore(params, source, p, torch.Generator().manual_seed(seed))
    for new, old, back, mask in zip(out, params, source, masks, strict=True):
        assert torch.equal(new, torch.where(mask.bool(), back, old)) and new.dtype == dtype
    assert same(params, kept)


def test_restore_without_a_generator_uses_torchs():
    source, shifted = [torch.zeros(500)], [torch.ones(500)]
    with torch.random.fork_rng():
        torch.manual_seed(5)
        a = restore(shifted, source, 0.5)
        torch.manual_seed(5)
        b = restore(shifted, source, 0.5)
        c = restore(shifted, source, 0.5)
    assert same(a, b) and not same(a, c)


def test_lists_of_different_length_are_refused():
    with pytest.raises(ValueError):
        ema([torch.ones(2)], [torch.ones(2)] * 2, 0.5)
    with pytest.raises(ValueError):
        restore([torch.ones(2)], [torch.ones(2)] * 2, 0.5)


# --- edge cases -------------------------------------------------------------------------------------------------------
def test_batch_of_one_is_refused_with_batchnorm_only():
    method = CoTTA(network())
    before = state(method)
    with pytest.raises(ValueError, match="x: expected at least 2 samples.* got 1"):
        method(images(1))
    assert equal(state(method), before)
    assert CoTTA(network(norm=group_norm), n_views=2)(images(1)).shape == (1, 5)


@pytest.mark.parametrize("dtype", [torch.float, torch.bfloat16])
def test_empty_batch_answers_nothing_and_changes_nothing(dtype):
    method = CoTTA(network(dtype=dtype), n_views=2)
    method(images(dtype=dtype))
    before = state(method)
    out = method(images(0, dtype=dtype))
    assert out.shape == (0, 5) and out.dtype == dtype
    assert equal(state(method), before)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, group_norm])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("threshold", [NEVER, ALWAYS])
def test_broken_batch_leaves_everything_as_it_was(norm, value, threshold):
    method = CoTTA(network(norm=norm), n_views=2, threshold=threshold, views=brightness)
    method(images())
    before, x = state(method), images(seed=1)
    x[0, 0, 3, 3] = value
    method(x)
    assert equal(state(method), before)
    assert method(images(seed=2)).isfinite().all()


class Cliff(torch.autograd.Function):
    """Finite value, infinite slope."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g * math.inf


def test_broken_gradient_leaves_everything_as_it_was():
    method = CoTTA(network(), n_views=2, threshold=ALWAYS, views=brightness)
    method(images())
    before = state(method)
    method.student[-1].register_forward_pre_hook(lambda _, inputs: Cliff.apply(*inputs))
    assert method(images()).isfinite().all()
    assert equal(state(method), before)


@pytest.mark.parametrize("failing_call", [1, 3])
def test_failing_view_leaves_student_and_teacher_as_they_were(failing_call):
    calls = itertools.count(1)

    def views(x: Tensor) -> Tensor:
        if next(calls) == 8 + failing_call:
            raise RuntimeError("no more views")
        return x * 0.8

    method = CoTTA(network(), n_views=4, threshold=ALWAYS, views=views)
    method(images()), method(images())
    before = state(method)
    with pytest.raises(RuntimeError, match="no more views"):
        method(images())
    assert equal(state(method), before)
    assert method(images()).isfinite().all()


def test_bare_linear_layer():
    """The published code looks up the key ".weight" of a root module and fails."""
    net = nn.Linear(6, 3).double()
    method = CoTTA(net, n_views=2, threshold=ALWAYS, views=brightness, restore_p=0.5)
    out = method(logits(5, 6))
    assert_close(out, net(logits(5, 6) * 0.7))
    assert not same(tensors(method.student), tensors(net))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(150, 150, bias=False), nn.Linear(150, 150, bias=False)
        self.outer.weight = self.inner.weight
        self.head = nn.Linear(150, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.outer(self.inner(x).tanh()))


def test_tied_parameters_stay_tied_and_are_restored_once():
    """Restored twice, the rate would be 1 - (1 - r)^2 = 0.51 instead of 0.3."""
    method = CoTTA(Tied(), n_views=2, threshold=ALWAYS, views=brightness, restore_p=0.3)
    for _ in range(3):
        method.student.inner.weight.data.add_(1.0)  # nothing equals the source by chance
        method(logits(6, 150).float())
        for part in (method.source, method.teacher, method.student):
            assert part.inner.weight is part.outer.weight
    method.reset()
    method.student.inner.weight.data.add_(1.0)
    method(logits(6, 150).float())
    back = (method.student.inner.weight == method.source.inner.weight).sum().item()
    assert abs(back - 0.3 * 150**2) < 5 * math.sqrt(150**2 * 0.3 * 0.7)


def test_half_precision_keeps_teacher_and_anchor_in_float32():
    """In bfloat16 0.999 t + 0.001 s is t: such a teacher would never move."""
    net = network(dtype=torch.bfloat16)
    method = CoTTA(net, n_views=2, threshold=ALWAYS, lr=1e-2)
    for seed in range(3):
        out = method(images(seed=seed, dtype=torch.bfloat16))
        assert out.dtype == torch.bfloat16 and out.isfinite().all()
    dtypes = [{p.dtype for p in part.parameters()} for part in (method.student, method.teacher, method.source, net)]
    assert dtypes == [{torch.bfloat16}, {torch.float32}, {torch.float32}, {torch.bfloat16}]
    moved = zip(method.teacher.parameters(), method.source.parameters(), strict=True)
    assert all((p != q).any() for p, q in moved)
    # the same steps in float32 bring the teacher to about the same place
    twin = CoTTA(net.float(), n_views=2, threshold=ALWAYS, lr=1e-2)
    for seed in range(3):
        twin(images(seed=seed, dtype=torch.bfloat16).float())
    for a, b in zip(method.teacher.parameters(), twin.teacher.parameters(), strict=True):
        assert (a - b).abs().max() < 1e-4


def test_thresholds_at_and_beyond_the_ends():
    """p_th <= 0 never augments, > 1 always; at exactly the confidence the comparison is strict: no views."""
    sure = confidence(BNAdapt(network())(images())).item()
    for threshold, used in ((-1.0, 0), (0.0, 0), (sure, 0), (math.nextafter(sure, 2), 3), (1.01, 3), (math.inf, 3)):
        views = Fixed()
        CoTTA(network(), n_views=3, threshold=threshold, views=views)(images())
        assert views.calls == used, threshold
    sharp = nn.Sequential(nn.Flatten(), nn.Linear(144, 2)).double()
    nn.init.constant_(sharp[1].weight[0], 1e3)
    views = Fixed()
    CoTTA(sharp, n_views=3, threshold=1.01, views=views)(images())
    assert views.calls == 3  # even where the anchor is certain


def test_no_restoration_draws_no_mask():
    method = CoTTA(network(), restore_p=0.0, n_views=1, threshold=ALWAYS)
    before = method.generator.get_state()
    method(images())
    assert torch.equal(method.generator.get_state(), before)


def test_dropout_and_the_callers_mode_do_not_matter():
    """Dropout is off in all three networks; BatchNorm uses the batch in eval and in train mode."""
    net = nn.Sequential(*network()[:-1], nn.Dropout(0.9), network()[-1]).train()
    outs = []
    for prepare in (lambda m: m, lambda m: m.train(), lambda m: m.eval()):
        method = prepare(CoTTA(net, n_views=2, threshold=ALWAYS))
        outs.append([method(images(seed=s)) for s in range(3)])
        assert not any(m.training for m in method.modules())
    plain = CoTTA(network(), n_views=2, threshold=ALWAYS)
    assert equal(outs[0], outs[1]) and equal(outs[0], outs[2])
    assert_close(outs[0], [plain(images(seed=s)) for s in range(3)])


def test_parameters_of_any_name_are_trained_and_restored():
    """The published code takes ``weight`` and ``bias`` only, and leaves a ViT's embeddings where they are."""
    torch.manual_seed(0)
    net = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=4, pretrained=False)
    # As they come, head and gradient are almost zero; a loud head saturates, and there is no gradient either.
    nn.init.normal_(net.cls_token), nn.init.normal_(net.head.weight, std=0.1)
    method = CoTTA(net, n_views=2, threshold=ALWAYS, restore_p=0.0)
    method(images(3, channels=3, size=32, dtype=torch.float))
    moved = [name for name, p in method.student.named_parameters() if (p != method.source.get_parameter(name)).any()]
    assert {"cls_token", "pos_embed"} <= set(moved)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {"img_size": 32, "depth": 1, "drop_path_rate": 0.5}),
        ("resnet18", {"block": timm.models.resnet.BasicBlock, "layers": (1, 1, 1, 1)}),
        ("convnext_atto", {"depths": (1, 1, 1, 1)}),
    ],
)
def test_timm_models_untouched(name, options):
    net = timm.create_model(name, pretrained=False, num_classes=4, **options)
    x, before = images(4, channels=3, size=64 if name == "resnet18" else 32, dtype=torch.float), state(net)
    method = CoTTA(net, n_views=2, threshold=ALWAYS, symmetric=True)
    first = method(x)
    assert first.shape == (4, 4) and first.isfinite().all() and method(x).isfinite().all()
    assert equal(state(net), before)
    method.reset()
    assert torch.equal(method(x), first)


# --- the contract -----------------------------------------------------------------------------------------------------
def test_source_model_is_never_changed():
    net = network().train()
    net[0].weight.requires_grad_(False)
    before = state(net)
    method = CoTTA(net, n_views=2, threshold=ALWAYS, lr=0.1)
    for seed in range(3):
        method(images(seed=seed))
    assert equal(state(net), before)


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, SGD])
def test_reset_restores_everything_bit_for_bit(optimizer):
    method = CoTTA(network(), n_views=2, threshold=ALWAYS, optimizer=optimizer, restore_p=0.1, seed=4)
    fresh = state(method)
    first = [method(images(seed=s)) for s in range(3)]
    assert not equal(state(method), fresh)
    method.reset()
    assert equal(state(method), fresh)
    assert equal([method(images(seed=s)) for s in range(3)], first)  # the masks and views come again


def test_deterministic_and_seeded():
    runs = []
    for seed in (0, 0, 1):
        method = CoTTA(network(), n_views=2, threshold=ALWAYS, restore_p=0.1, seed=seed)
        runs.append([method(images(seed=s)) for s in range(3)])
    assert equal(runs[0], runs[1]) and not equal(runs[0], runs[2])
    before = torch.get_rng_state()
    method(images())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_learns_inside_the_callers_evaluation_loop(context):
    """Built, reset and fed there: the same answers as outside, and tensors that may be used afterwards."""

    def answers() -> list[Tensor]:
        method = CoTTA(network(), n_views=2, threshold=ALWAYS)
        method(images(seed=9))
        method.reset()
        return [method(images(seed=s)) for s in range(3)]

    outside = answers()
    with context():
        inside = answers()
    assert equal(inside, outside)
    method = CoTTA(network(), n_views=2)
    with context():
        out = method(images())
    assert not out.requires_grad and not out.is_inference()


def test_every_setting_matters():
    base = {"n_views": 2, "threshold": ALWAYS, "lr": 0.01, "momentum": 0.9, "restore_p": 0.1}
    changes = {
        "lr": 0.02, "momentum": 0.8, "restore_p": 0.2, "threshold": NEVER, "n_views": 3, "symmetric": True,
        "steps": 2, "views": brightness, "optimizer": SGD, "seed": 1,
    }  # fmt: skip

    def answers(**options) -> Tensor:
        method = CoTTA(network(), **base | options)
        return torch.stack([method(images(seed=s)) for s in range(4)])[-1]

    usual = answers()
    for name, value in changes.items():
        assert (answers(**{name: value}) - usual).abs().max() > 1e-6, name
    assert torch.equal(answers(), usual)


def test_seed_reaches_masks_and_views_apart():
    masks = [CoTTA(network(), n_views=2, threshold=ALWAYS, views=brightness, restore_p=0.5, seed=s) for s in (0, 1)]
    views = [CoTTA(network(), n_views=2, threshold=ALWAYS, restore_p=0.0, seed=s) for s in (0, 1)]
    for a, b in (masks, views):
        a(images()), b(images())
        assert not same(tensors(a.student), tensors(b.student))


def test_answers_before_it_learns():
    """The first answer is the unadapted teacher's; the published code returns the teacher, not the student."""
    method = CoTTA(network(), n_views=2, threshold=ALWAYS, views=brightness, lr=1.0)
    assert_close(method(images()), BNAdapt(network())(images() * 0.7), rtol=0, atol=1e-12)
    teacher = copy.deepcopy(method.teacher)
    assert_close(method(images(seed=1)), teacher(images(seed=1) * 0.7), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"lr": -1.0}, "lr: expected .* got -1.0"),
        ({"lr": math.nan}, "lr: expected"),
        ({"lr": math.inf}, "lr: expected"),
        ({"momentum": 1.1}, "momentum: expected .* got 1.1"),
        ({"momentum": -0.1}, "momentum: expected"),
        ({"restore_p": 2}, "restore_p: expected .* got 2"),
        ({"restore_p": -0.5}, "restore_p: expected"),
        ({"threshold": math.nan}, "threshold: expected"),
        ({"n_views": -1}, "n_views.* expected"),
        ({"n_views": 2.5}, "n_views.* expected .* got 2.5"),
        ({"steps": 0}, "steps.* expected"),
    ],
)
def test_bad_settings_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        CoTTA(network(), **options)


def test_bad_models_and_inputs_are_refused():
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got str"):
        CoTTA("resnet18")
    with pytest.raises(ValueError, match="model: expected at least one parameter"):
        CoTTA(nn.Flatten())
    with pytest.raises(ValueError, match="p: expected .* got 1.5"):
        restore([torch.ones(2)], [torch.ones(2)], 1.5)
    method = CoTTA(network())
    before = state(method)
    for x in ([[0.0]], torch.zeros(2, 1, 8, 8, dtype=torch.long)):
        with pytest.raises(TypeError, match="x: expected a floating-point tensor"):
            method(x)
    with pytest.raises(ValueError, match="x: expected a batch"):
        method(torch.zeros(3))
    with pytest.raises(ValueError, match="x: expected images"):
        method(images().repeat(1, 2, 1, 1))  # two channels
    assert equal(state(method), before)
