"""What torch, transformers and accelerate do to any module, they may do to one with adapters: every kind of adapter."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import Tensor, nn
from torch.func import functional_call, grad, jacfwd, jacrev, vmap
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM, WavLMConfig, WavLMModel

from peftref.adapters.adaptformer import AdaptFormer
from peftref.adapters.baselines.lora import LoRA
from peftref.adapters.bone import Bone
from peftref.adapters.core.bypass import bypassed
from peftref.adapters.core.host import Host
from peftref.adapters.core.injection import adapters, inject, merge, unload, unmerge
from peftref.adapters.core.switch import Tasks
from peftref.adapters.core.targets import find
from peftref.adapters.tera import TeRA
from peftref.adapters.tlora import TLoRA
from peftref.adapters.vl_adapter import VLAdapter
from peftref.continual.baselines.ewc import diagonal_fisher
from tests.adapters.test_contract import METHODS, adapted, inputs, pair, shake

KINDS = [(method, row.layers[0]) for method, row in METHODS.items()] + [("bone", "conv2d"), ("tlora", "conv2d")]
each = pytest.mark.parametrize(("method", "layer"), KINDS)
linear = pytest.mark.parametrize(("method", "layer"), [one for one in KINDS if METHODS[one[0]].kind.mergeable])


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


def replica(model: nn.Module) -> nn.Module:
    """What DataParallel makes for each device, for which torch's own function wants a GPU."""
    modules = list(model.modules())
    copies = {m: m._replicate_for_data_parallel() for m in modules}
    for m, twin in copies.items():
        twin._former_parameters = OrderedDict()
        for n, child in m._modules.items():
            if child is not None:
                setattr(twin, n, copies[child])
        for n, p in m._parameters.items():
            value = None if p is None else p.clone()
            if value is None:
                twin._parameters[n] = None
            else:
                setattr(twin, n, value)
                twin._former_parameters[n] = value
    return copies[model]


# -- torch


@each
def test_gradients_of_single_samples(method: str, layer: str) -> None:
    model, x = adapted(method, layer, True, torch.float64)
    theta = trained(model)

    def loss(theta: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, theta, (x[None],)).square().sum()

    got = vmap(grad(loss), (None, 0))(theta, x)
    for n, one in enumerate(x):
        for name, g in grad(loss)(theta, one).items():
            assert_close(got[name][n], g)


@each
def test_fisher_is_a_loop_over_samples(method: str, layer: str) -> None:
    model, x = adapted(method, layer, True, torch.float64)
    net = nn.Sequential(model, nn.Flatten())
    y = net(x).argmin(1)
    expected = {n: torch.zeros_like(p) for n, p in trained(net).items()}
    for one, label in zip(x, y, strict=True):
        net.zero_grad()
        net(one[None]).log_softmax(-1)[0, label].backward()
        for n, p in net.named_parameters():
            if p.requires_grad:
                expected[n] += p.grad.square() / len(x)
    for n, f in diagonal_fisher(net, x, y).items():
        assert_close(f, expected[n])


@each
def test_forward_mode_and_second_derivatives(method: str, layer: str) -> None:
    model, x = adapted(method, layer, True, torch.float64)

    def f(x: Tensor) -> Tensor:
        return model(x[None])[0]

    assert_close(jacfwd(f)(x[0]), jacrev(f)(x[0]))
    name, value = next(iter(trained(model).items()))

    def loss(value: Tensor) -> Tensor:
        return functional_call(model, {name: value}, (x,)).square().sum()

    assert_close(jacfwd(jacrev(loss))(value), jacrev(jacrev(loss))(value))


@each
def test_replicas_of_data_parallel(method: str, layer: str) -> None:
    model, x = adapted(method, layer, True)
    assert torch.equal(replica(model)(x), model(x))
    assert torch.equal(nn.DataParallel(model)(x), model(x))


@each
@pytest.mark.filterwarnings("ignore")
def test_traced(method: str, layer: str) -> None:
    model, x = adapted(method, layer, True)
    traced = torch.jit.trace(model, x)
    assert_close(traced(2 * x), model(2 * x))


