"""AdaptFormer alone: its numbers on real blocks, what the tap hears and leaves behind, and every option."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from transformers import ViTConfig, ViTModel

from peftref.adapters.adaptformer import AdaptFormer, branch, dead_share, head
from peftref.adapters.baselines.lora import LoRA
from peftref.adapters.core.bypass import call_with_taps
from peftref.adapters.core.files import load, save
from peftref.adapters.core.injection import activate, adapters, build, inject, unload
from peftref.adapters.core.layers import view, width
from peftref.models.vit import ViT
from tests._naive.adaptformer import bottleneck as naive_bottleneck
from tests._naive.adaptformer import dead as naive_dead

BLOCKS = r"blocks\.\d+"
EXACT = {"rtol": 0, "atol": 0}


def shaken(model: nn.Module, name: str = "default") -> nn.Module:
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for adapter in adapters(model, name).values():
            for p in adapter.parameters():
                p.add_(0.3 * torch.randn(p.shape, generator=g, dtype=p.dtype))
    return model


def one(dtype: torch.dtype = torch.float64, drop_path: float = 0.0, **options) -> tuple[nn.Sequential, AdaptFormer]:
    """A block of timm with LayerScale, with an adapter that is no longer the identity; in eval mode."""
    torch.manual_seed(0)
    net = nn.Sequential(Block(16, 2, qkv_bias=True, init_values=0.5, drop_path=drop_path)).to(dtype).eval()
    inject(net, AdaptFormer, ["0"], **{"bottleneck": 5, **options})
    return shaken(net), adapters(net)["0"]


def by_hand(block: Block, adapter: AdaptFormer, x: Tensor) -> Tensor:
    """The authors' block: the bottleneck is added behind LayerScale and DropPath, which only the frozen paths have."""
    x = x + block.drop_path1(block.ls1(block.attn(block.norm1(x))))
    z = block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
    u = adapter.norm(x if adapter.placement == "parallel" else z)
    h = torch.relu(adapter.down_proj(u))
    return x + z + adapter.up_proj(h) * adapter.s


