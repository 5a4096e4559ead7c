"""Add a patch to weights: to a state dict for good, or to a live model until it is switched off again.

A patch maps some of a model's tensor names to what to add there (eq-rws-patch). It is usually much smaller than the
model, and that is all that switching it on or off costs: a copy and an addition of the tensors it names.

>>> import torch
>>> from torch import nn
>>> apply({"w": torch.ones(2), "v": torch.ones(1)}, {"w": torch.tensor([0.5, -0.5])})
{'w': tensor([1.5000, 0.5000]), 'v': tensor([1.])}
>>> net = nn.Linear(1, 2)
>>> before = net.bias.clone()
>>> with Patched(net, {"bias": torch.ones(2)}) as patched:
...     print(net.bias - before)
...     _ = patched.on(0.5)
...     print(net.bias - before)
tensor([1., 1.], grad_fn=<SubBackward0>)
tensor([0.5000, 0.5000], grad_fn=<SubBackward0>)
>>> torch.equal(net.bias, before)
True
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor, nn

from ..._checks import number
from .aligned import State, check_states, check_tensors, layout_of, memory_of
from .loop import upcast

__all__ = ["Patched", "apply"]


@torch.no_grad()
def apply(host: State, patch: State) -> dict[str, Tensor]:
    """The host's state dict with ``patch`` added (eq-rws-patch): a new one that shares no memory with its inputs.

    The sum is taken in float32 or wider and rounded once, to the host's type. Tensors that are tied in the host are
    patched once and stay tied: theta_h + patch, tensor by tensor.

    Args:
        host: a state dict; not changed.
        patch: of :func:`~peftref.merging.rws.compose`, or a signature as it is.

    Raises:
        TypeError: something is no state dict.
        ValueError: the host lacks a tensor of the patch, or has it in another shape or as integers.
    """
    check_states(host=host, patch=patch)
    check_tensors(patch, patch=patch, host=host)
    copies: dict[tuple[Hashable, ...], Tensor] = {}
    result = {}
    for name, place in layout_of(host).items():
        key = memory_of(place)
        if key not in copies:
            copies[key] = host[name].detach().clone()
        result[name] = copies[key]
    _add(*_once(result, patch))
    return result


class Patched:
    """Switches a patch on a live model on and off (eq-rws-patch), in place; ``off`` restores every bit.

    What a patch touches is put aside meanwhile, in memory for as many numbers as the patch has; the rest of the model
    is not copied. Entering it as a context manager switches it on, leaving switches it off. Whatever else changes the
    patched tensors meanwhile is undone too, so do not train them, and switch off a second patch before the first; to
    have several on together, :func:`~peftref.merging.rws.compose` them.

    Args:
        model: any module; only the tensors named in the patch change.
        patch: of :func:`~peftref.merging.rws.compose`, or a signature as it is.

    Attributes:
        strength: at which the patch is on; 0 when it is off.

    Raises:
        TypeError: no module, or no state dict.
        ValueError: the model lacks a tensor of the patch, or has it in another shape or as integers.
    """

    def __init__(self, model: nn.Module, patch: State) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        tensors |= model.named_buffers(remove_duplicate=False)
        check_states(patch=patch)
        check_tensors(patch, patch=patch, model=tensors)
        self._tensors, self._patch = _once(tensors, patch)
        self._model = model
        self._names = {name: tensors[name] for name in patch}
        self._stash = [torch.empty_like(t, requires_grad=False) for t in self._tensors]
        self.strength = 0.0

    @torch.no_grad()
    def on(self, strength: float = 1.0) -> Patched:
        """Add ``strength`` times the patch to the model as it was before: calling it again replaces the strength.

        Raises:
            ValueError: a strength that is not finite.
            RuntimeError: the model has other tensors than before (``load_state_dict(..., assign=True)``).
        """
        number("strength", strength)
        now: dict[str, Tensor] = dict(self._model.named_parameters(remove_duplicate=False))
        now |= self._model.named_buffers(remove_duplicate=False)
        replaced = [name for name, tensor in self._names.items() if now.get(name) is not tensor]
        if replaced:
            raise RuntimeError(f"model: expected the tensors it had, got others for {', '.join(replaced)}")
        self.off()
        if strength and self._tensors:
            torch._foreach_copy_(self._stash, self._tensors)
            _add(self._tensors, self._patch, strength)  # a half-precision weight: summed in float32, rounded once
        self.strength = float(strength)
        return self

    @torch.no_grad()
    def off(self) -> Patched:
        """Put back what was there before, bit for bit."""
        if self.strength and self._tensors:
            torch._foreach_copy_(self._tensors, self._stash)
        self.strength = 0.0
        return self

    def __enter__(self) -> Patched:
        return self if self.strength else self.on()

    def __exit__(self, *error: object) -> None:
        self.off()


def _add(tensors: list[Tensor], patch: list[Tensor], alpha: float = 1.0) -> None:
    if tensors:
        torch._foreach_add_(tensors, patch, alpha=alpha)


def _once(tensors: State, patch: State) -> tuple[list[Tensor], list[Tensor]]:
    """Tensors and what to add to each; tensors that share memory count once, or the patch would act twice."""
    found: dict[tuple[Hashable, ...], tuple[str, Tensor, Tensor]] = {}
    for name in patch:
        t = tensors[name]
        p = upcast(patch[name]).to(tensors[name].device)
        tied, _, same = found.setdefault(memory_of(t), (name, t, p))
        if same is not p and not torch.equal(same, p):
            raise ValueError(f"patch: expected one value for {tied} and {name}, which share memory, got two")
    return [t for _, t, _ in found.values()], [p for _, _, p in found.values()]
