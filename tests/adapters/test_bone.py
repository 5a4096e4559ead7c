"""Bone alone: guided and pooled, the gradient by hand, and Hugging Face PEFT's MiSS on the same numbers."""

from __future__ import annotations

import itertools
import json
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.testing import assert_close

from peftref.adapters.baselines.lora import LoRA
from peftref.adapters.bone import Bone, _Bat, bat, pool, pooled, tiles
from peftref.adapters.core.files import config, load, save
from peftref.adapters.core.injection import activate, adapters, inject, merge, unmerge
from peftref.adapters.core.layers import view
from tests._naive import bone as naive


def one(n_in: int = 8, n_out: int = 4, dtype: torch.dtype = torch.float64, **options) -> tuple[nn.Sequential, Bone]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(n_in, n_out)).to(dtype)
    inject(net, Bone, ["0"], **options)
    adapter = adapters(net)["0"]
    nn.init.normal_(adapter.miss_block)
    return net, adapter


def tensor(rows: object) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


# -- the update


@settings(max_examples=25, deadline=None)
@given(groups=st.integers(1, 4), shards=st.integers(1, 4), r=st.integers(1, 4))
def test_the_guided_update_is_the_naive_one(groups: int, shards: int, r: int) -> None:
    net, adapter = one(shards * r, groups * r, r=r)
    w, B = net[0].weight, adapter.miss_block
    expected = tensor(naive.bat(w.tolist(), B.tolist()))
    assert_close(bat(w, B), expected)
    assert_close(bat(w.T.contiguous().T, B), expected)  # however the weight lies in memory
    x = torch.randn(3, shards * r, dtype=torch.float64)
    assert_close(net(x), x @ (w + expected).T + net[0].bias)


@settings(max_examples=25, deadline=None)
@given(n_in=st.integers(1, 9), copies=st.integers(1, 3), m=st.integers(1, 3), data=st.data())
def test_the_pooled_update_is_the_naive_one(n_in: int, copies: int, m: int, data: st.DataObject) -> None:
    r, n_out = data.draw(st.integers(1, n_in)), copies * m
    for options in ({"variant": "bone"}, {"variant": "mini", "mini_r": m}):
        net, adapter = one(n_in, n_out, r=r, **options)
        expected = tensor(naive.pooled(adapter.miss_block.tolist(), n_out, n_in))
        assert_close(adapter.delta(view(net[0].base_layer))[0], expected)
        x = torch.randn(3, n_in, dtype=torch.float64)
        assert_close(net(x), x @ (net[0].weight + expected).T + net[0].bias)