def tokens(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


# -- the numbers


@settings(max_examples=25, deadline=None)
@given(d=st.integers(1, 6), r=st.integers(1, 8), scale=st.floats(-3, 3), norm=st.booleans(), seed=st.integers(0, 99))
def test_equal_to_the_naive_form(d: int, r: int, scale: float, norm: bool, seed: int) -> None:
    torch.manual_seed(seed)
    u = torch.randn(d, dtype=torch.float64)
    weights = [torch.randn(*shape, dtype=torch.float64) for shape in ((r, d), (r,), (d, r), (d,), (d,), (d,))]
    listed, own = [w.tolist() for w in weights], nn.functional.layer_norm(u, (d,), *weights[4:])
    expected = naive_bottleneck(u.tolist(), *listed[:4], scale, tuple(listed[4:]) if norm else None)
    assert_close(branch(own if norm else u, *weights[:4], scale), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("placement", ["parallel", "sequential"])
@pytest.mark.parametrize("options", [{}, {"layernorm": True}, {"scale": -2.0, "learn_scale": True}])
def test_a_block_is_the_authors_block(placement: str, options: dict) -> None:
    net, adapter = one(placement=placement, **options)
    x = tokens(3, 7, 16)
    assert_close(net(x), by_hand(net[0].base_layer, adapter, x))


@pytest.mark.parametrize("placement", ["parallel", "sequential"])
def test_droppath_drops_the_frozen_paths_alone(placement: str) -> None:
    net, adapter = one(drop_path=0.5, dropout=0.0, placement=placement)
    x = tokens(16, 7, 16)
    net.train()
    torch.manual_seed(5)
    y = net(x)
    torch.manual_seed(5)
    assert_close(y, by_hand(net[0].base_layer, adapter, x))
    assert not torch.allclose(y, net.eval()(x))
    gone = nn.Sequential(Block(16, 2, drop_path=0.999).double().train())  # nothing of the frozen block is left
    inject(gone, AdaptFormer, ["0"], dropout=0.0)
    shaken(gone)
    a = adapters(gone)["0"]
    expected = branch(x, a.down_proj.weight, a.down_proj.bias, a.up_proj.weight, a.up_proj.bias, 0.1)
    assert_close(gone(x), x + expected)


def test_the_gradients_are_those_of_the_authors_block() -> None:
    net, adapter = one(learn_scale=True, layernorm=True)
    x, params = tokens(2, 5, 16).requires_grad_(), list(adapter.parameters())
    weights = tokens(2, 5, 16).cos()
    ours = torch.autograd.grad((net(x) * weights).sum(), [x, *params])
    theirs = torch.autograd.grad((by_hand(net[0].base_layer, adapter, x) * weights).sum(), [x, *params])
    assert len(params) == 7 and all(g.abs().max() > 0 for g in ours)
    assert_close(ours, theirs)


# -- limiting cases


def test_without_the_relu_it_is_a_matrix_beside_the_stream() -> None:
    net, a = one(scale=0.5)
    block, x = net[0].base_layer, tokens(3, 7, 16)
    nn.init.constant_(a.down_proj.bias, 1e4)  # every ReLU is on
    stream = x + block.ls1(block.attn(block.norm1(x)))
    skip = 0.5 * a.up_proj.weight @ a.down_proj.weight  # (d, d), of rank r
    shift = 0.5 * (a.up_proj.weight @ a.down_proj.bias + a.up_proj.bias)
    assert torch.linalg.matrix_rank(skip) == 5
    assert_close(net(x), block(x) + stream @ skip.T + shift, rtol=1e-9, atol=1e-9)
    nn.init.constant_(a.down_proj.bias, -1e4)  # every one is off: a constant
    assert_close(net(x), block(x) + 0.5 * a.up_proj.bias)


def test_scale_zero_is_the_frozen_block_and_the_scale_is_linear() -> None:
    x = tokens(3, 7, 16)
    y = {s: one(scale=s)[0](x) for s in (0.0, 0.1, 0.2)}
    assert torch.equal(y[0.0], one()[0][0].base_layer(x))
    assert_close(y[0.2] - y[0.0], 2 * (y[0.1] - y[0.0]))


def test_both_placements_agree_where_the_mlp_passes_the_stream_on() -> None:
    outputs = []
    for placement in ("parallel", "sequential"):
        net, _ = one(placement=placement)
        outputs.append(net(tokens(3, 7, 16)))
        block = net[0].base_layer
        block.norm2, block.mlp, block.ls2 = nn.Identity(), nn.Identity(), nn.Identity()  # z = x'
        outputs.append(net(tokens(3, 7, 16)))
    assert_close(outputs[1], outputs[3])
    assert not torch.allclose(outputs[0], outputs[2])


def test_the_start_draws_down_as_the_authors_do_and_moves_up_first() -> None:
    net = nn.Sequential(Block(64, 2))
    inject(net, AdaptFormer, ["0"], bottleneck=500)
    a = adapters(net)["0"]
    down = a.down_proj.weight.abs()
    assert 0.99 / 8 < down.max() <= 1 / 8 and down.std().item() == pytest.approx(1 / 8 / math.sqrt(12), rel=0.05)
    assert not any(p.any() for p in (a.down_proj.bias, a.up_proj.weight, a.up_proj.bias))
    net(tokens(2, 5, 64, dtype=torch.float32)).square().sum().backward()
    moved = {n for n, p in a.named_parameters() if p.grad.any()}
    assert moved == {"up_proj.weight", "up_proj.bias"}


@pytest.mark.parametrize("learned", [False, True])
def test_one_step_of_sgd_goes_with_the_square_of_the_scale(learned: bool) -> None:
    change = {}
    for s in (0.01, 0.02):
        torch.manual_seed(0)
        net, x = nn.Sequential(Block(16, 2)).double(), tokens(4, 5, 16)
        inject(net, AdaptFormer, ["0"], scale=s, dropout=0.0, learn_scale=learned)
        y = net(x)
        y.square().mean().backward()
        torch.optim.SGD(adapters(net)["0"].parameters(), lr=0.1).step()
        change[s] = (net(x) - y).norm().item()
    assert change[0.02] == pytest.approx(4 * change[0.01], rel=1e-6)


# -- whole models


def test_a_timm_model_starts_as_it_was_and_trains_what_it_should() -> None:
    torch.manual_seed(0)
    net = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, num_classes=5).eval()
    x = torch.randn(2, 3, 32, 32)
    before = net(x)
    assert inject(net, AdaptFormer, BLOCKS, bottleneck=8) == [f"blocks.{i}" for i in range(3)]
    assert torch.equal(net(x), before)
    net.head.requires_grad_(True)
    names = {n.rpartition("default.")[2] for n, p in net.named_parameters() if p.requires_grad}
    assert names == {f"{half}_proj.{what}" for half in ("down", "up") for what in ("weight", "bias")} | {
        "head.weight", "head.bias",
    }  # fmt: skip
    shaken(net)
    y = net(x)
    assert not torch.allclose(y, before)
    assert_close(torch.compile(net, backend="eager", fullgraph=True)(x), y)


def test_the_papers_parameter_counts() -> None:
    with torch.device("meta"):
        net = timm.create_model("vit_base_patch16_224")
    count = {r: sum(p.numel() for a in build(net, AdaptFormer, BLOCKS, bottleneck=r).values() for p in a.parameters())
             for r in (8, 64)}  # fmt: skip
    assert count == {8: 156_768, 64: 1_189_632}  # 0.16 M and 1.19 M
    assert count[64] == 12 * (2 * 768 * 64 + 64 + 768)


def test_files_keep_every_option_and_the_learned_scale(tmp_path) -> None:
    options = {"bottleneck": 3, "scale": 0.7, "dropout": 0.2, "placement": "sequential", "layernorm": True,
               "learn_scale": True, "tap": "mlp"}  # fmt: skip
    nets = []
    for _ in range(2):
        torch.manual_seed(0)
        nets.append(ViT(embed_dim=16, depth=2, num_heads=2).eval())
    inject(nets[0], AdaptFormer, BLOCKS, per_layer={"blocks.1": {"bottleneck": 4}}, **options)
    shaken(nets[0])
    save(nets[0], tmp_path)
    load(nets[1], tmp_path, "again")
    a, b = (list(adapters(net, name).values()) for net, name in zip(nets, ("default", "again"), strict=True))
    assert [x.bottleneck for x in b] == [3, 4] and a[0].s.item() != pytest.approx(0.7)
    assert all(getattr(x, o) == getattr(y, o) for x, y in zip(a, b, strict=True) for o in AdaptFormer.options)
    x = torch.rand(2, 1, 28, 28)
    assert torch.equal(nets[0](x), nets[1](x))


def test_blocks_of_other_libraries() -> None:
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    net = ViTModel(ViTConfig(image_size=8, patch_size=4, num_channels=1, **size), add_pooling_layer=False).eval()
    layers = [n for n, m in net.named_modules() if type(m).__name__ == "ViTLayer"]
    x = torch.rand(2, 1, 8, 8)
    before = net(x).last_hidden_state
    assert inject(net, AdaptFormer, layers, tap="layernorm_after") == layers and len(layers) == 2
    assert torch.equal(net(x).last_hidden_state, before)
    first = net.get_submodule(layers[0])
    shaken(net)
    h = torch.randn(2, 5, 16)
    y0, inputs = call_with_taps(first.base_layer, ["layernorm_after"], h)
    a = adapters(net)[layers[0]]
    u = inputs["layernorm_after"]
    assert_close(first(h), y0 + a(u, y0, view(first.base_layer)))
    assert_close(y0 - u, first.base_layer.mlp(first.base_layer.layernorm_after(u)), rtol=1e-4, atol=1e-5)  # it is x'


def test_a_child_that_is_passed_over_is_an_error_not_a_wrong_number() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, norm_first=True, batch_first=True, dropout=0.0)
    net, x = nn.Sequential(layer), torch.randn(2, 5, 16)
    inject(net, AdaptFormer, ["0"], dropout=0.0)
    shaken(net)
    assert not torch.allclose(net(x), layer(x))
    net.eval()
    with torch.no_grad(), pytest.raises(RuntimeError, match="tap: expected a child that the Transformer"):
        net(x)  # torch's fused path, which calls no child
    activate(net)
    with torch.no_grad():
        assert_close(net(x), layer(x))


