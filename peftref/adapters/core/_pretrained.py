"""What transformers' own methods would do to a model with adapters, and must not.

>>> from torch import nn
>>> class Model(nn.Module):
...     def __init__(self):
...         super().__init__()
...         self.lm_head = nn.Linear(2, 5)
...     def get_output_embeddings(self):
...         return self.lm_head
...     def resize_token_embeddings(self, n):
...         return n
>>> from peftref.adapters.core.injection import inject, unload
>>> from peftref.adapters.baselines.lora import LoRA
>>> net = Model()
>>> inject(net, LoRA, ["lm_head"], r=2)
['lm_head']
>>> net.resize_token_embeddings(7)
Traceback (most recent call last):
RuntimeError: model: expected an output layer without adapters to resize, got one with adapters of its size; ...
>>> unload(net)
>>> net.resize_token_embeddings(7)
7
"""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn

from .host import Host

__all__ = ["protect"]

RESIZE = "resize_token_embeddings"


def protect(model: nn.Module) -> None:
    """Keep transformers from drawing adapters anew, and from replacing an output layer together with its adapters."""
    for module in list(model.modules()):
        if isinstance(module, Host):
            for part in (module, *module.adapters.modules()):
                part._is_hf_initialized = True  # type: ignore[assignment] # or init_weights would draw its matrices
        if hasattr(type(module), RESIZE):
            vars(module).pop(RESIZE, None)
            if isinstance(_output_layer(module), Host):
                vars(module)[RESIZE] = _refuse_to_resize


def _output_layer(module: Any) -> object:
    try:
        return module.get_output_embeddings()
    except (AttributeError, NotImplementedError):  # a body without a head
        return None


def _refuse_to_resize(*args: object, **kwargs: object) -> NoReturn:
    raise RuntimeError(
        "model: expected an output layer without adapters to resize, got one with adapters of its size; resize before "
        "they are put in, or after they are unloaded"
    )
