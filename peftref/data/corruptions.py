r"""Nineteen common corruptions in five severities, for a whole batch of images at once, on any device, from a seed.

Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations", ICLR 2019,
arXiv 1903.12261: fifteen for the benchmark (:data:`CORRUPTIONS`, in the customary order) and four for validation
(:data:`EXTRA`). :data:`TABLES` holds the published constants: ``cifar`` for images of about 32 pixels (CIFAR-10-C),
``imagenet`` for about 224 (ImageNet-C; far too strong for small images).

For an image :math:`x\in[0,1]^{C\times H\times W}` and the constants :math:`c` (or :math:`a,b,\dots`) of a severity,
with fresh randomness for every image, the result is :math:`\lfloor255\,\mathrm{clip}(y,0,1)\rfloor/255` (8-bit files):

=====================  ===============================================================================================
``gaussian_noise``     :math:`y=x+c\,n`, with :math:`n` normal for every pixel and channel
``shot_noise``         :math:`y=\mathrm{Poisson}(c\,x)/c`
``impulse_noise``      a share :math:`c` of all values becomes 0 or 1
``defocus_blur``       correlation with a disk of radius :math:`a`, its rim softened with :math:`\sigma=b`
``glass_blur``         blur of :math:`\sigma=a`; :math:`c` times, pixels take values at most :math:`b` away; blur again
``motion_blur``        Gaussian trail of :math:`2a+1` pixels, :math:`\sigma=b`, at an angle of -45 to 45 degrees
``zoom_blur``          mean of :math:`x` and its magnifications by :math:`1,1+b,\dots,a`
``snow``               whitened image, plus flakes: normal noise, magnified, cut at a threshold, blurred along the fall
``frost``              :math:`y=a\,x+b\,f` with a texture of ice :math:`f`
``fog``                :math:`y=(x+a\,p)\,m/(m+a)`, clouds :math:`p` of decay :math:`b`, :math:`m=\max x`
``brightness``         value :math:`v\to\min(v+c,1)` at equal hue and saturation
``contrast``           :math:`y=\bar x+c\,(x-\bar x)`, mean per image and channel
``elastic_transform``  affine map (corners move by up to :math:`c`), then displacements :math:`a` times smooth noise
``pixelate``           area means on a grid of :math:`c` times the size, shown as blocks
``jpeg_compression``   baseline JPEG, 4:2:0, of quality :math:`c`
``speckle_noise``      :math:`y=x+c\,x\,n`
``gaussian_blur``      Gaussian of :math:`\sigma=c`
``spatter``            drops of water (lit along their rims) or splashes of mud where smooth noise exceeds a threshold
``saturate``           saturation :math:`s\to a\,s+b` at equal hue and value
=====================  ===============================================================================================

A grey image (C = 1) gives the first channel of what three equal channels would give. So ``saturate``, which leaves the
first channel of a grey pixel alone, does nothing to it.

What differs from the published code, and why:

- Random numbers come from one :class:`torch.Generator` for the batch, drawn on the generator's device: a seed (a CPU
  generator) gives the same draws for images on a CPU and on a GPU. They are not those of the published files.
- ``frost``: the published code pastes crops of five photographs, which are not ours to ship. We synthesise needles over
  haze with the photos' range of mean, contrast and tint. The constants are the published ones, the pictures are not.
- ``motion_blur``, ``snow``: ImageMagick's kernel (weights, offsets, borders, rounding to 8 bits) is computed here.
- ``elastic_transform``: exact bilinear weights where OpenCV rounds positions to 1/32 of a pixel. Its constants are
  fractions of the side, so that every size sees the same deformation; all other constants are pixels.
- ``glass_blur``: the loop over pixels is resolved at once, with the same result.
- ``spatter``: an image without a drop stays clean, where the original divides 0 by 0.

>>> x = torch.linspace(0, 1, 64).view(1, 1, 8, 8)
>>> [int(level) for level in (corrupt(x, "contrast", 5) * 255).aminmax()]     # 0.15 of the range is left
[108, 146]
>>> foggy = corrupt(x, "fog", 3, seed=1)
>>> torch.equal(foggy, corrupt(x, "fog", 3, seed=1)), torch.equal(foggy, corrupt(x, "fog", 3, seed=2))
(True, False)
>>> batch = torch.rand(100, 3, 32, 32, generator=torch.Generator().manual_seed(0))
>>> for name in ("gaussian_noise", "contrast", "pixelate"):                     # root mean square change
...     print(name, [round(float((corrupt(batch, name, s) - batch).square().mean().sqrt()), 2) for s in (1, 3, 5)])
gaussian_noise [0.04, 0.08, 0.1]
contrast [0.07, 0.17, 0.25]
pixelate [0.1, 0.15, 0.22]
>>> corrupt(x, "rain", 3)  # doctest: +ELLIPSIS
Traceback (most recent call last):
    ...
ValueError: name: expected one of gaussian_noise, ..., saturate, got 'rain'
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peftref.data import _filters as filters
from peftref.data import _textures as textures
from peftref.data._jpeg import jpeg
from peftref.data._severities import CORRUPTIONS, EXTRA, TABLES
from peftref.data._textures import normal, uniform

SLACK = 1e-3  # beyond [0, 1]: what resizing and half precision round to

__all__ = ["CORRUPTIONS", "EXTRA", "TABLES", "corrupt"]


def corrupt(
    x: Tensor,
    name: str,
    severity: int,
    *,
    generator: torch.Generator | None = None,
    seed: int = 0,
    table: str = "cifar",
) -> Tensor:
    """Corrupt every image of a batch, each with its own randomness.

    Args:
        x: images in [0, 1], at least 8 x 8 pixels, one or three channels; not changed.
        name: one of :data:`CORRUPTIONS` or :data:`EXTRA`.
        severity: 1 (mild) to 5 (strong).
        generator: source of randomness, advanced by the call; default: a new CPU generator with ``seed``.
        seed: used when no generator is given.
        table: ``"cifar"`` (constants for about 32 pixels) or ``"imagenet"`` (about 224), see :data:`TABLES`.

    Returns:
        Images on the levels k/255, on the device and in the dtype of ``x``.

    Raises:
        TypeError: ``x`` is not a floating-point tensor, or another argument has the wrong type.
        ValueError: a shape, value, name, severity or table outside the above.

    Shape:
        ``(N, C, H, W) -> (N, C, H, W)``.
    """
    _check(x, name, severity, generator, seed, table)
    if generator is None:
        generator = torch.Generator().manual_seed(int(seed))
    work = x.detach().clamp(0, 1).to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    with torch.no_grad():
        y = _FUNCTIONS[name](work, TABLES[table][name][severity - 1], generator)
        return _truncated(y.clamp(0, 1)).to(x.dtype)


def _check(x: Tensor, name: str, severity: int, generator: torch.Generator | None, seed: int, table: str) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x: expected a floating-point tensor with values in [0, 1], got {got}")
    if x.ndim != 4 or x.shape[0] == 0 or x.shape[1] not in (1, 3) or min(x.shape[2:]) < 8:
        raise ValueError(f"x: expected shape (N >= 1, 1 or 3, H >= 8, W >= 8), got {tuple(x.shape)}")
    if not ((x >= -SLACK) & (x <= 1 + SLACK)).all():
        raise ValueError(f"x: expected values in [0, 1], got {float(x.min()):.4g} to {float(x.max()):.4g}")
    if name not in CORRUPTIONS + EXTRA:
        raise ValueError(f"name: expected one of {', '.join(CORRUPTIONS + EXTRA)}, got {name!r}")
    if not isinstance(severity, Integral) or isinstance(severity, bool):
        raise TypeError(f"severity: expected an integer from 1 to 5, got {type(severity).__name__}")
    if not 1 <= severity <= 5:
        raise ValueError(f"severity: expected an integer from 1 to 5, got {severity}")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator or None, got {type(generator).__name__}")
    if not isinstance(seed, Integral) or isinstance(seed, bool):
        raise TypeError(f"seed: expected an integer, got {type(seed).__name__}")
    if table not in tuple(TABLES):
        raise ValueError(f"table: expected one of {', '.join(TABLES)}, got {table!r}")


def _gaussian_noise(x: Tensor, c: float, g: torch.Generator) -> Tensor:
    return x + c * normal(x.shape, x, g)


def _shot_noise(x: Tensor, c: float, g: torch.Generator) -> Tensor:
    return torch.poisson((c * x).to(g.device), generator=g).to(x) / c


def _impulse_noise(x: Tensor, c: float, g: torch.Generator) -> Tensor:
    u = uniform(x.shape, 0, 1, x, g)
    return torch.where(u < c / 2, 0.0, torch.where(u >= 1 - c / 2, 1.0, x))


def _speckle_noise(x: Tensor, c: float, g: torch.Generator) -> Tensor:
    return x + c * x * normal(x.shape, x, g)


def _defocus_blur(x: Tensor, c: tuple[float, float], g: torch.Generator) -> Tensor:
    radius, softness = c
    return filters.correlate(x, filters.disk(radius, softness, x), "mirror")


def _gaussian_blur(x: Tensor, c: float, g: torch.Generator) -> Tensor:
    return filters.gaussian(x, c)


def _glass_blur(x: Tensor, c: tuple[float, int, int], g: torch.Generator) -> Tensor:
    sigma, reach, rounds = c
    x = _truncated(filters.gaussian(x, sigma))
    n, _, height, width = x.shape
    for _ in range(rounds):
        size = (n, 2, max(height - 2 * reach, 0), max(width - 2 * reach, 0))
        shift = torch.randint(-reach, reach, size, generator=g, device=g.device).to(x.device)
        x = textures.shuffle(x, shift, reach)
    return filters.gaussian(x, sigma)


def _motion_blur(x: Tensor, c: tuple[int, float], g: torch.Generator) -> Tensor:
    radius, sigma = c
    return _rounded(filters.motion_blur(x, radius, sigma, uniform(x.shape[:1], -45, 45, x, g)))


def _zoom_blur(x: Tensor, c: tuple[float, float], g: torch.Generator) -> Tensor:
    end, step = c
    factors = np.arange(1, end, step)  # NumPy's count: the end is sometimes included, as it was when published
    total = x.clone()
    for factor in factors.tolist():
        rows, columns = (filters.zoom_operator(n, factor, x) for n in x.shape[-2:])
        total += filters.separable(x, rows, columns)
    return total / (len(factors) + 1)


def _snow(x: Tensor, c: tuple[float, float, float, float, int, float, float], g: torch.Generator) -> Tensor:
    mean, std, zoom, threshold, radius, sigma, keep = c
    flakes = mean + std * normal((x.shape[0], 1, *x.shape[2:]), x, g)
    flakes = filters.separable(flakes, *(filters.zoom_operator(n, zoom, x) for n in x.shape[-2:]))
    flakes = _truncated(torch.where(flakes < threshold, 0.0, flakes).clamp(0, 1))
    flakes = _rounded(filters.motion_blur(flakes, radius, sigma, uniform(x.shape[:1], -135, -45, x, g)))
    grey = x if x.shape[1] == 1 else torch.einsum("nchw,c->nhw", x, x.new_tensor([0.299, 0.587, 0.114]))[:, None]
    x = keep * x + (1 - keep) * torch.maximum(x, 1.5 * grey + 0.5)
    return x + flakes + flakes.flip(-2, -1)


def _frost(x: Tensor, c: tuple[float, float], g: torch.Generator) -> Tensor:
    image, ice = c
    return image * x + ice * textures.frost(x, g)


def _fog(x: Tensor, c: tuple[float, float], g: torch.Generator) -> Tensor:
    amount, decay = c
    height, width = x.shape[-2:]
    size = 1 << (max(height, width) - 1).bit_length()
    clouds = textures.plasma(uniform((x.shape[0], size, size), -1, 1, x, g), decay)[:, None, :height, :width]
    brightest = x.amax((1, 2, 3), keepdim=True)
    return (x + amount * clouds) * brightest / (brightest + amount)


def _brightness(x: Tensor, c: float, g: torch.Generator) -> Tensor:
    value = x.amax(1, keepdim=True)
    brighter = (value + c).clamp(max=1)
    return torch.where(value > 0, x * (brighter / value), brighter)  # hue and saturation: the ratios of the channels


def _contrast(x: Tensor, c: float, g: torch.Generator) -> Tensor:
    mean = x.mean((2, 3), keepdim=True)
    return mean + c * (x - mean)


def _saturate(x: Tensor, c: tuple[float, float], g: torch.Generator) -> Tensor:
    factor, offset = c
    value = x.amax(1, keepdim=True)
    spread = value - x.amin(1, keepdim=True)
    saturation = torch.where(value > 0, spread / value, 0.0)
    # Share of the spread each channel lies below the value: fixed by the hue. Grey counts as red: (0, 1, 1).
    below = torch.where(spread > 0, (value - x) / spread, x.new_tensor([0.0, 1.0, 1.0])[: x.shape[1], None, None])
    return value * (1 - (factor * saturation + offset).clamp(0, 1) * below)


def _elastic_transform(x: Tensor, c: tuple[float, float, float], g: torch.Generator) -> Tensor:
    n, _, height, width = x.shape
    strength, sigma, shift = (min(height, width) * fraction for fraction in c)
    # The affine map that takes three corners of a square to their shifted places; positions are (column, row).
    middle = x.new_tensor([width // 2, height // 2])
    arm = min(height, width) // 3
    corners = middle + arm * x.new_tensor([[1, 1], [1, -1], [-1, -1]])
    moved = corners + uniform((n, 3, 2), -shift, shift, x, g)
    inverse = torch.linalg.solve(torch.cat((moved, torch.ones_like(moved[..., :1])), -1), corners.expand(n, 3, 2))
    row, column = torch.meshgrid(*(torch.arange(m, device=x.device).to(x) for m in (height, width)), indexing="ij")
    source = torch.stack((column, row, torch.ones_like(row)), -1) @ inverse[:, None]  # (N, H, W, 2)
    x = filters.sample(x, source[..., 0], source[..., 1], "mirror")
    smooth = strength * filters.gaussian(uniform((n, 2, height, width), -1, 1, x, g), sigma, "reflect", truncate=3.0)
    return filters.sample(x, column + smooth[:, 0], row + smooth[:, 1], "reflect")


def _pixelate(x: Tensor, c: float, g: torch.Generator) -> Tensor:
    height, width = x.shape[-2:]
    x = (x * 255).round()
    for rows, columns in ((int(height * c), int(width * c)), (height, width)):  # down to the coarse grid and up again
        # Whole levels after each pass, halves up, as in Pillow.
        x = (x @ filters.box_operator(x.shape[-1], columns, x).mT + 0.5).floor()
        x = (filters.box_operator(x.shape[-2], rows, x) @ x + 0.5).floor()
    return x / 255


def _jpeg_compression(x: Tensor, c: int, g: torch.Generator) -> Tensor:
    return jpeg((x * 255).round(), c) / 255


def _spatter(x: Tensor, c: tuple[float, float, float, float, float, int], g: torch.Generator) -> Tensor:
    mean, std, sigma, threshold, amount, is_mud = c
    liquid = filters.gaussian(mean + std * normal((x.shape[0], 1, *x.shape[2:]), x, g), sigma)
    colour = x.new_tensor([63, 42, 20] if is_mud else [175, 238, 238])[: x.shape[1], None, None] / 255
    if is_mud:
        cover = filters.gaussian((liquid > threshold).to(x), amount)
        cover = torch.where(cover < 0.8, 0.0, cover)
        return x * (1 - cover) + colour * cover
    drops = torch.where(liquid < threshold, 0.0, liquid).clamp(0, 1)
    return x + amount * textures.water((drops * 255).floor()) * colour


def _truncated(x: Tensor) -> Tensor:  # a thousandth of a level keeps round-off from costing a whole one
    return (x * 255 + 1e-3).floor() / 255


def _rounded(x: Tensor) -> Tensor:
    return (x * 255).round() / 255


_FUNCTIONS: dict[str, Callable[[Tensor, Any, torch.Generator], Tensor]] = {
    function.__name__[1:]: function
    for function in (
        _gaussian_noise,
        _shot_noise,
        _impulse_noise,
        _defocus_blur,
        _glass_blur,
        _motion_blur,
        _zoom_blur,
        _snow,
        _frost,
        _fog,
        _brightness,
        _contrast,
        _elastic_transform,
        _pixelate,
        _jpeg_compression,
        _speckle_noise,
        _gaussian_blur,
        _spatter,
        _saturate,
    )
}
