"""Every method on models, wrappers and images as users have them: equal to a plain reference, or refused unchanged."""

from __future__ import annotations

import functools
import io
import math
from types import SimpleNamespace

import pytest
import timm.layers
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.testing import assert_close

from peftref.models import Normalised, SmallCNN
from peftref.tta import LAME, BNAdapt, CoTTA, Tent

METHODS = {
    "BN-adapt": BNAdapt,
    "BN-adapt, mixed": functools.partial(BNAdapt, alpha=0.3),
    "TENT": functools.partial(Tent, lr=0.05),
    "CoTTA": functools.partial(CoTTA, lr=0.05, n_views=2, threshold=2.0, restore_p=0.1, momentum=0.5),
    "LAME": functools.partial(LAME, k=2),
}
LEARNING = ("TENT", "CoTTA")
each_method = pytest.mark.parametrize("name", METHODS)
each_learning = pytest.mark.parametrize("name", LEARNING)


def network() -> SmallCNN:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = SmallCNN(width=4, num_classes=4)
        nn.init.normal_(net.fc.weight)
    return net.eval()


def images(n: int = 6, seed: int = 0) -> Tensor:
    return torch.rand(n, 1, 16, 16, generator=torch.Generator().manual_seed(seed))


def answers(method: nn.Module, count: int = 3, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [method(images(seed=seed).to(dtype)) for seed in range(count)]


def state(method: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in method.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[key]) for key, value in a.items())


def compiled(net: nn.Module) -> nn.Module:
    return torch.compile(net, backend="eager")


def compiled_in_place(net: nn.Module) -> nn.Module:
    net.compile(backend="eager")
    return net


def compiled_within(net: nn.Module) -> nn.Module:
    return Normalised(compiled(net), (0.0,), (1.0,))


def hooked_as_accelerate_does(net: nn.Module) -> nn.Module:
    def forward(module: nn.Module, *args: Tensor) -> Tensor:
        return module._old_forward(*args)

    net._old_forward = net.forward
    net.forward = functools.update_wrapper(functools.partial(forward, net), net.forward)
    return net


# --- wrappers and forwards --------------------------------------------------------------------------------------------
@each_method
@pytest.mark.parametrize(
    "wrap",
    [compiled, compiled_in_place, compiled_within, nn.DataParallel, checkpoint_wrapper, hooked_as_accelerate_does],
)
def test_wrapped_models_give_what_the_plain_one_gives(name, wrap):
    plain = answers(METHODS[name](network()))
    assert all(map(torch.equal, answers(METHODS[name](wrap(network()))), plain))


def test_names_are_those_without_a_wrapper():
    for wrap in (compiled, nn.DataParallel):
        assert list(LAME(wrap(network())).state_dict()) == list(LAME(network()).state_dict())
        expected = LAME(network(), head="fc")(images())
        for head in ("fc", "_orig_mod.fc" if wrap is compiled else "module.fc"):
            assert torch.equal(LAME(wrap(network()), head=head)(images()), expected)
    nested = nn.Sequential(compiled(network()))
    assert torch.equal(LAME(nested, head="0.fc")(images()), LAME(network(), head="fc")(images()))


@each_method
def test_a_forward_bound_to_the_original_is_refused(name):
    """A deep copy shares a function: the copy would run the original, and no adaptation would have an effect."""
    for replace in (
        lambda net: torch.compile(net.forward, backend="eager"),
        lambda net: lambda x: type(net).forward(net, x),
        lambda net: lambda x, own=net: type(own).forward(own, x),
    ):
        net = network()
        net.forward = replace(net)
        with pytest.raises(ValueError, match="model: expected modules whose copies run themselves"):
            METHODS[name](net)
    net = network()
    net.stages[4][2].forward = lambda x: x  # of no module: nothing is wrong with it
    assert METHODS[name](net)(images()).shape == (6, 4)


@each_learning
def test_logits_that_depend_on_nothing_to_adapt_are_refused(name):
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.weight = nn.LayerNorm(3), torch.ones(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    options = {} if name == "TENT" else {"n_views": 0}
    method = METHODS[name](Constant(), **options)
    before = state(method)
    with pytest.raises(ValueError, match="model: expected logits that depend on the weights to adapt"):
        method(torch.rand(5, 3))
    assert same(state(method), before)


class Functional(nn.Module):
    """BatchNorm as a function of a layer's tensors; another layer is not used at all."""

    def __init__(self, bypass: bool) -> None:
        super().__init__()
        self.bypass = bypass
        self.used, self.second, self.unused = nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.used(x)
        if not self.bypass:
            return self.second(x)
        m = self.second
        return F.batch_norm(x, m.running_mean, m.running_var, m.weight, m.bias)


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_batch_norm_as_a_function_is_refused(alpha):
    x = torch.rand(5, 3, generator=torch.Generator().manual_seed(0))
    called = Functional(bypass=False)
    expected = BNAdapt(nn.Sequential(called.used, called.second), alpha)(x)
    assert torch.equal(BNAdapt(called, alpha)(x), expected)  # a layer without use does no harm
    method = BNAdapt(Functional(bypass=True), alpha)
    before = state(method)
    with pytest.raises(ValueError, match=r"model: expected BatchNorm layers that its forward calls, got .*second"):
        method(x)
    assert same(state(method), before)


class Own(SmallCNN):
    """Normalises by itself, as many a user's network does: features of ``forward_features(x)`` are others."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward((x - 0.5) / 0.2)


class Around(nn.Module):
    """Has timm's methods, but a ``forward`` that does not use them."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.body, self.fc = net.stages, net.fc
        self.forward_features, self.forward_head = net.forward_features, net.forward_head

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x).mean((2, 3)))


