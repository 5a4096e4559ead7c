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
from ..._wrapped import plain_name
from .aligned import State, check_dense, check_finite, check_states, check_tensors, layout_of, memory_of
from .loop import upcast
from .storing import all_finite, limit

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
        ValueError: the host lacks a tensor of the patch, or has it in another shape or as integers; a patch that is not
            finite; a sum that the host's type cannot hold.
    """
    check_states(host=host, patch=patch)
    check_dense(host=host)
    check_tensors(patch, patch=patch, host=host)
    check_finite("patch", patch)
    copies: dict[tuple[Hashable, ...], Tensor] = {}
    result = {}
    for name, place in layout_of(host).items():
        key = memory_of(place)
        if key not in copies:
            copies[key] = host[name].detach().clone()
        result[name] = copies[key]
    names, tensors, patches = _once(result, patch)
    _add(tensors, patches)
    _check_sums(names, tensors, patches, [host[name] for name in names])
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
        ValueError: the model lacks a tensor of the patch, or has it in another shape or as integers; a patch that is
            not finite.
    """

    def __init__(self, model: nn.Module, patch: State) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        held = _held(model)
        tensors = {plain_name(model, name): tensor for name, tensor in held.items()} | held
        check_states(patch=patch)
        check_tensors(patch, patch=patch, model=tensors)
        check_finite("patch", patch)
        self._labels, self._tensors, self._patch = _once(tensors, patch)
        self._model = model
        self._names = {name: t for name, t in held.items() if any(t is patched for patched in self._tensors)}
        self._stash = [torch.empty_like(t, requires_grad=False) for t in self._tensors]
        self.strength = 0.0

    @torch.no_grad()
    def on(self, strength: float = 1.0) -> Patched:
        """Add ``strength`` times the patch to the model as it was before: calling it again replaces the strength.

        Raises:
            ValueError: a strength that is not finite, or with which a sum is more than a weight's type can hold; the
                strength stays as it was.
            RuntimeError: the model has other tensors than before (``load_state_dict(..., assign=True)``).
        """
        strength = number("strength", strength)
        self._refuse_others()
        before = self.strength
        try:
            self._switch(strength)
        except ValueError:
            self._switch(before)
            raise
        return self

    def _refuse_others(self) -> None:
        now = _held(self._model)
        replaced = [name for name, tensor in self._names.items() if now.get(name) is not tensor]
        if replaced:
            raise RuntimeError(f"model: expected the tensors it had, got others for {', '.join(replaced)}")

    def _switch(self, strength: float) -> None:
        self.off()
        self.strength = strength
        if strength and self._tensors:
            torch._foreach_copy_(self._stash, self._tensors)
            _add(self._tensors, self._patch, strength)  # a half-precision weight: summed in float32, rounded once
            _check_sums(self._labels, self._tensors, self._patch, self._stash, strength)

    @torch.no_grad()
    def off(self) -> Patched:
        """Put back what was there before, bit for bit.

        Raises:
            RuntimeError: the model has other tensors than before, as after ``double()``, which replaces buffers.
        """
        if self.strength and self._tensors:
            self._refuse_others()
            torch._foreach_copy_(self._tensors, self._stash)
        self.strength = 0.0
        return self

    def __enter__(self) -> Patched:
        return self if self.strength else self.on()

    def __exit__(self, *error: object) -> None:
        self.off()


def _held(model: nn.Module) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    return tensors | dict(model.named_buffers(remove_duplicate=False))


def _add(tensors: list[Tensor], patch: list[Tensor], alpha: float = 1.0) -> None:
    tiny = {i for i, t in enumerate(tensors) if t.dtype.itemsize == 1}  # float8, in which torch does not add
    for i in tiny:
        tensors[i].copy_(upcast(tensors[i]).add(patch[i], alpha=alpha))
    pairs = [(t, p) for i, (t, p) in enumerate(zip(tensors, patch, strict=True)) if i not in tiny]
    if pairs:
        torch._foreach_add_([t for t, _ in pairs], [p for _, p in pairs], alpha=alpha)


def _check_sums(
    names: list[str], sums: list[Tensor], patch: list[Tensor], before: list[Tensor], alpha: float = 1.0
) -> None:
    """Refuse sums that became infinite, or, in float8, that stopped at the largest number.

    Raises:
        ValueError: there are some; the message names the tensors.
    """
    broken = []
    for name, y, p, w in zip(names, sums, patch, before, strict=True):
        if y.dtype.itemsize > 1 and (not y.numel() or all_finite(y)):
            continue
        exact = upcast(w).to(p).add(p, alpha=alpha).abs()
        if (upcast(w).isfinite() & ~((exact <= limit(y.dtype)) & upcast(y).isfinite())).any():
            broken.append(f"{name} ({y.dtype})")
    if broken:
        raise ValueError(
            f"patch: expected sums that the weights' types can hold, got larger ones in {', '.join(broken)}"
        )


def _once(tensors: State, patch: State) -> tuple[list[str], list[Tensor], list[Tensor]]:
    """Names, tensors and what to add to each; tensors that share memory count once, or the patch would act twice."""
    found: dict[tuple[Hashable, ...], tuple[str, Tensor, Tensor]] = {}
    for name in patch:
        t = tensors[name]
        p = upcast(patch[name]).to(tensors[name].device)
        tied, _, same = found.setdefault(memory_of(t), (name, t, p))
        if same is not p and not torch.equal(same, p):
            raise ValueError(f"patch: expected one value for {tied} and {name}, which share memory, got two")
    return [n for n, _, _ in found.values()], [t for _, t, _ in found.values()], [p for _, _, p in found.values()]
