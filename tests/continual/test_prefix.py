"""Calibrated prefixes: the loops, the published form, identities of the softmax, gradients, timm's attention."""

from __future__ import annotations

import copy
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import DiffAttention
from timm.models.cait import TalkingHeadAttn
from timm.models.davit import ChannelAttention
from timm.models.swin_transformer import WindowAttention
from timm.models.xcit import XCA
from torch import Tensor, nn
from torch.testing import assert_close

from peftref.adapters.core.files import load, save
from peftref.adapters.core.injection import activate, adapters, inject, unload
from peftref.continual.core.prefix import AttentionHost, Prefix, inject_prefix, prefix_attention, prefix_share
from peftref.continual.core.small_modules import ParallelAdapter
from peftref.models.vit import Attention, ViT
from tests._naive import lae as naive

ATTENTIONS = r"blocks\.\d+\.attn"


def problem(tokens=7, rows=3, heads=2, width=4, batch=2, seed=0, dtype=torch.double) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, batch, heads, tokens, width, generator=g, dtype=torch.double).to(dtype).unbind(0)
    p_k, p_v = torch.randn(2, heads, rows, width, generator=g, dtype=torch.double).to(dtype).unbind(0)
    return q, k, v, p_k, p_v


def vit(seed: int = 0, **options) -> ViT:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ViT(embed_dim=16, depth=2, num_heads=2, **options).eval()


def images(n: int = 3, seed: int = 0) -> Tensor:
    return torch.rand(n, 1, 28, 28, generator=torch.Generator().manual_seed(seed))


# --- the loops, the published form, the identities --------------------------------------------------------------------
@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(1, 6), rows=st.integers(1, 4), width=st.integers(1, 4), compensate=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_equals_the_loops(tokens, rows, width, compensate, seed):
    q, k, v, p_k, p_v = problem(tokens, rows, 1, width, 1, seed)
    parts = [t.flatten(0, -2).tolist() for t in (q, k, v, p_k, p_v)]
    out, weights = naive.loop_prefix_attention(*parts, compensate)
    ours = prefix_attention(q, k, v, p_k, p_v, compensate=compensate)[0, 0]
    assert_close(ours, torch.tensor(out, dtype=torch.double), rtol=1e-10, atol=1e-12)
    if compensate:  # the prefix' columns sum to one, the others to 1 - lambda
        share = prefix_share(q, k, p_k).flatten()
        for w, own in zip(weights, share.tolist(), strict=True):
            assert math.isclose(sum(w[:rows]), 1.0, rel_tol=1e-12)
            assert math.isclose(sum(w[rows:]), 1 - own, rel_tol=1e-9, abs_tol=1e-12)


@pytest.mark.parametrize("compensate", [True, False])
@pytest.mark.parametrize("position", [0, 1, 7])
def test_equals_the_published_form_wherever_the_prefix_stands(compensate, position):
    parts = problem()
    want = naive.published_prefix_attention(*parts, compensate=compensate, position=position)
    assert_close(prefix_attention(*parts, compensate=compensate), want, rtol=0, atol=1e-12)


def test_the_softmax_over_the_union_splits():
    q, k, v, p_k, p_v = problem()
    share = prefix_share(q, k, p_k)
    tokens = F.scaled_dot_product_attention(q, k, v)
    own = F.scaled_dot_product_attention(q, *(p.expand(2, *p.shape) for p in (p_k, p_v)))
    plain, calibrated = (prefix_attention(q, k, v, p_k, p_v, compensate=c) for c in (False, True))
    assert_close(plain, (1 - share) * tokens + share * own, rtol=0, atol=1e-12)
    assert_close(calibrated, (1 - share) * tokens + own, rtol=0, atol=1e-12)
    assert_close(calibrated, naive.materialised_lse(q, k, v, p_k, p_v), rtol=0, atol=1e-12)


def test_share_is_the_ratio_of_the_exponentials():
    q, k, _, p_k, _ = problem()
    e_p, e_k = ((q @ t.mT / math.sqrt(q.shape[-1])).exp().sum(-1, keepdim=True) for t in (p_k, k))
    assert_close(prefix_share(q, k, p_k), e_p / (e_p + e_k), rtol=1e-12, atol=0)


def test_ten_rows_beside_two_hundred_tokens_take_a_twentieth():
    q, k = torch.zeros(1, 4, 8), torch.randn(1, 197, 8)
    assert_close(prefix_share(q, k, torch.zeros(1, 10, 8)), torch.full((1, 4, 1), 10 / 207))


