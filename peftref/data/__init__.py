"""Data: sets, corruptions, and the streams on which test-time adaptation is judged."""

from __future__ import annotations

from . import corruptions, orders, streams
from .corruptions import CORRUPTIONS, corrupt
from .fetch import fetch_cifar10, fetch_cifar100, fetch_fashion_mnist
from .sets import NAMES, Dataset, Split, load
from .streams import Batch, Stream, continual, gradual, mixed

__all__ = [
    "Batch", "CORRUPTIONS", "Dataset", "NAMES", "Split", "Stream", "continual", "corrupt", "corruptions",
    "fetch_cifar10", "fetch_cifar100", "fetch_fashion_mnist", "gradual", "load", "mixed", "orders", "streams",
]  # fmt: skip
