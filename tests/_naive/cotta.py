"""The naive twin of CoTTA: the schedule of the published CIFAR code, written from a description of it.

All 32 augmented passes and the plain teacher pass run for every batch, whether or not their result is used; anchor and
source weights are two copies; average and restoration go tensor by tensor, each with a mask of its own. Views and
uniform draws come from outside, so that twin and module can see the same ones. The benchmark's peer.

``loop_*`` are the formulas on Python lists, one number at a time.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
import torchvision.transforms.functional as T
from torch import Tensor, nn

from peftref.tta.core.views import View

Uniform = Callable[[torch.Size], Tensor]


# --- the specification ------------------------------------------------------------------------------------------------
def loop_softmax(z: list[float]) -> list[float]:
    e = [math.exp(v - max(z)) for v in z]
    return [v / sum(e) for v in e]


def loop_consistency(student: list[list[float]], target: list[list[float]], symmetric: bool) -> float:
    total = 0.0
    for z, t in zip(student, target, strict=True):
        p, q = loop_softmax(z), loop_softmax(t)
        forward = -sum(b * math.log(a) for a, b in zip(p, q, strict=True))
        backward = -sum(a * math.log(b) for a, b in zip(p, q, strict=True))
        total += 0.5 * forward + 0.5 * backward if symmetric else forward
    return total / len(student)


def loop_confidence(logits: list[list[float]]) -> float:
    return sum(max(loop_softmax(z)) for z in logits) / len(logits)


# --- the published schedule -------------------------------------------------------------------------------------------
def published_configure(model: nn.Module) -> nn.Module:
    """Batch statistics for every BatchNorm2d, everything trainable."""
    model = copy.deepcopy(model).train().requires_grad_(True)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.track_running_stats = False
            m.running_mean, m.running_var = None, None
    return model


def published_ema(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    for ours, new in zip(teacher.parameters(), student.parameters(), strict=True):
        ours.data[:] = momentum * ours.data + (1 - momentum) * new.data


def published_restore(model: nn.Module, source: dict[str, Tensor], p: float, uniform: Uniform) -> None:
    for prefix, module in model.named_modules():
        for name, tensor in module.named_parameters(recurse=False):
            if name in ("weight", "bias"):
                mask = (uniform(tensor.shape) < p).to(tensor.dtype)
                with torch.no_grad():
                    tensor.data = source[f"{prefix}.{name}"] * mask + tensor * (1 - mask)


class PublishedCoTTA:
    """``step(x)`` returns the teacher's logits and adapts."""

    def __init__(
        self,
        model: nn.Module,
        views: Callable[[Tensor], Tensor],
        uniform: Uniform,
        lr: float = 1e-3,
        momentum: float = 0.999,
        restore_p: float = 0.01,
        threshold: float = 0.92,
        n_views: int = 32,
        symmetric: bool = False,
        steps: int = 1,
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
    ) -> None:
        self.student = published_configure(model)
        self.source = copy.deepcopy(self.student.state_dict())
        self.anchor = copy.deepcopy(self.student)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.optimizer = optimizer(list(self.student.parameters()), lr=lr)
        self.views, self.uniform = views, uniform
        self.momentum, self.restore_p, self.threshold = momentum, restore_p, threshold
        self.n_views, self.symmetric, self.steps = n_views, symmetric, steps
        self.augmented: list[bool] = []

    def step(self, x: Tensor) -> Tensor:
        for _ in range(self.steps):
            answer = self._step(x)
        return answer

    def _step(self, x: Tensor) -> Tensor:
        student = self.student(x)
        confidence = F.softmax(self.anchor(x), dim=1).max(1)[0].mean(0)
        plain = self.teacher(x)
        outputs = []
        for _ in range(self.n_views):
            outputs.append(self.teacher(self.views(x)).detach())
        self.augmented.append(bool(confidence < self.threshold))
        target = torch.stack(outputs).mean(0) if self.augmented[-1] else plain
        loss = (-(target.softmax(1) * student.log_softmax(1)).sum(1)).mean(0)
        if self.symmetric:
            reverse = (-(student.softmax(1) * target.log_softmax(1)).sum(1)).mean(0)
            loss = 0.5 * loss + 0.5 * reverse
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        published_ema(self.teacher, self.student, self.momentum)
        published_restore(self.student, self.source, self.restore_p, self.uniform)
        return target.detach()


def published_view(x: Tensor, view: View) -> Tensor:
    """One view as published: the padded image goes through torchvision's functions, and is cropped at the end."""
    h, w = x.shape[-2:]
    x = x.clamp(0, 1)
    jitter = (
        lambda x: T.adjust_brightness(x, view.brightness),
        lambda x: T.adjust_contrast(x, view.contrast),
        lambda x: T.adjust_saturation(x, view.saturation),
        lambda x: T.adjust_hue(x, view.hue),
        lambda x: T.adjust_gamma(x.clamp(1e-8, 1), view.gamma),
    )
    for i in view.order:
        x = jitter[i](x)
    x = F.pad(x, (w // 2, w // 2, h // 2, h // 2), mode="replicate")
    x = T.affine(x, view.angle, list(view.shift), view.scale, [0.0, 0.0], interpolation=T.InterpolationMode.BILINEAR)
    x = T.gaussian_blur(x, [5, 5], [view.sigma, view.sigma])
    x = T.center_crop(x, [h, w])
    if view.flip:
        x = x.flip(-1)
    if view.noise is not None:
        generator = torch.Generator(x.device).manual_seed(view.noise)
        x = x + 0.005 * torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    return x.clamp(0, 1)
