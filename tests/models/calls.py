"""A valid call of everything public in peftref.models: tests.frame.test_fuzz spoils its arguments one by one."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from peftref import models
from tests.frame._inputs import Call, cnn, fixed, small_vit, t

CALLS: dict[str, Callable[[], Call]] = {
    "Normalised": lambda: (models.Normalised, dict(model=nn.Identity(), mean=(0.5,), std=(0.5,))),
    "Normalised.forward": lambda: (models.Normalised(cnn(), (0.5,), (0.5,)), dict(x=t(2, 1, 28, 28))),
    "PlainCNN": lambda: (models.PlainCNN, dict(in_chans=1, num_classes=4, width=4)),
    "PlainCNN.forward": lambda: (fixed(lambda: models.PlainCNN(width=4)), dict(x=t(2, 1, 28, 28))),
    "SmallCNN": lambda: (models.SmallCNN, dict(in_chans=1, num_classes=4, width=4)),
    "SmallCNN.forward": lambda: (cnn().eval(), dict(x=t(2, 1, 28, 28))),
    "pretrained": lambda: (models.pretrained, dict(name="fashion8k", seed=0)),
    "Attention": lambda: (models.Attention, dict(dim=8, num_heads=2)),
    "Block": lambda: (models.Block, dict(dim=8, num_heads=2)),
    "Mlp": lambda: (models.Mlp, dict(dim=8, hidden=4)),
    "ViT": lambda: (
        models.ViT,
        dict(img_size=14, patch_size=7, in_chans=1, num_classes=4, embed_dim=8, depth=1, num_heads=2),
    ),
    "ViT.forward": lambda: (small_vit(), dict(x=t(2, 1, 14, 14))),
}


# Names without a row, and why.
NAMELESS = {
    "efficientnet_lite0": "needs an extra, see models/test_lite0",
    "minilm": "no input",
    "smollm2": "no input",
    "Pretrained": "a pair",
    "imagenet_classes": "no input",
    "from_timm": "timm's own arguments",
    "pretrained_vit": "no input",
}
