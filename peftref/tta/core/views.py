r"""Random views of a batch: the test-time augmentation of CoTTA.

Wang, Fink, Van Gool, Dai, "Continual Test-Time Domain Adaptation", CVPR 2022, arXiv 2203.13591 (the transformations of
the published CIFAR experiments).

One view draws its parameters ONCE for the whole batch (eq-cotta-view):

.. math:: a(x) = \mathrm{clip}\big(\mathrm{flip}\,\circ\,\mathrm{blur}\,\circ\,\mathrm{affine}\,\circ\,
          \mathrm{jitter}(x) + \varepsilon\big),\qquad \varepsilon\sim\mathcal N(0,\,0.005^2)

==============  =====================================================  =================================
field           meaning                                                drawn from
==============  =====================================================  =================================
``order``       order of the five colour changes                       permutations
``brightness``  factor                                                 U[0.6, 1.4]
``contrast``    factor about the mean grey value of each image         U[0.7, 1.3]
``saturation``  factor about the grey image (colour only)              U[0.5, 1.5]
``hue``         shift in turns of the colour circle (colour only)      U[-0.06, 0.06]
``gamma``       exponent                                               U[0.7, 1.3]
``angle``       degrees                                                U[-15, 15]
``shift``       whole pixels, each direction                           round U[-n/8, n/8]
``scale``       factor                                                 U[0.9, 1.1]
``sigma``       of a 5 x 5 Gaussian blur, pixels                       U[0.001, 0.5]
``flip``        mirrored left-right                                    probability 1/2
``noise``       seed of the additive noise                             integers
==============  =====================================================  =================================

Differs from the published code: that pads by n/2 with edge pixels, transforms the padded image (shift: 1/16 of the
padded 2n = n/8) and crops; here the same pixels are sampled directly from the unpadded image with clamped coordinates,
a quarter of the work and the same values. The noise of every view comes from a seed that the view itself carries.

>>> import torch
>>> x = torch.rand(4, 1, 28, 28)
>>> views = RandomViews(seed=0)
>>> views(x).shape
torch.Size([4, 1, 28, 28])
>>> bool((views(x) == views(x)).all())             # each call draws anew
False
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["RandomViews", "View", "apply_view", "draw_view"]

GREY = (0.2989, 0.587, 0.114)  # luma weights of the grey image, ITU-R 601 as rounded by torchvision
SLACK = 1e-3  # of the range [0, 1], for the rounding of resized and half-precision images
NOISE = 0.005  # standard deviation of the additive noise, published configuration


class View(NamedTuple):
    """Parameters of one view; see the table of the module."""

    order: tuple[int, ...] = (0, 1, 2, 3, 4)
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0
    gamma: float = 1.0
    angle: float = 0.0
    shift: tuple[int, int] = (0, 0)
    scale: float = 1.0
    sigma: float = 0.001
    flip: bool = False
    noise: int | None = None


def draw_view(size: tuple[int, int], generator: torch.Generator, flip: bool = True) -> View:
    """Draw the parameters of one view for images of ``size`` (H, W) from a CPU ``generator``."""
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size: expected (H, W), both positive, got {size!r}")
    u: list[float] = torch.rand(10, generator=generator, dtype=torch.float64).tolist()

    def uniform(i: int, low: float, high: float) -> float:
        return low + (high - low) * u[i]

    reach = [(n + 2 * (n // 2)) / 16 for n in size]  # 1/16 of the side after padding by n // 2
    return View(
        order=tuple(torch.randperm(5, generator=generator).tolist()),
        brightness=uniform(0, 0.6, 1.4),
        contrast=uniform(1, 0.7, 1.3),
        saturation=uniform(2, 0.5, 1.5),
        hue=uniform(3, -0.06, 0.06),
        gamma=uniform(4, 0.7, 1.3),
        angle=uniform(5, -15, 15),
        shift=(round(uniform(6, -reach[1], reach[1])), round(uniform(7, -reach[0], reach[0]))),
        scale=uniform(8, 0.9, 1.1),
        sigma=uniform(9, 0.001, 0.5),
        flip=flip and bool(torch.rand((), generator=generator) < 0.5),
        noise=int(torch.randint(2**62, (), generator=generator)),
    )


def apply_view(x: Tensor, view: View) -> Tensor:
    """The view of images ``x`` (N, C, H, W) with values in [0, 1], C = 1 or 3: same shape, dtype and device.

    A NaN or infinite pixel is no reason to refuse the batch.

    Raises:
        ValueError: another shape, or values outside [0, 1], as normalised images and those of 0 to 255 have.
    """
    check_images(x)
    return _viewed(x, view)


def _viewed(x: Tensor, view: View) -> Tensor:
    x = _jitter(x.clamp(0, 1), view)
    x = _blur(_affine(x, view, margin=2), view.sigma)
    if view.flip:
        x = x.flip(-1)
    if view.noise is not None:
        generator = torch.Generator(x.device).manual_seed(view.noise)
        x = x + NOISE * torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    return x.clamp(0, 1)


class RandomViews:
    """``views(x)``: a new random view of the whole batch at each call; ``reset()`` starts the sequence again.

    Images have values in [0, 1]: put the normalisation into the model (:class:`peftref.models.Normalised`).

    Args:
        seed: of the sequence of views.
        flip: allow mirror images (as published); ``False`` where left and right carry meaning, as in digits.

    Raises:
        ValueError: in use, for what is no batch of images in [0, 1]; before a view is drawn.
    """

    def __init__(self, seed: int = 0, flip: bool = True) -> None:
        self.seed = seed
        self.flip = flip
        self.reset()

    def reset(self) -> None:
        """Start the sequence again."""
        self.generator = torch.Generator().manual_seed(self.seed)

    def check(self, x: Tensor) -> None:
        """Refuse what is no batch of images in [0, 1].

        Args:
            x: images.

        Raises:
            ValueError: another shape, or values outside [0, 1].
        """
        check_images(x)

    def __call__(self, x: Tensor) -> Tensor:
        self.check(x)
        return self._unchecked(x)

    def _unchecked(self, x: Tensor) -> Tensor:
        """A view of a batch that :meth:`check` has seen: a look at its values would stall an accelerator each time."""
        return _viewed(x, draw_view((x.shape[-2], x.shape[-1]), self.generator, self.flip))


def check_images(x: Tensor) -> None:
    """Refuse what is no batch of images in [0, 1]; a NaN or infinite pixel may be among them."""
    if x.ndim != 4 or x.shape[1] not in (1, 3) or 0 in x.shape[2:] or not x.is_floating_point():
        raise ValueError(f"x: expected images (N, 1 or 3, H, W), got shape {tuple(x.shape)} of {x.dtype}")
    if x.numel():
        low, high = torch.stack(x.detach().where(x.isfinite(), 0.5).aminmax()).tolist()
        if low < -SLACK or high > 1 + SLACK:
            raise ValueError(f"x: expected images with values in [0, 1], got {low:.4g} to {high:.4g}")


def _grey(x: Tensor) -> Tensor:
    return x if x.shape[1] == 1 else (x * x.new_tensor(GREY).view(1, 3, 1, 1)).sum(1, keepdim=True)


def _blend(x: Tensor, other: Tensor, factor: float) -> Tensor:
    return (factor * x + (1 - factor) * other).clamp(0, 1)


def _shift_hue(x: Tensor, turns: float) -> Tensor:
    """Rotate the hue of the HSV representation; value and chroma stay. A grey image has no hue."""
    if x.shape[1] == 1:
        return x
    value = x.amax(1)
    low = x.amin(1)
    chroma = value - low
    r, g, b = x.unbind(1)
    safe = chroma.where(chroma > 0, torch.ones_like(chroma))
    sector = torch.where(value == g, (b - r) / safe + 2, (r - g) / safe + 4)
    sector = torch.where(value == r, ((g - b) / safe) % 6, sector) + 6 * turns
    k = (torch.tensor([5.0, 3.0, 1.0], device=x.device, dtype=x.dtype).view(1, 3, 1, 1) + sector[:, None]) % 6
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


def _jitter(x: Tensor, view: View) -> Tensor:
    steps = (
        lambda x: (x * view.brightness).clamp(0, 1),
        lambda x: _blend(x, _grey(x).mean((1, 2, 3), keepdim=True), view.contrast),
        lambda x: _blend(x, _grey(x), view.saturation),
        lambda x: _shift_hue(x, view.hue),
        lambda x: x.clamp(min=1e-8) ** view.gamma,  # the clamp keeps the slope at 0 finite
    )
    for i in view.order:
        x = steps[i](x)
    return x


def _affine(x: Tensor, view: View, margin: int) -> Tensor:
    """Rotate, scale and shift about the centre; returns ``margin`` extra pixels on each side for the blur."""
    h, w = x.shape[-2:]
    a = math.radians(view.angle)
    cos = math.cos(a) / view.scale
    sin = math.sin(a) / view.scale
    rows = torch.arange(-margin, h + margin, device=x.device, dtype=x.dtype) - (h - 1) / 2 - view.shift[1]
    cols = torch.arange(-margin, w + margin, device=x.device, dtype=x.dtype) - (w - 1) / 2 - view.shift[0]
    # output pixel -> input pixel: the inverse of "rotate by a, scale, shift"
    source_x = cos * cols[None, :] + sin * rows[:, None]  # (h + 2 margin, w + 2 margin)
    source_y = -sin * cols[None, :] + cos * rows[:, None]
    grid = torch.stack((source_x * 2 / w, source_y * 2 / h), -1)  # in [-1, 1] between the outer edges
    return F.grid_sample(x, grid.expand(len(x), -1, -1, -1), padding_mode="border", align_corners=False)


def _blur(x: Tensor, sigma: float) -> Tensor:
    """Separable 5 x 5 Gaussian, without padding."""
    kernel = torch.exp(-0.5 * (torch.arange(-2.0, 3.0, dtype=torch.float64) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).to(x.device, x.dtype).repeat(x.shape[1], 1, 1, 1)  # (C, 1, 1, 5)
    x = F.conv2d(x, kernel, groups=x.shape[1])
    return F.conv2d(x, kernel.transpose(-1, -2), groups=x.shape[1])
