r"""The experiments of this part with large backbones and real photographs: what the guarded cells of the chapters run.

Images are corrupted on the fly, one domain after the other, and a domain is kept in 8 bits (corrupted images are whole
levels): 5,000 photographs of 224 pixels take 0.75 GB, whatever the number of domains. The stream is that of
:func:`peftref.data.continual`; no method is reset between domains, and all meet the same images.

>>> from peftref.data import load
>>> from peftref.models import pretrained
>>> from peftref.tta.baselines.bn_adapt import BNAdapt
>>> methods = {"source": lambda net: net, "BN-adapt": BNAdapt}
>>> test = load("fashion8k").test
>>> run_at_scale(methods, pretrained("fashion8k"), test, ["clean", "contrast"], 3, 200, table="cifar", device="cpu")
... # doctest: +ELLIPSIS
          source  BN-adapt
domain...
clean  ...
contrast  ...
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from ...data import Split
from ...data.domains import domain_names, generator_for, shift
from ...data.orders import Order, as_stored

__all__ = ["imagenet_folder", "run_at_scale"]

BLOCK = 250  # images corrupted at a time: 150 MB at 224 pixels, times what a corruption needs on the way
SUFFIXES = {".jpeg", ".jpg", ".png"}
BORDER = 1 / 16  # cut off on each side, as in "resize to 256, crop the central 224"


def imagenet_folder(root: str | Path, size: int = 224, limit: int | None = None) -> Split:
    """Photographs in one folder per class, as the validation set of ImageNet is usually laid out: central square crops.

    Where all folders are named by ImageNet's synsets (``n01440764``), labels are the 1,000 classes of its models, even
    if only some of the folders are there; otherwise classes are numbered in the order of their names.

    Args:
        root: folder with one folder of JPEG or PNG files per class.
        size: side in pixels (224: what most weights expect).
        limit: take this many images, evenly spaced over the classes; default: all (50,000 take 30 GB).

    Raises:
        FileNotFoundError: no images there.
        ValueError: a limit or size below 1.
    """
    if size < 1 or (limit is not None and limit < 1):
        raise ValueError(f"size, limit: expected integers >= 1, got {size} and {limit}")
    paths = sorted(p for p in Path(root).glob("*/*") if p.suffix.lower() in SUFFIXES)
    if not paths:
        raise FileNotFoundError(f"root: expected folders of JPEG or PNG files, one per class, in {str(root)!r}")
    number = _class_numbers(sorted({p.parent.name for p in paths}))
    if limit is not None and limit < len(paths):
        paths = [paths[i] for i in np.arange(limit) * len(paths) // limit]
    return Split(torch.stack([_square(p, size) for p in paths]), torch.tensor([number[p.parent.name] for p in paths]))


def run_at_scale(
    methods: Mapping[str, Callable[[nn.Module], nn.Module]],
    model: nn.Module,
    data: Split,
    domains: Sequence[str],
    severity: int,
    batch_size: int,
    order: Order | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
    table: str = "imagenet",
) -> pd.DataFrame:
    """Online error in % of several methods on one continual stream of corruptions.

    Args:
        methods: name -> function that wraps the model, for example ``{"LAME": LAME}``.
        model: a classifier of images in [0, 1], as :func:`peftref.models.from_timm` gives it; it moves to ``device``.
        data: clean images and labels, for example of :func:`imagenet_folder`.
        domains, severity, order, seed, table: see :func:`peftref.data.continual`.
        batch_size: 64 is usual on ImageNet-C.
        device: default: a GPU if there is one.

    Returns:
        One row per domain, one column per method; ``attrs["protocol"]`` says what was run, for the results file.
    """
    names = domain_names(domains)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = model.to(device).eval()
    wrapped = {name: wrap(model).eval() for name, wrap in methods.items()}
    errors = pd.DataFrame(index=pd.Index(names, name="domain"), columns=list(methods), dtype=float)
    for i, domain in enumerate(names):
        images = _corrupted(data.x, domain, severity, seed, table, device)
        rows = (order or as_stored)(data.y, generator_for("order", seed, i)).cpu()
        wrong = {name: torch.zeros((), dtype=torch.long, device=device) for name in wrapped}
        for batch in rows.split(batch_size):
            x = images[batch].to(device).float().div_(255)
            y = data.y.cpu()[batch].to(device)
            for name, method in wrapped.items():
                with torch.no_grad():  # methods that learn switch gradients on themselves
                    wrong[name] += (method(x).argmax(-1) != y).sum()  # stays on the device: no wait per batch
        errors.loc[domain] = {name: 100 * int(n) / len(rows) for name, n in wrong.items()}
    errors.attrs["protocol"] = {
        "images": len(data.y),
        "size": data.x.shape[-1],
        "severity": severity,
        "batch_size": batch_size,
        "order": getattr(order, "__name__", "as_stored"),
        "seed": seed,
        "table": table,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }
    return errors


def _corrupted(x: Tensor, domain: str, severity: int, seed: int, table: str, device: torch.device) -> Tensor:
    """All images of a domain, in 8 bits on the CPU; computed on the device, block by block."""
    generator = generator_for(domain, severity, seed, 0)
    blocks = (shift(block.to(device), domain, severity, generator, table) for block in x.split(BLOCK))
    return torch.cat([block.mul(255).round().byte().cpu() for block in blocks])


def _class_numbers(folders: list[str]) -> dict[str, int]:
    numbers = {name: i for i, name in enumerate(folders)}
    if all(name[:1] == "n" and name[1:].isdigit() for name in folders):
        from timm.data import ImageNetInfo

        synsets = {name: i for i, name in enumerate(ImageNetInfo().label_names())}
        if set(folders) <= set(synsets):
            return synsets
    return numbers


def _square(path: Path, size: int) -> Tensor:
    with Image.open(path) as image:
        crop = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC, bleed=BORDER)
    return torch.from_numpy(np.array(crop)).permute(2, 0, 1).float().div_(255)
