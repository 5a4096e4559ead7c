"""What a call of a frozen module would lose without a word: gradients and tasks where it is recomputed in the backward
pass (``torch.utils.checkpoint``), weights that are not in memory.

>>> import torch
>>> from torch.utils.checkpoint import checkpoint
>>> x = torch.ones(2)
>>> checkpoint(lambda x: x if loses_gradients() else None, x, use_reentrant=True)        # torch only warns of it
tensor([1., 1.])
>>> checkpoint(lambda x: loses_gradients(), x, use_reentrant=False), loses_gradients(), recomputing()
(False, False, False)
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction

__all__ = ["is_bare", "loses_gradients", "on_meta", "recomputing", "will_be_recomputed"]

WITHOUT_NUMBERS = "some on the meta device, without numbers (offloaded between calls, or not loaded yet)"
REENTRANT = CheckpointFunction.forward.__code__


def loses_gradients() -> bool:
    """Whether this runs within ``checkpoint(use_reentrant=True)`` of which no input asks for a gradient.

    Nothing is recomputed then, and no parameter within gets a gradient.
    """
    inputs = _reentrant_inputs()
    return inputs is not None and not any(isinstance(t, Tensor) and t.requires_grad for t in inputs)


def recomputing() -> bool:
    """Whether this runs within a backward pass."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def will_be_recomputed() -> bool:
    """Whether what runs here is checkpointed, and so runs again in a backward pass."""
    if torch.is_grad_enabled():
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        return bool(hooks) and "_checkpoint_hook" in getattr(hooks[0], "__qualname__", "")
    return any(isinstance(t, Tensor) and t.requires_grad for t in _reentrant_inputs() or ())


def _reentrant_inputs() -> tuple[object, ...] | None:
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    frame = sys._getframe()
    while frame is not None and frame.f_code is not REENTRANT:
        frame = frame.f_back  # type: ignore[assignment]
    inputs: tuple[object, ...] | None = None if frame is None else frame.f_locals["args"]
    return inputs


def on_meta(module: nn.Module) -> bool:
    """Whether the weights that an adapter reads or has lie on the meta device, where they have a shape and no numbers.

    >>> on_meta(nn.Linear(2, 2)), on_meta(nn.Linear(2, 2, device="meta"))
    (False, True)
    """
    weight = module.weight if "weight" in module._parameters else next(module.parameters(), None)
    return weight is not None and bool(weight.is_meta)


def is_bare(module: nn.Module) -> bool:
    """Whether the module runs as its class says: no ``forward`` was set on it or on a module within."""
    return not any("forward" in vars(m) for m in module.modules())
