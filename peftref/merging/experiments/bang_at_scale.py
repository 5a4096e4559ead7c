r"""WiSE-FT and BANG with a large backbone: what the guarded cell of the chapter runs.

:math:`\theta_0` is a pre-trained backbone *with a linear probe as its head*. That is essential: were the head new in
:math:`\theta_1` and random in :math:`\theta_0`, interpolating the two would interpolate with noise. From there the
whole network is fine-tuned once with each loss, and every point of the lines :math:`(1-\alpha)\theta_0+\alpha\theta_1`
is evaluated on clean and on corrupted test images; all losses start from the same network and see the same batches.
(Meant for networks without BatchNorm. The running statistics of an average are not the average of running statistics:
see :mod:`peftref.merging.core.batchnorm`.)

>>> from peftref.data import load
>>> from peftref.models import SmallCNN
>>> digits, losses = load("mnist5k"), {"plain": (0.0, None), "BANG": (0.1, 0.5)}
>>> with torch.random.fork_rng():
...     model = SmallCNN().eval()
>>> table = run_at_scale(model, digits, ["contrast"], losses, alphas=[0, 1], limit=200, test_limit=50, device="cpu")
>>> table.index.tolist()
[('plain', 0), ('plain', 1), ('BANG', 0), ('BANG', 1)]
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...data import Dataset, Split
from ...data.domains import domain_names, generator_for, shift
from ...fitting import predict
from ..bang import confidence, fine_tune, outcomes
from ..baselines.arithmetic import wise_ft
from ..core.loop import merge

__all__ = ["Upsampled", "linear_probe", "run_at_scale"]

EVAL = 250  # images per forward pass when nothing is learned
TENTHS = tuple(i / 10 for i in range(11))
COLUMNS = ["in distribution (%)", "shifted (%)", "both wrong, average right (%)", "confidence under the shift (%)"]


class Upsampled(nn.Module):
    """A classifier of ``size`` x ``size`` images that takes smaller ones: small sets stay small in memory."""

    def __init__(self, model: nn.Module, size: int) -> None:
        super().__init__()
        self.model: Any = model  # speaks timm's protocol, of which nn.Module says nothing
        self.size = size

    def forward_features(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True)
        h: Tensor = self.model.forward_features(x)
        return h

    def forward_head(self, h: Tensor, pre_logits: bool = False) -> Tensor:
        h = self.model.forward_head(h, pre_logits=pre_logits)
        return h

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def linear_probe(
    model: nn.Module, x: Tensor, y: Tensor, *, decay: float = 1e-4, iterations: int = 100, batch_size: int = EVAL
) -> nn.Module:
    """A copy of ``model`` whose head is the logistic regression on its frozen features: the common start of WiSE-FT.

    Args:
        model: a classifier with timm's ``forward_features`` and ``forward_head`` that ends in an ``nn.Linear``.
        x: images.
        y: their classes.
        decay: ridge penalty on the weights (ours: just enough for a finite solution).
        iterations: of L-BFGS, on all images at once.
        batch_size: images per forward pass.

    Raises:
        ValueError: the last linear layer is not the head, or has fewer outputs than there are classes.
    """
    model = copy.deepcopy(model).eval()
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    timm: Any = model  # has methods of which nn.Module says nothing
    with torch.no_grad():
        h = torch.cat([timm.forward_head(timm.forward_features(b), pre_logits=True) for b in x.split(batch_size)])
        fits = bool(linear) and h.shape[1:] == (linear[-1].in_features,)
        if not fits or not torch.allclose(linear[-1](h[:2]), model(x[:2]), rtol=1e-3, atol=1e-3):
            raise ValueError("model: expected a classifier that ends in an nn.Linear on its pooled features")
    head = linear[-1]
    if int(y.max()) >= head.out_features:
        raise ValueError(f"model: expected at least {int(y.max()) + 1} outputs, got {head.out_features}")
    center = h.mean(0)
    spread = h.std(0) + 1e-6  # the regression runs on standardised features, and is folded back
    weight = torch.zeros_like(head.weight, requires_grad=True)
    bias = torch.zeros(head.out_features, device=h.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=iterations, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy((h - center) / spread @ weight.T + bias, y) + decay * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        head.weight.copy_(weight / spread)
        head.bias.copy_(bias - (weight / spread) @ center)
    return model


def run_at_scale(
    model: nn.Module,
    data: Dataset,
    domains: Sequence[str],
    losses: Mapping[str, tuple[float, float | None]],
    *,
    alphas: Sequence[float] = TENTHS,
    severity: int = 5,
    size: int | None = None,
    limit: int | None = None,
    test_limit: int = 2000,
    epochs: int = 5,
    lr: float = 3e-5,
    batch_size: int = 128,
    weight_decay: float = 0.1,
    device: torch.device | str | None = None,
    seed: int = 0,
    table: str = "cifar",
) -> pd.DataFrame:
    """Probe, fine-tune with each loss, interpolate, evaluate.

    Args:
        model: pre-trained, with as many outputs as the data has classes; its head is replaced by a linear probe.
        data: for example ``load("cifar10", root)``.
        domains: corruptions of the test images, of ``peftref.data.CORRUPTIONS``.
        losses: name -> (smoothing, mixing) of :func:`peftref.merging.bang.fine_tune`.
        alphas: points of the line to evaluate.
        severity: of the corruptions, 1 to 5.
        size: side in pixels to which images are enlarged inside the model; default: as they are.
        limit: training images (all).
        test_limit: test images, of each domain.
        epochs: of fine-tuning.
        lr: learning rate of AdamW (3e-5: what is usual for CLIP ViT-B).
        batch_size: images in a batch.
        weight_decay: of AdamW (0.1: what is usual for CLIP ViT-B).
        device: default: a GPU if there is one.
        seed: of the choice of images, the order of the batches, Mixup and the corruptions.
        table: severity constants, as of :func:`peftref.data.corruptions.corrupt`.

    Returns:
        One row per loss and alpha; ``attrs["protocol"]`` says what was run, for the results file.
    """
    names = domain_names(domains)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    train, test = (_some(s, n, seed, device) for s, n in ((data.train, limit), (data.test, test_limit)))
    start = linear_probe((Upsampled(model, size) if size else model).to(device), *train)
    shifted = torch.cat(
        [shift(test.x, name, severity, generator_for(name, severity, seed, 0), table) for name in names]
    )
    labels = test.y.repeat(len(names))
    rows = {}
    between = copy.deepcopy(start)
    for loss, (smoothing, mixing) in losses.items():
        tuned = fine_tune(
            start,
            *train,
            smoothing,
            mixing,
            epochs=epochs,
            lr=lr,
            batch_size=batch_size,
            weight_decay=weight_decay,
            seed=seed,
        )
        ends = [predict(m, shifted, EVAL).argmax(-1) for m in (start, tuned)]
        for alpha in alphas:
            between.load_state_dict(merge(start.state_dict(), [tuned.state_dict()], wise_ft(alpha)))
            logits = predict(between, shifted, EVAL)
            fft = outcomes(labels, ends[0], ends[1], logits.argmax(-1))["fraction"]["FFT"]
            clean = (predict(between, test.x, EVAL).argmax(-1) == test.y).double().mean().item()
            right = (logits.argmax(-1) == labels).double().mean().item()
            rows[loss, alpha] = [100 * v for v in (clean, right, fft, confidence(logits.softmax(-1)))]
    found = pd.DataFrame(rows, index=COLUMNS).T.rename_axis(["loss", "alpha"])
    found.attrs["protocol"] = {
        "data": data.name,
        "sha256": data.sha256,
        "train": len(train.y),
        "test": len(test.y),
        "domains": list(names),
        "severity": severity,
        "epochs": epochs,
        "lr": lr,
        "batch_size": batch_size,
        "weight_decay": weight_decay,
        "size": size,
        "losses": dict(losses),
        "seed": seed,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }
    return found


def _some(split: Split, limit: int | None, seed: int, device: torch.device) -> Split:
    """``limit`` images at random, on the device."""
    rows = torch.randperm(len(split.y), generator=torch.Generator().manual_seed(seed))[:limit]
    return Split(split.x[rows].to(device), split.y[rows].to(device))
