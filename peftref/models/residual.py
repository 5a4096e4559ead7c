r"""The residual networks for images of 32 x 32 pixels, and published weights read from their files.

He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, arXiv 1512.03385, section 4.2: a first
convolution, three stages of :math:`n` blocks with 16, 32 and 64 channels, global average pooling and a linear layer,
:math:`6n+2` layers together. Shortcuts have no parameters (option A): every second pixel, and zeros for the channels
that are new.

>>> import torch
>>> CifarResNet(20)(torch.rand(2, 3, 32, 32)).shape
torch.Size([2, 10])
>>> sum(p.numel() for p in CifarResNet(20).parameters())
269722
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import integer
from .cnn import Normalised

__all__ = ["CifarResNet", "cifar_resnet"]

WIDTHS = (16, 32, 64)
MEAN = (0.485, 0.456, 0.406)  # the published weights were trained with the mean and deviation of ImageNet
STD = (0.229, 0.224, 0.225)


class CifarResNet(nn.Module):
    """A residual network of 6n + 2 layers for images ``(N, 3, 32, 32)``, with the names of the published files.

    Args:
        depth: 20, 32, 44, 56, 110, ...: 6n + 2.
        num_classes: width of the last layer.

    Raises:
        ValueError: another depth, or no class.
    """

    def __init__(self, depth: int = 20, num_classes: int = 10) -> None:
        super().__init__()
        integer("num_classes", num_classes, 1)
        if integer("depth", depth, 8) % 6 != 2:
            raise ValueError(f"depth: expected 6n + 2, such as 20 or 56, got {depth}")
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.layer1 = _stage(WIDTHS[0], WIDTHS[0], blocks)
        self.layer2 = _stage(WIDTHS[0], WIDTHS[1], blocks)
        self.layer3 = _stage(WIDTHS[1], WIDTHS[2], blocks)
        self.linear = nn.Linear(WIDTHS[2], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits.

        Args:
            x: normalised images ``(N, 3, H, W)``.

        Returns:
            ``(N, num_classes)``.
        """
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


class _Block(nn.Module):
    """Two convolutions beside a shortcut without parameters."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.new = outside - inside
        stride = 2 if self.new else 1
        self.conv1 = nn.Conv2d(inside, outside, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)

    def forward(self, x: Tensor) -> Tensor:
        change = F.relu(self.bn1(self.conv1(x)))
        change = self.bn2(self.conv2(change))
        if self.new:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.new // 2, self.new - self.new // 2))
        return F.relu(x + change)


def _stage(inside: int, outside: int, blocks: int) -> nn.Sequential:
    return nn.Sequential(_Block(inside, outside), *(_Block(outside, outside) for _ in range(blocks - 1)))


def cifar_resnet(path: str | Path, depth: int = 20) -> nn.Module:
    """The network of a file of ``akamaster/pytorch_resnet_cifar10`` (BSD-2), for images in [0, 1], in eval mode.

    They were trained with random crops and mirror images, and their names begin with ``module.``, as a network in
    ``DataParallel`` has them.

    Args:
        path: of the file, such as ``resnet20-12fca82f.th``.
        depth: 20, 32, 44, 56 or 110.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file without the weights of this depth.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"path: expected the file of a CIFAR ResNet, such as resnet20-12fca82f.th, got {file}")
    net = CifarResNet(depth)
    stored: Any = torch.load(file, map_location="cpu", weights_only=True)
    weights = stored.get("state_dict", stored) if isinstance(stored, dict) else {}
    try:
        net.load_state_dict({name.removeprefix("module."): tensor for name, tensor in weights.items()})
    except RuntimeError as error:
        raise ValueError(f"path: expected the weights of a CIFAR ResNet-{depth}, got {file.name}: {error}") from error
    return Normalised(net, MEAN, STD).eval()
