"""Naive twin of MultiColorMNIST: one image, one cell, one patch at a time, cells in the order of the official code."""

from __future__ import annotations

import numpy as np

RGB = [
    (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255), (255, 0, 255), (0, 0, 0), (255, 255, 255),
    (128, 128, 128), (255, 165, 0),
]  # fmt: skip
CELLS = [(0, 0), (0, 14), (0, 28), (14, 0), (14, 28), (28, 0), (28, 14), (28, 28)]


def loop_paint(digits: np.ndarray, shown: np.ndarray, maps: np.ndarray) -> np.ndarray:
    """Images ``(N, 3, 42, 42)`` of digits ``(N, 28, 28)``, given the class that each patch shows.

    ``shown`` and ``maps`` number the patches row by row over the picture.
    """
    corners = sorted((r + 7 * i, c + 7 * j) for r, c in CELLS for i in range(2) for j in range(2))
    number = {corner: n for n, corner in enumerate(corners)}
    images = np.zeros((len(digits), 3, 42, 42), dtype=np.float32)
    for image, digit, classes in zip(images, digits, shown, strict=True):
        for channel in range(3):
            image[channel, 14:28, 14:28] = digit[::2, ::2]
        for r, c in CELLS:
            for i in range(2):
                for j in range(2):
                    top, left = r + 7 * i, c + 7 * j
                    patch = number[top, left]
                    colour = RGB[maps[patch][classes[patch]]]
                    for channel in range(3):
                        image[channel, top : top + 7, left : left + 7] = colour[channel] / 255
    return images