@pytest.mark.parametrize(("method", "layer"), [one for one in KINDS if one[1] != "conv1d"])
def test_exported(method: str, layer: str) -> None:
    model, x = adapted(method, layer, True)
    assert_close(torch.export.export(model, (x,)).module()(2 * x), model(2 * x))


@each
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed(method: str, layer: str, reentrant: bool) -> None:
    model, x = adapted(method, layer, True, torch.float64)
    x.requires_grad_()
    expected = torch.autograd.grad(model(x).square().sum(), [x, *(p for p in model.parameters() if p.requires_grad)])
    checkpoint(model.train(), x, use_reentrant=reentrant).square().sum().backward()
    got = [x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]
    assert_close(got, list(expected))


@each
def test_reentrant_checkpoints_that_would_train_nothing_are_refused(method: str, layer: str) -> None:
    model, x = adapted(method, layer, True)
    model.train()
    with pytest.raises(RuntimeError, match="checkpoint: expected use_reentrant=False, or an input that requires"):
        checkpoint(model, x, use_reentrant=True)
    checkpoint(model, x, use_reentrant=False).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        model(x)  # no gradient is wanted
        with pytest.warns(UserWarning, match="None of the inputs"):
            checkpoint(model.eval(), x, use_reentrant=True)


@each
def test_keywords(method: str, layer: str) -> None:
    model, x = adapted(method, layer, True)
    word = {"linear": "input", "odd": "input", "conv2d": "input", "conv1d": "x", "block": "input"}[layer]
    assert torch.equal(model.a(**{word: x}), model.a(x))
    with pytest.raises(TypeError):
        model.a()


# -- the frozen layer


@each
def test_whatever_is_unfrozen_is_trained(method: str, layer: str) -> None:
    many = torch.randn(400, *inputs(layer).shape[1:], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model, _ = adapted(method, layer, True, torch.float64)
    model.a.base_layer.requires_grad_(True)
    weights = {n: p for n, p in model.named_parameters() if p.requires_grad}
    values = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    for x in (inputs(layer, torch.float64), many):
        got = torch.autograd.grad(functional_call(model, weights, (x,)).square().mean(), list(weights.values()))
        for n, g in zip(weights, got, strict=True):
            if ".base_layer." in n:  # along one direction, against differences
                step = torch.randn(g.shape, generator=torch.Generator().manual_seed(1), dtype=g.dtype)
                up, down = (
                    functional_call(model, values | {n: values[n] + h * step}, (x,)).square().mean()
                    for h in (1e-6, -1e-6)
                )
                assert_close((g * step).sum(), (up - down) / 2e-6, rtol=1e-5, atol=1e-7)


def test_without_freezing_adapted_layers_stay_trainable() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].bias.requires_grad_(False)
    flags = [p.requires_grad for p in net.parameters()]
    inject(net, LoRA, ["0", "1"], r=1, freeze=False)
    assert [p.requires_grad for n, p in net.named_parameters() if ".adapters." not in n] == flags
    inject(net, LoRA, ["0"], r=1, name="other")
    assert not any(p.requires_grad for n, p in net.named_parameters() if ".adapters." not in n)


class Doubled(ModelHook):
    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        return 2 * output


@each
@pytest.mark.parametrize("n", [3, 400])
def test_a_forward_that_was_set_on_the_layer_is_called(method: str, layer: str, n: int) -> None:
    row = METHODS[method]
    model, x = pair(layer, True), torch.randn(n, *inputs(layer).shape[1:])
    add_hook_to_module(model.a, Doubled())
    y = model(x)
    inject(model, row.kind, ["a", "b"], **row.options, **row.extra())
    assert_close(model(x), y)
    shake(model)
    adapted_y = model.a(x)
    assert not torch.allclose(adapted_y, model.a.base_layer(x))
    add_hook_to_module(model.a, ModelHook())  # on the host: around layer and adapter
    assert torch.equal(model.a(x), adapted_y)