def test_tiles_pool_and_pooled_belong_together() -> None:
    x, D = torch.randn(2, 3, 7, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    S = tiles(3, 7).double()
    assert_close(pool(x, 3), x @ S.T)
    assert_close(pooled(D, 7), D.T @ S)
    assert pool(x[:0], 3).shape == (0, 3, 3)


def test_what_pooling_cannot_see_changes_nothing() -> None:
    net, _ = one(r=2, variant="bone")
    x = torch.randn(3, 8, dtype=torch.float64)
    unseen = torch.tensor([1, 2, -1, -2, 3, 0, -3, 0], dtype=torch.float64)  # shards that cancel
    assert_close(net(x + unseen) - net[0].base_layer(x + unseen), net(x) - net[0].base_layer(x))
    guided, _ = one(r=2)
    assert not torch.allclose(
        guided(x + unseen) - guided[0].base_layer(x + unseen), guided(x) - guided[0].base_layer(x), atol=1e-3
    )


def test_it_is_lora_with_frozen_tiles() -> None:
    for n_in, r in ((8, 2), (7, 3)):
        net, adapter = one(n_in, 6, r=r, variant="bone")
        twin = nn.Sequential(net[0].base_layer)
        inject(twin, LoRA, ["0"], r=r, lora_alpha=r)
        with torch.no_grad():
            adapters(twin)["0"].lora_A.weight.copy_(tiles(r, n_in))
            adapters(twin)["0"].lora_B.weight.copy_(adapter.miss_block.T)
        x = torch.randn(4, n_in, dtype=torch.float64)
        assert_close(net(x), twin(x))


def test_without_a_weight_there_is_no_guide() -> None:
    B = torch.randn(3, 2, 2, dtype=torch.float64)
    D = torch.cat(list(B.mT), 1)  # D_a = B_a^T
    assert torch.equal(bat(torch.zeros(6, 8, dtype=torch.float64), B), pooled(D, 8))


def test_row_and_column_sharing_agree_where_all_blocks_are_equal() -> None:
    w, B = torch.randn(6, 6, dtype=torch.float64), torch.randn(2, 2, dtype=torch.float64)
    same = B.expand(3, 2, 2)
    assert_close(bat(w, same), tensor(naive.bat_row(w.tolist(), same.tolist())))
    other = torch.randn(3, 2, 2, dtype=torch.float64)
    assert not torch.allclose(bat(w, other), tensor(naive.bat_row(w.tolist(), other.tolist())))


def test_the_guide_makes_full_rank_out_of_r() -> None:
    for n_in, n_out in ((24, 16), (16, 24)):
        rank = {}
        for variant in ("bat", "bone"):
            net, adapter = one(n_in, n_out, r=4, variant=variant)
            rank[variant] = int(torch.linalg.matrix_rank(adapter.delta(view(net[0].base_layer))[0]))
            assert adapter.miss_block.numel() == 4 * n_out
        assert rank == {"bat": min(n_in, n_out), "bone": 4}


def test_one_shard_reaches_any_matrix() -> None:
    net, adapter = one(4, 6, r=4, variant="bone")
    wanted = torch.randn(6, 4, dtype=torch.float64)
    with torch.no_grad():
        adapter.miss_block.copy_(wanted.T)
    merged = net[0].base_layer.weight + wanted
    merge(net)
    assert_close(net[0].weight.data, merged.data)


def test_mini_with_all_columns_is_bone_and_with_fewer_is_tied() -> None:
    whole, small = (one(8, 6, r=2, variant="mini", mini_r=m)[1] for m in (6, 3))
    plain = one(8, 6, r=2, variant="bone")[1]
    base = view(nn.Linear(8, 6).double())
    assert torch.equal(whole.delta(base)[0], plain.delta(base)[0])
    dW = small.delta(base)[0]
    assert torch.equal(dW[:3], dW[3:]) and small.miss_block.numel() == 2 * 3


def test_weights_of_llama_2_7b() -> None:
    """All seven matrices of its 32 blocks at the default r: the 87.0 million of the MiSS repository."""
    d, f = 4096, 11008
    shapes = [(d, d)] * 4 + [(d, f)] * 2 + [(f, d)]
    with torch.device("meta"):
        sizes = {v: sum(Bone(view(nn.Linear(*s)), variant=v).miss_block.numel() for s in shapes)
                 for v in ("bat", "bone")}  # fmt: skip
    assert 32 * sizes["bat"] == 32 * sizes["bone"] == 64 * 32 * (5 * d + 2 * f) == 87_031_808


# -- the gradient


def test_the_first_gradient_is_the_sum_over_tiles_and_not_zero() -> None:
    for n_in, n_out in ((8, 4), (4, 8)):
        net, adapter = one(n_in, n_out, r=2)
        nn.init.zeros_(adapter.miss_block)
        x, up = torch.randn(5, n_in, dtype=torch.float64), torch.randn(5, n_out, dtype=torch.float64)
        (net(x) * up).sum().backward()
        G = up.T @ x
        expected = tensor(naive.bat_gradient(net[0].weight.tolist(), G.tolist(), 2))
        assert_close(adapter.miss_block.grad, expected)
        assert adapter.miss_block.grad.abs().min() > 0


@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 8), (0, 8), (2, 0, 8)])
def test_by_hand_or_by_autograd(shape: tuple[int, ...]) -> None:
    w = torch.randn(6, 8, dtype=torch.float64)
    x, B = torch.randn(shape, dtype=torch.float64).requires_grad_(), torch.randn(3, 2, 2).double().requires_grad_()
    bias = torch.randn(6, dtype=torch.float64)
    for need, whole in itertools.product(((x, B), (x,), (B,)), (False, True)):
        inputs = [t if any(t is n for n in need) else t.detach() for t in (x, B)]
        mine = _Bat.apply(inputs[0], w, inputs[1], whole, bias if whole else None)
        theirs = inputs[0] @ (bat(w, inputs[1]) + whole * w).T + whole * bias
        assert_close(mine, theirs)
        up = torch.randn_like(mine)
        for a, b in zip(*(torch.autograd.grad(y, need, up) for y in (mine, theirs)), strict=True):
            assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_of_the_size_of_the_weight_is_kept(dtype: torch.dtype) -> None:
    net, adapter = one(16, 12, dtype, r=4)
    kept = []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        net(torch.randn(3, 16, dtype=dtype)).sum()
    whole = [t for t in kept if t.numel() == 16 * 12]
    assert whole and {t.data_ptr() for t in whole} == {net[0].weight.data_ptr()}


