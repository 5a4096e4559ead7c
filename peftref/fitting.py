"""Training loops that several parts share: batches, an optimiser and its schedule, the choice of a learning rate.

A method whose training is part of the method has its own loop; these are recipes.

Batches in order are full but for the last of an epoch; one sample alone joins the batch before it, since BatchNorm has
no statistics of one. Streams of test images follow the same rule (:class:`peftref.data.Stream`).

>>> import torch
>>> from torch import nn
>>> x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
>>> y = (x[:, 0] > 0).long()
>>> net = nn.Linear(2, 2)
>>> losses = train(net, x, y, lr=0.1, steps=60, generator=torch.Generator().manual_seed(0))
>>> losses.shape, accuracy(predict(net, x), y) > 90
(torch.Size([60]), True)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._batching import batch_sizes
from ._checks import class_scores, finite, integer
from .data.sets import Split

__all__ = ["accuracy", "batches", "best_rate", "check_batches", "fit", "minimise", "predict", "train"]


def batches(
    split: Split, batch_size: int, *, epochs: int = 1, drop_last: bool = False, generator: torch.Generator
) -> Iterator[Split]:
    """Batches in a new random order in each epoch. One epoch is the *online* setting: every image is seen once.

    Args:
        split: inputs and labels.
        batch_size: of each batch but perhaps the last; a last sample alone joins the batch before it.
        epochs: passes over the data.
        drop_last: leave out what does not fill a batch, as long as an epoch keeps at least one.
        generator: on the CPU, of the order.

    Raises:
        ValueError: a number out of range; at the call, not when the first batch is asked for.
    """
    check_batches(batch_size, epochs)
    n = len(split.y)
    if len(split.x) != n:
        raise ValueError(f"split: expected as many images as labels, got {len(split.x)} and {n}")
    end = n - n % batch_size if drop_last and n >= batch_size else n
    sizes = batch_sizes(end, batch_size)

    def each() -> Iterator[Split]:
        for _ in range(epochs):
            for i in torch.randperm(n, generator=generator)[:end].split(sizes):
                i = i.to(split.y.device)
                yield Split(split.x[i], split.y[i])

    return each()


def check_batches(batch_size: int, epochs: int) -> None:
    """Refuse sizes that no loop can run with.

    Raises:
        ValueError: not integers of at least 1 and 0.
    """
    integer("batch_size", batch_size, 1)
    integer("epochs", epochs, 0)


def minimise(
    loss: Callable[[], Tensor], parameters: Iterable[Tensor], *, lr: float, steps: int, clip: float = 1.0
) -> Tensor:
    """Minimise by AdamW without decay, one-cycle learning rate, clipped gradients.

    Decay would pull a trained factor towards zero, where some adapters learn nothing any more.

    Args:
        loss: of a new batch at each call.
        parameters: of them, those that require a gradient.
        lr: peak of the schedule.
        steps: updates.
        clip: largest length of the gradient; infinity leaves it alone.

    Returns:
        The loss of each step, ``(steps,)``, on the CPU.

    Raises:
        ValueError: what is not positive.
    """
    _check_settings(lr, steps, clip)
    trained = [p for p in parameters if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    rise = 0.1 if steps != 10 else 0.099  # OneCycleLR divides by the length of the rise, 0.1 * steps - 1
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=rise)
    losses = []
    for _ in range(steps):
        value = loss()
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(trained, clip)
        optimizer.step()
        schedule.step()
        torch.clear_autocast_cache()  # a caller's autocast would go on using the weights of before the step
        losses.append(value.detach())
    return torch.stack(losses).cpu()  # waits for the device, once


def train(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    lr: float,
    steps: int,
    batch_size: int = 64,
    clip: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """:func:`minimise` the cross-entropy of batches drawn with replacement; the model is left in eval mode.

    Args:
        model: trained in place.
        x: inputs; batches are moved to the model's device.
        y: classes.
        lr: see :func:`minimise`.
        steps: see :func:`minimise`.
        batch_size: of each batch.
        clip: see :func:`minimise`.
        generator: of the batches; default: torch's own.

    Returns:
        The loss of each step, ``(steps,)``, on the CPU.

    Raises:
        TypeError: a model that returns no tensor.
        ValueError: numbers of inputs and classes that differ, what is not positive, batches of one for BatchNorm, or a
            model that returns other than logits ``(N, K)``; before the model is touched.
    """
    if y.ndim != 1 or not 0 < len(y) == len(x) or batch_size < 1:
        got = f"{tuple(x.shape)}, {tuple(y.shape)} and {batch_size}"
        raise ValueError(f"x, y, batch_size: expected (N, ...), (N,) and a size, none of them empty, got {got}")
    finite("x", x)
    device = next(model.parameters()).device
    _check_settings(lr, steps, clip)
    y = y.long()
    scores = _checked(model)

    def loss() -> Tensor:
        i = torch.randint(len(y), (batch_size,), generator=generator)
        return F.cross_entropy(scores(x[i].to(device)), y[i].to(device))

    model.train()
    losses = minimise(loss, model.parameters(), lr=lr, steps=steps, clip=clip)
    model.eval()
    return losses


def fit(
    model: nn.Module, x: Tensor, y: Tensor, epochs: int = 10, lr: float = 3e-3, batch_size: int = 100, seed: int = 0
) -> nn.Module:
    """Train an image network in place: cross-entropy, AdamW, one-cycle learning rate, shifts by up to two pixels.

    Args:
        model: trained in place.
        x: images ``(N, C, H, W)`` in [0, 1].
        y: classes ``(N,)``.
        epochs: passes over the images.
        lr: peak of the one-cycle schedule.
        batch_size: of each batch but perhaps the last; a last image alone joins the batch before it.
        seed: of the order of the batches and of the shifts.

    Returns:
        ``model`` in eval mode.

    Raises:
        TypeError: a model that returns no tensor.
        ValueError: no images, other labels than classes, sizes below 1, batches of one for BatchNorm, or a model that
            returns other than logits ``(N, K)``; before the model is touched.
    """
    if not y.ndim or len(x) != len(y) or len(x) == 0:
        n = len(y) if y.ndim else "one number"
        raise ValueError(f"x, y: expected equal, positive numbers of images and classes, got {len(x)} and {n}")
    if y.ndim != 1 or y.is_floating_point() or y.min() < 0:
        raise ValueError(f"y: expected integers from 0 on, (N,), got {y.dtype} {tuple(y.shape)} from {y.min()} on")
    if epochs < 1 or batch_size < 1:
        raise ValueError(f"epochs, batch_size: expected at least 1 of each, got {epochs} and {batch_size}")
    if x.ndim < 3:
        raise ValueError(f"x: expected images (N, C, H, W), got shape {tuple(x.shape)}")
    finite("x", x)
    y = y.long()
    sizes = batch_sizes(len(x), batch_size)
    scores = _checked(model)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * len(sizes))
    height, width = x.shape[-2:]
    model.train()
    for _ in range(epochs):
        for i in torch.randperm(len(x), generator=generator).split(sizes):
            dy, dx = torch.randint(-2, 3, (2,), generator=generator).tolist()
            padded = F.pad(x[i], (2, 2, 2, 2))
            batch = padded[..., 2 + dy : 2 + dy + height, 2 + dx : 2 + dx + width]
            F.cross_entropy(scores(batch), y[i]).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            torch.clear_autocast_cache()
    return model.eval()


@torch.inference_mode()
def predict(model: nn.Module, x: Tensor, batch_size: int = 1000) -> Tensor:
    """Logits of all images ``x``, batch by batch: ``(N, ...) -> (N, K)``. Uses the model in the mode it is in.

    Args:
        model: any classifier.
        x: inputs.
        batch_size: of each batch but perhaps the last; a last sample alone joins the batch before it.

    Raises:
        TypeError: a model that returns no tensor.
        ValueError: a batch size below 1, or a model that returns other than logits ``(N, K)``.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    sizes = batch_sizes(len(x), batch_size) or [0]
    found = [class_scores("model", model(batch), len(batch)) for batch in x.split(sizes)]
    torch.clear_autocast_cache()  # a caller's autocast would go on using weights cast here, without a gradient
    return torch.cat(found)


