r"""Families of small networks that share a start and met different corruptions: what signatures are made of.

For each seed the 6,000 training images of ``fashion8k`` are dealt into three parts that share no image. The *start*
learns from the first; from it, one network is fine-tuned on the second part as it is (``"clean"``) and one on each
corruption of it, and on nothing else. The third part is for choosing settings; the test images stay apart.

>>> from peftref.data import load
>>> {name: len(part.y) for name, part in deal(load("fashion8k").train, seed=0).items()}
{'upstream': 2000, 'tune': 3000, 'validation': 1000}
>>> model, states = family(0)
>>> list(states)[:4]
['start', 'clean', 'contrast', 'fog']
>>> test = load("fashion8k").test
>>> accuracy(model, states["clean"], test) > 75 > 40 > accuracy(model, states["clean"], corrupted(test, "contrast"))
True
"""

from __future__ import annotations

from importlib.resources import as_file, files

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ...data import Split, corrupt
from ...data.domains import generator_for
from ...models.cnn import PlainCNN, SmallCNN
from ..core.loop import State

__all__ = ["DOMAINS", "Corrupting", "accuracy", "corrupted", "deal", "family"]

# Severity and table, chosen so that the network that has seen clean images only loses 20 points or more. "invert" is
# not among the standard corruptions: an extreme case, 1 - x.
DOMAINS: dict[str, tuple[int, str] | None] = {
    "contrast": (3, "cifar"),
    "fog": (3, "cifar"),
    "defocus_blur": (3, "imagenet"),
    "gaussian_noise": (5, "imagenet"),
    "invert": None,
}
PARTS = {"upstream": 2000, "tune": 3000, "validation": 1000}
BLOCK = 250  # images in one forward pass: what fits a core's cache


def deal(data: Split, seed: int) -> dict[str, Split]:
    """Three parts of the training images, drawn at random and without a common image.

    Raises:
        ValueError: other than 6,000 images.
    """
    if len(data.y) != sum(PARTS.values()):
        raise ValueError(f"data: expected {sum(PARTS.values())} images to deal, got {len(data.y)}")
    rows = torch.randperm(len(data.y), generator=generator_for("deal", seed)).split(list(PARTS.values()))
    return {name: Split(data.x[i], data.y[i]) for name, i in zip(PARTS, rows, strict=True)}


def corrupted(data: Split, name: str, seed: int = 0) -> Split:
    """The images as they look in one of :data:`DOMAINS`, or ``"clean"``; labels stay."""
    return Split(Corrupting(nn.Identity(), name, seed)(data.x), data.y)


class Corrupting(nn.Module):
    """A model behind a corruption, for training: every batch is corrupted anew before the model sees it.

    Args:
        model: takes images in [0, 1].
        name: one of :data:`DOMAINS`, or ``"clean"``.
        seed: of the corruption's noise.

    Raises:
        ValueError: an unknown name.
    """

    def __init__(self, model: nn.Module, name: str, seed: int = 0) -> None:
        super().__init__()
        if name not in DOMAINS and name != "clean":
            raise ValueError(f"name: expected 'clean' or one of {', '.join(DOMAINS)}, got {name!r}")
        self.model = model
        self.name = name
        self.generator = generator_for("corrupting", name, seed)

    def forward(self, x: Tensor) -> Tensor:
        level = DOMAINS.get(self.name)
        if level:
            x = corrupt(x, self.name, level[0], generator=self.generator, table=level[1])
        elif self.name == "invert":
            x = 1 - x
        logits: Tensor = self.model(x)
        return logits


def family(seed: int, kind: str = "plain") -> tuple[nn.Module, dict[str, dict[str, Tensor]]]:
    """A model and the state dicts of a shipped family of networks, by what each was trained on.

    Args:
        seed: 0 to 4; of the initialisation, of :func:`deal` and of the order of the batches.
        kind: ``"plain"``: five convolutions without BatchNorm; ``"norm"``: with BatchNorm, seeds 0 to 2, contrast only.

    Returns:
        The model, in eval mode, and for the plain kind the states ``"start"``, ``"clean"``, one for each of
        :data:`DOMAINS`; ``"digits"`` and ``"digits contrast"``, fine-tuned from the same start on handwritten digits;
        and ``"far start"``, ``"far clean"``, ``"far contrast"``, whose start learned digits only.

    Raises:
        ValueError: no such family.
    """
    folder = files("peftref") / "weights"
    resource = folder / f"family_{kind}_{seed}.safetensors"
    if not resource.is_file():
        have = sorted(f.name[7:-12] for f in folder.iterdir() if f.name.startswith("family_"))
        raise ValueError(f"seed, kind: expected one of the shipped families {have}, got {seed!r} and {kind!r}")
    with as_file(resource) as path:
        tensors = load_file(path)
    states: dict[str, dict[str, Tensor]] = {}
    for key, t in tensors.items():
        name, _, tensor = key.partition("/")
        states.setdefault(name[2:], {})[tensor] = t.float() if t.is_floating_point() else t
    model = (PlainCNN if kind == "plain" else SmallCNN)(width=8).eval()
    model.load_state_dict(states["start"])
    return model, states


@torch.inference_mode()
def accuracy(model: nn.Module, state: State, data: Split) -> float:
    """Accuracy in % of the model with the tensors of ``state``; the model itself stays as it is."""
    if data.y.ndim != 1 or not 0 < len(data.y) == len(data.x):
        raise ValueError(f"data: expected an image for each label, got {len(data.x)} and labels {tuple(data.y.shape)}")
    blocks = zip(data.x.split(BLOCK), data.y.split(BLOCK), strict=True)
    # Kernels in the order of memory in which a processor convolves a few channels half as fast again.
    state = {n: t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t for n, t in state.items()}
    right = sum((torch.func.functional_call(model, state, (x,)).argmax(-1) == y).sum() for x, y in blocks)
    return 100 * int(right) / len(data.y)