def test_training_under_autocast() -> None:
    grads = []
    for enabled in (False, True):
        net, adapter = one(16, 8, torch.float32, r=4)
        x = torch.randn(32, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = net(x)
        y.float().square().mean().backward()
        grads.append((adapter.miss_block.grad, x.grad))
    for exact, rough in zip(*grads, strict=True):
        assert rough.dtype == torch.float32
        assert (rough - exact).norm() < 0.02 * exact.norm()


# -- several at once; options


def test_adapters_of_two_variants_on_one_layer_add() -> None:
    net, _ = one(8, 4, r=2)
    inject(net, Bone, ["0"], name="pooled", r=3, variant="bone")
    nn.init.normal_(adapters(net, "pooled")["0"].miss_block)
    x, y0 = torch.randn(3, 8, dtype=torch.float64), None
    parts = {}
    for names in ((), ("default",), ("pooled",), ("pooled", "default")):
        activate(net, *names)
        parts[names] = net(x)
    y0 = parts.pop(())
    assert_close(parts[("pooled", "default")] - y0, parts[("default",)] + parts[("pooled",)] - 2 * y0)
    merge(net)
    assert_close(net(x), parts[("pooled", "default")])
    unmerge(net)
    assert torch.equal(net(x), parts[("pooled", "default")])


def test_every_option_changes_the_output() -> None:
    x = torch.ones(8, dtype=torch.float64)
    outputs = [one(8, 4, **options)[0](x) for options in (
        {"r": 2}, {"r": 4}, {"r": 2, "variant": "bone"}, {"r": 2, "variant": "mini", "mini_r": 2},
        {"r": 2, "variant": "mini", "mini_r": 1},
    )]  # fmt: skip
    assert all(not torch.allclose(a, b) for n, a in enumerate(outputs) for b in outputs[:n])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"r": 0}, "r: expected an integer in \\[1, 8\\], got 0"),
        ({"r": 9, "variant": "bone"}, "r: expected an integer in \\[1, 8\\], got 9"),
        ({"r": 2.0}, "r: expected an integer in \\[1, 8\\], got 2.0"),
        ({"r": True}, "r: expected an integer in \\[1, 8\\], got True"),
        ({"r": 3}, "r: expected a divisor of 10 outputs and 8 inputs for variant 'bat', got 3"),
        ({"r": 4}, "r: expected a divisor of 10 outputs and 8 inputs for variant 'bat', got 4"),
        ({"r": 2, "variant": "row"}, r"variant: expected one of \['bat', 'bone', 'mini'\], got 'row'"),
        ({"r": 2, "variant": "mini", "mini_r": 3}, "mini_r: expected a divisor of 10, the layer's outputs, got 3"),
        ({"r": 2, "variant": "mini", "mini_r": 0}, "mini_r: expected an integer >= 1, got 0"),
    ],
)
def test_bad_options_change_nothing(options: dict, said: str) -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 10))
    with pytest.raises(ValueError, match=said):
        inject(net, Bone, ["0", "1"], **{"r": 2, "per_layer": {"1": options}})
    assert type(net[0]) is nn.Linear and all(p.requires_grad for p in net.parameters())


def test_a_layer_that_does_not_divide_can_be_left_out() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 10))
    assert inject(net, Bone, ["0", "1"], r=4, per_layer={"1": {"r": 2}}) == ["0", "1"]
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 10))
    assert inject(net, Bone, "all-linear", r=4, exclude=["1"]) == ["0"]


