"""Small backbones that train in seconds, their shipped source weights, and the entry to timm's large ones.

Every model here speaks timm's protocol: ``forward_features(x)``, ``forward_head(h, pre_logits=False)``, ``forward(x)``.

>>> import torch
>>> net = SmallCNN()
>>> net(torch.rand(2, 1, 28, 28)).shape
torch.Size([2, 10])
>>> net.forward_head(net.forward_features(torch.rand(2, 1, 28, 28)), pre_logits=True).shape
torch.Size([2, 64])
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

__all__ = ["Normalised", "PlainCNN", "SmallCNN", "from_timm", "pretrained"]

SEEDS = (0, 1, 2)  # source networks shipped for each dataset


class SmallCNN(nn.Module):
    """Five 3 x 3 convolutions, each with BatchNorm and ReLU, then global average pooling and a linear head.

    Args:
        in_chans: image channels.
        num_classes: K.
        width: channels of the first layer; the last has four times as many.

    Shape:
        ``(N, in_chans, H, W) -> (N, num_classes)``; 28 x 28 images cost about 1.6 million multiplications at width 16.
    """

    def __init__(self, in_chans: int = 1, num_classes: int = 10, width: int = 16) -> None:
        super().__init__()
        w = width
        plan = [(in_chans, w, 2), (w, w, 1), (w, 2 * w, 2), (2 * w, 2 * w, 1), (2 * w, 4 * w, 2)]
        self.stages = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(i, o, 3, s, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU(inplace=True))
                for i, o, s in plan
            )
        )
        self.num_features = 4 * w
        self.fc = nn.Linear(4 * w, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        h: Tensor = self.stages(x)  # (N, 4 width, H/8, W/8)
        return h

    def forward_head(self, h: Tensor, pre_logits: bool = False) -> Tensor:
        h = h.mean((2, 3))  # (N, 4 width)
        return h if pre_logits else self.fc(h)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class PlainCNN(nn.Module):
    """Five 3 x 3 convolutions with bias and ReLU, no normalisation, then global average pooling and a linear head.

    :class:`SmallCNN` without BatchNorm, so that a weight does not act through statistics that others depend on.

    Args:
        in_chans: image channels.
        num_classes: K.
        width: channels of the first layer; the last has four times as many.

    Shape:
        ``(N, in_chans, H, W) -> (N, num_classes)``.
    """

    def __init__(self, in_chans: int = 1, num_classes: int = 10, width: int = 16) -> None:
        super().__init__()
        w = width
        plan = [(in_chans, w, 2), (w, w, 1), (w, 2 * w, 2), (2 * w, 2 * w, 1), (2 * w, 4 * w, 2)]
        self.stages = nn.Sequential(
            *(nn.Sequential(nn.Conv2d(i, o, 3, s, 1), nn.ReLU(inplace=True)) for i, o, s in plan)
        )
        for conv in (m for m in self.stages.modules() if isinstance(m, nn.Conv2d)):
            assert conv.bias is not None
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")  # keeps the variance where no BatchNorm does
            nn.init.zeros_(conv.bias)
        self.num_features = 4 * w
        self.fc = nn.Linear(4 * w, num_classes)

    forward_features = SmallCNN.forward_features
    forward_head = SmallCNN.forward_head
    forward = SmallCNN.forward


class Normalised(nn.Module):
    """A classifier fed images in [0, 1]: the normalisation its weights expect moves inside.

    Methods and corruptions of this package all work on [0, 1] images, so a backbone carries its own mean and standard
    deviation; a wrong pair is the commonest cause of numbers that do not reproduce.

    Args:
        model: speaks timm's protocol; its own ``forward`` is used, with all hooks.
        mean: of each channel, or one for all.
        std: of each channel, or one for all, above 0.

    Raises:
        ValueError: other numbers of means and deviations, or a deviation that is not positive.
        TypeError: in use, for integer images, whose values are not in [0, 1].
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        if not 0 < len(mean) == len(std) or not min(std) > 0:
            raise ValueError(f"mean, std: expected one of each for each channel, std > 0, got {mean} and {std}")
        self.model: Any = model  # speaks timm's protocol, of which nn.Module says nothing
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward_features(self, x: Tensor) -> Tensor:
        h: Tensor = self.model.forward_features(self._normalised(x))
        return h

    def forward_head(self, h: Tensor, pre_logits: bool = False) -> Tensor:
        h = self.model.forward_head(h, pre_logits=pre_logits)
        return h

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(self._normalised(x))
        return logits

    def _normalised(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            raise TypeError(f"x: expected float images in [0, 1], got {x.dtype}; x.float() / 255 makes them of 8 bits")
        return (x - self.mean) / self.std


def pretrained(name: str, seed: int = 0) -> SmallCNN:
    """A source network shipped with the package, in eval mode.

    Args:
        name: dataset it was trained on, ``"fashion8k"`` or ``"mnist5k"``.
        seed: 0, 1 or 2: initialisation and order of the batches.

    Raises:
        ValueError: no such network.
    """
    folder = files("peftref") / "weights"
    resource = folder / f"cnn_{name}_{seed}.safetensors"
    if not resource.is_file():
        have = sorted(f.name[4:-12] for f in folder.iterdir() if f.name.startswith("cnn_"))
        raise ValueError(f"name, seed: expected one of the shipped networks {have}, got {name!r} and {seed!r}")
    with as_file(resource) as path:
        state = load_file(path)
    model = SmallCNN(width=len(state["stages.0.1.weight"]))
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
    return model.eval()


def from_timm(name: str, pretrained: bool = False, checkpoint: str | Path | None = None, **kwargs: Any) -> Normalised:
    """A timm model that takes images in [0, 1], in eval mode; its mean and standard deviation come with its weights.

    Args:
        name: full timm tag, architecture and weights (``"vit_base_patch16_224.augreg2_in21k_ft_in1k"``).
        pretrained: let timm download the weights.
        checkpoint: or load them from this file.
        kwargs: passed on to ``timm.create_model``. With ``in_chans`` other than the weights' three channels, the mean
            and standard deviation are averaged for one channel and repeated in turn for more (RGBR), as timm does with
            the filters of the first layer.
    """
    try:
        import timm
    except ImportError as error:
        raise ImportError("from_timm needs timm: pip install 'peftref[vision]'") from error
    model = timm.create_model(name, pretrained=pretrained, checkpoint_path=str(checkpoint or ""), **kwargs)
    config = timm.data.resolve_data_config({}, model=model)
    channels = kwargs.get("in_chans") or config["input_size"][0]
    mean = _per_channel(config["mean"], channels)
    std = _per_channel(config["std"], channels)
    return Normalised(model, mean, std).eval()


def _per_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    if channels == 1:
        return (sum(values) / len(values),)
    return tuple(values[i % len(values)] for i in range(channels))
