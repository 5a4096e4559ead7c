r"""Random textures for :mod:`peftref.data.corruptions`: fog, frost, drops of water, the pixel shuffle of glass.

Every function works on a whole batch; the randomness comes in as an argument (drawn numbers, or a generator).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from peftref.data._filters import correlate, motion_blur

__all__ = ["frost", "normal", "plasma", "shuffle", "uniform", "water"]


def normal(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal numbers, drawn where the generator lives: one seed gives one result on every device."""
    return torch.randn(shape, generator=generator, device=generator.device).to(like)


def uniform(shape: tuple[int, ...], low: float, high: float, like: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform numbers between ``low`` and ``high``, drawn where the generator lives."""
    return (low + (high - low) * torch.rand(shape, generator=generator, device=generator.device)).to(like)


def plasma(noise: Tensor, decay: float) -> Tensor:
    r"""Clouds in [0, 1] by diamond-square on a torus: ``noise (N, S, S)`` in [-1, 1], ``S`` a power of two.

    Each level halves the step. A new point is the mean of its four neighbours (first the diagonal, then the straight
    ones) plus :math:`w_l^2` times its noise, with :math:`w_l=100/\mathrm{decay}^l` (squared in the published code).
    """
    height = torch.zeros_like(noise)
    step = noise.shape[-1]
    amplitude = 100.0
    while step >= 2:
        half = step // 2
        even = slice(0, None, step)
        odd = slice(half, None, step)
        corner = height[:, even, even]
        across = corner + corner.roll(-1, 2)
        down = corner + corner.roll(-1, 1)
        height[:, odd, odd] = (across + across.roll(-1, 1)) / 4 + amplitude**2 * noise[:, odd, odd]
        centre = height[:, odd, odd]
        height[:, even, odd] = (across + centre + centre.roll(1, 1)) / 4 + amplitude**2 * noise[:, even, odd]
        height[:, odd, even] = (down + centre + centre.roll(1, 2)) / 4 + amplitude**2 * noise[:, odd, even]
        step = half
        amplitude = amplitude / decay
    height = height - height.amin((1, 2), keepdim=True)
    return height / height.amax((1, 2), keepdim=True)


def frost(x: Tensor, generator: torch.Generator) -> Tensor:
    """Ice needles over haze, ``(N, C, H, W)`` in [0, 1]; level, contrast and tint as in the published photographs."""
    n, channels, height, width = x.shape
    length = min(max(4, max(height, width) // 8), 12)
    needles = torch.zeros_like(x[:, :1])
    for _ in range(3):  # three crystal directions
        seeds = (uniform((n, 1, height, width), 0, 1, x, generator) > 0.85).to(x)
        angle = uniform((n,), 0, 360, x, generator)
        needles = torch.maximum(needles, motion_blur(seeds, length, length / 2, angle))
    size = 1 << (max(height, width) - 1).bit_length()
    haze = plasma(uniform((n, size, size), -1, 1, x, generator), 2.0)[:, None, :height, :width]
    pattern = needles / needles.std((1, 2, 3), keepdim=True) + haze / haze.std((1, 2, 3), keepdim=True)
    pattern = pattern - pattern.mean((1, 2, 3), keepdim=True)
    pattern = pattern / pattern.std((1, 2, 3), keepdim=True)
    level = uniform((n, 1, 1, 1), 0.5, 0.8, x, generator)  # the photos' mean levels: 0.48 to 0.81
    contrast = uniform((n, 1, 1, 1), 0.05, 0.13, x, generator)  # standard deviation within a crop: 0.05 to 0.13
    tint = x.new_tensor([-0.07, 0.02, 0.05])[:channels, None, None]  # red, green, blue against the mean
    return (level + tint + contrast * pattern).clamp(0, 1)


def shuffle(x: Tensor, shift: Tensor, reach: int) -> Tensor:
    """Replace each pixel by the one at offset ``shift``, one after another from the bottom right (frosted glass).

    The published loop means to swap two pixels, but on colour images NumPy's views turn the swap into a copy: pixel
    ``p`` takes the value that ``q = p + shift`` has *at that moment*: q's final value if q came before p, else its
    original one. So each pixel points to its source, and following all pointers at once, doubling the distance every
    time, gives the loop's result after ``log2`` of the longest chain, not ``H W``, steps.

    Args:
        x: images ``(N, C, H, W)``.
        shift: integers ``(N, 2, H - 2 reach, W - 2 reach)`` in ``[-reach, reach)``: rows, columns.
        reach: pixels with row and column in ``reach + 1 .. size - reach`` are visited (the published range).
    """
    n, channels, height, width = x.shape
    if min(height, width) <= 2 * reach:
        return x
    pixels = height * width
    index = torch.arange(pixels, device=x.device).view(height, width)
    inner = (slice(None), slice(reach + 1, height - reach + 1), slice(reach + 1, width - reach + 1))
    start = index[inner[1:]]
    source = start + shift[:, 0] * width + shift[:, 1]
    visited = torch.zeros(pixels, dtype=torch.bool, device=x.device).view(height, width)
    visited[inner[1:]] = True
    # Node p < H W: final value of pixel p. Node H W + p: its original value, which points to itself.
    final = (source > start) & visited.flatten()[source]  # visited from the bottom right: larger index, earlier
    parent = torch.arange(pixels, 2 * pixels, device=x.device).repeat(n, 2)  # (N, 2 H W)
    parent[:, :pixels].view(n, height, width)[inner] = torch.where(final, source, source + pixels)
    while not torch.equal(nxt := parent.gather(1, parent), parent):
        parent = nxt
    origin = parent[:, None, :pixels] - pixels
    return x.flatten(2).gather(2, origin.expand(-1, channels, -1)).view_as(x)


def water(liquid: Tensor) -> Tensor:
    """Brightness in [0, 1] of drops: levels 0..255 of a thresholded height map ``(N, 1, H, W)``, lit along their rims.

    Edges (Canny), distance to them, histogram equalisation, an emboss filter: OpenCV's steps, each on 8-bit levels.
    """
    third = liquid.new_full((3, 3), 1 / 3) / 3
    distance = correlate(edge_distance(edges(liquid)).to(liquid), third, "mirror")
    distance = equalise((distance + 1e-4).floor())
    emboss = liquid.new_tensor([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]])
    light = correlate(correlate(distance, emboss, "mirror").clamp(0, 255), third, "mirror").round()
    drops = liquid * light
    return drops / drops.amax((1, 2, 3), keepdim=True).clamp(min=1e-12)  # no drop at all: 0, where the original has NaN


def edges(levels: Tensor, low: int = 50, high: int = 150) -> Tensor:
    """Canny edges (boolean) of levels 0..255: Sobel, non-maximum suppression, hysteresis."""
    sobel = levels.new_tensor([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]])
    dx = correlate(levels, sobel, "nearest")
    dy = correlate(levels, sobel.T, "nearest")
    ax = dx.abs()
    ay = dy.abs()
    strength = dx.abs() + dy.abs()
    around = F.pad(strength, (1, 1, 1, 1))

    def at(v: int, u: int) -> Tensor:
        return around[..., 1 + v : around.shape[-2] - 1 + v, 1 + u : around.shape[-1] - 1 + u]

    flat = 13573 / 32768
    steep = 13573 / 32768 + 2  # tangents of 22.5 and 67.5 degrees, as rounded by OpenCV
    rising = dx * dy < 0
    across = (strength > at(0, -1)) & (strength >= at(0, 1))
    along = (strength > at(-1, 0)) & (strength >= at(1, 0))
    diagonal = torch.where(
        rising, (strength > at(-1, 1)) & (strength > at(1, -1)), (strength > at(-1, -1)) & (strength > at(1, 1))
    )
    ridge = torch.where(ay < ax * flat, across, torch.where(ay > ax * steep, along, diagonal)) & (strength > low)
    found = ridge & (strength > high)
    while True:  # weak ridges count if a chain of ridges links them to a strong one
        grown = ridge & (F.max_pool2d(found.float(), 3, 1, 1) > 0)
        if torch.equal(grown, found):
            return found
        found = grown


def edge_distance(edge: Tensor, limit: int = 20) -> Tensor:
    """Distance to the nearest edge, at most ``limit``, by the 5 x 5 chamfer steps 1, 1.4 and 2.1969."""
    step = [(v, u) for v in range(-2, 3) for u in range(-2, 3) if v * v + u * u in (1, 2, 5)]
    cost = {1: 1.0, 2: 1.4, 5: 2.1969}
    distance = torch.where(edge, 0.0, float(limit))
    height, width = edge.shape[-2:]
    for _ in range(limit):
        around = F.pad(distance, (2, 2, 2, 2), value=float(limit))
        last = distance
        for v, u in step:
            there = around[..., 2 + v : 2 + v + height, 2 + u : 2 + u + width]
            distance = torch.minimum(distance, there + cost[v * v + u * u])
        if torch.equal(distance, last):
            break
    return distance


def equalise(levels: Tensor, bins: int = 21) -> Tensor:
    """Histogram equalisation of levels ``0..bins - 1`` to 0..255, per image; an image of one level stays as it is."""
    flat = levels.flatten(1).long()
    count = torch.zeros(len(flat), bins, device=levels.device, dtype=levels.dtype)
    total = count.scatter_add_(1, flat, torch.ones_like(flat, dtype=levels.dtype)).cumsum(1)
    first = total.gather(1, flat.amin(1, keepdim=True))  # pixels at the darkest level present, which maps to 0
    spread = flat.shape[1] - first
    mapped = (255 * (total - first).clamp(min=0) / spread.clamp(min=1)).round()
    return torch.where(spread > 0, mapped.gather(1, flat), flat.to(levels)).view_as(levels)