def test_gradient_of_the_values_is_smaller_by_the_share_and_not_so_when_calibrated():
    q, k, v, p_k, p_v = problem(tokens=1, batch=1)  # one query: one share for each head
    share, grads = prefix_share(q, k, p_k)[0], []
    for compensate in (False, True):
        p = p_v.clone().requires_grad_()
        prefix_attention(q, k, v, p_k, p, compensate=compensate).sum().backward()
        grads.append(p.grad)
    assert_close(grads[0], share * grads[1], rtol=1e-12, atol=0)
    assert share.max() < 0.999


@pytest.mark.parametrize("compensate", [True, False])
def test_gradients_through_every_input(compensate):
    parts = [t.requires_grad_() for t in problem(tokens=3, rows=2, heads=1, width=2, batch=1)]
    assert torch.autograd.gradcheck(lambda *a: prefix_attention(*a, compensate=compensate), parts)


def test_the_share_is_part_of_the_graph():
    """A detached share would leave the keys of the prefix without their pull on the tokens' part."""
    q, k, v, p_k, p_v = problem()
    p = p_k.clone().requires_grad_()
    prefix_attention(q, k, v, p, torch.zeros_like(p_v)).sum().backward()
    assert p.grad.abs().max() > 1e-3  # the values are zero: only the share is left to be moved


def test_no_rows_is_the_attention_itself():
    q, k, v, p_k, p_v = problem(rows=0)
    assert torch.equal(prefix_attention(q, k, v, p_k, p_v), F.scaled_dot_product_attention(q, k, v))


def test_a_share_that_underflows_does_no_harm():
    q, k, v, p_k, p_v = problem()
    p_k = p_k - 1e6 * q.mean((0, 2))[:, None]  # far from every query
    q = q.mean((0, 2), keepdim=True).expand_as(q)
    out = prefix_attention(q, k, v, p_k, p_v)
    assert out.isfinite().all() and prefix_share(q, k, p_k).max() == 0
    own = F.scaled_dot_product_attention(q, *(p.expand(2, *p.shape) for p in (p_k, p_v)))
    assert_close(out, F.scaled_dot_product_attention(q, k, v) + own)


def test_a_mask_hides_tokens_and_never_the_prefix():
    q, k, v, p_k, p_v = problem()
    mask = torch.ones(7, 7, dtype=torch.bool)
    mask[:, 4:] = False
    for compensate in (True, False):
        short = prefix_attention(q, k[..., :4, :], v[..., :4, :], p_k, p_v, compensate=compensate)
        assert_close(prefix_attention(q, k, v, p_k, p_v, compensate=compensate, mask=mask), short)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dtype_follows_the_tokens(dtype):
    q, k, v, p_k, p_v = problem(dtype=dtype)
    out = prefix_attention(q, k, v, p_k.float(), p_v.float())
    assert out.dtype == dtype
    tolerance = {torch.bfloat16: 5e-2, torch.float32: 1e-5, torch.float64: 1e-6}[dtype]  # of a type's own rounding
    assert_close(out.double(), prefix_attention(*problem()), rtol=0, atol=tolerance)


def test_bad_input_is_refused():
    q, k, v, p_k, p_v = problem()
    with pytest.raises(ValueError, match="p_k, p_v: expected one shape"):
        prefix_attention(q, k, v, p_k, p_v[:, :1])
    with pytest.raises(ValueError, match="mask: expected booleans"):
        prefix_attention(q, k, v, p_k, p_v, mask=torch.zeros(7, 7))