# -- Hugging Face PEFT


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 12), nn.Linear(12, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


CONFIGS = {
    "bat": {"init_weights": "bat", "r": 4},
    "bone": {"r": 4},
    "uneven": {"r": 5, "miss_dropout": 0.1},
    "mini": {"init_weights": "mini", "r": 3, "mini_r": 2},
    "random": {"init_weights": False, "r": 2},
}


def theirs(case: str, **more):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    net = Net().to(more.pop("dtype", torch.float32))
    model = peft.get_peft_model(net, peft.MissConfig(target_modules=["a", "b"], **CONFIGS[case], **more))
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "miss_block" in n:
                p.copy_(0.5 * torch.randn(p.shape, generator=g))
    return model.eval()


def ours(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype).eval()


X = torch.randn(5, 8, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("case", CONFIGS)
def test_theirs_opens_here_and_ours_there(case: str, tmp_path) -> None:
    other = theirs(case)
    other.save_pretrained(tmp_path / "theirs")
    net = ours()
    before = net(X)
    assert load(net, tmp_path / "theirs", name="from_peft") == ["a", "b"]
    variant = {"uneven": "bone", "random": "bone"}.get(case, case)
    assert all(a.variant == variant for a in adapters(net, "from_peft").values())
    y = net(X)
    assert_close(y, other(X), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(y, before, atol=1e-3)
    save(net, tmp_path / "ours", "from_peft")
    import peft

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        back = peft.PeftModel.from_pretrained(ours(), tmp_path / "ours").eval()
    assert not [w for w in said if "ignored" in str(w.message)]
    assert_close(back(X), y, rtol=1e-5, atol=1e-6)
    merge(net)
    assert_close(net(X), other.merge_and_unload()(X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["bat", "bone", "mini"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_train_alike(case: str, dtype: torch.dtype, tmp_path) -> None:
    other = theirs(case, dtype=dtype)
    other.save_pretrained(tmp_path)
    net, curves, grads = ours(dtype), [], []
    load(net, tmp_path)
    for model in (other, net):
        params = [p for p in model.parameters() if p.requires_grad]
        assert len(params) == 2 and all(p.dtype == torch.float32 for p in params)
        optimizer, losses = torch.optim.AdamW(params, lr=1e-2), []
        for _ in range(4):
            loss = (model(X.to(dtype)).float() - 1).square().mean()
            optimizer.zero_grad()
            loss.backward()
            grads.append(params[0].grad.clone())
            optimizer.step()
            losses.append(loss.item())
        curves.append(losses)
    tight = dtype == torch.float32
    assert_close(*map(torch.tensor, curves), rtol=1e-5 if tight else 3e-2, atol=1e-5)
    if tight:
        assert_close(grads[4], grads[0], rtol=1e-4, atol=1e-5)
    assert curves[1][-1] < curves[1][0]


@pytest.mark.parametrize("case", ["bat", "bone"])
def test_files_of_the_older_name_open(case: str, tmp_path) -> None:
    """PEFT's own conversion from BONE to MISS renames the tensors and the method: here backwards."""
    other = theirs(case)
    other.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file({k.replace(".miss_", ".bone_"): t for k, t in tensors.items()}, tmp_path / "adapter_model.safetensors")
    spec = json.loads((tmp_path / "adapter_config.json").read_text())
    spec = {k: v for k, v in spec.items() if k not in ("miss_dropout", "mini_r")} | {"peft_type": "BONE"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(spec))
    net = ours()
    load(net, tmp_path)
    assert_close(net(X), other(X), rtol=1e-5, atol=1e-6)
    assert config(net)["peft_type"] == "MISS"


@pytest.mark.parametrize("options", [{"bias": "all"}, {"layers_to_transform": [0]}])
def test_what_it_can_and_we_cannot_is_refused(options: dict, tmp_path) -> None:
    theirs("bone").save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | options))
    with pytest.raises(ValueError, match=f"^{next(iter(options))}: expected"):
        load(ours(), tmp_path)


def test_ranks_by_layer_are_kept(tmp_path) -> None:
    net = ours()
    inject(net, Bone, ["a", "b"], r=4, per_layer={"b": {"r": 3, "variant": "bone"}})
    for adapter in adapters(net).values():
        nn.init.normal_(adapter.miss_block)
    save(net, tmp_path)
    other = ours()
    load(other, tmp_path)
    assert torch.equal(other(X), net(X)) and adapters(other)["b"].variant == "bone"
