# ruff: noqa: I001
# Written by `python -m tools.stubs` from the `__all__` of the modules.
from .cnn import Normalised as Normalised
from .cnn import PlainCNN as PlainCNN
from .cnn import SmallCNN as SmallCNN
from .cnn import from_timm as from_timm
from .cnn import pretrained as pretrained
from .lite0 import efficientnet_lite0 as efficientnet_lite0
from .lite0 import imagenet_classes as imagenet_classes
from .text import Pretrained as Pretrained
from .text import minilm as minilm
from .text import smollm2 as smollm2
from .vit import Attention as Attention
from .vit import Block as Block
from .vit import Mlp as Mlp
from .vit import ViT as ViT
from .vit import pretrained_vit as pretrained_vit

__all__ = [
    "Attention",
    "Block",
    "Mlp",
    "Normalised",
    "PlainCNN",
    "Pretrained",
    "SmallCNN",
    "ViT",
    "efficientnet_lite0",
    "from_timm",
    "imagenet_classes",
    "minilm",
    "pretrained",
    "pretrained_vit",
    "smollm2",
]
