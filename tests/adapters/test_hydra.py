"""Hydra alone: the official form, its branches one by one, what each can reach, and PEFT's LoRA on the same numbers."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from peftref.adapters.baselines.lora import LoRA
from peftref.adapters.core.injection import activate, adapters, inject, merge, unload, unmerge
from peftref.adapters.core.layers import view
from peftref.adapters.hydra import Hydra, as_lora, save_as_lora
from tests._naive import hydra as naive


@torch.no_grad()
def shake(model: nn.Module, name: str = "default") -> None:
    g = torch.Generator().manual_seed(3)
    for adapter in adapters(model, name).values():
        for p in adapter.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64).to(p.dtype))


def one(n_in: int = 6, n_out: int = 5, *, layer_bias: bool = True, **options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(n_in, n_out, layer_bias)).double()
    inject(net, Hydra, ["0"], **options)
    shake(net)
    return net, adapters(net)["0"]


def tensor(rows: object) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


# -- the update


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), st.floats(-3, 3))
def test_forward_and_merge_are_those_of_the_official_code(n_in: int, n_out: int, r_p: int, r_s: int, s: float) -> None:
    net, a = one(n_in, n_out, r_par=r_p, r_seq=r_s, scale=s)
    w, b = net[0].weight.tolist(), net[0].bias.tolist()
    beta_p = [0.25] * n_out  # any part of beta: only the sum matters
    beta_s = (a.up_bias - 0.25).tolist()
    par = a.par_down.tolist(), a.down_bias[:r_p].tolist(), a.up[:, :r_p].tolist(), beta_p
    seq = a.seq_down.tolist(), a.down_bias[r_p:].tolist(), a.up[:, r_p:].tolist(), beta_s
    x = torch.randn(n_in, dtype=torch.float64)
    assert_close(net(x), tensor(naive.hydra(x.tolist(), w, b, par, seq, s)))
    weight, bias = naive.merged(w, b, par, seq, s)
    merge(net)
    assert_close(net[0].weight.data, tensor(weight))
    assert_close(net[0].bias.data, tensor(bias))


def test_every_target_of_a_transformer_block_is_merged() -> None:
    """The official code adds the branches of the attention to the matrix of the MLP."""
    from peftref.models.vit import ViT

    torch.manual_seed(0)
    net = ViT(embed_dim=16, depth=2, num_heads=2).double().eval()
    names = inject(net, Hydra, ["attn.proj", "mlp.fc2", "attn.qkv"], r_par=2, r_seq=2)
    assert len(names) == 6
    shake(net)
    x = torch.rand(3, 1, 28, 28, dtype=torch.float64)
    y = net(x)
    merge(net)
    assert_close(net(x), y)
    unmerge(net)
    assert torch.equal(net(x), y)


def test_without_the_sequential_branch_it_is_lora() -> None:
    net, a = one(r_par=3, r_seq=0, bias=False, scale=0.5)
    twin = nn.Sequential(net[0].base_layer)
    inject(twin, LoRA, ["0"], r=3, lora_alpha=1.5)
    with torch.no_grad():
        adapters(twin)["0"].lora_A.weight.copy_(a.par_down)
        adapters(twin)["0"].lora_B.weight.copy_(a.up)
    x = torch.randn(4, 6, dtype=torch.float64)
    assert_close(net(x), twin(x))
    assert a.seq_down is None and a.delta(view(net[0].base_layer))[1] is None


def test_without_the_parallel_branch_it_mixes_the_outputs() -> None:
    net, a = one(r_par=0, r_seq=2, bias=False, scale=0.5)
    w, b = net[0].weight.clone(), net[0].bias.clone()
    mix = torch.eye(5).double() + 0.5 * a.up @ a.seq_down
    x = torch.randn(4, 6, dtype=torch.float64)
    assert_close(net(x), (x @ w.T + b) @ mix.T)
    merge(net)
    assert_close(net[0].weight.data, mix @ w)
    assert_close(net[0].bias.data, mix @ b)
    # Woodbury: the inverse of the mix by that of a matrix of rank r_s
    core = torch.eye(2).double() + 0.5 * a.seq_down @ a.up
    back = torch.eye(5).double() - 0.5 * a.up @ torch.linalg.solve(core, a.seq_down)
    assert_close(back @ net[0].weight, w)
    unmerge(net)
    assert torch.equal(net[0].weight, w)


def test_the_sequential_branch_stays_in_the_row_space_and_is_blind_outside() -> None:
    torch.manual_seed(1)
    rows = torch.randn(3, 6, dtype=torch.float64)
    outside = torch.linalg.svd(rows).Vh[3:]  # (3, 6): what the layer kills
    shares = {}
    for label, ranks in {"sequential": {"r_par": 0}, "parallel": {"r_seq": 0}}.items():
        net, a = one(bias=False, **ranks)
        with torch.no_grad():
            net[0].weight.copy_(torch.randn(5, 3, dtype=torch.float64) @ rows)
        dW, _ = a.delta(view(net[0].base_layer))
        shares[label] = (dW @ outside.T).square().sum() / dW.square().sum()
        x = torch.randn(4, 6, dtype=torch.float64)
        moved = net(x + outside[0]) - net(x)
        assert torch.allclose(moved, torch.zeros_like(moved), atol=1e-12) == (label == "sequential")
    assert shares["sequential"] < 1e-24 and shares["parallel"] > 0.1


def test_a_layer_of_zeros_leaves_the_sequential_branch_a_bias() -> None:
    net, a = one(r_par=0, r_seq=2)
    nn.init.zeros_(net[0].weight)
    nn.init.zeros_(net[0].bias)
    y = net(torch.randn(4, 6, dtype=torch.float64))
    assert_close(y, y[:1].expand(4, -1))
    assert y.abs().min() > 0
    assert_close(y[0], a.up @ a.down_bias + a.up_bias)


def test_ranks_add() -> None:
    for r_p, r_s in ((1, 2), (2, 1), (0, 2), (2, 0)):
        net, a = one(9, 8, r_par=r_p, r_seq=r_s)
        assert torch.linalg.matrix_rank(a.delta(view(net[0].base_layer))[0]) == r_p + r_s


def test_the_frozen_bias_goes_through_the_sequential_branch() -> None:
    for bias, trained in ((True, True), (True, False), (False, True), (False, False)):
        net, a = one(layer_bias=bias, bias=trained)
        _, db = a.delta(view(net[0].base_layer))
        assert (db is None) == (not bias and not trained)
        at_zero = net(torch.zeros(6, dtype=torch.float64))
        if db is not None:
            assert_close(at_zero, db + (net[0].bias if bias else 0))
        y = net(torch.ones(6, dtype=torch.float64))
        merge(net)
        assert (net[0].bias is None) == (db is None)
        assert_close(net(torch.ones(6, dtype=torch.float64)), y)


def test_all_branches_read_the_frozen_output() -> None:
    net, _ = one(r_par=0, r_seq=2)
    inject(net, Hydra, ["0"], name="second", r_par=0, r_seq=1)
    shake(net, "second")
    x, y = torch.randn(3, 6, dtype=torch.float64), {}
    for names in ((), ("default",), ("second",), ("second", "default")):
        activate(net, *names)
        y[names] = net(x)
    assert_close(y["second", "default"], y["default",] + y["second",] - y[()])


# -- the start, and the options


def test_the_first_gradient_reaches_the_way_up_alone() -> None:
    net = nn.Sequential(nn.Linear(6, 5)).double()
    inject(net, Hydra, ["0"], r_par=2, r_seq=1)
    a, base = adapters(net)["0"], net[0].base_layer
    x, g = torch.randn(7, 6, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    (net(x) * g).sum().backward()
    assert not (a.par_down.grad.any() or a.seq_down.grad.any() or a.down_bias.grad.any())
    assert_close(a.up.grad[:, :2], g.T @ (x @ a.par_down.T))
    assert_close(a.up.grad[:, 2:], g.T @ (base(x) @ a.seq_down.T))
    assert a.par_down.std() > 0 and a.seq_down.std() > 0  # or nothing would ever move


def test_the_way_down_is_drawn_for_its_own_input() -> None:
    torch.manual_seed(0)
    a = Hydra(view(nn.Linear(400, 90)), r_par=50, r_seq=60)
    for drawn, fan in ((a.par_down, 400 + 50), (a.seq_down, 90 + 60)):
        assert drawn.abs().max() <= (6 / fan) ** 0.5
        assert drawn.std().item() == pytest.approx((2 / fan) ** 0.5, rel=0.03)


def count(o: int, i: int, **options) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Hydra(view(nn.Linear(i, o)), **options).parameters())


def test_published_numbers_of_weights() -> None:
    """From the repository's tables, which count the heads; ours is smaller by one of two biases of the outputs."""
    assert 12 * count(768, 3072, r_par=4, r_seq=8, bias=False) == 331_776  # RoBERTa-base: 0.3 M
    clip = count(768, 3072) + 768
    assert clip == 12_292 and 12 * clip == 147_504  # CLIP ViT-B/32: 0.20 M with its head
    assert clip + count(768, 768) + 768 == 19_976  # VTAB: 12 of these and a head of 38 k are 0.28 M