def test_lame_takes_the_features_that_the_model_itself_uses():
    own = Own(width=4, num_classes=4).eval()
    own.load_state_dict(network().state_dict())
    hooked = network()
    hooked.register_forward_pre_hook(lambda _, args: ((args[0] - 0.5) / 0.2,))
    around = nn.Sequential(Normalised(network(), (0.5,), (0.2,)))
    expected = LAME(network(), k=2)((images() - 0.5) / 0.2)
    for net, head in ((own, "fc"), (hooked, "fc"), (around, "0.model.fc")):
        assert torch.equal(LAME(net, k=2)(images()), expected)
        assert torch.equal(LAME(net, k=2, head=head)(images()), expected)
    assert not torch.equal(LAME(network(), k=2)(images()), expected)
    method = LAME(Around(network()))
    with pytest.raises(ValueError, match="head: expected a layer that the model's forward calls, got None"):
        method(images())
    unused = network()
    unused.other = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="head: expected a layer that the model's forward calls, got 'other'"):
        LAME(unused, head="other")(images())
    assert "forward_head" not in method.source.__dict__ or isinstance(method.source, Around)


# --- autocast and precision -------------------------------------------------------------------------------------------
@each_method
def test_one_autocast_region_equals_one_for_each_batch(name):
    """Autocast keeps half-precision copies of weights until its end: steps would not be seen, or lose the gradient."""
    apart, around = METHODS[name](network()), METHODS[name](network())
    expected = []
    for seed in range(4):
        with torch.autocast("cpu", torch.bfloat16):
            expected.append(apart(images(seed=seed)))
    with torch.autocast("cpu", torch.bfloat16):
        around(images(0))
        found = [around(images(seed=seed)) for seed in range(4)]
    assert all(map(torch.equal, found, expected))


@each_method
def test_half_precision(name):
    narrow = answers(METHODS[name](network().bfloat16()), dtype=torch.bfloat16)
    assert all(z.isfinite().all() and z.shape == (6, 4) for z in narrow)
    assert_close(narrow[0].float(), METHODS[name](network())(images()), rtol=0.1, atol=0.3)


def test_the_teacher_keeps_its_precision_when_the_method_is_moved():
    method = METHODS["CoTTA"](network())
    method(images())
    teacher = [p.detach().clone() for p in method.teacher.parameters()]
    method.to(torch.bfloat16)
    assert {p.dtype for p in method.student.parameters()} == {torch.bfloat16}
    assert all(map(torch.equal, method.teacher.parameters(), teacher))
    assert {p.dtype for p in method.source.parameters()} == {torch.float32}
    assert method(images(seed=1).bfloat16()).isfinite().all()  # the optimiser's moments have moved too
    method.reset()
    assert {p.dtype for p in method.student.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in method.double().teacher.parameters()} == {torch.float64}
    assert method(images().double()).dtype == torch.float64


@each_learning
@pytest.mark.parametrize("optimizer", [torch.optim.Adam, functools.partial(torch.optim.SGD, momentum=0.9)])
def test_a_resumed_run_is_the_run(name, optimizer):
    whole, first = (METHODS[name](network(), optimizer=optimizer) for _ in range(2))
    expected = answers(whole, 5)
    for seed in range(3):
        first(images(seed=seed))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = METHODS[name](network(), optimizer=optimizer)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert all(torch.equal(second(images(seed=seed)), expected[seed]) for seed in (3, 4))
    third = METHODS[name](network(), optimizer=optimizer)
    third.load_state_dict(first.state_dict())
    third(images(seed=9))  # shares nothing with the method whose state it took
    assert all(torch.equal(first(images(seed=seed)), expected[seed]) for seed in (3, 4))


def test_a_state_for_other_views_is_refused():
    saved = METHODS["CoTTA"](network()).state_dict()
    with pytest.raises(ValueError, match="state: expected a state for each random generator"):
        METHODS["CoTTA"](network(), views=lambda x: x).load_state_dict(saved)


# --- inputs and outputs -----------------------------------------------------------------------------------------------
@each_method
def test_a_last_batch_of_one_answers_or_is_refused(name):
    method = METHODS[name](network())
    method(images())
    before = state(method)
    if method.smallest == 1:
        assert method(images(1)).shape == (1, 4)
    else:
        with pytest.raises(ValueError, match="x: expected at least 2 samples"):
            method(images(1))
    assert same(state(method), before)


