"""What goes into the layers of a model on some data, seen without changing the model.

>>> import torch
>>> from torch import nn
>>> class Pair(nn.Module):
...     def __init__(self):
...         super().__init__()
...         self.q, self.k, self.out = (nn.Linear(3, 3) for _ in range(3))
...     def forward(self, x):
...         return self.out(self.q(x) * self.k(x))
>>> net, seen = Pair().train(), []
>>> with record_inputs(net, {"out": net.out}, lambda name, x: seen.append((name, tuple(x.shape)))):
...     run(net, torch.ones(2, 3)).requires_grad, net.training
(False, False)
>>> seen, net.training
([('out', (2, 3))], True)
>>> shared_inputs(net, dict(net.named_children()), torch.ones(2, 3))
[['q', 'k'], ['out']]
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .layers import view

__all__ = ["input_rows", "record_inputs", "run", "shared_inputs", "token_mask"]


@contextmanager
def record_inputs(
    model: nn.Module, layers: Mapping[str, nn.Module], record: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Within the block the model is in eval mode, and ``record(name, x)`` is called with the input of each layer.

    After it, or an error in it, every training flag is what it was, module by module, and the hooks are gone.

    Args:
        model: runs within the block.
        layers: name -> layer whose inputs are recorded.
        record: gets the name and the input, before the layer runs.
    """

    def hook_of(name: str) -> Callable[..., None]:
        return lambda module, args, kwargs: record(name, args[0] if args else next(iter(kwargs.values())))

    flags = [(module, module.training) for module in model.modules()]
    hooks = []
    try:
        model.eval()
        hooks += [layer.register_forward_pre_hook(hook_of(n), with_kwargs=True) for n, layer in layers.items()]
        with torch.no_grad():
            yield
    finally:
        for hook in hooks:
            hook.remove()
        for module, flag in flags:
            module.training = flag


def run(model: nn.Module, batch: Any) -> Any:
    """The model on a tensor, on a dictionary of its arguments, or on the first element of a sequence (images, labels).

    Tensors go to the device of the model's parameters.
    """
    device = next((p.device for p in model.parameters()), None)
    if isinstance(batch, Mapping):
        return model(**{key: v.to(device) if isinstance(v, Tensor) else v for key, v in batch.items()})
    x = batch if isinstance(batch, Tensor) else batch[0]
    return model(x.to(device))


def shared_inputs(
    model: nn.Module, layers: Mapping[str, nn.Module], batch: Any, forward: Callable[[nn.Module, Any], object] = run
) -> list[list[str]]:
    """One pass: the layers that get the very same tensors, and read them alike, such as queries, keys and values.

    Compared is the tensor, not its entries: a copy counts as another input. A layer that is not reached is alone.
    """
    # An address can be used again, so look whether what had it is still there.
    alive: dict[Hashable, tuple[weakref.ref[Tensor], int]] = {}
    calls: dict[str, list[int]] = {n: [] for n in layers}

    def record(name: str, x: Tensor) -> None:
        key = id(x), 0 if x.is_inference() else x._version, _reading(layers[name])
        if key not in alive or alive[key][0]() is not x:
            alive[key] = weakref.ref(x), sum(map(len, calls.values()))
        calls[name].append(alive[key][1])

    with record_inputs(model, layers, record):
        forward(model, batch)
    groups: dict[Any, list[str]] = {}
    for n, inputs in calls.items():
        groups.setdefault(tuple(inputs) or n, []).append(n)
    return list(groups.values())


def input_rows(name: str, module: nn.Module, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """The rows that a layer multiplies, ``(n, i)``, in float32 or wider; those of tokens where ``mask`` is true.

    Raises:
        ValueError: entries that are not finite, or a mask of another shape than the tokens; both name the layer.
    """
    found = view(module).rows(x.detach())  # (..., i)
    if mask is not None:
        if mask.shape != found.shape[:-1]:
            shapes = f"{tuple(found.shape[:-1])} for {name}, got {tuple(mask.shape)}"
            raise ValueError(f"mask: expected one value for each row of the input, {shapes}; exclude it or mask=None")
        found = found[mask.to(found.device)]
    found = found.reshape(-1, found.shape[-1]).to(torch.promote_types(found.dtype, torch.float32))
    if not found.isfinite().all():
        raise ValueError(f"batches: expected finite inputs of every layer, got NaN or infinity into {name}")
    return found


def token_mask(batch: Any, ignore: int | None = -100) -> Tensor | None:
    """Which tokens of a batch count, ``(batch, tokens)``: those attended to whose label is not ``ignore``.

    None, for all, if the batch is no dictionary with an ``attention_mask`` or ``labels`` of one value per token. With
    ``functools.partial(token_mask, ignore=None)`` labels do not matter.

    >>> token_mask({"attention_mask": torch.tensor([[1, 1, 0]]), "labels": torch.tensor([[-100, 7, 7]])})
    tensor([[False,  True, False]])
    """
    if not isinstance(batch, Mapping):
        return None
    mask = batch.get("attention_mask")
    labels = batch.get("labels")
    mask = None if mask is None or mask.ndim != 2 else mask.bool()
    if ignore is not None and labels is not None and labels.ndim == 2:
        mask = labels != ignore if mask is None else mask & (labels != ignore)
    return mask


def _reading(module: nn.Module) -> tuple[Hashable, ...]:
    """How a layer cuts its input into rows: convolutions with other windows do not share."""
    if not isinstance(module, nn.Conv2d):
        return ()
    return module.kernel_size, module.stride, module.padding, module.dilation, module.padding_mode
