"""A small vision transformer with timm's names, pre-trained in this project.

No package index carries weights of a vision transformer, so the book has one of its own, trained on the embedded
images of clothes by ``python -m peftref.weights.make_vit``. Its layers carry the names of timm's
``VisionTransformer``: what works on one (a choice of layers, a checkpoint, an adapter) works on the other.

>>> import torch
>>> net = pretrained_vit()
>>> net(torch.rand(2, 1, 28, 28)).shape
torch.Size([2, 10])
>>> [name for name, module in net.named_modules() if isinstance(module, nn.Linear)][:4]
['blocks.0.attn.qkv', 'blocks.0.attn.proj', 'blocks.0.mlp.fc1', 'blocks.0.mlp.fc2']
"""

from __future__ import annotations

from importlib.resources import as_file, files

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

__all__ = ["Attention", "Block", "Mlp", "ViT", "pretrained_vit"]


class Attention(nn.Module):
    """Multi-head self-attention with one projection for queries, keys and values: ``(N, T, d) -> (N, T, d)``."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (N, T, 3, heads, d / heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)  # (N, heads, T, d / heads)
        out: Tensor = self.proj(y.transpose(1, 2).flatten(2))
        return out


class Mlp(nn.Module):
    """Two linear layers with a GELU between, on each token."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc2(self.act(self.fc1(x)))
        return x


class Block(nn.Module):
    """A pre-norm block: attention, then the MLP, each added to the residual stream."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return x


class ViT(nn.Module):
    """A vision transformer with a class token and learned positions, as timm lays it out.

    Args:
        img_size: side of the square image in pixels.
        patch_size: side of a patch; it divides ``img_size``.
        in_chans, num_classes: channels of the image, K.
        embed_dim: d, a multiple of ``num_heads``.
        depth: blocks.

    Shape:
        ``(N, in_chans, img_size, img_size) -> (N, num_classes)``; ``T = (img_size / patch_size)^2 + 1`` tokens.

    Raises:
        ValueError: sizes that do not divide.
    """

    def __init__(
        self,
        img_size: int = 28,
        patch_size: int = 7,
        in_chans: int = 1,
        num_classes: int = 10,
        embed_dim: int = 64,
        depth: int = 4,
        num_heads: int = 4,
    ) -> None:
        if min(patch_size, num_heads) < 1 or img_size % patch_size or embed_dim % num_heads:
            raise ValueError(
                "img_size, embed_dim: expected multiples of patch_size and num_heads, "
                f"got {img_size} / {patch_size} and {embed_dim} / {num_heads}"
            )
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)})
        tokens = (img_size // patch_size) ** 2 + 1
        self.cls_token = nn.Parameter(1e-6 * torch.randn(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, tokens, embed_dim))
        self.blocks = nn.Sequential(*(Block(embed_dim, num_heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.num_features = embed_dim
        self.head = nn.Linear(embed_dim, num_classes)
        for linear in (m for m in self.modules() if isinstance(m, nn.Linear)):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.patch_embed["proj"](x).flatten(2).mT  # (N, T - 1, d)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        x = self.norm(self.blocks(x))  # (N, T, d)
        return x

    def forward_head(self, h: Tensor, pre_logits: bool = False) -> Tensor:
        return h[:, 0] if pre_logits else self.head(h[:, 0])

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def pretrained_vit() -> ViT:
    """The shipped network, in eval mode: trained on the 6,000 training images of ``fashion8k``, in half precision."""
    with as_file(files("peftref") / "weights" / "vit_fashion8k.safetensors") as path:
        state = load_file(path)
    embed_dim, in_chans, patch_size, _ = state["patch_embed.proj.weight"].shape
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    model = ViT(patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim, depth=depth)
    model.load_state_dict({name: t.float() for name, t in state.items()})
    return model.eval()