# --- in a network -----------------------------------------------------------------------------------------------------
def by_hand(attn: Attention, prefix: Prefix, x: Tensor) -> Tensor:
    q, k, v = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    p_k, p_v = (
        (s * p).unflatten(-1, (attn.num_heads, -1)).transpose(0, 1)
        for s, p in ((prefix.s_k, prefix.p_k), (prefix.s_v, prefix.p_v))
    )
    y = naive.published_prefix_attention(q, k, v, p_k, p_v, prefix.compensate)
    return attn.proj(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("compensate", [True, False])
@pytest.mark.parametrize("peer", ["peftref", "timm", "timm with normalised queries"])
def test_a_module_equals_the_published_form(compensate, peer):
    torch.manual_seed(0)
    if peer == "peftref":
        attn = Attention(16, 2)
    else:
        options = {"qk_norm": True, "norm_layer": nn.LayerNorm} if "norm" in peer else {}
        attn = timm.layers.Attention(16, 2, qkv_bias=True, **options)
    net, x = nn.Sequential(attn).double().eval(), torch.randn(3, 5, 16, dtype=torch.double)
    want_without = net(x)
    assert inject_prefix(net, ["0"], length=3, compensate=compensate) == ["0"]
    prefix = adapters(net)["0"]
    with torch.no_grad():
        prefix.p_k.normal_()
        prefix.p_v.normal_()
        prefix.s_k.fill_(0.7)
        prefix.s_v.fill_(1.3)
    if "norm" not in peer:
        assert_close(net(x), by_hand(attn, prefix, x), rtol=0, atol=1e-12)
    else:
        q, k, v = attn.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        p_k, p_v = prefix.rows(2)
        y = naive.published_prefix_attention(attn.q_norm(q), attn.k_norm(k), v, p_k, p_v, compensate)
        assert_close(net(x), attn.proj(y.transpose(1, 2).flatten(2)), rtol=0, atol=1e-12)
    assert not torch.allclose(net(x), want_without)
    unload(net)
    assert torch.equal(net(x), want_without) and net[0] is attn


def test_the_increment_and_the_direct_way_agree():
    """By plain ``inject`` the frozen attention runs too, and the prefix corrects it."""
    direct, x = vit(), images()
    slow = copy.deepcopy(direct)
    inject_prefix(direct, ATTENTIONS)
    inject(slow, Prefix, ATTENTIONS)
    for n, a in adapters(slow).items():
        a.load_state_dict(adapters(direct)[n].state_dict())
    assert type(direct.blocks[0].attn) is AttentionHost and type(slow.blocks[0].attn) is not AttentionHost
    assert_close(direct(x), slow(x))


def test_beside_another_adapter_in_one_host():
    net, x = vit(), images()
    inject(net, ParallelAdapter, ATTENTIONS, name="adapter")
    inject_prefix(net, ATTENTIONS, name="prefix")
    alone = net(x)
    for a in adapters(net, "adapter").values():
        nn.init.normal_(a.up.weight)
    assert torch.equal(net(x), alone)
    activate(net, "adapter", "prefix")
    assert not torch.allclose(net(x), alone, atol=1e-3)
    activate(net)
    assert torch.equal(net(x), vit()(x))


def test_only_the_prefix_trains_and_gradients_reach_it():
    net = vit()
    inject_prefix(net, ATTENTIONS, length=4)
    trained = {n: p for n, p in net.named_parameters() if p.requires_grad}
    assert len(trained) == 8 and sum(p.numel() for p in trained.values()) == 2 * (2 * 4 * 16 + 2)
    net(images()).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained.values())


def test_calibration_multiplies_the_first_gradient():
    grads = {}
    for compensate in (True, False):
        net = vit()
        inject_prefix(net, [r"blocks.1.attn"], length=2, compensate=compensate)
        net(images()).logsumexp(-1).sum().backward()
        grads[compensate] = adapters(net)["blocks.1.attn"].p_v.grad.norm()
    assert 5 < grads[True] / grads[False] < 15  # 17 tokens and 2 rows: a share near 2 / 19


def test_every_setting_matters_and_length_zero_changes_nothing():
    x, outs = images(), {}
    for options in ({}, {"length": 3}, {"compensate": False}):
        net = vit()
        torch.manual_seed(0)
        inject_prefix(net, ATTENTIONS, **options)
        outs[str(options)] = net(x)
    a, b, c = outs.values()
    assert not torch.allclose(a, b, atol=1e-5) and not torch.allclose(a, c, atol=1e-5)
    net = vit()
    inject_prefix(net, ATTENTIONS, length=0)
    assert_close(net(x), vit()(x))


def test_the_start_is_that_of_the_paper():
    net = vit()
    inject_prefix(net, ATTENTIONS)
    for a in adapters(net).values():
        assert a.p_k.shape == a.p_v.shape == (10, 16) and a.s_k == a.s_v == 1
        rows = torch.cat([a.p_k, a.p_v]).detach()
        assert rows.min() >= 0 and rows.max() < 0.01 and 0.004 < rows.mean() < 0.006