def test_width() -> None:
    assert width(nn.LayerNorm(6, elementwise_affine=False)) == width(nn.RMSNorm(6)) == width(nn.Linear(6, 3)) == 6
    assert width(Block(6, 2).mlp) == 6 and width(nn.BatchNorm1d(6)) == 6
    with pytest.raises(ValueError, match="tap: expected a normalisation or layers with a matrix, got a Tanh"):
        width(nn.Tanh())


# -- the tap


def state_of(module: nn.Module) -> dict[str, list]:
    """Every attribute that Python sees (hooks, children, flags), but for the mark that torch.compile leaves."""
    return {
        n: [(k, list(v.items()) if isinstance(v, dict) else v) for k, v in vars(m).items() if k != "_is_torch_compile"]
        for n, m in module.named_modules()
    }


class Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ArithmeticError("midway")


@pytest.mark.parametrize("compiled", [False, True])
def test_a_call_leaves_nothing_behind_even_when_it_fails(compiled: bool) -> None:
    net, _ = one()
    before = state_of(net)
    heard: list[weakref.ref] = []
    handle = net[0].base_layer.norm2.register_forward_pre_hook(lambda _, inputs: heard.append(weakref.ref(inputs[0])))
    run = torch.compile(net, backend="eager") if compiled else net
    y = run(tokens(2, 5, 16))
    y.sum().backward()
    del y
    handle.remove()
    gc.collect()
    assert heard and all(ref() is None for ref in heard)  # the stream after attention is not kept
    assert state_of(net) == before
    block = net[0].base_layer
    mlp, block.mlp = block.mlp, Fails()
    before = state_of(net)
    with pytest.raises(ArithmeticError, match="midway"):
        run(tokens(2, 5, 16))
    assert state_of(net) == before
    block.mlp = mlp
    assert_close(run(tokens(2, 5, 16)), by_hand(block, adapters(net)["0"], tokens(2, 5, 16)))


