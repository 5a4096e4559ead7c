"""Models of transformers and timm whose source or layers are unlike others."""

import pytest
import timm
import torch
from torch import nn
from transformers import FalconConfig, FalconForCausalLM

from peftref.adapters import LoRA, adapters, inject, merge


def falcon() -> nn.Module:
    torch.manual_seed(0)
    return FalconForCausalLM(FalconConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32))


@pytest.mark.parametrize(
    ("make", "x", "targets"),
    [
        (falcon, torch.arange(4)[None], ["query_key_value"]),
        (lambda: timm.create_model("mobilenetv3_small_050"), torch.rand(1, 3, 64, 64), ["classifier"]),
        (lambda: timm.create_model("efficientformer_l1"), torch.rand(1, 3, 224, 224), ["qkv"]),
    ],
)
def test_they_are_adapted_and_merged(make, x, targets) -> None:
    model = make().eval()
    inject(model, LoRA, targets, r=1)
    for adapter in adapters(model).values():
        nn.init.normal_(adapter.get_parameter("lora_B.weight"))
    with torch.no_grad():
        before = model(x)
        merge(model)
        after = model(x)
    before, after = (getattr(y, "logits", y) for y in (before, after))
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)
