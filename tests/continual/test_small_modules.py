"""Adapter and LoRA as LAE has them, and two experts in one batch: identities, peers, traps of the published code."""

from __future__ import annotations

import copy

import peft
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from peftref.adapters.baselines.lora import LoRA
from peftref.adapters.core.files import load, save
from peftref.adapters.core.injection import activate, adapters, inject, install, merge, unload, unmerge
from peftref.continual.core.prefix import Prefix, inject_prefix
from peftref.continual.core.small_modules import Experts, KVLoRA, ParallelAdapter
from peftref.models.vit import ViT
from tests._naive import lae as naive

ATTENTIONS, QKV = r"blocks\.\d+\.attn", r"blocks\.\d+\.attn\.qkv"
KINDS = {"adapter": (ParallelAdapter, ATTENTIONS), "lora": (KVLoRA, QKV), "prefix": (Prefix, ATTENTIONS)}


def vit(seed: int = 0) -> ViT:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ViT(embed_dim=16, depth=2, num_heads=2).eval()


def images(n: int = 3, seed: int = 0) -> Tensor:
    return torch.rand(n, 1, 28, 28, generator=torch.Generator().manual_seed(seed))


def put(net: nn.Module, kind: str, name: str = "default", **options) -> list[str]:
    if kind == "prefix":
        return inject_prefix(net, ATTENTIONS, name=name, **options)
    return inject(net, *KINDS[kind], name=name, **options)