@each_method
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_image_leaves_nothing_behind(name, value):
    method, twin = METHODS[name](network()), METHODS[name](network())
    if name == "CoTTA":
        method.views = twin.views = lambda x: x
    method(images()), twin(images())
    before = state(method)
    x = images(seed=1)
    x[0, 0, 3, 3] = value
    method(x)
    assert same(state(method), before)
    assert torch.equal(method(images(seed=2)), twin(images(seed=2)))


@each_method
@pytest.mark.parametrize("kind", ["tuple", "object", "dense", "flat"])
def test_other_than_logits_is_refused(name, kind):
    """With the class axis not last, an entropy over the width of the image would look like any other."""
    outputs = {
        "tuple": lambda z: (z, None),
        "object": lambda z: SimpleNamespace(logits=z),
        "dense": lambda z: z[..., None, None].expand(-1, -1, 4, 4),
        "flat": lambda z: z[:, 0],
    }
    net = network()
    net.register_forward_hook(lambda _m, _i, out: outputs[kind](out))
    method = METHODS[name](net)
    before = state(method)
    if name.startswith("BN") and kind in ("dense", "flat"):
        assert method(images()).shape[:1] == (6,)  # a segmentation network is normalised as any other
    else:
        with pytest.raises((TypeError, ValueError), match=r"model: expected logits \((6|N), K\), got"):
            method(images())
    assert same(state(method), before)


@each_method
def test_integer_images_are_refused(name):
    method = METHODS[name](network())
    before = state(method)
    with pytest.raises(TypeError, match="x: expected a floating-point tensor"):
        method((255 * images()).byte())
    assert same(state(method), before)


@pytest.mark.parametrize("change", [lambda x: (x - 0.45) / 0.225, lambda x: 255 * x])
def test_cotta_refuses_images_that_its_views_would_clip(change):
    """Also while the anchor is sure and no views are drawn: else the refusal would come in mid-stream."""
    for threshold in (1e-6, 2.0):
        method = CoTTA(network(), n_views=2, threshold=threshold)
        before = state(method)
        with pytest.raises(ValueError, match=r"x: expected images with values in \[0, 1\]"):
            method(change(images()))
        assert same(state(method), before)
    for options in ({"n_views": 0}, {"threshold": 0.0}, {"views": lambda x: x}):
        assert CoTTA(network(), **options)(change(images())).shape == (6, 4)


# --- normalisation layers ---------------------------------------------------------------------------------------------
NORM_ACTS = [
    timm.layers.BatchNormAct2d, timm.layers.SyncBatchNormAct, timm.layers.GroupNormAct, timm.layers.LayerNormAct,
    timm.layers.LayerNormAct2d, nn.BatchNorm2d, nn.SyncBatchNorm, nn.InstanceNorm2d, nn.GroupNorm,
]  # fmt: skip


@pytest.mark.parametrize("kind", NORM_ACTS)
def test_activations_inside_normalisation_layers_are_kept(kind):
    """Against the formula: statistics of the batch (BatchNorm) or of the sample, scale and shift, activation."""
    name = kind.__name__
    options = {"num_groups": 2} if "Group" in name else {"affine": True} if "Instance" in name else {}
    layer = kind(2, 4) if kind is nn.GroupNorm else kind(4, **options)
    active = nn.ReLU()
    if hasattr(layer, "act"):
        layer.act = active = nn.Hardswish()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, -2.0, 0.5, 3.0]))
        layer.bias.copy_(torch.tensor([0.3, 0.1, -1.0, 0.0]))
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    x = images(5).unfold(2, 4, 4).unfold(3, 4, 4).reshape(5, 16, 4, 4)[:, :4]
    if name == "LayerNormAct":
        x = x.movedim(1, -1)
        pool = nn.Flatten()
    net = nn.Sequential(layer, pool).eval()
    tent = Tent(net, lr=0.1)
    if "Batch" in name:
        z = F.batch_norm(x, None, None, layer.weight, layer.bias, training=True, eps=layer.eps)
        expected = pool(active(z) if hasattr(layer, "act") else z)
        assert_close(BNAdapt(net)(x), expected)
        mean, var = 0.3 * x.mean((0, 2, 3)), 0.7 + 0.3 * x.var((0, 2, 3), correction=0)
        z = F.batch_norm(x, mean, var, layer.weight, layer.bias, eps=layer.eps)
        assert_close(BNAdapt(net, 0.3)(x), pool(active(z) if hasattr(layer, "act") else z))
    else:
        expected = net(x).detach()
        with pytest.raises(ValueError, match="model: expected at least one BatchNorm layer"):
            BNAdapt(net)
    assert_close(tent(x), expected)
    assert not torch.allclose(tent(x), expected)
    assert_close(CoTTA(net, n_views=0)(x), expected)