def test_every_option_changes_the_output() -> None:
    x = torch.ones(6, dtype=torch.float64)
    options = ({}, {"r_par": 1}, {"r_seq": 1}, {"scale": 0.5}, {"r_par": 0}, {"bias": False})
    ys = [one(**o)[0](x) for o in options]
    assert all(not torch.allclose(a, b) for n, a in enumerate(ys) for b in ys[:n])
    unscaled, half = one()[0], one(scale=0.5)[0]
    y0 = unscaled[0].base_layer(x)
    assert_close(half(x) - y0, (unscaled(x) - y0) / 2)
    assert_close(one(scale=0.0)[0](x), y0)


def test_dropout_is_for_training_alone_and_keeps_the_mean() -> None:
    net, _ = one(dropout=0.5)
    x = torch.ones(20_000, 6, dtype=torch.float64)
    y = net.eval()(x)
    assert torch.equal(net(x), y)
    torch.manual_seed(0)
    noisy = net.train()(x)
    assert noisy.std(0).min() > 0.01
    assert_close(noisy.mean(0), y.mean(0), rtol=0, atol=0.1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"r_par": -1}, "r_par: expected an integer >= 0, got -1"),
        ({"r_seq": 1.0}, "r_seq: expected an integer >= 0, got 1.0"),
        ({"r_par": True}, "r_par: expected an integer >= 0, got True"),
        ({"r_par": 0, "r_seq": 0}, "r_par, r_seq: expected at least one branch, got ranks 0 and 0"),
        ({"scale": float("inf")}, "scale: expected a finite number, got inf"),
        ({"dropout": 1.0}, r"dropout: expected a number in \[0, 1\), got 1.0"),
    ],
)
def test_bad_options_change_nothing(options: dict, said: str) -> None:
    net = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    with pytest.raises(ValueError, match=said):
        inject(net, Hydra, ["0", "1"], per_layer={"1": options})
    assert type(net[0]) is nn.Linear and all(p.requires_grad for p in net.parameters())


