r"""Image filters as small matrices, for :mod:`peftref.data.corruptions`.

A linear filter that acts on rows and columns alike is two matrix products, :math:`y=RxC^\top`: blurs, zooms and resizes
are then one line each, exact at every border, batched over images, and the same on every device (no convolution that
picks a lower precision by itself). The border rules carry SciPy's names, here for the line ``a b c d``:

===========  ===================  ========================================
``nearest``  ``a a|a b c d|d d``  scikit-image's ``gaussian``, ImageMagick
``reflect``  ``b a|a b c d|d c``  SciPy's ``map_coordinates``
``mirror``   ``c b|a b c d|c b``  OpenCV's default (``BORDER_REFLECT_101``)
===========  ===================  ========================================
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "box_operator",
    "correlate",
    "disk",
    "fold",
    "gaussian",
    "gaussian_taps",
    "line_operator",
    "motion_blur",
    "sample",
    "separable",
    "zoom_operator",
]


def fold(index: Tensor, n: int, border: str) -> Tensor:
    """Index of the pixel that stands at ``index`` (any integer) of a line of ``n`` pixels extended by ``border``.

    >>> [fold(torch.arange(-2, 6), 4, rule).tolist() for rule in ("nearest", "reflect", "mirror")]
    [[0, 0, 0, 1, 2, 3, 3, 3], [1, 0, 0, 1, 2, 3, 3, 2], [2, 1, 0, 1, 2, 3, 2, 1]]
    """
    if border == "nearest":
        return index.clamp(0, n - 1)
    if border == "reflect":
        index = index % (2 * n)
        return torch.minimum(index, 2 * n - 1 - index)
    index = index % (2 * n - 2)
    return torch.minimum(index, 2 * n - 2 - index)


def line_operator(n: int, taps: Tensor, border: str) -> Tensor:
    """The ``(n, n)`` matrix that correlates a line of ``n`` pixels with an odd number of ``taps``."""
    reach = torch.arange(len(taps), device=taps.device) - len(taps) // 2
    source = fold(torch.arange(n, device=taps.device)[:, None] + reach, n, border)  # (n, taps)
    return taps.new_zeros(n, n).scatter_add_(1, source, taps.expand(n, -1))


def separable(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """``(..., H, W) -> (..., H', W')``: ``rows (H', H)`` acts down the columns, ``columns (W', W)`` along the rows."""
    return rows @ (x @ columns.mT)


def correlate(x: Tensor, kernel: Tensor, border: str) -> Tensor:
    """Correlation with any odd-sized ``kernel (kh, kw)``: one matrix product per kernel row."""
    height, width = x.shape[-2:]
    out = torch.zeros_like(x)
    line = torch.arange(height, device=x.device)
    for j, taps in enumerate(kernel.to(x)):
        shifted = x.index_select(-2, fold(line + j - len(kernel) // 2, height, border))
        out += shifted @ line_operator(width, taps, border).mT
    return out


def gaussian_taps(sigma: float, reach: int, like: Tensor) -> Tensor:
    """Normalised Gaussian weights at ``-reach..reach``; ``sigma = 0`` is the unit impulse."""
    offset = torch.arange(-reach, reach + 1, dtype=torch.float64)
    return torch.softmax(-0.5 * (offset / max(sigma, 1e-12)) ** 2, 0).to(like)


def gaussian(x: Tensor, sigma: float, border: str = "nearest", truncate: float = 4.0) -> Tensor:
    """Gaussian blur with scikit-image's defaults: taps up to ``truncate`` standard deviations, edge pixels repeated."""
    taps = gaussian_taps(sigma, int(truncate * sigma + 0.5), x)
    height, width = x.shape[-2:]
    return separable(x, line_operator(height, taps, border), line_operator(width, taps, border))


def disk(radius: float, sigma: float, like: Tensor) -> Tensor:
    """Kernel of an out-of-focus lens: a normalised disk of pixels, its rim softened by a Gaussian of ``sigma``."""
    reach, soften = (8, 1) if radius <= 8 else (int(radius), 2)
    line = torch.arange(-reach, reach + 1, device=like.device)
    kernel = ((line[:, None] ** 2 + line**2) <= radius**2).to(like)
    soft = line_operator(len(line), gaussian_taps(sigma, soften, like), "mirror")
    kernel = separable(kernel / kernel.sum(), soft, soft)
    rim = max(reach - int(radius) - soften, 0)  # rows of zeros all around, cut to save work
    return kernel[rim : len(line) - rim, rim : len(line) - rim]


def zoom_operator(n: int, factor: float, like: Tensor) -> Tensor:
    """``(n, n)``: magnify the middle of a line by ``factor`` (linear, ends aligned), keep the middle ``n`` pixels."""
    crop = math.ceil(n / factor)
    size = round(crop * factor)
    position = torch.arange(n, dtype=torch.float64) + (size - n) // 2
    position = position * ((crop - 1) / (size - 1))
    low = position.floor().clamp(max=crop - 2)
    matrix = torch.zeros(n, n, dtype=torch.float64)
    start = (n - crop) // 2
    left = low.long()[:, None] + start
    matrix.scatter_(1, left, (1 - position + low)[:, None]).scatter_(1, left + 1, (position - low)[:, None])
    return matrix.to(like)


def box_operator(n: int, size: int, like: Tensor) -> Tensor:
    """``(size, n)``: an output pixel is the mean of the input pixels centred in its footprint (Pillow's BOX)."""
    scale = n / size
    centre = (torch.arange(size, dtype=torch.float64)[:, None] + 0.5) * scale
    distance = (torch.arange(n, dtype=torch.float64) + 0.5 - centre) / max(scale, 1.0)
    inside = ((distance > -0.5) & (distance <= 0.5)).double()
    return (inside / inside.sum(1, keepdim=True)).to(like)


def motion_blur(x: Tensor, radius: int, sigma: float, degrees: Tensor) -> Tensor:
    """One-sided Gaussian trail of ``2 radius + 1`` pixels, one angle per image (ImageMagick's kernel and rounding).

    Shape: ``x (N, C, H, W)``, ``degrees (N,)`` -> ``(N, C, H, W)``.
    """
    n, channels, height, width = x.shape
    weight = torch.softmax(-0.5 * (torch.arange(2 * radius + 1, dtype=torch.float64) / sigma) ** 2, 0).tolist()
    angle = degrees.double().deg2rad()
    row = torch.arange(height, device=x.device)[None, :, None]
    column = torch.arange(width, device=x.device)[None, None, :]
    flat = x.flatten(2)
    out = torch.zeros_like(x).flatten(2)
    for i, w in enumerate(weight):
        down = (i * angle.sin() - 0.5).ceil().long()[:, None, None]
        right = (i * angle.cos() - 0.5).ceil().long()[:, None, None]
        source = (row + down).clamp(0, height - 1) * width + (column + right).clamp(0, width - 1)  # (N, H, W)
        out += w * flat.gather(2, source.view(n, 1, -1).expand(-1, channels, -1))
    return out.view_as(x)


def sample(x: Tensor, column: Tensor, row: Tensor, border: str) -> Tensor:
    """Bilinear values of ``x (N, C, H, W)`` at positions ``column, row (N, H, W)``; ``border`` is mirror or reflect."""
    height, width = x.shape[-2:]
    aligned = border == "mirror"  # grid_sample reflects about pixel centres if aligned, about pixel edges if not
    if aligned:
        grid = torch.stack((2 * column / (width - 1) - 1, 2 * row / (height - 1) - 1), -1)
    else:
        grid = torch.stack(((2 * column + 1) / width - 1, (2 * row + 1) / height - 1), -1)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=aligned)