def test_threads_do_not_hear_each_other() -> None:
    net, _ = one()
    xs = [tokens(1 + i % 3, 5 + i, 16) for i in range(40)]
    expected = [net(x) for x in xs]
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(net, xs))
    assert_close(got, expected)


def test_copies_hear_their_own_block() -> None:
    net, _ = one()
    x = tokens(2, 5, 16)
    y = net(x)
    y.sum().backward()  # a graph is alive while it is copied
    twin = copy.deepcopy(net)
    assert torch.equal(twin(x), y)
    with torch.no_grad():
        twin[0].base_layer.attn.proj.weight.zero_()
        adapters(twin)["0"].up_proj.weight.zero_()
    assert torch.equal(net(x), y) and not torch.allclose(twin(x), y)


def test_several_adapters_inside_and_beside_a_block_and_all_out_again() -> None:
    net, a = one()
    block, x = net[0].base_layer, tokens(2, 5, 16)
    modules = {n: m for n, m in block.named_modules()}
    inject(net, AdaptFormer, ["0"], name="second", placement="sequential", bottleneck=2)
    inject(net, AdaptFormer, ["0"], name="third", tap="mlp", bottleneck=3)
    inject(net, LoRA, ["attn.qkv", "mlp.fc2"], name="inside", r=2)
    for name in ("second", "third", "inside"):
        shaken(net, name)
    activate(net, "inside")
    frozen = net(x)
    gain = {}
    for name in ("default", "second", "third"):
        activate(net, name, "inside")
        gain[name] = net(x) - frozen
    activate(net, "third", "default", "inside", "second")
    assert_close(net(x) - frozen, sum(gain.values()))
    assert_close(gain["default"], by_hand(block, a, x) - frozen)  # the block with LoRA inside
    assert all(g.abs().max() > 1e-3 for g in gain.values())
    unload(net)
    assert net[0] is block and dict(block.named_modules()) == modules and not block._forward_pre_hooks
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in net.modules())


def test_checkpointing_gives_the_same_gradients() -> None:
    net, a = one(dropout=0.3)
    net.train()
    grads = []
    for reentrant in (None, False):
        torch.manual_seed(0)
        x = tokens(2, 5, 16)
        y = net(x) if reentrant is None else checkpoint(net, x, use_reentrant=reentrant)
        grads.append(torch.autograd.grad(y.square().sum(), list(a.parameters())))
    assert_close(*grads)


def test_hooks_of_a_user_still_run_once() -> None:
    net, _ = one()
    block, seen = net[0].base_layer, []
    block.register_forward_hook(lambda m, i, y: seen.append(y))
    block.norm2.register_forward_pre_hook(lambda m, i: seen.append(i[0]))
    y = net(tokens(2, 5, 16))
    assert len(seen) == 2 and not torch.equal(seen[1], y)  # the stream, then the frozen block's output


def test_the_mlps_input_is_another_tap() -> None:
    net, a = one(tap="mlp")
    block, x = net[0].base_layer, tokens(2, 5, 16)
    u = block.norm2(x + block.ls1(block.attn(block.norm1(x))))
    assert_close(net(x), block(x) + a(u, block(x), view(block)))


def test_half_precision_keeps_a_wide_adapter() -> None:
    net, _ = one(torch.bfloat16, scale=1e-3)
    a, x = adapters(net)["0"], tokens(2, 5, 16).bfloat16()
    assert {p.dtype for p in a.parameters()} == {torch.float32}
    y0, inputs = call_with_taps(net[0].base_layer, ["norm2"], x)
    assert torch.equal(net(x), (y0 + a(inputs["norm2"].float(), y0.float(), view(net[0].base_layer))).bfloat16())


# -- options


@pytest.mark.parametrize(
    ("option", "other"),
    [("bottleneck", 4), ("scale", 0.2), ("placement", "sequential"), ("layernorm", True), ("tap", "mlp")],
)
def test_every_option_changes_the_output(option: str, other: object) -> None:
    x = tokens(2, 5, 16)
    assert not torch.allclose(one()[0](x), one(**{option: other})[0](x), rtol=1e-3)