@linear
def test_hooks_of_the_frozen_layer_are_not_merged_away(method: str, layer: str) -> None:
    for where in ("hook", "pre-hook", "forward"):
        model, x = adapted(method, layer, True)
        base = model.a.base_layer
        if where == "hook":
            base.register_forward_hook(lambda module, args, y: 2 * y)
        elif where == "pre-hook":
            base.register_forward_pre_hook(lambda module, args: (2 * args[0],))
        else:
            add_hook_to_module(base, Doubled())
        y = model(x)
        with pytest.raises(ValueError, match="expected frozen layers without hooks, got a.base_layer with 1"):
            merge(model)
        assert torch.equal(model(x), y) and not model.b.merged
    model, x = adapted(method, layer, True)
    model.a.register_forward_hook(lambda module, args, y: 2 * y)
    y = model(x)
    merge(model)
    assert_close(model(x), y, rtol=1e-4, atol=1e-5)


@each
def test_weights_without_numbers_are_refused(method: str, layer: str) -> None:
    row = METHODS[method]
    model = pair(layer, True)
    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"targets: expected layers with their weights in memory, got \['a', 'b'\]"):
        inject(model, row.kind, ["a", "b"], **row.options, **row.extra())
    inject(pair(layer, True).to("meta"), row.kind, ["a", "b"], **row.options, **row.extra())  # for its shapes alone
    model, x = adapted(method, layer, True)
    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(RuntimeError, match="model: expected weights in memory, got some on the meta device"):
        model(x)
    if row.kind.mergeable:
        with pytest.raises(ValueError, match="model: expected weights in memory, got a with some on the meta device"):
            merge(model)


@pytest.mark.parametrize("layer", ["linear", "conv2d"])
def test_what_is_set_reaches_the_layer(layer: str) -> None:
    model, x = adapted("lora", layer, True)
    bare = copy.deepcopy(model.a.base_layer)
    increment = model.a(x) - model.a.base_layer(x)
    model.a.bias = None
    bare.bias = None
    assert model.a.base_layer.bias is None
    assert_close(model.a(x), bare(x) + increment)
    model.a.weight = nn.Parameter(2 * bare.weight.detach())
    bare.weight = nn.Parameter(2 * bare.weight.detach())
    assert model.a.weight is model.a.base_layer.weight
    assert_close(model.a(x), bare(x) + increment)
    with pytest.raises(ValueError, match="weight: expected the shape"):
        model.a.weight = nn.Parameter(torch.zeros(1, 1))
    with pytest.raises(TypeError, match="cannot assign"):
        model.a.weight = torch.zeros_like(bare.weight)
    model.a.mark = 3
    assert model.a.base_layer.mark == 3
    del model.a.mark
    assert not hasattr(model.a.base_layer, "mark") and not hasattr(model.a, "mark")
    model.a._mark = 3
    assert not hasattr(model.a.base_layer, "_mark")
    if layer == "conv2d":
        model.a.stride = (1, 1)
        bare.stride = (1, 1)
        assert model.a(x).shape == bare(x).shape == (3, 4, 5, 6)
    merge(model)
    with pytest.raises(RuntimeError, match="weight: expected a model that is not merged"):
        model.a.weight = bare.weight
    unmerge(model)


# -- transformers


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=32, tie_word_embeddings=True))


def test_a_tied_head() -> None:
    model, ids = llama(), torch.arange(8)[None]
    inject(model, LoRA, ["lm_head", "q_proj"], r=2)
    shake(model)
    y, before = model(ids).logits, {n: p.clone() for n, p in model.named_parameters()}
    for call in (model.tie_weights, model.init_weights):
        call()
        assert torch.equal(model(ids).logits, y)
        assert model.lm_head.weight is model.model.embed_tokens.weight
    with pytest.raises(RuntimeError, match="expected an output layer without adapters to resize"):
        model.resize_token_embeddings(40)
    with pytest.raises(RuntimeError, match="expected an output layer without adapters to resize"):
        copy.deepcopy(model).resize_token_embeddings(40)
    assert torch.equal(model(ids).logits, y)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    unload(model)
    model.resize_token_embeddings(40)
    assert model(ids).logits.shape == (1, 8, 40)
    model = llama()
    inject(model, LoRA, ["q_proj"], r=2)
    model.resize_token_embeddings(40)
    assert model(ids).logits.shape == (1, 8, 40)


