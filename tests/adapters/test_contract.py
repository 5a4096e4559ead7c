"""What every adapter must do, on every layer it can sit on: a new method adds its row to ``METHODS``."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

import peftref.adapters
from peftref.adapters.adaptformer import AdaptFormer
from peftref.adapters.baselines.hyperformer import Hyperformer, HyperNet
from peftref.adapters.baselines.lora import LoRA
from peftref.adapters.bone import Bone
from peftref.adapters.core.adapter import Adapter
from peftref.adapters.core.bank import Bank
from peftref.adapters.core.files import load, save
from peftref.adapters.core.host import Host
from peftref.adapters.core.injection import activate, adapters, inject, merge, unload, unmerge
from peftref.adapters.core.layers import Layer, view
from peftref.adapters.core.phm import Rule
from peftref.adapters.core.switch import Tasks
from peftref.adapters.hydra import Hydra
from peftref.adapters.tera import TeRA
from peftref.adapters.tlora import TLoRA
from peftref.adapters.vl_adapter import VLAdapter


class Sequential(Adapter):
    """A stand-in for the methods that read the frozen weight, bias and output: y0 -> y0 + y0 Q^T + c."""

    kind, options = "test_sequential", ("r", "scale")

    def __init__(self, base: Layer, r: int = 2, scale: float = 1.0) -> None:
        super().__init__()
        self.r, self.scale = r, scale
        self.down = nn.Parameter(torch.randn(r, base.out_features))
        self.up = nn.Parameter(torch.zeros(base.out_features, r))
        self.shift = nn.Parameter(torch.zeros(base.out_features))

    def forward(self, x: Tensor, y0: Tensor, base: Layer) -> Tensor:
        return self.scale * (y0 @ self.down.T @ self.up.T + self.shift)

    def delta(self, base: Layer) -> tuple[Tensor, Tensor]:
        q = self.up @ self.down
        shift = self.shift if base.bias is None else q @ base.bias + self.shift
        return self.scale * q @ base.weight, self.scale * shift


class Bottleneck(Adapter):
    """A stand-in for the methods that are not linear."""

    kind, options, mergeable = "test_bottleneck", ("r",), False

    def __init__(self, base: Layer, r: int = 2) -> None:
        super().__init__()
        self.r, d = r, base.out_features
        self.down, self.up = nn.Linear(d, r), nn.Linear(r, d, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor, y0: Tensor, base: Layer) -> Tensor:
        return self.up(torch.tanh(self.down(y0)))


class Whole(Bottleneck):
    """A stand-in for the methods that sit beside a block of several layers."""

    kind, any_module = "test_whole", True

    def __init__(self, base: Layer, r: int = 2) -> None:
        super().__init__(view(base.module[-1]), r)


LAYERS: dict[str, tuple[Callable[[bool], nn.Module], tuple[int, ...]]] = {  # module, and the shape of one input
    "linear": (lambda bias: nn.Linear(8, 4, bias), (8,)),
    "odd": (lambda bias: nn.Linear(5, 7, bias), (5,)),
    "conv1d": (lambda bias: Conv1D(4, 8), (8,)),
    "conv2d": (lambda bias: nn.Conv2d(2, 4, 3, stride=2, padding=1, bias=bias), (2, 5, 6)),
    "circular": (lambda bias: nn.Conv2d(2, 4, (2, 3), padding="same", padding_mode="circular", bias=bias), (2, 4, 3)),
    "pointwise": (lambda bias: nn.Conv2d(8, 4, 1, bias=bias), (8, 2, 3)),
    "block": (lambda bias: nn.Sequential(nn.Linear(8, 4, bias), nn.Tanh(), nn.Linear(4, 4, bias)), (8,)),
}
BIASES = {"odd": (True,), "conv1d": (True,), "circular": (True,), "pointwise": (False,)}  # of the others, both
ALL = ("linear", "odd", "conv1d", "conv2d", "circular", "pointwise")


def second_of_three() -> Tasks:
    tasks = Tasks(["a", "b", "c"])
    tasks.use("b")
    return tasks


@dataclass
class Method:
    """A row: the class, its options, the layers it is for; ``extra()`` makes what its files do not keep."""

    kind: type[Adapter]
    options: dict[str, Any]
    layers: tuple[str, ...] = ALL
    extra: Callable[[], dict[str, Any]] = dict


METHODS = {
    "lora": Method(LoRA, {"r": 2, "lora_alpha": 3}),
    "rslora": Method(LoRA, {"r": 3, "lora_alpha": 2, "use_rslora": True}, ("conv2d", "linear")),
    "bone": Method(Bone, {"r": 2}, ("linear", "conv1d", "conv2d", "circular", "pointwise")),
    "bone-1": Method(Bone, {"r": 1}, ("odd",)),
    "bone-pooled": Method(Bone, {"r": 3, "variant": "bone"}),
    "bone-mini": Method(Bone, {"r": 4, "variant": "mini", "mini_r": 2}, ("linear", "conv2d")),
    "adaptformer": Method(AdaptFormer, {"bottleneck": 6, "dropout": 0.0, "tap": "2"}, ("block",)),
    "adaptformer-sequential": Method(
        AdaptFormer,
        {"bottleneck": 6, "dropout": 0, "placement": "sequential", "layernorm": True, "learn_scale": True, "tap": "2"},
        ("block",),
    ),
    "tlora": Method(TLoRA, {"transform_rank": 2, "residual_rank": 2}),
    "tlora-paper": Method(
        TLoRA,
        {"transform_rank": 2, "residual_rank": 1, "order": 3, "init": "paper", "residual": "lora"},
        ("conv2d", "linear"),
    ),
    "hydra": Method(Hydra, {"r_par": 2, "r_seq": 1, "scale": 0.7}),
    "hydra-plain": Method(Hydra, {"r_par": 1, "r_seq": 2, "bias": False}, ("linear", "conv2d", "conv1d")),
    "hydra-sequential": Method(Hydra, {"r_par": 0, "r_seq": 2}, ("linear",)),
    "tera": Method(TeRA, {"seed": 1}, extra=lambda: {"bank": Bank(1)}),
    "tera-own": Method(TeRA, {"out_modes": 2, "in_modes": 3, "r": 3, "save_bank": True}, ("conv2d", "linear")),
    "vl_adapter": Method(VLAdapter, {"reduction": 2}),
    "vl_adapter-half": Method(
        VLAdapter,
        {"reduction": 2, "sharing": "half-up"},
        ("odd", "conv2d", "linear"),
        lambda: {"tasks": second_of_three()},
    ),
    "vl_adapter-phm": Method(
        VLAdapter,
        {"reduction": 2, "sharing": "multiple", "phm": 2},
        ("conv2d", "linear"),
        lambda: {"tasks": second_of_three(), "rule": Rule(2, std=0.5)},  # with 0.01, three plain steps move too little
    ),
    "vl_adapter-compacter": Method(
        VLAdapter, {"reduction": 2, "phm": 2, "rank": 1}, ("conv2d", "linear"), lambda: {"rule": Rule(2, std=0.5)}
    ),
    "vl_adapter-hyperformer": Method(
        Hyperformer,
        {"layer": 1},
        ("linear", "conv1d", "conv2d", "pointwise"),
        lambda: {"tasks": second_of_three(), "hyper": HyperNet(4, 3, 2, reduction=2, p=3, dim=4, hidden=8)},
    ),
    "sequential": Method(Sequential, {"r": 2, "scale": 0.5}),
    "bottleneck": Method(Bottleneck, {"r": 3}, ("linear", "odd", "conv2d")),
    "whole": Method(Whole, {"r": 2}, ("block",)),
}
CASES = [
    pytest.param(method, layer, bias, id=f"{method}-{layer}-{'bias' if bias else 'none'}")
    for method, row in METHODS.items()
    for layer in row.layers
    for bias in BIASES.get(layer, (True, False))
]
each = pytest.mark.parametrize(("method", "layer", "bias"), CASES)
linear = pytest.mark.parametrize(
    ("method", "layer", "bias"), [case for case in CASES if METHODS[case.values[0]].kind.mergeable]
)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def test_every_public_adapter_has_a_row() -> None:
    public = [getattr(peftref.adapters, name) for name in peftref.adapters.__all__]
    kinds = {kind for kind in public if isinstance(kind, type) and issubclass(kind, Adapter) and kind is not Adapter}
    methods = {kind for kind in kinds if ".experiments." not in kind.__module__}  # what only one experiment needs
    assert methods and methods <= {row.kind for row in METHODS.values()}


class Pair(nn.Module):
    """Two layers on one input, so that one can be adapted and the other not, or both."""

    def __init__(self, a: nn.Module, b: nn.Module) -> None:
        super().__init__()
        self.a, self.b = a, b

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x).tanh()


def pair(layer: str, bias: bool, dtype: torch.dtype = torch.float32, seed: int = 0) -> Pair:
    torch.manual_seed(seed)
    make, _ = LAYERS[layer]
    return Pair(make(bias), make(bias)).to(dtype).eval()


def adapted(
    method: str, layer: str, bias: bool, dtype: torch.dtype = torch.float32, name: str = "default"
) -> tuple[Pair, Tensor]:
    """A model with adapters that are no longer the identity, and three inputs."""
    model, row = pair(layer, bias, dtype), METHODS[method]
    inject(model, row.kind, ["a", "b"], name=name, **row.options, **row.extra())
    shake(model, name)
    return model, inputs(layer, dtype)


def inputs(layer: str, dtype: torch.dtype = torch.float32, lead: tuple[int, ...] = (3,)) -> Tensor:
    return torch.randn(*lead, *LAYERS[layer][1], generator=torch.Generator().manual_seed(1)).to(dtype)


@torch.no_grad()
def shake(model: nn.Module, name: str = "default", seed: int = 2) -> None:
    g = torch.Generator().manual_seed(seed)
    for adapter in adapters(model, name).values():
        for p in adapter.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=g, dtype=torch.float64).to(p.dtype))


def bits(model: nn.Module) -> dict[str, bytes]:
    state = model.state_dict()
    return {k: v.contiguous().flatten().view(torch.uint8).numpy().tobytes() for k, v in state.items()}


def frozen(model: nn.Module) -> dict[str, bytes]:
    return {k: v for k, v in bits(model).items() if ".adapters." not in k}


# -- the start, and training


@each
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_start_changes_nothing(method: str, layer: str, bias: bool, dtype: torch.dtype) -> None:
    model, row = pair(layer, bias, dtype), METHODS[method]
    conv = len(LAYERS[layer][1]) == 3
    leads = [(), (3,), (0,)] if conv else [(), (3,), (2, 3), (0,), (2, 1, 2)]
    xs = [inputs(layer, dtype, lead) for lead in leads]
    before, weights = [model(x) for x in xs], bits(model)
    assert inject(model, row.kind, ["a", "b"], **row.options, **row.extra()) == ["a", "b"]
    for x, y in zip(xs, before, strict=True):
        assert model(x).dtype == dtype and torch.equal(model(x), y)
    wide = torch.promote_types(dtype, torch.float32)
    for name, p in model.named_parameters():
        assert p.requires_grad == (".adapters." in name), name
        assert p.dtype == (wide if ".adapters." in name else dtype), name
    assert sorted(frozen(model).values()) == sorted(weights.values())
    assert all(module.training is False for module in model.modules())


@each
def test_a_step_moves_the_adapter_alone(method: str, layer: str, bias: bool) -> None:
    model, row = pair(layer, bias), METHODS[method]
    inject(model, row.kind, ["a", "b"], **row.options, **row.extra())
    before, start = frozen(model), {n: p.clone() for n, p in model.named_parameters() if p.requires_grad}
    x = inputs(layer)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(3):  # two matrices in a row need two steps before both have moved
        loss = (model(x) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert frozen(model) == before and all(p.grad is None for p in model.parameters() if not p.requires_grad)
    assert not [n for n, p in model.named_parameters() if p.requires_grad and torch.equal(p, start[n])]


@each
def test_gradients(method: str, layer: str, bias: bool) -> None:
    model, x = adapted(method, layer, bias, torch.float64)
    params = {n: p.detach().requires_grad_() for n, p in model.named_parameters() if p.requires_grad}

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return functional_call(model, dict(zip(params, values, strict=True)), (x,))

    x = x[:1].requires_grad_()
    assert torch.autograd.gradcheck(run, (x, *params.values()), fast_mode=True)


# -- one linear map, merged


@linear
def test_delta_is_the_linear_map_of_forward(method: str, layer: str, bias: bool) -> None:
    model, x = adapted(method, layer, bias, torch.float64)
    host = model.a
    base, adapter = view(host.base_layer), adapters(model)["a"]
    y0 = host.base_layer(x)
    got = adapter(x, base.to_rows(y0), base)
    dW, db = adapter.delta(base)
    assert dW.shape == (base.out_features, base.in_features) and (db is None or db.shape == (base.out_features,))
    assert_close(got, base.rows(x) @ dW.T + (0 if db is None else db), rtol=1e-12, atol=1e-12)
    assert_close(base.linear(x, dW), base.rows(x) @ dW.T, rtol=1e-12, atol=1e-12)
    assert_close(host(x), y0 + base.from_rows(got, y0), rtol=1e-12, atol=1e-12)


@linear
@pytest.mark.parametrize("dtype", DTYPES)
def test_merged_is_forward_up_to_rounding_and_undone_to_the_bit(
    method: str, layer: str, bias: bool, dtype: torch.dtype
) -> None:
    model, x = adapted(method, layer, bias, dtype)
    host, before, objects = model.a, bits(model), {n: id(p) for n, p in model.named_parameters()}
    y, adapters_before = host(x), bits(adapters(model)["a"])
    merge(model)
    assert bits(adapters(model)["a"]) == adapters_before and host.weight.dtype == dtype
    base = view(host.base_layer, torch.float64)
    size = base.linear(x.double().abs(), base.weight.abs()) + (0 if base.bias is None else base.bias.abs())
    # every weight and every output is rounded once or twice in the layer's type; sums err in float32 or wider
    error = (base.to_rows(host(x)).double() - base.to_rows(y).double()).abs()
    assert (error <= 6 * torch.finfo(dtype).eps * size + 1e-6 * (dtype != torch.float64)).all()
    dense = {"weight": base.kept(base.weight).to(dtype)} | ({} if base.bias is None else {"bias": base.bias.to(dtype)})
    assert torch.equal(functional_call(host.base_layer, dense, (x,)), host(x))
    unmerge(model)
    assert bits(model) == before and {n: id(p) for n, p in model.named_parameters()} == objects
    assert torch.equal(host(x), y)
    for _ in range(10):  # no drift
        merge(model)
        unmerge(model)
    assert bits(model) == before


@linear
def test_merging_twice_and_changing_what_is_merged_are_refused(method: str, layer: str, bias: bool) -> None:
    model, x = adapted(method, layer, bias)
    row = METHODS[method]
    merge(model)
    before, y = bits(model), model(x)
    for call in (
        lambda: merge(model),
        lambda: activate(model),
        lambda: inject(model, row.kind, ["a"], name="other", **row.options, **row.extra()),
    ):
        with pytest.raises(RuntimeError, match="not merged, got a merged one; unmerge it first"):
            call()
    assert bits(model) == before and torch.equal(model(x), y)
    unmerge(model)
    with pytest.raises(RuntimeError, match="expected a merged model to unmerge"):
        unmerge(model)


@linear
def test_a_broken_adapter_does_not_break_the_base(method: str, layer: str, bias: bool) -> None:
    model, _ = adapted(method, layer, bias)
    with torch.no_grad():
        next(iter(adapters(model)["b"].parameters())).fill_(float("nan"))
    before = bits(model)
    with pytest.raises(ValueError, match=r"finite merged weights, got others in \['b'\]"):
        merge(model)
    assert bits(model) == before and not model.a.merged


@linear
def test_two_adapters_add_in_any_order(method: str, layer: str, bias: bool) -> None:
    model, x = adapted(method, layer, bias, torch.float64)
    row = METHODS[method]
    inject(model, row.kind, ["a", "b"], name="second", **row.options, **row.extra())
    shake(model, "second", seed=5)
    increments = []
    y0 = model.a.base_layer(x)
    for names in (["default"], ["second"], ["default", "second"], ["second", "default"]):
        activate(model, *names)
        increments.append(model.a(x) - y0)
    one, two, both, turned = increments
    assert_close(both, one + two)
    assert_close(both, turned)
    assert not torch.allclose(one, two)
    y = model(x)
    merge(model)
    assert_close(model(x), y)


@pytest.mark.parametrize("method", [m for m, row in METHODS.items() if not row.kind.mergeable])
def test_what_is_not_linear_is_not_merged(method: str) -> None:
    model, x = adapted(method, METHODS[method].layers[0], True)
    before, y = bits(model), model(x)
    inject(model, LoRA, ["a.0" if METHODS[method].kind.any_module else "a"], name="linear")
    activate(model, "default", "linear")
    with pytest.raises(TypeError, match=f"linear adapters, got {METHODS[method].kind.kind} on a"):
        merge(model)
    with pytest.raises(TypeError, match="cannot be merged"):
        adapters(model)["a"].delta(view(model.a.base_layer))
    unload(model)
    assert not torch.equal(model(x), y) and len(bits(model)) < len(before)


# -- files


@each
def test_saved_and_loaded_it_is_the_same(method: str, layer: str, bias: bool, tmp_path) -> None:
    model, x = adapted(method, layer, bias)
    before = bits(model)
    save(model, tmp_path)
    assert bits(model) == before
    other = pair(layer, bias)
    assert load(other, tmp_path, name="elsewhere", **METHODS[method].extra()) == ["a", "b"]
    assert torch.equal(other(x), model(x))
    again = tmp_path / "again"
    save(other, again, name="elsewhere")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (again / file).read_bytes() == (tmp_path / file).read_bytes()
    if METHODS[method].kind.mergeable:
        merge(model)
        save(model, again)
        assert (again / file).read_bytes() == (tmp_path / file).read_bytes()


# -- what people do with models


@each
def test_copies_and_pickles_are_independent(method: str, layer: str, bias: bool) -> None:
    model, x = adapted(method, layer, bias)
    y, before = model(x), bits(model)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for twin in (copy.deepcopy(model), torch.load(stream, weights_only=False)):
        assert torch.equal(twin(x), y)
        shake(twin)
        with torch.no_grad():
            next(twin.a.base_layer.parameters()).zero_()
        assert not torch.equal(twin(x), y)
        assert bits(model) == before and torch.equal(model(x), y)


@pytest.mark.parametrize(
    ("method", "layer"),
    [(m, row.layers[0]) for m, row in METHODS.items()],
)
def test_compiles_in_one_graph(method: str, layer: str) -> None:
    torch.compiler.reset()
    model, x = adapted(method, layer, True)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_close(compiled(x), model(x))
    activate(model)
    assert_close(compiled(x), model(x))  # switching compiles again, and is seen


@each
def test_inputs_of_any_layout(method: str, layer: str, bias: bool) -> None:
    model, _ = adapted(method, layer, bias)
    x = inputs(layer, lead=(2,) if len(LAYERS[layer][1]) == 3 else (2, 3))
    y = model(x)
    assert_close(model(x[0]), y[0])
    assert model(x[:0]).shape == (0, *y.shape[1:])
    if x.ndim == 4:
        assert_close(model(x.to(memory_format=torch.channels_last)), y)
    if layer != "conv1d":  # which itself asks for contiguous inputs
        spread = torch.stack([x, x], -1)[..., 0]
        assert not spread.is_contiguous()
        assert_close(model(spread), y)
        assert_close(model(x.transpose(-1, -2).contiguous().transpose(-1, -2)), y)


@each
def test_inputs_are_not_changed_and_autocast_works(method: str, layer: str, bias: bool) -> None:
    model, x = adapted(method, layer, bias)
    kept = x.clone()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16 and torch.equal(x, kept)
    assert_close(y.float(), model(x), rtol=0.05, atol=0.1)


@each
def test_layers_in_two_places_and_weights_in_two_layers(method: str, layer: str, bias: bool) -> None:
    row = METHODS[method]
    torch.manual_seed(0)
    shared = LAYERS[layer][0](bias)
    model, x = Pair(shared, shared), inputs(layer)
    assert inject(model, row.kind, ["b"], **row.options, **row.extra()) == ["a"]  # one layer: its first name
    assert model.a is model.b and isinstance(model.a, Host)
    shake(model)
    assert_close(model(x), model.a(x) + model.a(x).tanh())
    unload(model)
    assert model.a is shared and model.b is shared

    if row.kind.mergeable:
        model = pair(layer, bias)
        model.b.weight = model.a.weight
        weight, y = model.b.weight, model.b(x)
        inject(model, row.kind, ["a"], **row.options, **row.extra())
        shake(model)
        merge(model)
        assert model.b.weight is weight and torch.equal(model.b(x), y)  # the other keeps the frozen weight
        unmerge(model)
        assert model.a.weight is weight


@each
def test_undone_everything_is_as_it_was(method: str, layer: str, bias: bool) -> None:
    plain = pair(layer, bias)
    modules, before, x = dict(plain.named_modules()), bits(plain), inputs(layer)
    y = plain(x)
    row = METHODS[method]
    inject(plain, row.kind, ["a", "b"], **row.options, **row.extra())
    shake(plain)
    if row.kind.mergeable:
        merge(plain)
    unload(plain)
    assert dict(plain.named_modules()) == modules and bits(plain) == before and torch.equal(plain(x), y)
    if row.kind.mergeable:
        inject(plain, row.kind, ["a", "b"], **row.options, **row.extra())
        shake(plain)
        y = plain(x)
        unload(plain, merged=True)
        assert_close(plain(x), y)
        assert dict(plain.named_modules()) == modules and bits(plain) != before


@linear
def test_moved_while_merged(method: str, layer: str, bias: bool) -> None:
    model, x = adapted(method, layer, bias)
    y = model(x)
    merge(model)
    model.double()
    unmerge(model)
    assert_close(model(x.double()), y.double(), rtol=1e-4, atol=1e-5)


WHOLE = [  # the pooled forms of Bone are thin, and go by increment
    name
    for name, row in METHODS.items()
    if row.kind.whole is not Adapter.whole and row.options.get("variant", "bat") == "bat"
]


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("bias", [True, False])
def test_the_whole_output_is_the_sum(name: str, bias: bool) -> None:
    """One product with W + dW gives what the frozen output and the increment give, with the same gradients."""
    row, base = METHODS[name], nn.Linear(8, 4, bias).double()
    net, x = nn.Sequential(base), torch.randn(40, 8, dtype=torch.float64, requires_grad=True)
    inject(net, row.kind, ["0"], **row.options, **row.extra())
    adapter = adapters(net)["0"]
    assert torch.equal(net(x), base(x))
    for p in adapter.parameters():
        nn.init.normal_(p)
    frozen = view(base)
    whole = adapter.whole(x, frozen)
    y0 = base(x)
    total = y0 + adapter(x, y0, frozen)
    assert whole is not None and torch.equal(net(x), whole)
    assert_close(whole, total)
    up, inputs = torch.randn_like(total), [x, *adapter.parameters()]
    for a, b in zip(*(torch.autograd.grad(y, inputs, up) for y in (whole, total)), strict=True):
        assert_close(a, b)


def test_there_are_whole_outputs_and_another_increment_does_not_inherit_them() -> None:
    assert {METHODS[name].kind.kind for name in WHOLE} == {"bone", "tlora", "tera"}
    parent = METHODS["bone"].kind

    class Twice(parent):
        kind = "test_twice"

        def forward(self, x: Tensor, y0: Tensor, base: Layer) -> Tensor:
            return 2 * super().forward(x, y0, base)

    assert Twice.whole is Adapter.whole and parent.whole is not Adapter.whole
    net, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(3, 4)
    inject(net, Twice, ["0"], r=2)
    nn.init.normal_(adapters(net)["0"].miss_block)
    y0 = net[0].base_layer(x)
    once = parent.forward(adapters(net)["0"], x, y0, view(net[0].base_layer))
    assert_close(net(x), y0 + 2 * once)


def test_in_low_precision_and_beside_others_increments_are_summed() -> None:
    parent = METHODS["bone"].kind
    net, x = nn.Sequential(nn.Linear(4, 4)).bfloat16(), torch.randn(3, 4).bfloat16()
    inject(net, parent, ["0"], r=2)
    nn.init.normal_(adapters(net)["0"].miss_block)
    frozen = net[0].base_layer
    increment = adapters(net)["0"](x.float(), frozen(x).float(), view(frozen))
    assert torch.equal(net(x), (frozen(x) + increment).bfloat16())  # not rounded in the weight


def test_under_autocast_and_with_hooks_on_the_frozen_layer_increments_are_summed() -> None:
    kind = METHODS["bone"].kind
    net, x = nn.Sequential(nn.Linear(16, 16)), torch.randn(30, 16)
    inject(net, kind, ["0"], r=2)
    frozen, adapter = net[0].base_layer, adapters(net)["0"]
    nn.init.normal_(adapter.miss_block)
    with torch.autocast("cpu", torch.bfloat16):
        y0 = frozen(x)
        assert torch.equal(net(x), (y0 + adapter(x, y0.float(), view(frozen))).to(y0.dtype))
        assert not torch.equal(net(x), adapter.whole(x, view(frozen)))  # rounds W + dW as one
    calls: list[str] = []
    handle = frozen.register_forward_hook(lambda *_: calls.append("called"))
    hooked = net(x)
    assert calls == ["called"]
    handle.remove()
    assert_close(net(x), hooked)
    assert calls == ["called"]
