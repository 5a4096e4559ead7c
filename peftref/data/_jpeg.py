r"""Baseline JPEG, there and back, for a batch of images on any device (entropy coding is lossless, hence left out).

ITU-T Recommendation T.81 in the integer arithmetic of libjpeg, so that the result is Pillow's, bit for bit: RGB to
YCbCr, chroma averaged over 2 x 2 pixels (4:2:0), blocks :math:`B` of 8 x 8 coded as

.. math:: \hat B = D^\top\Bigl(Q\odot\mathrm{round}\bigl(DBD^\top\oslash Q\bigr)\Bigr)D

with the DCT matrix :math:`D` and the quantisation table :math:`Q` of Annex K scaled by the quality, chroma brought back
by triangle interpolation, and YCbCr to RGB. All numbers are integers, held in double precision, in which CPUs and GPUs
alike multiply matrices exactly; ``floor(n / 2**k + 1/2)`` is the codec's rounding shift.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from peftref.data._filters import fold

__all__ = ["jpeg"]

LUMA = """16 11 10 16 24 40 51 61  12 12 14 19 26 58 60 55  14 13 16 24 40 57 69 56  14 17 22 29 51 87 80 62
          18 22 37 56 68 109 103 77  24 35 55 64 81 104 113 92
          49 64 78 87 103 121 120 101  72 92 95 98 112 100 103 99"""
CHROMA = """17 18 24 47 99 99 99 99  18 21 26 66 99 99 99 99  24 26 56 99 99 99 99 99  47 66 99 99 99 99 99 99
            99 99 99 99 99 99 99 99  99 99 99 99 99 99 99 99  99 99 99 99 99 99 99 99  99 99 99 99 99 99 99 99"""
# sqrt(8) 2^13 times the orthonormal DCT matrix, left half of its rows, with the rounding errors of libjpeg's constants;
# the right half mirrors the left, with the opposite sign in odd rows.
DCT = """8192 8192 8192 8192  11363 9633 6437 2260  10703 4433 -4433 -10703  9633 -2259 -11362 -6436
         8192 -8192 -8192 8192  6437 -11362 2261 9633  4433 -10704 10704 -4433  2260 -6436 9633 -11363"""


def matrix(text: str, like: Tensor) -> Tensor:
    """The eight rows of numbers in ``text``."""
    return torch.tensor([float(number) for number in text.split()]).view(8, -1).to(like)


def table(base: str, quality: int, like: Tensor) -> Tensor:
    """Quantisation table ``(8, 8)`` by libjpeg's rule: the base table at quality 50, all ones at 100."""
    percent = 5000 // quality if quality < 50 else 200 - 2 * quality
    return ((matrix(base, like) * percent + 50) / 100).floor().clamp(1, 255)


def shift(number: Tensor, bits: int) -> Tensor:
    """Divide by ``2**bits`` and round, halves up."""
    return (number / (1 << bits) + 0.5).floor()


def extend(plane: Tensor, height: int, width: int) -> Tensor:
    """Repeat the last row and column up to ``height`` and ``width``."""
    rows = fold(torch.arange(height, device=plane.device), plane.shape[-2], "nearest")
    columns = fold(torch.arange(width, device=plane.device), plane.shape[-1], "nearest")
    return plane[..., rows, :][..., columns]


def code(plane: Tensor, steps: Tensor) -> Tensor:
    """Levels ``(N, H, W)`` -> levels after quantisation of the block DCT by ``steps (8, 8)``."""
    height, width = plane.shape[-2:]
    left = matrix(DCT, plane)
    dct = torch.cat((left, left.flip(1) * (1 - torch.arange(8, device=plane.device) % 2 * 2)[:, None]), 1)
    full = extend(plane, -(-height // 8) * 8, -(-width // 8) * 8) - 128  # whole blocks
    block = full.unflatten(2, (-1, 8)).unflatten(1, (-1, 8)).transpose(2, 3)  # (N, H/8, W/8, 8, 8)
    frequency = shift(dct @ shift(block @ dct.T, 11), 15)  # 8 times the orthonormal transform: rows first, then columns
    count = frequency.sign() * ((frequency.abs() + 4 * steps) / (8 * steps)).floor()  # halves away from zero
    block = shift(shift(dct.T @ (count * steps), 11) @ dct, 18)  # columns first, then rows
    full = block.transpose(2, 3).flatten(3, 4).flatten(1, 2) + 128
    return full[:, :height, :width].clamp(0, 255)


def halve(plane: Tensor) -> Tensor:
    """2 x 2 means, rounded down and up in turn along a row (the codec's way not to drift)."""
    height, width = plane.shape[-2:]
    # Columns are repeated before the averaging up to a whole block, rows only up to an even number: libjpeg's order.
    plane = extend(plane, height + height % 2, -(-width // 16) * 16)
    total = plane[..., ::2, ::2] + plane[..., 1::2, ::2] + plane[..., ::2, 1::2] + plane[..., 1::2, 1::2]
    return ((total + 1 + torch.arange(total.shape[-1], device=plane.device) % 2) / 4).floor()


def double(plane: Tensor, height: int, width: int) -> Tensor:
    """Triangle interpolation to twice the size (weights 9, 3, 3, 1 over 16), cut to ``(height, width)``."""
    plane = plane[..., : (width + 1) // 2]
    fine = F.interpolate(plane[:, None], scale_factor=2, mode="bilinear", align_corners=False)[:, 0]
    even = (torch.arange(fine.shape[-1], device=plane.device) + 1) % 2
    return ((16 * fine + 7 + even) / 16).floor()[..., :height, :width]  # halves up and down in turn


def jpeg(levels: Tensor, quality: int) -> Tensor:
    """Levels 0..255 ``(N, C, H, W)``, C = 1 or 3, as they come back from a JPEG file of the given quality."""
    exact = levels.double()
    luma = table(LUMA, quality, exact)
    chroma = table(CHROMA, quality, exact)
    if levels.shape[1] == 1:  # grey: Cb = Cr = 128 survive the codec unchanged
        return code(exact[:, 0], luma)[:, None].to(levels)
    r, g, b = exact.unbind(1)
    y = code(shift(19595 * r + 38470 * g + 7471 * b, 16), luma)
    cb = shift(-11059 * r - 21709 * g + 32768 * b - 1, 16) + 128
    cr = shift(32768 * r - 27439 * g - 5329 * b - 1, 16) + 128
    cb, cr = (double(code(halve(plane), chroma), *levels.shape[-2:]) - 128 for plane in (cb, cr))
    rgb = y + shift(91881 * cr, 16), y + shift(-22554 * cb - 46802 * cr, 16), y + shift(116130 * cb, 16)
    return torch.stack(rgb, 1).clamp(0, 255).to(levels)