def test_bf16_model_keeps_a_wide_prefix():
    net = vit().to(torch.bfloat16)
    inject_prefix(net, ATTENTIONS)
    out = net(images().to(torch.bfloat16))
    assert out.dtype == torch.bfloat16 and out.isfinite().all()
    assert adapters(net)["blocks.0.attn"].p_k.dtype == torch.float32


def test_file_round_trip(tmp_path):
    net, x = vit(), images()
    inject_prefix(net, ATTENTIONS, length=3, compensate=False)
    save(net, tmp_path)
    other = vit()
    load(other, tmp_path)
    assert_close(other(x), net(x))


def test_timm_transformer_end_to_end():
    torch.manual_seed(0)
    net = timm.create_model("vit_tiny_patch16_224", pretrained=False, img_size=32, depth=2, num_classes=4).eval()
    x, before = torch.rand(2, 3, 32, 32), {n: t.clone() for n, t in net.state_dict().items()}
    want = net(x)
    assert inject_prefix(net, ATTENTIONS) == ["blocks.0.attn", "blocks.1.attn"]
    assert net(x).isfinite().all() and not torch.allclose(net(x), want)
    with pytest.raises(ValueError, match="attn_mask, is_causal: expected None and False"):
        net.blocks[0].attn(torch.rand(1, 5, 192), attn_mask=torch.ones(5, 5, dtype=torch.bool))
    unload(net)
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())


class Scaled(timm.layers.Attention):
    """Logits that are capped, by no weight and no module."""

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        y = (2 * (q @ k.mT * self.scale / 2).tanh()).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).flatten(2))


class Gridded(timm.layers.Attention):
    def forward(self, x):
        n, h, w, d = x.shape
        return super().forward(x.reshape(n, h * w, d)).reshape(x.shape)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("start", ["as drawn", "all zeros", "on no device"])
def test_attentions_of_every_type_are_known_again(dtype, start):
    attn = timm.layers.Attention(16, 2, qkv_bias=True).to(dtype)
    if start == "all zeros":
        nn.init.zeros_(attn.proj.weight), nn.init.zeros_(attn.proj.bias)
    net = nn.Sequential(attn.to("meta") if start == "on no device" else attn).train()
    assert inject_prefix(net, ["0"], length=0) == ["0"] and attn.training
    if start != "on no device":
        x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
        assert_close(net(x), attn(x))
    with pytest.raises(ValueError, match="rope: expected None, as the attention with a prefix uses tokens alone"):
        net[0](torch.zeros(2, 5, 16, dtype=dtype), rope=torch.zeros(5, 8))


@pytest.mark.parametrize(
    ("attn", "message"),
    [
        (nn.Linear(4, 4), "expected an attention with qkv, proj and num_heads, got a Linear"),
        (timm.layers.Attention(8, 2, gated=True), "without gate"),
        (timm.layers.Attention(8, 2, scale_norm=True, norm_layer=nn.LayerNorm), "without norm"),
        (timm.layers.Attention(8, 2, attn_drop=0.1), "without attn_drop"),
        (timm.layers.Attention(8, 2, proj_drop=0.1), "without proj_drop"),
        (XCA(8, 2), "of qkv and proj alone, got a XCA with .'temperature'. too"),
        (TalkingHeadAttn(8, 2), "of qkv and proj alone, got a TalkingHeadAttn with .'proj_l', 'proj_w'. too"),
        (DiffAttention(8, 2), "of qkv and proj alone, got a DiffAttention with .'lambda_k1'"),
        (WindowAttention(8, 2, window_size=3), "of qkv and proj alone, got a WindowAttention with .'relative_position"),
        (ChannelAttention(8, 2), "got a ChannelAttention, which is .* off it"),
        (Scaled(8, 2), "got a Scaled, which is .* off it"),
        (Gridded(8, 2), "of tokens .N, T, d., got a Gridded: not enough values"),
    ],
)
def test_other_attentions_are_refused(attn, message):
    net = nn.Sequential(attn)
    with pytest.raises(ValueError, match=f"base: .*{message}"):
        inject_prefix(net, ["0"])
    assert net[0] is attn and all(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("length", [-1, 2.0, True])
def test_bad_lengths_are_refused(length):
    net = vit()
    with pytest.raises(ValueError, match="length: expected an integer from 0 on"):
        inject_prefix(net, ATTENTIONS, length=length)
    assert type(net.blocks[0].attn) is Attention
