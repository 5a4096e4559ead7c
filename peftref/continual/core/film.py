r"""FiLM: one scale and one shift per channel after each normalisation layer, and nothing else, are trained.

Perez, Strub, de Vries, Dumoulin, Courville, "FiLM: Visual Reasoning with a General Conditioning Layer", AAAI 2018,
arXiv 1709.07871; used as an adapter of a frozen body by FSA-FiLM (see :mod:`peftref.continual.fsa`). Per channel c
(eq-fsa-film)

.. math:: h_c\leftarrow\gamma_c\,h_c+\beta_c,\qquad\gamma_c=1,\ \beta_c=0\ \text{at first}.

A normalisation layer ends in :math:`h=w\odot\hat x+b`, so the two are one affine map (eq-fsa-fold),

.. math:: \gamma\odot(w\odot\hat x+b)+\beta=(\gamma\odot w)\odot\hat x+(\gamma\odot b+\beta) .

The layer here calls the normalisation layer with that weight and bias. So it acts before the activation even where the
layer (timm's ``BatchNormAct2d``) contains one, works for channels first and last, and folds into the layer exactly.

>>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
>>> inject_film(net)
['1']
>>> sum(p.numel() for p in film_parameters(net))
8
>>> merge_film(net)
>>> type(net[1]).__name__
'BatchNorm2d'
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from ..._wrapped import plain_name

__all__ = ["EFFICIENTNET", "FiLM", "film_parameters", "inject_film", "merge_film", "remove_film"]

NORMS = (_BatchNorm, nn.GroupNorm, nn.LayerNorm)

#: Where FSA-FiLM has its layers in timm's EfficientNets: after the stem, every depthwise convolution, and the head
#: (``aresPanos/fsa@e151d896:src/cnn/efficientnet.py``).
EFFICIENTNET = r"(?:model\.)*(?:bn[12]|blocks\.0\.\d+\.bn1|blocks\.[1-9]\.\d+\.bn2)"


class FiLM(nn.Module):
    """A normalisation layer followed by h_c <- gamma_c h_c + beta_c in each channel c; the identity at first.

    What one may ask of the layer it answers as the layer does, and ``weight`` and ``bias`` with those of eq-fsa-fold.

    Args:
        norm: with a weight and a bias; called as it is, in whichever mode it is in.

    Raises:
        TypeError: not a BatchNorm, GroupNorm or LayerNorm.
        ValueError: a layer without weight and bias.
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        if not isinstance(norm, NORMS):
            raise TypeError(f"norm: expected a BatchNorm, GroupNorm or LayerNorm, got {type(norm).__name__}")
        if norm.weight is None or norm.bias is None:
            raise ValueError("norm: expected a layer with weight and bias, got one without")
        self.norm = norm
        self.gamma = nn.Parameter(torch.ones_like(norm.weight))
        self.beta = nn.Parameter(torch.zeros_like(norm.bias))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__"):
                raise
            # Whoever uses the weight without a call (a TransformerEncoderLayer in eval mode) gets the folded one.
            return self.folded()[name] if name in ("weight", "bias") else getattr(super().__getattr__("norm"), name)

    def folded(self) -> dict[str, Tensor]:
        """Weight gamma w and bias gamma b + beta of the one affine map (eq-fsa-fold)."""
        # eq-fsa-film, eq-fsa-fold:  gamma (w x + b) + beta = (gamma w) x + (gamma b + beta)
        return {"weight": self.gamma * self.norm.weight, "bias": self.gamma * self.norm.bias + self.beta}

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = functional_call(self.norm, self.folded(), (x,))
        return y


def inject_film(model: nn.Module, layers: str | Iterable[str] | None = None) -> list[str]:
    """Put FiLM on normalisation layers, in place; the outputs stay as they are, bit for bit. Nothing is frozen.

    Args:
        model: any module.
        layers: names of layers, or a regular expression for the whole name (:data:`EFFICIENTNET`); default: every
            BatchNorm, GroupNorm and LayerNorm that has a weight and a bias.

    Returns:
        The names of the layers, as they were, without the words that the wrappers of torch add.

    Raises:
        ValueError: no such layer, one without weight and bias, or a model that has FiLM already.
    """
    if any(isinstance(m, FiLM) for m in model.modules()):
        raise ValueError("model: expected one without FiLM; merge_film or remove_film first")
    norms = {plain_name(model, name): m for name, m in model.named_modules() if isinstance(m, NORMS)}
    affine = [name for name, m in norms.items() if m.weight is not None and m.bias is not None]
    if layers is None:
        names = affine
    elif isinstance(layers, str):
        names = [name for name in norms if re.fullmatch(layers, name)]
    else:
        names = list(layers)
    if not names or set(names) - set(affine) or "" in names:
        raise ValueError(f"layers: expected names of normalisation layers with weight and bias, {affine}, got {layers}")
    _swap(model, {norms[name]: FiLM(norms[name]) for name in names})
    return names


def film_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Every gamma and beta of the model."""
    return [p for m in model.modules() if isinstance(m, FiLM) for p in (m.gamma, m.beta)]


@torch.no_grad()
def merge_film(model: nn.Module) -> None:
    """Fold every FiLM into its layer, in place: the same function, and the modules that the model had before."""
    films = [m for m in model.modules() if isinstance(m, FiLM)]
    for film in films:
        for name, value in film.folded().items():
            getattr(film.norm, name).copy_(value)
    _swap(model, {film: film.norm for film in films})


def remove_film(model: nn.Module) -> None:
    """Take every FiLM out again, in place: the model is what it was before :func:`inject_film`, bit for bit."""
    _swap(model, {m: m.norm for m in model.modules() if isinstance(m, FiLM)})


def _swap(model: nn.Module, new: dict[nn.Module, nn.Module]) -> None:
    """Put ``new[module]`` in every place where ``module`` is: a layer used twice keeps one FiLM."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in new:
                parent._modules[name] = new[child]
