"""The small vision transformer: timm's numbers, timm's names, and the shipped weights on real test images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from timm.models.vision_transformer import VisionTransformer
from torch.testing import assert_close

from peftref.data import load
from peftref.fitting import predict
from peftref.models.vit import ViT, pretrained_vit
from peftref.weights import make_vit

WEIGHTS = Path(make_vit.__file__).with_name("vit_fashion8k.safetensors")


@settings(max_examples=8, deadline=None)
@given(depth=st.integers(1, 3), heads=st.sampled_from([1, 2, 4]), chans=st.integers(1, 3), classes=st.integers(1, 7))
def test_equal_to_timm(depth: int, heads: int, chans: int, classes: int) -> None:
    """The same state dict, name by name, gives the same logits and the same gradients in timm's own class."""
    sizes = {"img_size": 12, "patch_size": 4, "in_chans": chans, "num_classes": classes}
    sizes |= {"embed_dim": 8 * heads, "depth": depth, "num_heads": heads}
    ours, theirs = ViT(**sizes).double(), VisionTransformer(**sizes).double()
    theirs.load_state_dict(ours.state_dict())
    x = torch.rand(3, chans, 12, 12, dtype=torch.float64)
    assert_close(ours(x), theirs(x))
    assert_close(ours.forward_features(x), theirs.forward_features(x))
    pooled = ours.forward_head(ours.forward_features(x), pre_logits=True)
    assert_close(pooled, theirs.forward_head(theirs.forward_features(x), pre_logits=True))
    ours(x).sum().backward()
    theirs(x).sum().backward()
    for (name, p), (other, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == other
        assert_close(p.grad, q.grad)


def test_the_shipped_network_knows_clothes() -> None:
    data, model = load("fashion8k"), pretrained_vit()
    right = (predict(model, data.test.x).argmax(-1) == data.test.y).double().mean().item()
    with safe_open(WEIGHTS, "pt") as file:
        note = file.metadata()
    assert right == pytest.approx(1 - float(note["test_error"]) / 100, abs=0.005) and right > 0.8
    assert note["data"].endswith(data.sha256) and note["script"] == "make_vit.py"
    assert not model.training and next(model.parameters()).dtype == torch.float32


def test_the_recipe_of_the_weights_is_the_one_noted() -> None:
    with safe_open(WEIGHTS, "pt") as file:
        note = file.metadata()
    assert (note["epochs"], note["rate"], note["seed"]) == (
        str(make_vit.EPOCHS), str(make_vit.RATE), str(make_vit.SEED),
    )  # fmt: skip


@pytest.mark.parametrize("sizes", [{"img_size": 30}, {"embed_dim": 66}])
def test_sizes_that_do_not_divide_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="img_size, embed_dim: expected multiples of patch_size and num_heads"):
        ViT(**sizes)
