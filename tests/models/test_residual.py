"""CIFAR's residual networks: a plain functional twin, known sizes, files as they are published."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from peftref.models import CifarResNet, cifar_resnet


def twin(weights, x, blocks):
    """Logits in eval mode, from the stored tensors alone; a shortcut is every second pixel beside zeros."""

    def norm(x, name):
        mean, variance = (weights[f"{name}.running_{part}"].view(1, -1, 1, 1) for part in ("mean", "var"))
        scale, shift = (weights[f"{name}.{part}"].view(1, -1, 1, 1) for part in ("weight", "bias"))
        return (x - mean) / (variance + 1e-5).sqrt() * scale + shift

    x = norm(F.conv2d(x, weights["conv1.weight"], padding=1), "bn1").clamp(min=0)
    for stage in (1, 2, 3):
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            h = F.conv2d(x, weights[f"{name}.conv1.weight"], stride=stride, padding=1)
            h = norm(h, f"{name}.bn1").clamp(min=0)
            h = norm(F.conv2d(h, weights[f"{name}.conv2.weight"], padding=1), f"{name}.bn2")
            if stride == 2:
                small = x[:, :, ::2, ::2]
                empty = torch.zeros_like(small)[:, : small.shape[1] // 2]
                x = torch.cat([empty, small, empty], 1)
            x = (x + h).clamp(min=0)
    return x.flatten(2).mean(2) @ weights["linear.weight"].T + weights["linear.bias"]


def stirred(depth, num_classes=10):
    """A network whose running statistics, scales and shifts are not those of its initialisation."""
    torch.manual_seed(0)
    net = CifarResNet(depth, num_classes).double()
    for name, tensor in net.state_dict().items():
        if "bn" in name and tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5)
    return net.eval()


@pytest.mark.parametrize(("depth", "classes"), [(8, 3), (20, 10)])
def test_it_is_the_network_of_its_equations(depth, classes):
    net = stirred(depth, classes)
    x = torch.randn(2, 3, 16, 16, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    assert_close(net(x), twin(net.state_dict(), x, (depth - 2) // 6))


@pytest.mark.parametrize(("depth", "parameters"), [(20, 269_722), (32, 464_154), (56, 853_018)])
def test_sizes_are_the_published_ones(depth, parameters):
    assert sum(p.numel() for p in CifarResNet(depth).parameters()) == parameters


def test_each_image_by_itself_in_eval_mode():
    net = stirred(8)
    x = torch.randn(3, 3, 8, 8, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    assert_close(net(x)[1:2], net(x[1:2]))


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_published_file_is_read(tmp_path, wrapped):
    net = stirred(20).float()
    names = {f"module.{name}": tensor for name, tensor in net.state_dict().items()}
    torch.save({"state_dict": names, "best_prec1": 91.7} if wrapped else net.state_dict(), tmp_path / "net.th")
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        assert_close(cifar_resnet(tmp_path / "net.th")(x), net((x - mean) / std))


def test_what_is_no_such_file_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="path: expected the file"):
        cifar_resnet(tmp_path / "none.th")
    torch.save({"state_dict": CifarResNet(8).state_dict()}, tmp_path / "small.th")
    with pytest.raises(ValueError, match="path: expected the weights of a CIFAR ResNet-20"):
        cifar_resnet(tmp_path / "small.th")
    torch.save([1, 2], tmp_path / "list.th")
    with pytest.raises(ValueError, match="path: expected the weights"):
        cifar_resnet(tmp_path / "list.th")


@pytest.mark.parametrize("depth", [18, 2, 21])
def test_other_depths_are_refused(depth):
    with pytest.raises(ValueError, match="depth: expected"):
        CifarResNet(depth)