def _checked(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The model, known to return logits; where the first batch fails, modes and buffers are what they are now."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    seen = False

    def scores(x: Tensor) -> Tensor:
        nonlocal seen
        try:
            logits = class_scores("model", model(x), len(x))
        except Exception as error:
            if not seen:
                _restore(modes, buffers)
            if len(x) == 1 and "more than 1 value per channel" in str(error):
                raise ValueError("batch_size: expected at least 2 samples a batch, for BatchNorm, got 1") from error
            raise
        seen = True
        return logits

    return scores


@torch.no_grad()
def _restore(modes: list[tuple[nn.Module, bool]], buffers: list[tuple[Tensor, Tensor]]) -> None:
    for module, training in modes:
        module.training = training
    for buffer, value in buffers:
        buffer.copy_(value)


def _check_settings(lr: float, steps: int, clip: float) -> None:
    if not 0 < lr < math.inf or not isinstance(steps, int) or steps < 1 or not clip > 0:
        raise ValueError(f"lr, steps, clip: expected positive numbers, got {lr!r}, {steps!r} and {clip!r}")


def best_rate(lrs: Sequence[float], score: Callable[[float], tuple[float, ...]]) -> float:
    """The learning rate with the highest score, the first of equals; a single one is not tried.

    >>> best_rate((1e-3, 1e-2), lambda lr: (-abs(lr - 0.02),))
    0.01
    """
    if not lrs:
        raise ValueError("lrs: expected at least one, got none")
    return max(lrs, key=score) if len(lrs) > 1 else lrs[0]


def accuracy(logits: Tensor, y: Tensor) -> float:
    """Share of right answers in %, of logits ``(N, K)`` and classes ``(N,)``.

    Raises:
        ValueError: no logits, dense ones, or other numbers of logits and classes.
    """
    if not logits.numel() or logits.ndim != 2 or logits.shape[:-1] != y.shape:
        raise ValueError(f"logits, y: expected (N, K) and (N,), got {tuple(logits.shape)} and {tuple(y.shape)}")
    return 100 * (logits.argmax(-1) == y).double().mean().item()
