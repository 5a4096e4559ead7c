"""Naive twins of rehearsal: the losses in plain loops over numbers, the buffer one sample at a time."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def loop_cross_entropy(z: Tensor, y: Tensor, allowed: list[int] | None = None) -> float:
    total = 0.0
    for row, label in zip(z.tolist(), y.tolist(), strict=True):
        among = range(len(row)) if allowed is None else allowed
        total += math.log(sum(math.exp(row[k]) for k in among)) - row[label]
    return total / len(y)


def loop_mse(z: Tensor, stored: Tensor) -> float:
    squares = [(a - b) ** 2 for a, b in zip(z.flatten().tolist(), stored.flatten().tolist(), strict=True)]
    return sum(squares) / len(squares)


def competing(y: Tensor, classes: int, seen: int) -> list[int]:
    """Classes in the softmax of a new batch under ER-ACE: present in it, or not yet seen."""
    return [k for k in range(classes) if k in y.tolist() or k >= seen]


def published_competing(batches: list[Tensor], classes: int) -> list[int]:
    """The published mask for the last of ``batches``: seen classes are counted batch by batch, the largest competes."""
    largest = max(k for y in batches for k in y.tolist())
    last = batches[-1].tolist()
    return [k for k in range(classes) if k in last or (largest < classes - 1 and k >= largest)]


class LoopReservoir:
    """Vitter's algorithm R, one sample after the other, from the same random numbers as the batched form."""

    def __init__(self, size: int, seed: int = 0) -> None:
        self.size = size
        self.seen = 0
        self.slots = [None] * size
        self.generator = torch.Generator().manual_seed(seed)

    def add(self, samples: list[Any]) -> None:
        numbers = torch.rand(len(samples), dtype=torch.float64, generator=self.generator).tolist()
        for sample, u in zip(samples, numbers, strict=True):
            j = self.seen
            if j < self.size:
                self.slots[j] = sample
            elif int(u * (j + 1)) < self.size:
                self.slots[int(u * (j + 1))] = sample
            self.seen += 1
