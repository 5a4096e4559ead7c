"""The lines of mathematics give on a GPU what they give on the CPU, and their results stay on the GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tests.frame.test_fuzz import CASES, KERNELS

PLAIN = Tensor | int | float | str | None


def on(device: str, tree: Any) -> Any:
    """The same arguments or results with their tensors on a device."""
    return pytree.tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, tree)


def of_tensors(name: str) -> bool:
    """Whether the arguments of a call are tensors and plain values, so that all of them can be moved."""
    leaves = pytree.tree_leaves(CASES[name]()[1]) if name in CASES else []
    return any(isinstance(leaf, Tensor) for leaf in leaves) and all(isinstance(leaf, PLAIN) for leaf in leaves)


NAMES = sorted(name for name in KERNELS if of_tensors(name))


def test_most_lines_of_mathematics_are_asked() -> None:
    assert len(NAMES) > len(KERNELS) / 2 and "tta.vote_update" in NAMES
    call, arguments = CASES["tta.vote_update"]()
    moved = pytree.tree_leaves(on("meta", arguments))
    assert all(leaf.is_meta for leaf in moved if isinstance(leaf, Tensor))
    assert call(**on("meta", arguments)).is_meta


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", NAMES)
def test_the_gpu_agrees(name: str) -> None:
    call, arguments = CASES[name]()
    wanted = call(**on("cpu", arguments))
    call, arguments = CASES[name]()
    found = call(**on("cuda", arguments))
    tensors = [leaf for leaf in pytree.tree_leaves(found) if isinstance(leaf, Tensor)]
    assert all(tensor.is_cuda for tensor in tensors)
    torch.testing.assert_close(on("cpu", found), wanted, rtol=1e-4, atol=1e-4, check_device=False)