def test_weights_are_not_drawn_anew() -> None:
    model = llama()
    inject(model, AdaptFormer, r"model\.layers\.\d", bottleneck=2, tap="post_attention_layernorm")
    shake(model)
    before = {n: p.clone() for n, p in model.named_parameters()}
    model.init_weights()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_model_that_checkpoints_itself(reentrant: bool) -> None:
    ids = torch.arange(8)[None]
    options = {"bottleneck": 2, "tap": "post_attention_layernorm", "dropout": 0.0}
    for kind, targets, own in ((LoRA, ["q_proj"], {"r": 2}), (AdaptFormer, r"model\.layers\.\d", options)):
        grads = []
        for checkpointed in (False, True):
            model = llama().train()
            inject(model, kind, targets, **own)
            shake(model)
            if checkpointed:
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            if checkpointed and reentrant and kind is AdaptFormer:
                with pytest.raises(RuntimeError, match="tap: expected a gradient for what post_attention_layernorm"):
                    model(ids, labels=ids)
                continue
            model(ids, labels=ids).loss.backward()
            grads.append([p.grad for p in model.parameters() if p.requires_grad])
        assert_close(grads[0], grads[-1])


def test_wavlm_reads_its_projections_itself() -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    front = {"conv_dim": (8,), "conv_stride": (2,), "conv_kernel": (3,)}
    model = WavLMModel(WavLMConfig(**sizes, **front, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2))
    with pytest.raises(ValueError, match=r"q_proj \(in a WavLMAttention\), whose weights are used without a call"):
        inject(model, LoRA, ["q_proj"])
    assert len(inject(model, LoRA, ["intermediate_dense", "output_dense"])) == 2


# -- weights that are read in other methods


def fused(x: Tensor, layer: nn.Linear) -> Tensor:
    return nn.functional.linear(x, layer.weight, layer.bias)


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(4, 4), nn.Linear(4, 4)
        self.many = nn.ModuleList([nn.Linear(4, 4)])
        self.inner = nn.ModuleDict({"v": nn.Linear(4, 4)})
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self._draw(self.o)

    def _draw(self, layer: nn.Linear) -> None:
        nn.init.zeros_(self.o.weight)

    def fuse(self) -> Tensor:
        return self.o.weight @ self.q.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.o(x)


class Helper(Reader):
    def forward(self, x: Tensor) -> Tensor:
        return self.helper(x)

    def helper(self, x: Tensor) -> Tensor:
        return self.o(nn.functional.linear(x, self.q.weight, self.q.bias))


class Function(Reader):
    def forward(self, x: Tensor) -> Tensor:
        return fused(self.o(x), layer=self.q)


class Renamed(Reader):
    def forward(self, x: Tensor) -> Tensor:
        q, o = self.q, self.o
        return o(x) @ q.weight.T


class Handed(Reader):
    def forward(self, x: Tensor) -> Tensor:
        return self.use(self.q, self.o(x))

    @staticmethod
    def use(layer: nn.Linear, x: Tensor) -> Tensor:
        return x @ layer.weight.T


class Property(Reader):
    @property
    def matrix(self) -> Tensor:
        return self.q.weight.T

    def forward(self, x: Tensor) -> Tensor:
        return self.o(x) @ self.matrix


class Listed(Reader):
    def forward(self, x: Tensor) -> Tensor:
        for _, layer in enumerate(self.many):
            x = x @ layer.weight
        return x @ self.inner["v"].weight


class Served(Reader):
    def predict(self, x: Tensor) -> Tensor:  # called by another module
        return x @ self.q.weight


class Asking(Reader):
    def forward(self, x: Tensor) -> Tensor:
        if self.q.bias is not None and self.q.weight.size(0) == 4:
            x = x.to(self.q.weight)
        return self.q(x)


