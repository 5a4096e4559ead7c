r"""Robust weight signatures with large backbones: what the guarded cell of their chapter runs.

One pretrained network is fine-tuned on clean images and, once per corruption, on corrupted ones, all from the same
start and with the same order of batches; then signatures of the first K layers are added to the clean network. The
recipe is the official one (SGD with momentum 0.9, weight decay 5e-4, a tenth of the learning rate after 40 and 80 % of
the epochs, random crops and flips), except that all training images are used, and the last checkpoint instead of the
best on held-out images. Training images are corrupted once, beforehand, and kept in 8 bits.

>>> from peftref.data import load
>>> from peftref.models import PlainCNN
>>> small = load("digits")
>>> table = run_at_scale(PlainCNN(width=2), small, ["contrast"], [1], severity=1, epochs=1, device="cpu")
>>> list(table.index.get_level_values("network")), list(table.columns)
(['clean', 'signature, K = 1', 'difference, K = 1', 'robust'], ['clean', 'corrupted'])
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...at_scale import shifted_crop
from ...data import Dataset, Split
from ...data.domains import domain_names, generator_for, shift
from ...models.cnn import Normalised, from_timm
from ..core.aligned import State
from ..core.batchnorm import batchnorms
from ..core.patching import apply
from ..core.units import first, units
from ..rws import average_batchnorm, blend_statistics, compose, signature

__all__ = ["cifar_start", "run_at_scale", "tune"]

BLOCK = 500  # images corrupted, or predicted, at a time
RATE = 0.01
BATCH = 128  # official configuration


def cifar_start(tag: str, num_classes: int = 10, pretrained: bool = True) -> Normalised:
    """A network of ``timm`` with a new head; of a VGG only the convolutions are kept, as in the official code.

    Args:
        tag: full tag, architecture and weights (``"vgg16.tv_in1k"``, ``"resnet50.a1_in1k"``).
        num_classes: of the new head.
        pretrained: let timm download the weights.
    """
    net = from_timm(tag, pretrained=pretrained, num_classes=num_classes)
    if isinstance(getattr(net.model, "pre_logits", None), nn.Module):  # two layers of 4,096, made for 224 pixels
        net.model.pre_logits = nn.Identity()
        net.model.head.fc = nn.Linear(net.model.num_features, num_classes)
    return net


def run_at_scale(
    model: nn.Module,
    data: Dataset,
    domains: Sequence[str],
    depths: Sequence[int],
    *,
    severity: int = 5,
    strength: float = 1.0,
    epochs: int = 50,
    device: torch.device | str | None = None,
    seed: int = 0,
    table: str = "cifar",
) -> pd.DataFrame:
    """Clean and corrupted accuracy in % of the clean, the patched and the robust network, for each corruption.

    Args:
        model: the pretrained start with a new head, for images in [0, 1]; not changed.
        data: training and test images.
        domains: names of corruptions.
        depths: values of K, the number of patched layers.
        severity: of training and test images (5: paper).
        strength: of every patch (1: official code); in a network with BatchNorm also of its statistics, so at most 1.
        epochs: of each fine-tuning (50: official code).
        device: default: a GPU if there is one.
        seed: of batches, crops and corruptions.
        table: severity constants, see :func:`peftref.data.corrupt`.

    Returns:
        One row per corruption and network; ``attrs["protocol"]`` says what was run, for the results file.
    """
    names = domain_names(domains)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    start = copy.deepcopy(model).to(device)
    theta_0 = _weights(start)
    layers = units(start)
    clean = tune(start, data.train, epochs, seed=seed)
    train = data.train
    theta_s = _weights(clean)
    test = data.test
    rows: dict[tuple[str, str], dict[str, float]] = {}

    def note(domain: str, name: str, net: nn.Module, seen: Split) -> None:
        rows[domain, name] = {"clean": _accuracy(net, test), "corrupted": _accuracy(net, seen)}

    for domain in names:
        seen, learned = (
            _see(data_part, domain, severity, f"{part} {seed}", table, device)
            for part, data_part in (("test", test), ("train", train))
        )
        robust = tune(start, learned, epochs, seed=seed)
        note(domain, "clean", clean, seen)
        for k in depths:
            for name, project in (("signature", True), ("difference", False)):
                rho = signature(theta_0, theta_s, _weights(robust), first(layers, k), project=project)
                net = _patched(clean, rho, _weights(robust), learned, strength)
                note(domain, f"{name}, K = {k}", net, seen)
        note(domain, "robust", robust, seen)
    result = pd.DataFrame.from_dict(rows, orient="index").rename_axis(["domain", "network"])
    result.attrs["protocol"] = {
        "data": data.name,
        "sha256": data.sha256,
        "severity": severity,
        "table": table,
        "strength": strength,
        "epochs": epochs,
        "batch_size": BATCH,
        "lr": RATE,
        "seed": seed,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }
    return result


def tune(model: nn.Module, data: Split, epochs: int, *, seed: int = 0) -> nn.Module:
    """A copy of ``model``, fine-tuned on the device the model is on, in eval mode."""
    model = copy.deepcopy(model).train()
    device = next(model.parameters()).device
    x = data.x.to(device)
    y = data.y.to(device)
    generator = generator_for("tune", seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [round(0.4 * epochs), round(0.8 * epochs)], gamma=0.1)
    for _ in range(epochs):
        for rows in torch.randperm(len(y), generator=generator).split(BATCH):
            batch = _floats(shifted_crop(x[rows.to(device)], generator))
            F.cross_entropy(model(batch), y[rows.to(device)]).backward()
            optimizer.step()
            optimizer.zero_grad()
        schedule.step()
    return model.eval()


def _patched(clean: nn.Module, rho: State, robust: State, learned: Split, strength: float) -> nn.Module:
    """The clean network with its patch; one with BatchNorm then goes through the paper's procedure for it."""
    net = copy.deepcopy(clean)
    net.load_state_dict(apply(net.state_dict(), compose([rho], strength=strength)))
    if batchnorms(net):
        net.load_state_dict(average_batchnorm(net, [robust]))
        blend_statistics(net, _blocks(learned.x, next(net.parameters()).device), strength)
    return net


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


@torch.inference_mode()
def _accuracy(model: nn.Module, data: Split) -> float:
    device = next(model.parameters()).device
    parts = zip(_blocks(data.x, device), data.y.split(BLOCK), strict=True)
    return 100 * int(sum((model(x).argmax(-1).cpu() == y.cpu()).sum() for x, y in parts)) / len(data.y)


def _see(data: Split, domain: str, severity: int, key: str, table: str, device: torch.device) -> Split:
    """The images of a domain, in 8 bits; computed on the device, block by block."""
    generator = generator_for(domain, severity, key)
    blocks = (shift(x, domain, severity, generator, table) for x in _blocks(data.x, device))
    return Split(torch.cat([x.mul(255).round().byte().cpu() for x in blocks]), data.y)


def _blocks(x: Tensor, device: torch.device) -> Iterator[Tensor]:
    return (_floats(block.to(device)) for block in x.split(BLOCK))


def _floats(x: Tensor) -> Tensor:
    return x if x.is_floating_point() else x.float().div_(255)