def test_a_learned_scale_starts_where_it_is_told_and_gets_a_gradient() -> None:
    net, a = one(scale=0.4, learn_scale=True)
    fresh = build(nn.Sequential(Block(16, 2)), AdaptFormer, ["0"], scale=0.4, learn_scale=True)["0"]
    assert fresh.s.item() == pytest.approx(0.4) and fresh.s.requires_grad
    net(tokens(2, 5, 16)).square().sum().backward()
    assert a.s.grad.abs() > 0
    assert isinstance(one(scale=0.4)[1].s, float)


def test_dropout_is_for_training_alone_and_keeps_the_mean() -> None:
    net, a = one(dropout=0.5, scale=1.0)
    x = tokens(1, 5, 16).expand(4000, 5, 16)
    y = net(x)
    assert torch.equal(net(x), y)
    torch.manual_seed(0)
    noisy = net.train()(x)
    assert noisy.std(0).min() > 0.01
    assert_close(noisy.mean(0), y.mean(0), rtol=0, atol=0.1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bottleneck": 0}, "bottleneck: expected an integer >= 1, got 0"),
        ({"bottleneck": True}, "bottleneck: expected an integer >= 1, got True"),
        ({"scale": float("inf")}, "scale: expected a finite number, got inf"),
        ({"dropout": 1.0}, r"dropout: expected a number in \[0, 1\), got 1.0"),
        ({"placement": "before"}, "placement: expected one of \\['parallel', 'sequential'\\], got 'before'"),
        ({"tap": "ln_2"}, r"tap: expected a child of the block, one of \['norm1', .*\], got 'ln_2'"),
        ({"tap": "ls2"}, "tap: expected a normalisation or layers with a matrix, got a Identity"),
    ],
)
def test_bad_options_change_nothing(options: dict, said: str) -> None:
    net = nn.Sequential(Block(8, 2), Block(8, 2))
    with pytest.raises(ValueError, match=said):
        inject(net, AdaptFormer, ["0", "1"], per_layer={"1": options})
    assert type(net[0]) is Block and all(p.requires_grad for p in net.parameters())


# -- measuring, and the head


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 4), r=st.integers(1, 6), seed=st.integers(0, 99))
def test_dead_share_is_the_naive_one(n: int, r: int, seed: int) -> None:
    torch.manual_seed(seed)
    net = nn.Sequential(Block(6, 2).double())
    inject(net, AdaptFormer, ["0"], bottleneck=r)
    a, x = adapters(net)["0"], torch.randn(1, n, 6, dtype=torch.float64)
    nn.init.normal_(a.down_proj.bias)
    _, inputs = call_with_taps(net[0].base_layer, ["norm2"], x)
    expected = naive_dead(inputs["norm2"][0].tolist(), a.down_proj.weight.tolist(), a.down_proj.bias.tolist())
    assert dead_share(net, x) == {"0": pytest.approx(expected)}


def test_dead_units_get_no_gradient_and_measuring_changes_nothing() -> None:
    net, a = one(bottleneck=4, layernorm=True)
    with torch.no_grad():
        a.down_proj.bias[:3] = -1e3
    net.train()
    net[0].base_layer.attn.eval()
    x, rng, before = tokens(2, 5, 16), torch.get_rng_state(), state_of(net)
    assert dead_share(net, x) == {"0": 0.75}
    assert state_of(net) == before and torch.equal(torch.get_rng_state(), rng)
    assert net.training and not net[0].base_layer.attn.training
    net(x).square().sum().backward()
    assert not a.down_proj.weight.grad[:3].any() and not a.up_proj.weight.grad[:, :3].any()
    assert a.down_proj.weight.grad[3].any()
    activate(net)
    with pytest.raises(ValueError, match="expected an adapter that is active, got 'default'"):
        dead_share(net, x)
    inject(net, LoRA, ["mlp.fc1"], name="lora")
    with pytest.raises(ValueError, match=r"expected an AdaptFormer, got another adapter on \['0.mlp.fc1'\]"):
        dead_share(net, x, "lora")


def test_the_head_is_that_of_the_official_script() -> None:
    torch.manual_seed(0)
    classifier = head(500, 100)
    assert sum(p.numel() for p in classifier.parameters()) == 500 * 100 + 100
    assert classifier[1].weight.std().item() == pytest.approx(0.01, rel=0.02) and not classifier[1].bias.any()
    x = 3 + 2 * torch.randn(64, 500)
    normalised = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-6).sqrt()
    assert_close(classifier(x), normalised @ classifier[1].weight.T, rtol=1e-4, atol=1e-5)