@pytest.mark.parametrize(
    ("kind", "paths"),
    [
        (Reader, set()), (Helper, {"q"}), (Function, {"q"}), (Renamed, {"q"}), (Handed, {"q"}), (Property, {"q"}),
        (Listed, {"many.*", "inner.v"}), (Asking, set()), (Served, {"q"}),
    ],
)  # fmt: skip
def test_weights_that_other_code_reads(kind: type[Reader], paths: set[str]) -> None:
    assert bypassed(kind) == paths
    net = nn.Sequential(kind())
    for name in ("q", "many.0", "inner.v"):
        if any(name == path.replace("*", "0") for path in paths):
            with pytest.raises(ValueError, match=rf"got 0.{name} \(in a {kind.__name__}\), whose weights are used"):
                find(net, [name])
        else:
            assert list(find(net, [name])) == [f"0.{name}"]


def test_weights_that_code_without_source_reads() -> None:
    text = (
        "class Att(nn.Module):\n"
        "    def forward(self, x): return self.fused(x)\n"
        "    def fused(self, x):\n"
        "        y = x @ self.q.weight.T\n"
        "        return self.o(y) if self.o.bias is not None else self.o(y.to(self.o.weight.dtype))\n"
    )
    names: dict[str, type] = {"nn": nn}
    exec(text, names)
    assert bypassed(names["Att"]) == {"q"}


# -- tasks


def shared(sharing: str = "multiple") -> tuple[nn.Sequential, Tasks]:
    torch.manual_seed(0)
    net, tasks = nn.Sequential(nn.Linear(4, 8)).double(), Tasks(["a", "b"])
    inject(net, VLAdapter, ["0"], reduction=4, sharing=sharing, tasks=tasks)
    shake(net)
    return net, tasks


def losses(order: str, call: Callable[[nn.Module, Tensor, Tasks], Tensor], mixed: bool) -> list[Tensor]:
    net, tasks = shared()
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    total = x.new_zeros(())
    for name in order:
        tasks.use([name] * 3 if mixed else name)
        total = total + call(net, x, tasks).square().sum()
    total.backward()
    return [p.grad for p in net.parameters() if p.requires_grad]


@pytest.mark.parametrize("mixed", [False, True])
def test_checkpoints_of_several_tasks(mixed: bool) -> None:
    travels = {"use_reentrant": False}
    for order in ("a", "aa", "ab", "aba"):
        expected = losses(order, lambda net, x, tasks: net(x), mixed)
        got = losses(order, lambda net, x, tasks: checkpoint(net, x, context_fn=tasks.contexts, **travels), mixed)
        assert_close(got, expected)
        for reentrant in (True, False):
            plain = lambda net, x, tasks: checkpoint(net, x, use_reentrant=reentrant)  # noqa: B023, E731
            if len(set(order)) == 1:
                assert_close(losses(order, plain, mixed), expected)
            else:
                with pytest.raises(RuntimeError, match="tasks: expected, for a layer that is recomputed"):
                    losses(order, plain, mixed)


def test_checkpoints_of_one_task_at_a_time() -> None:
    net, tasks = shared()
    x = torch.randn(3, 4).double().requires_grad_()
    for name in "abab":
        tasks.use("b")
        net(x)  # looked at, never trained on
        tasks.use(name)
        checkpoint(net, x, use_reentrant=False).sum().backward()


# -- other libraries


def test_bones_own_product_compiles() -> None:
    torch.compiler.reset()
    net, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(5, 8)
    inject(net, Bone, ["0"], r=2)
    shake(net)
    expected = torch.autograd.grad(net(x).square().sum(), adapters(net)["0"].miss_block)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    assert_close(torch.autograd.grad(compiled(x).square().sum(), adapters(net)["0"].miss_block), expected)


def test_transformers_is_told_of_every_host() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    inject(net, TLoRA, ["0"], name="one")
    inject(net, TeRA, ["0", "1"], name="two")
    assert all(isinstance(m, Host) and m._is_hf_initialized for m in net)
