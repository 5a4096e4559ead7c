"""Shared by the tests and by the examples in docstrings."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _the_same_numbers_in_every_example(request: pytest.FixtureRequest) -> None:
    """An example in a docstring that draws numbers without a seed does not depend on what ran before it."""
    if isinstance(request.node, pytest.DoctestItem):
        torch.manual_seed(0)
