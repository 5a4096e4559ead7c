"""A task for adapters of a language model: is a sentence of a film review positive?

The last layers of an encoder are trained on features of the layers below, which are computed once.

>>> task = stand_in(train=8, test=4)
>>> task.top(hidden=task.train.hidden, attention_mask=task.train.mask).shape
torch.Size([8, 2])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...data.text import movie_reviews
from ...models.text import minilm
from ...models.vit import Block

__all__ = ["Features", "SentenceTask", "Top", "linears", "rotten_tomatoes", "stand_in"]


class Features(NamedTuple):
    """Inputs of the trained layers ``(N, tokens, width)``, which tokens count ``(N, tokens)``, classes ``(N,)``."""

    hidden: Tensor
    mask: Tensor
    y: Tensor

    def rows(self, i: Tensor) -> Features:
        """Some of the sentences."""
        return Features(self.hidden[i], self.mask[i], self.y[i])

    def inputs(self) -> dict[str, Tensor]:
        """Arguments of :class:`Top`."""
        return {"hidden": self.hidden, "attention_mask": self.mask}


class Top(nn.Module):
    """The last layers of an encoder, the mean over the tokens, and a head.

    Args:
        layers: each called with the tokens and a mask to be added to the attention's scores.
        width: of a token.
        classes: of the head.
    """

    def __init__(self, layers: Sequence[nn.Module], width: int, classes: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(width, classes)

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        bias = additive(attention_mask, hidden.dtype)
        for layer in self.layers:
            hidden = layer(hidden, bias)
        weight = attention_mask[..., None].to(hidden.dtype)
        logits: Tensor = self.head((hidden * weight).sum(1) / weight.sum(1))
        return logits


class SentenceTask(NamedTuple):
    """The network to adapt, and sentences to train on (a pool to draw from), to choose by, to report on."""

    top: Top
    train: Features
    val: Features
    test: Features


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to the scores: 0 where a token counts, very negative where not; ``(N, 1, 1, tokens)``."""
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)[:, None, None]


def linears(model: nn.Module) -> list[str]:
    """Full names of the linear layers inside the stack of layers."""
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layers." in n]


def rotten_tomatoes(*, pool: int, val: int | None, test: int | None, layers: int, length: int) -> SentenceTask:
    """Sentences of Rotten Tomatoes for the last layers of MiniLM.

    Args:
        pool: sentences to draw training sets from.
        val: sentences for the choice of a learning rate; None for all.
        test: sentences for the results; None for all.
        layers: that are adapted.
        length: tokens of a sentence; longer ones are cut.
    """
    model, tokenizer = minilm()
    every = model.encoder.layer
    below = every[: len(every) - layers]
    parts = []
    for split, count in (("train", pool), ("val", val), ("test", test)):
        table = movie_reviews("rotten_tomatoes", split).sample(frac=1, random_state=0)[:count]
        options = {"padding": "max_length", "truncation": True, "max_length": length, "return_tensors": "pt"}
        tokens = tokenizer(table["text"].tolist(), **options)
        hidden = _encode(model.embeddings, below, tokens)
        parts.append(Features(hidden, tokens["attention_mask"].bool(), torch.tensor(table["label"].to_numpy())))
    return SentenceTask(Top(every[len(every) - layers :], model.config.hidden_size), *parts)


class _Plain(Block):
    """A block without a mask."""

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return super().forward(x)


def stand_in(train: int = 64, test: int = 64, width: int = 16, tokens: int = 6) -> SentenceTask:
    """A task of the same shape without any download: a random network; the class is the sign of one direction."""
    g = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        top = Top([_Plain(width, 2) for _ in range(2)], width)
    scale = torch.linspace(2.0, 0.2, width)
    parts = []
    for count in (train, test, test):
        hidden = torch.randn(count, tokens, width, generator=g) * scale
        y = (hidden.mean(1)[:, 0] > 0).long()
        parts.append(Features(hidden, torch.ones(count, tokens, dtype=torch.bool), y))
    return SentenceTask(top, *parts)


@torch.no_grad()
def _encode(embeddings: nn.Module, layers: nn.ModuleList, tokens: Any) -> Tensor:
    """Features of the frozen layers, in batches."""
    found = []
    for ids, mask in zip(tokens["input_ids"].split(64), tokens["attention_mask"].bool().split(64), strict=True):
        hidden = embeddings(input_ids=ids)
        for layer in layers:
            hidden = layer(hidden, additive(mask, hidden.dtype))
        found.append(hidden)
    return torch.cat(found)
