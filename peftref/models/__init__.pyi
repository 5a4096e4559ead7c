# Written by `python -m tools.stubs` from the `__all__` of the modules.
from .cnn import Normalised as Normalised
from .cnn import PlainCNN as PlainCNN
from .cnn import SmallCNN as SmallCNN
from .cnn import fit as fit
from .cnn import from_timm as from_timm
from .cnn import predict as predict
from .cnn import pretrained as pretrained
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
    "SmallCNN",
    "ViT",
    "fit",
    "from_timm",
    "predict",
    "pretrained",
    "pretrained_vit",
]