def test_a_layer_that_is_used_without_a_call_is_refused() -> None:
    with pytest.raises(ValueError, match="out_proj .in a MultiheadAttention."):
        inject(nn.MultiheadAttention(4, 2), Hydra, ["out_proj"])


# -- as a LoRA, for PEFT


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.Linear(4, 6, bias=False)
        self.tail, self.last = nn.ModuleDict({"fc": nn.Linear(6, 5)}), Conv1D(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.tail["fc"](self.fc(self.conv(x).mean((-1, -2))).relu()))


def mixed() -> Mixed:
    torch.manual_seed(0)
    return Mixed().eval()


X = torch.randn(3, 2, 6, 6, generator=torch.Generator().manual_seed(0))
CASES = {
    "all": (["conv", "fc"], {}),
    "no biases": (["^fc"], {"bias": False}),
    "by layer": (["conv", "fc"], {"per_layer": {"fc": {"r_seq": 0}, "tail.fc": {"r_par": 0, "r_seq": 3}}}),
    "scaled": (["conv", "tail.fc"], {"scale": 0.3, "r_par": 1}),
    "conv1d": (["last"], {"r_par": 1}),
}


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out")
@pytest.mark.parametrize("case", CASES)
def test_peft_opens_it_as_a_lora(case: str, tmp_path) -> None:
    peft = pytest.importorskip("peft")
    targets, options = CASES[case]
    net = mixed()
    inject(net, Hydra, targets if targets != ["^fc"] else r"fc", **options)
    shake(net)
    before, y = mixed()(X), net(X)
    save_as_lora(net, tmp_path)
    assert torch.equal(net(X), y)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        theirs = peft.PeftModel.from_pretrained(mixed(), tmp_path).eval()
    assert not [w for w in said if "ignored" in str(w.message) or "missing" in str(w.message)]
    assert_close(theirs(X), y, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(y, before, atol=1e-3)
    has_bias = any("lora_B" in n and n.endswith("bias") for n, _ in theirs.named_parameters())
    assert has_bias == (case != "no biases")
    if case not in ("all", "by layer"):  # PEFT cannot merge a bias into a layer that has none
        assert_close(theirs.merge_and_unload()(X), y, rtol=1e-5, atol=1e-5)


def test_as_lora_is_the_update() -> None:
    net, a = one(r_par=1, r_seq=2, scale=0.5)
    dW, db = a.delta(view(net[0].base_layer))
    for module in (net[0], net[0].base_layer):  # the host, or what it holds
        A, B, b = as_lora(a, module)
        assert A.shape == (3, 6) and B.shape == (5, 3) and not A.requires_grad
        assert_close(B @ A, dW.data)
        assert_close(b, db.data)


def test_what_is_no_hydra_or_merged_is_not_written(tmp_path) -> None:
    net, _ = one()
    merge(net)
    with pytest.raises(RuntimeError, match="not merged, got a merged one"):
        save_as_lora(net, tmp_path / "no")
    unload(net)
    inject(net, LoRA, ["0"])
    with pytest.raises(TypeError, match="name: expected a Hydra, got lora on 0"):
        save_as_lora(net, tmp_path / "no")
    with pytest.raises(ValueError, match="name: expected one of"):
        save_as_lora(net, tmp_path / "no", "other")
    assert not (tmp_path / "no").exists()
