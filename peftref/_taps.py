"""The features that reach a model's head while the model itself runs, with its own ``forward`` and all hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def has_head(model: nn.Module) -> bool:
    """Whether a module of the model speaks timm's protocol."""
    return bool(_timm_like(model))


def features_of(model: Any, x: Tensor) -> Any:
    """What the model's forward hands to the classifier at its end, timm's ``pre_logits``; its output if it has none.

    The model itself runs, with its hooks and a forward of its own; only the classifier does not. One without a forward
    has its two halves called.

    Raises:
        ValueError: a model with timm's ``forward_head`` that its forward does not call.
    """
    found = _timm_like(model)
    if not found:
        return model(x)
    if type(model).forward is nn.Module.forward and "forward" not in vars(model):
        return model.forward_head(model.forward_features(x), pre_logits=True)
    seen: list[Any] = []

    def instead(whole: Callable[..., Any]) -> Callable[..., Any]:
        def forward_head(h: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append(whole(h, pre_logits=True))
            return seen[-1]

        return forward_head

    release = _replace_heads(found, instead)
    try:
        model(x)
    finally:
        release()
    if not seen:
        raise ValueError(f"model: expected a forward that calls forward_head, got a {type(model).__name__}")
    return seen[-1]


@contextmanager
def tapped(model: nn.Module, head: str | None) -> Iterator[Callable[[int], Tensor]]:
    """Within, a pass of ``model`` is watched; afterwards what is given tells the features of its ``n`` samples.

    Args:
        model: left as it was found.
        head: name of the layer whose input are the features; None for timm's ``forward_head``, whose ``pre_logits``
            they are.
    """
    seen: list[Callable[[], Any]] = []
    release = _on_heads(model, seen) if head is None else _on_layer(model.get_submodule(head), seen)

    def features(n: int) -> Tensor:
        if not seen:
            raise ValueError(f"head: expected a layer that the model's forward calls, got {head!r}, which it does not")
        found = seen[0]()
        if not isinstance(found, Tensor) or not found.is_floating_point() or found.ndim < 2 or len(found) != n:
            got = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"head: expected a layer that gets features ({n}, ...), got {head!r} with {got}")
        return found

    try:
        yield features
    finally:
        release()


def _on_layer(layer: nn.Module, seen: list[Callable[[], Any]]) -> Callable[[], None]:
    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        value = next(iter((*args, *kwargs.values())), None)
        value = value.clone() if isinstance(value, Tensor) else value  # the layer may work in place
        seen.insert(0, lambda: value)  # of several calls the last counts

    return layer.register_forward_pre_hook(note, with_kwargs=True).remove


def _on_heads(model: nn.Module, seen: list[Callable[[], Any]]) -> Callable[[], None]:
    """The outermost ``forward_head`` that is called counts: one inside a wrapper serves as well."""

    def watched(whole: Callable[..., Any]) -> Callable[..., Any]:
        def forward_head(h: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append(lambda: whole(h, pre_logits=True))
            return whole(h, *args, **kwargs)

        return forward_head

    return _replace_heads(_timm_like(model), watched)


def _replace_heads(found: list[Any], other: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Callable[[], None]:
    """Put another ``forward_head`` on each of these modules; what is returned puts things right again."""
    own = {module: module.__dict__["forward_head"] for module in found if "forward_head" in module.__dict__}

    def release() -> None:
        for module in found:
            del module.__dict__["forward_head"]
        for module, whole in own.items():
            module.__dict__["forward_head"] = whole

    for module in found:
        module.__dict__["forward_head"] = other(module.forward_head)
    return release


def _timm_like(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if hasattr(m, "forward_features") and hasattr(m, "forward_head")]
