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
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .layers import view

__all__ = ["input_rows", "record_inputs", "run", "shared_inputs", "token_mask"]

DECODER = ("decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds")  # then labels are the decoder's


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
        with torch.no_grad(), _uncompiled(model):
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

    None, for all, if the batch is no dictionary with an ``attention_mask`` or ``labels`` of one value per token. Labels
    are of tokens if they are integers in the shape of the attention mask, or where there is none of another tensor,
    such as ``input_ids``; the labels of an encoder-decoder model are of other tokens, and those of pictures and texts
    with several labels each, ``(N, K)``, of none. With ``functools.partial(token_mask, ignore=None)`` labels do not
    matter.

    >>> token_mask({"attention_mask": torch.tensor([[1, 1, 0]]), "labels": torch.tensor([[-100, 7, 7]])})
    tensor([[False,  True, False]])
    >>> token_mask({"attention_mask": torch.tensor([[1, 1, 0]]), "labels": torch.tensor([[7, 7]])})  # a translation
    tensor([[ True,  True, False]])
    """
    if not isinstance(batch, Mapping):
        return None
    mask = _values(batch, "attention_mask")
    labels = None if ignore is None or any(key in batch for key in DECODER) else _values(batch, "labels")
    others = [t for key, t in batch.items() if isinstance(t, Tensor) and key != "labels"] if mask is None else [mask]
    if labels is None or labels.is_floating_point() or (others and not any(_one_each(labels, t) for t in others)):
        return None if mask is None else mask.bool()
    labelled = labels != torch.as_tensor(ignore)
    return labelled if mask is None else mask.bool() & labelled


@contextmanager
def masks_of(
    model: nn.Module, layers: Mapping[str, nn.Module], batch: Any, mask: Callable[[Any], Tensor | None] | None
) -> Iterator[Callable[[str, Tensor], Tensor | None]]:
    """A function from a layer's name and input to the mask of this input, for one pass within the block.

    It is ``mask(batch)`` for all layers. But with :func:`token_mask`, or a ``partial`` of it, and an encoder-decoder
    model of transformers, the encoder's tokens, which the decoder's cross-attention reads too, count by
    ``attention_mask``, and the decoder's by ``decoder_attention_mask`` and where a label is not -100.

    Args:
        model: runs within the block, without wrappers.
        layers: name -> layer whose inputs are asked for.
        batch: the model's.
        mask: as in :func:`~peftref.adapters.eva.collect`.
    """
    both = getattr(getattr(model, "config", None), "is_encoder_decoder", False) and isinstance(batch, Mapping)
    if getattr(mask, "func", mask) is not token_mask or not both:
        common = None if mask is None else mask(batch)
        yield lambda name, x: common
        return
    whole: Any = model
    decoder: nn.Module = whole.get_decoder()
    behind = {id(m) for m in (*decoder.modules(), whole.get_output_embeddings())}
    encoded: list[Tensor] = []  # what the decoder is told of the encoder
    assert mask is not None
    of_encoder = mask({key: value for key, value in batch.items() if key != "labels"})
    attended = _values(batch, "decoder_attention_mask")
    of_decoder = mask({"attention_mask": attended, "labels": batch.get("labels")})

    def listen(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        encoded[:] = [kwargs["encoder_hidden_states"]] if kwargs.get("encoder_hidden_states") is not None else []

    def mask_for(name: str, x: Tensor) -> Tensor | None:
        own = id(layers[name]) in behind and all(x is not states for states in encoded)
        return of_decoder if own else of_encoder

    hook = decoder.register_forward_pre_hook(listen, with_kwargs=True)
    try:
        yield mask_for
    finally:
        hook.remove()


def _values(batch: Mapping[str, Any], key: str) -> Tensor | None:
    """One value for each token, if the batch has such."""
    found = batch.get(key)
    return found if isinstance(found, Tensor) and found.ndim == 2 else None


def _one_each(labels: Tensor, t: Tensor) -> bool:
    """Whether there is a label for each token of ``t``: numbers, a mask, or vectors."""
    tokens = t.ndim == 3 or (t.ndim == 2 and not t.is_floating_point())
    return tokens and t.shape[:2] == labels.shape


def _uncompiled(model: nn.Module) -> AbstractContextManager[object]:
    """What is compiled inside the model runs as it was written, or its hooks would not be seen."""
    compiled = any("_orig_mod" in m._modules or m._compiled_call_impl is not None for m in model.modules())
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


def _reading(module: nn.Module) -> tuple[Hashable, ...]:
    """How a layer cuts its input into rows: convolutions with other windows do not share."""
    if not isinstance(module, nn.Conv2d):
        return ()
    return module.kernel_size, module.stride, module.padding, module.dilation, module.padding_mode
