"""Names and modules as they are without the wrappers of torch: compiled, parallel, checkpointed, averaged."""

from __future__ import annotations

from torch import nn
from torch.optim.swa_utils import AveragedModel

WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")  # torch's own attribute names


def unwrapped(module: nn.Module) -> nn.Module:
    """What ``torch.compile``, ``DataParallel``, ``DistributedDataParallel`` were given; else the module itself.

    >>> net = nn.Linear(2, 2)
    >>> unwrapped(nn.DataParallel(net)) is net
    True
    """
    while (attribute := _holder(module)) is not None:
        module = getattr(module, attribute)
    return module


def plain_name(model: nn.Module, name: str) -> str:
    """The name of a module, parameter or buffer without those words that only a wrapper adds.

    >>> plain_name(nn.Sequential(nn.DataParallel(nn.Linear(2, 2))), "0.module.weight")
    '0.weight'
    """
    kept = []
    module: object = model
    for word in name.split("."):
        while (holder := _holder(module)) not in (None, word):  # some wrappers leave their own word out
            module = getattr(module, str(holder))
        if holder is None:
            kept.append(word)
        module = getattr(module, word, None)
    return ".".join(kept)


def _holder(module: object) -> str | None:
    """Under which attribute a wrapper holds its module; None for what wraps nothing."""
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel | AveragedModel):
        return "module"
    children = module._modules if isinstance(module, nn.Module) else {}
    return next((attribute for attribute in WRAPPED if attribute in children), None)