def stir(net: nn.Module, name: str = "default", seed: int = 0) -> None:
    """Every weight of the adapter, scales included, moves away from its start."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for a in adapters(net, name).values():
            for p in a.parameters():
                p.add_(0.3 * torch.randn(p.shape, generator=g).to(p))


def moved(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


# --- adapter ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["adapter", "lora"])
def test_zero_at_first(kind):
    net, x = vit(), images()
    before = net(x)
    put(net, kind)
    assert torch.equal(net(x), before)
    stir(net)
    assert not torch.allclose(net(x), before, atol=1e-3)
    unload(net)
    assert torch.equal(net(x), before)


@pytest.mark.parametrize("placement", ["parallel", "before", "after"])
def test_adapter_by_hand(placement):
    torch.manual_seed(0)
    host, x = nn.Linear(6, 6).double(), moved(4, 6, seed=1)
    net = nn.Sequential(copy.deepcopy(host))
    inject(net, ParallelAdapter, ["0"], hidden=3, placement=placement)
    stir(net)
    a = adapters(net)["0"]

    def layer(u: Tensor) -> Tensor:
        return a.s * (F.gelu(u @ a.down.weight.T + a.down.bias) @ a.up.weight.T + a.up.bias)

    want = {"parallel": host(x) + layer(x), "before": host(x + layer(x)), "after": host(x) + layer(host(x))}
    assert_close(net(x), want[placement], rtol=1e-12, atol=1e-12)


def test_after_never_bypasses_its_host_as_the_published_form_does():
    torch.manual_seed(0)
    host, x = nn.Linear(6, 6), torch.randn(4, 6)
    net = nn.Sequential(copy.deepcopy(host))
    inject(net, ParallelAdapter, ["0"], placement="after")
    assert torch.equal(net(x), host(x))
    assert torch.equal(naive.published_after(host, adapters(net)["0"].branch, x), x)  # at first: its input, and no more


def test_numbers_of_the_paper():
    net = timm.create_model("vit_base_patch16_224", pretrained=False, depth=1, num_classes=2)
    counts = {}
    for kind in KINDS:
        put(net, kind, name=kind)
        counts[kind] = sum(p.numel() for a in adapters(net, kind).values() for p in a.parameters())
    assert counts == {"adapter": 2 * 768 * 5 + 768 + 5 + 1, "lora": 4 * 768 * 5 + 2, "prefix": 2 * 10 * 768 + 2}
    a = adapters(net, "adapter")["blocks.0.attn"]
    assert a.down.weight.abs().max() <= 1 / 768**0.5 and a.down.weight.std() > 0.4 / 768**0.5  # kaiming, a^2 = 5
    assert not a.down.bias.any() and a.s == 1


def test_hidden_as_a_share_of_the_width():
    net = vit()
    inject(net, ParallelAdapter, ATTENTIONS, hidden=0.25)
    assert adapters(net)["blocks.0.attn"].down.out_features == 4
    with pytest.raises(
        ValueError, match="hidden: expected a positive integer, or a share of 16 that gives one, got 0.06"
    ):
        inject(vit(), ParallelAdapter, ATTENTIONS, hidden=0.06)  # int(0.96) = 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": 0}, "hidden: expected"),
        ({"hidden": 1.5}, "hidden: expected"),
        ({"hidden": True}, "hidden: expected"),
        ({"placement": "beside"}, "placement: expected one of"),
    ],
)
def test_bad_adapters_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        inject(vit(), ParallelAdapter, ATTENTIONS, **options)


# --- LoRA -------------------------------------------------------------------------------------------------------------
def test_lora_by_hand_and_merged():
    torch.manual_seed(0)
    qkv, x = nn.Linear(6, 12).double(), moved(2, 5, 6, seed=1)
    net = nn.Sequential(copy.deepcopy(qkv))
    inject(net, KVLoRA, ["0"], r=2, kv=4)
    stir(net)
    a = adapters(net)["0"]
    want = naive.published_kv_lora(x, qkv, a.A_k, a.B_k, a.A_v, a.B_v, a.s_k, a.s_v)
    assert_close(net(x), want, rtol=1e-12, atol=1e-12)
    assert torch.equal(net(x)[..., :4], qkv(x)[..., :4])  # queries stay
    merge(net)
    assert_close(net[0].weight[4:8], qkv.weight[4:8] + a.s_k * a.B_k @ a.A_k)
    assert_close(net[0].weight[8:], qkv.weight[8:] + a.s_v * a.B_v @ a.A_v)
    assert_close(net(x), want, rtol=1e-12, atol=1e-12)
    unmerge(net)
    assert torch.equal(net[0].weight, qkv.weight)


def test_lora_equals_peft_on_separate_keys_and_values():
    torch.manual_seed(0)
    r, x = 3, moved(4, 6, seed=2)
    qkv = nn.Linear(6, 18).double()
    net = nn.Sequential(copy.deepcopy(qkv))
    inject(net, KVLoRA, ["0"], r=r)
    stir(net)
    a = adapters(net)["0"]
    with torch.no_grad():
        a.s_k.fill_(1.0)
        a.s_v.fill_(1.0)

    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(6, 6).double() for _ in range(3))
            for part, weight, bias in zip(
                (self.q, self.k, self.v), qkv.weight.chunk(3), qkv.bias.chunk(3), strict=True
            ):
                part.load_state_dict({"weight": weight, "bias": bias})

        def forward(self, u: Tensor) -> Tensor:
            return torch.cat([self.q(u), self.k(u), self.v(u)], -1)

    peer = peft.get_peft_model(Apart(), peft.LoraConfig(r=r, lora_alpha=r, target_modules=["k", "v"]))
    for part, A, B in (("k", a.A_k, a.B_k), ("v", a.A_v, a.B_v)):
        layer = getattr(peer.base_model.model, part)
        layer.lora_A["default"].weight.data.copy_(A)
        layer.lora_B["default"].weight.data.copy_(B)
    assert_close(net(x), peer.double()(x), rtol=1e-12, atol=1e-12)


def test_lora_settings_matter_and_large_ranks_are_allowed():
    net = nn.Sequential(nn.Linear(4, 12))
    inject(net, KVLoRA, ["0"], r=9)
    assert adapters(net)["0"].A_k.shape == (9, 4)
    for r in (0, 1.0, True):
        with pytest.raises(ValueError, match="r: expected a positive integer"):
            inject(nn.Sequential(nn.Linear(4, 12)), KVLoRA, ["0"], r=r)
    for outputs in (6, 7, 15):
        with pytest.raises(ValueError, match=f"base: .*, or kv to be given, got {outputs} outputs of 4 inputs"):
            inject(nn.Sequential(nn.Linear(4, outputs)), KVLoRA, ["0"])
    for kv in (0, 6, 2.0, True):
        with pytest.raises(ValueError, match=r"kv: expected an integer in \[1, 5\]"):
            inject(nn.Sequential(nn.Linear(4, 12)), KVLoRA, ["0"], kv=kv)


def test_lora_where_heads_share_their_keys(tmp_path):
    """Grouped queries, as in Phi-3: four heads of two, one of keys; 12 outputs, whose third is not where keys begin."""
    torch.manual_seed(0)
    qkv, x = nn.Linear(8, 12).double(), moved(2, 5, 8, seed=1)
    net, other = (nn.Sequential(copy.deepcopy(qkv)) for _ in range(2))
    with pytest.raises(ValueError, match="base: .*, or kv to be given, got 12 outputs of 8 inputs"):
        inject(net, KVLoRA, ["0"])
    inject(net, KVLoRA, ["0"], r=3, kv=2)
    stir(net)
    a = adapters(net)["0"]
    change = torch.cat([qkv.weight.new_zeros(8, 8), a.s_k * a.B_k @ a.A_k, a.s_v * a.B_v @ a.A_v])
    want = x @ (qkv.weight + change).T + qkv.bias
    assert_close(net(x), want, rtol=1e-12, atol=1e-12)
    save(net, tmp_path)
    load(other, tmp_path)
    assert_close(other(x), want, rtol=1e-12, atol=1e-12)
    merge(net)
    assert_close(net(x), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["adapter", "lora"])
def test_gradients_reach_every_weight(kind):
    net = vit()
    put(net, kind)
    stir(net)
    net(images()).square().sum().backward()
    for n, p in net.named_parameters():
        assert (p.grad is not None and p.grad.abs().max() > 0) if ".adapters." in n else p.grad is None, n


@pytest.mark.parametrize("kind", ["adapter", "lora"])
def test_file_round_trip(kind, tmp_path):
    net, other, x = vit(), vit(), images()
    put(net, kind)
    stir(net)
    save(net, tmp_path)
    load(other, tmp_path)
    assert torch.equal(other(x), net(x))


@pytest.mark.parametrize("placement", ["parallel", "before", "after"])
def test_half_precision_model(placement):
    net = vit().to(torch.bfloat16)
    inject(net, ParallelAdapter, ATTENTIONS, placement=placement)
    inject(net, KVLoRA, QKV, name="lora")
    activate(net, "default", "lora")
    out = net(images().to(torch.bfloat16))
    assert out.dtype == torch.bfloat16 and out.isfinite().all()


# --- experts ----------------------------------------------------------------------------------------------------------
def expert_pair(kind: str) -> nn.Module:
    net = vit()
    for seed, name in enumerate(("one", "two")):
        put(net, kind, name)
        stir(net, name, seed)
    one, two = adapters(net, "one"), adapters(net, "two")
    install(net, {n: Experts(one[n], two[n]) for n in one}, "both")
    return net


@pytest.mark.parametrize("kind", KINDS)
def test_one_doubled_batch_is_two_forwards(kind):
    net, x = expert_pair(kind), images()
    together, apart = net(torch.cat([x, x])), []
    for name in ("one", "two"):
        activate(net, name)
        apart.append(net(x))
    assert not torch.allclose(*apart, atol=1e-3)
    assert_close(together, torch.cat(apart), rtol=1e-4, atol=1e-5)  # float32: products of another batch size


def test_experts_add_no_weights_and_follow_copies():
    net = expert_pair("lora")
    assert not list(adapters(net, "both")["blocks.0.attn.qkv"].parameters())
    twin = copy.deepcopy(net)
    members = adapters(twin, "both")["blocks.0.attn.qkv"].members
    assert members[0] is adapters(twin, "one")["blocks.0.attn.qkv"]
    with pytest.raises(ValueError, match="x: expected 2 copies of a batch, got 3 images"):
        net(images(3))


def test_experts_of_two_dtypes():
    net, x = expert_pair("lora"), images()
    want = net(torch.cat([x, x]))
    for a in adapters(net, "two").values():
        a.double()
    assert_close(net(torch.cat([x, x])), want, rtol=1e-4, atol=1e-5)


def test_an_ordinary_lora_can_be_an_expert_too():
    net, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4)
    inject(net, LoRA, ["0"], name="one")
    inject(net, LoRA, ["0"], name="two")
    stir(net, "two")
    one, two = adapters(net, "one"), adapters(net, "two")
    install(net, {"0": Experts(one["0"], two["0"])}, "both")
    out = net(torch.cat([x, x]))
    activate(net, "two")
    assert_close(out[2:], net(x))
