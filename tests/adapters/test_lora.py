"""LoRA alone: the numbers, the limiting cases, every option; what it shares with the others is in test_contract."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from peftref.adapters.baselines.lora import LoRA, scaling
from peftref.adapters.core.injection import adapters, inject, merge
from peftref.adapters.core.layers import view
from tests._naive.lora import lora as naive_lora


def one(n_in: int = 4, n_out: int = 3, dtype: torch.dtype = torch.float64, **options) -> tuple[nn.Sequential, LoRA]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(n_in, n_out)).to(dtype)
    inject(net, LoRA, ["0"], **options)
    adapter = adapters(net)["0"]
    nn.init.normal_(adapter.lora_B.weight)
    return net, adapter


@settings(max_examples=25, deadline=None)
@given(n_in=st.integers(1, 5), n_out=st.integers(1, 5), r=st.integers(1, 6), alpha=st.floats(-4, 4))
def test_equal_to_the_naive_form(n_in: int, n_out: int, r: int, alpha: float) -> None:
    net, adapter = one(n_in, n_out, r=r, lora_alpha=alpha)
    x, base = torch.randn(n_in, dtype=torch.float64), net[0].base_layer
    expected = naive_lora(
        x.tolist(), base.weight.tolist(), base.bias.tolist(),
        adapter.lora_A.weight.tolist(), adapter.lora_B.weight.tolist(), alpha,
    )  # fmt: skip
    assert_close(net(x), torch.tensor(expected, dtype=torch.float64))


def test_the_update_has_rank_r_and_full_rank_reaches_any_matrix() -> None:
    _, adapter = one(7, 6, r=3)
    dW, _ = adapter.delta(None)
    assert torch.linalg.matrix_rank(dW) == 3
    net, adapter = one(4, 6, r=4, lora_alpha=8)
    wanted = torch.randn(6, 4, dtype=torch.float64)
    with torch.no_grad():
        adapter.lora_A.weight.copy_(torch.eye(4))
        adapter.lora_B.weight.copy_(wanted / 2)  # s = 2
    merged = net[0].base_layer.weight + wanted
    merge(net)
    assert_close(net[0].weight.data, merged.data)


def test_the_first_gradient_reaches_b_alone() -> None:
    net = nn.Sequential(nn.Linear(4, 3))
    inject(net, LoRA, ["0"], r=2)
    net(torch.randn(5, 4)).sum().backward()
    adapter = adapters(net)["0"]
    assert not adapter.lora_A.weight.grad.any() and adapter.lora_B.weight.grad.abs().min() > 0
    assert adapter.lora_A.weight.std() > 0  # or nothing would ever move


def test_a_is_drawn_for_the_size_of_its_input() -> None:
    torch.manual_seed(0)
    for module, fan_in in ((nn.Linear(400, 2), 400), (nn.Conv2d(16, 2, 5), 400)):
        A = LoRA(view(module), r=50).lora_A.weight
        assert A.abs().max() <= 1 / math.sqrt(fan_in)
        assert A.std().item() == pytest.approx(1 / math.sqrt(3 * fan_in), rel=0.02)


def test_scale() -> None:
    assert scaling(4, 8) == 2 and scaling(4, 8, use_rslora=True) == 4 and scaling(1, 3) == scaling(1, 3, True)
    outputs = [one(r=4, **options)[0](torch.ones(4, dtype=torch.float64)) for options in
               ({}, {"lora_alpha": 4}, {"use_rslora": True}, {"lora_alpha": 0})]  # fmt: skip
    base = outputs.pop()  # alpha = 0: the frozen layer
    assert torch.equal(base, one(r=1)[0][0].base_layer(torch.ones(4, dtype=torch.float64)))
    half, double = outputs[1], outputs[2]
    assert_close(half - base, (outputs[0] - base) / 2)
    assert_close(double - base, (outputs[0] - base) * 2)


def test_dropout_is_for_training_alone_and_keeps_the_mean() -> None:
    net, _ = one(r=4, lora_dropout=0.5)
    x = torch.ones(20_000, 4, dtype=torch.float64)
    y = net.eval()(x)
    assert torch.equal(net(x), y)
    torch.manual_seed(0)
    noisy = net.train()(x)
    assert noisy.std(0).min() > 0.01
    assert_close(noisy.mean(0), y.mean(0), rtol=0, atol=0.05)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"r": 0}, "r: expected an integer >= 1, got 0"),
        ({"r": 2.0}, "r: expected an integer >= 1, got 2.0"),
        ({"r": True}, "r: expected an integer >= 1, got True"),
        ({"lora_alpha": float("nan")}, "lora_alpha: expected a finite number, got nan"),
        ({"lora_dropout": 1.0}, r"lora_dropout: expected a number in \[0, 1\), got 1.0"),
        ({"lora_dropout": -0.1}, r"lora_dropout: expected a number in \[0, 1\), got -0.1"),
    ],
)
def test_bad_options_change_nothing(options: dict, said: str) -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    with pytest.raises(ValueError, match=said):
        inject(net, LoRA, ["0", "1"], per_layer={"1": options})
    assert type(net[0]) is nn.Linear and all(p.requires_grad for p in net.parameters())
