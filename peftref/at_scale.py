"""What the runs with large backbones share: the device, image sizes, augmentation, subsets, what is written down.

>>> import torch
>>> random_crop(torch.rand(2, 3, 40, 40), 32, torch.Generator().manual_seed(0)).shape
torch.Size([2, 3, 32, 32])
>>> first_of_each(torch.tensor([1, 0, 1, 1, 0]), 2).tolist()
[0, 1, 2, 4]
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._checks import integer

__all__ = ["Resized", "first_of_each", "pick_device", "protocol", "random_crop", "shifted_crop"]


def pick_device(device: torch.device | str | None = None) -> torch.device:
    """The device asked for; if none is, a GPU where there is one."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


class Resized(nn.Module):
    """A network behind an enlargement of its images; grey images get three channels.

    Args:
        model: with its normalisation inside; timm's protocol is passed on where the model has it.
        size: side in pixels of what the model sees.
        cut: enlarge to this factor of ``size`` first and keep the middle (8 / 7: ImageNet's usual protocol).
        mode: of the interpolation, "bicubic" or "bilinear".

    Shape:
        ``(N, 1 or 3, H, W)`` in [0, 1]; images of ``size`` pixels pass as they are.
    """

    def __init__(self, model: nn.Module, size: int, *, cut: float = 1.0, mode: str = "bicubic") -> None:
        super().__init__()
        self.model: Any = model  # speaks timm's protocol, of which nn.Module says nothing
        self.size = integer("size", size, 1)
        self.cut = cut
        self.mode = mode

    @property
    def head(self) -> nn.Module:
        """The classifier."""
        inner = getattr(self.model, "model", self.model)  # behind the normalisation
        classifier: nn.Module = inner.get_classifier()
        return classifier

    @property
    def num_features(self) -> int:
        """Length of the features before the classifier."""
        return int(self.model.num_features)

    def enlarged(self, x: Tensor) -> Tensor:
        """The images as the model sees them."""
        x = x.expand(-1, 3, -1, -1)
        if x.shape[-1] == x.shape[-2] == self.size:
            return x
        large = round(self.size * self.cut)
        start = (large - self.size) // 2
        x = F.interpolate(x, (large, large), mode=self.mode, antialias=self.mode == "bilinear")
        return x[..., start : start + self.size, start : start + self.size].clamp(0, 1)

    def forward_features(self, x: Tensor) -> Tensor:
        h: Tensor = self.model.forward_features(self.enlarged(x))
        return h

    def forward_head(self, h: Tensor, pre_logits: bool = False) -> Tensor:
        h = self.model.forward_head(h, pre_logits=pre_logits)
        return h

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            logits: Tensor = self.model(self.enlarged(x))
        return logits.float()


def random_crop(x: Tensor, size: int, generator: torch.Generator, smallest: float = 0.08) -> Tensor:
    """Cut another random rectangle out of each image, enlarge it to ``size``, and mirror every second one.

    The area is uniform from ``smallest`` to 1, the log of the aspect uniform between 3 / 4 and 4 / 3, as is usual for
    ImageNet; sides are cut to the image.

    Args:
        x: images ``(N, C, H, W)``.
        size: side of the result.
        generator: on the CPU.
        smallest: area of a rectangle, as a share of the image's.
    """
    area, aspect, dx, dy, flip = torch.rand(5, len(x), generator=generator)
    area = smallest + (1 - smallest) * area
    aspect = (math.log(4 / 3) * (2 * aspect - 1)).exp()
    w, h = ((area * a).sqrt().clamp(max=1.0) for a in (aspect, 1 / aspect))  # sides, as shares of the image's
    zero = torch.zeros(len(x))
    mirrored = torch.where(flip < 0.5, -1.0, 1.0)
    rows = [mirrored * w, zero, (2 * dx - 1) * (1 - w), zero, h, (2 * dy - 1) * (1 - h)]
    grid = F.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), [len(x), 1, size, size], align_corners=False)
    return F.grid_sample(x, grid.to(x), mode="bilinear", padding_mode="border", align_corners=False)


def shifted_crop(x: Tensor, generator: torch.Generator, pad: int = 4) -> Tensor:
    """Move each image by up to ``pad`` pixels, black where nothing was, and mirror half of them: ``(N, C, H, W)``.

    Args:
        x: images of any type, ``(N, C, H, W)``.
        generator: on the CPU.
        pad: largest shift in pixels.
    """
    n, channels, height, width = x.shape
    down, right = torch.randint(2 * pad + 1, (2, n, 1), generator=generator)
    mirror = torch.rand(n, 1, generator=generator) < 0.5
    row = down + torch.arange(height)  # (N, H): where each pixel comes from
    columns = torch.arange(width)
    column = right + torch.where(mirror, columns.flip(0), columns)  # (N, W)
    image = torch.arange(n).view(-1, 1, 1, 1)
    channel = torch.arange(channels).view(-1, 1, 1)
    places = (image, channel, row[:, None, :, None], column[:, None, None, :])
    return F.pad(x, (pad, pad, pad, pad))[tuple(i.to(x.device) for i in places)]


def first_of_each(y: Tensor, count: int) -> Tensor:
    """Rows of the first ``count`` samples of each class, in stored order: ``(N,) -> (M,)``.

    Raises:
        ValueError: a count below 1.
    """
    integer("count", count, 1)
    kept = [(y == label).nonzero()[:count, 0] for label in y.unique()]
    return torch.cat(kept).sort().values if kept else y.new_zeros(0, dtype=torch.long)


def protocol(device: torch.device, **settings: Any) -> dict[str, Any]:
    """What a table says of the run behind it: its settings, the version of torch, the accelerator."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {**settings, "torch": torch.__version__, "device": name}
