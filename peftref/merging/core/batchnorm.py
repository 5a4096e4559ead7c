"""BatchNorm after weight arithmetic: the merged network's activations have statistics that neither parent knew."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["batchnorms", "recalibrate"]


def batchnorms(model: nn.Module) -> dict[str, _BatchNorm]:
    """The BatchNorm layers that keep running statistics, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is not None}


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
    """Re-estimate the running statistics of ``model`` in place: reset, then average over the batches.

    Each batch counts by its number of samples. Only BatchNorm layers are in training mode meanwhile, so dropout stays
    as it is. Modes, momenta and, if a batch fails, the old statistics are restored.

    Args:
        model: a network without BatchNorm stays as it is.
        batches: inputs ``(B, ...)`` of the distribution the model will meet.

    Returns:
        ``model``.

    Raises:
        ValueError: no batches, one without samples, or statistics that are not finite.
    """
    layers = list(batchnorms(model).values())
    before = [({k: v.clone() for k, v in m.named_buffers()}, m.training, m.momentum) for m in layers]
    seen = 0
    try:
        for m in layers:
            m.reset_running_stats()
            m.train()
        for x in batches:
            if not len(x):
                raise ValueError("batches: expected at least one sample in each, got none")
            seen += len(x)
            for m in layers:
                m.momentum = len(x) / seen  # running <- running + b / (n + b) (batch - running)
            model(x)
        if not seen:
            raise ValueError("batches: expected at least one, got none")
        broken = [n for n, m in batchnorms(model).items() if not all(t.isfinite().all() for t in m.buffers())]
        if broken:
            raise ValueError(f"batches: expected finite inputs, got statistics that are not in {', '.join(broken)}")
    except BaseException:
        for m, (buffers, _, _) in zip(layers, before, strict=True):
            m.load_state_dict(buffers, strict=False)
        raise
    finally:
        for m, (_, training, momentum) in zip(layers, before, strict=True):
            m.train(training)
            m.momentum = momentum
    return model
