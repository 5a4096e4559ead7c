r"""MultiColorMNIST: a digit amid 32 coloured patches, each of which alone tells the class, until it does not.

Lin, Tan, Hao, Wong, Dong, Zhang, Yang, Zhang, "Spurious Feature Diversification Improves Out-of-distribution
Generalization", ICLR 2024, arXiv 2309.17230, and its official code,
``linyongver/SpuriousFeatureDiversification@5aad511:submit_main.py``.

The digit, 14 x 14, stands in the middle of a 42 x 42 picture. The eight cells around it are cut into four patches of
7 x 7 each. Every patch has its own map from the ten classes to ten colours, a random permutation, drawn once. For
every image and patch the class q to show is drawn anew:

.. math:: q_{ij}=y_i\ \text{with probability}\ 1-p,\quad\text{else uniform over the ten classes,}

and the patch shows the colour that its map gives to q. At p = 0 (training) each patch is a perfect feature; at p = 1
colours say nothing. With ``colours=1`` all patches share one draw and one map: SingleColorMNIST, the control, in which
there is but one spurious feature to rely on.

Differs from the official code: it draws a colour where we draw the class of a colour, which is the same law; patches
are numbered row by row over the picture instead of cell by cell; digits of another size than 28 (of which every other
pixel is taken) or 14 are resized bilinearly.

>>> from peftref.data import load
>>> digits = load("mnist5k")
>>> maps = colour_maps(torch.Generator().manual_seed(0))
>>> train = multicolor(*digits.train, 0.0, generator=torch.Generator().manual_seed(1), maps=maps)
>>> test = multicolor(*digits.test, 0.7, generator=torch.Generator().manual_seed(2), maps=maps)
>>> train.x.shape, test.shown.shape
(torch.Size([4000, 3, 42, 42]), torch.Size([1000, 32]))
>>> [round((s.shown == s.y[:, None]).double().mean().item(), 2) for s in (train, test)]  # 1 - p + p / 10
[1.0, 0.37]
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["COLOURS", "MultiColor", "colour_maps", "multicolor"]

COLOURS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "cyan": (0, 255, 255),
    "magenta": (255, 0, 255),
    "black": (0, 0, 0),
    "white": (255, 255, 255),
    "grey": (128, 128, 128),
    "orange": (255, 165, 0),
}
SIDE = 7
GRID = 6
PATCHES = 32  # a patch has 7 x 7 pixels, the picture 6 x 6 patches, all but the middle four coloured
MIDDLE = slice(2 * SIDE, 4 * SIDE)


class MultiColor(NamedTuple):
    """Images, labels, and what made them.

    Attributes:
        x: float32 ``(N, 3, 42, 42)`` in [0, 1].
        y: int64 ``(N,)``.
        shown: the class q whose colour each patch shows, int64 ``(N, 32)``.
        maps: number of the colour (in the order of :data:`COLOURS`) of each patch and class, int64 ``(32, 10)``.
    """

    x: Tensor
    y: Tensor
    shown: Tensor
    maps: Tensor


def colour_maps(generator: torch.Generator, colours: int = PATCHES) -> Tensor:
    """The colour of each class on each patch, ``(32, 10)``: random permutations, or the same one for all patches.

    Args:
        generator: of the permutations.
        colours: 32 (a map for every patch) or 1 (one for all).
    """
    _check_colours(colours)
    drawn = torch.rand(colours, len(COLOURS), generator=generator, device=generator.device)
    return drawn.argsort(-1).expand(PATCHES, -1).clone()


def multicolor(
    x: Tensor, y: Tensor, p: float, *, generator: torch.Generator, colours: int = PATCHES, maps: Tensor | None = None
) -> MultiColor:
    """Colour digits. Training and test images of one experiment need the same ``maps``.

    Args:
        x: grey digits ``(N, 1, H, W)`` in [0, 1].
        y: their classes ``(N,)``, at most ten.
        p: probability with which the class that a patch shows is drawn anew.
        generator: of the maps, if they are not given, then of the classes shown; drawn on its device.
        colours: 32 (each patch draws for itself) or 1 (one draw and one map for all).
        maps: of :func:`colour_maps`, or of another result.

    Raises:
        TypeError: images that are not floating-point, labels that are not integers.
        ValueError: shapes, labels, p, colours or maps out of their range.
    """
    _check(x, y, p)
    _check_colours(colours)
    maps = colour_maps(generator, colours) if maps is None else _check_maps(maps, colours)
    n = len(y)
    device = x.device
    classes = len(COLOURS)
    anew = torch.rand(n, colours, generator=generator, device=generator.device) < p
    uniform = torch.randint(classes, (n, colours), generator=generator, device=generator.device)
    shown = torch.where(anew.to(y.device), uniform.to(y.device), y[:, None].long()).expand(n, PATCHES)

    colour = maps.to(y.device)[torch.arange(PATCHES, device=y.device), shown]  # (N, 32)
    rgb = torch.tensor(list(COLOURS.values()), dtype=torch.float32, device=device) / 255
    border = torch.ones(GRID, GRID, dtype=torch.bool, device=device)
    border[2:4, 2:4] = False
    patches = torch.zeros(n, GRID, GRID, 3, device=device)
    patches[:, border] = rgb[colour.to(device)]
    lines = patches.movedim(-1, 1).repeat_interleave(SIDE, -1)  # (N, 3, 6, 42): one line of pixels of each patch
    pictures = lines[:, :, :, None].expand(-1, -1, -1, SIDE, -1).reshape(n, 3, GRID * SIDE, GRID * SIDE)
    pictures[:, :, MIDDLE, MIDDLE] = _fourteen(x.float())
    return MultiColor(pictures, y.long(), shown.clone(), maps.clone())


def _fourteen(x: Tensor) -> Tensor:
    """Digits of 14 x 14: every other pixel of 28, as in the official code; other sizes bilinearly."""
    side = 2 * SIDE
    if x.shape[-2:] == (2 * side, 2 * side):
        return x[..., ::2, ::2]
    if x.shape[-2:] == (side, side):
        return x
    return F.interpolate(x, (side, side), mode="bilinear", align_corners=False)


def _check(x: Tensor, y: Tensor, p: float) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x: expected a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    if not isinstance(y, Tensor) or y.is_floating_point() or y.dtype == torch.bool:
        raise TypeError(f"y: expected a tensor of integers, got {getattr(y, 'dtype', type(y).__name__)}")
    if x.ndim != 4 or x.shape[1] != 1 or 0 in x.shape[2:] or y.shape != x.shape[:1]:
        raise ValueError(f"x, y: expected shapes (N, 1, H, W) and (N,), got {tuple(x.shape)} and {tuple(y.shape)}")
    if not ((x >= 0) & (x <= 1)).all():
        raise ValueError(f"x: expected values in [0, 1], got {float(x.min()):.4g} to {float(x.max()):.4g}")
    if not ((y >= 0) & (y < len(COLOURS))).all():
        raise ValueError(f"y: expected classes from 0 to 9, got {int(y.min())} to {int(y.max())}")
    if not 0 <= p <= 1:
        raise ValueError(f"p: expected a probability in [0, 1], got {p}")


def _check_colours(colours: int) -> None:
    if colours not in (1, PATCHES):
        raise ValueError(f"colours: expected 1 or {PATCHES}, got {colours!r}")


def _check_maps(maps: Tensor, colours: int) -> Tensor:
    every = torch.arange(len(COLOURS), device=maps.device)
    if maps.shape != (PATCHES, len(COLOURS)) or not torch.equal(maps.sort(-1).values, every.expand_as(maps)):
        raise ValueError(f"maps: expected {PATCHES} permutations of {len(COLOURS)} colours, got {tuple(maps.shape)}")
    if colours == 1 and not (maps == maps[0]).all():
        raise ValueError("maps: expected one map for all patches with colours=1, got several")
    return maps
