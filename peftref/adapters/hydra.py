r"""Hydra: a low-rank branch beside the frozen layer and another behind it.

Kim, Yang, Kim, Hong, Park, "Hydra: Multi-head Low-rank Adaptation for Parameter Efficient Fine-tuning", 2023,
arXiv 2309.06922; official code: https://github.com/extremebird/Hydra/tree/4138457.

With the frozen :math:`f_0(x)=W_0x+b_0`, the parallel branch reads the layer's input, the sequential one its output
(eq-hydra-update):

.. math:: h(x) = f_0(x) + s\,\bigl[B_p(A_px+a_p) + B_s(A_sf_0(x)+a_s) + \beta\bigr] .

All of it is affine, so it is merged, and it is a LoRA of rank :math:`r_p+r_s` with a bias, half of whose :math:`A` is
tied to the frozen weight (eq-hydra-lora):

.. math::

    \Delta W = s\,[B_p\;B_s]\begin{bmatrix}A_p\\ A_sW_0\end{bmatrix}, \qquad
    \Delta b = s\,\bigl(B_pa_p + B_s(A_sb_0 + a_s) + \beta\bigr) .

==================  ================================  ==================================  =====================
argument            here                              paper, official code                shape
==================  ================================  ==================================  =====================
``r_par``           :math:`r_p`                       ``hidden_dim`` of ``adapter_p``     integer
``r_seq``           :math:`r_s`                       ``hidden_dim`` of ``adapter_s``     integer
``scale``           :math:`s`                         :math:`s`                           number
``par_down``        :math:`A_p`                       :math:`A_{par}`                     ``(r_p, i)``
``seq_down``        :math:`A_s`                       :math:`A_{seq}`                     ``(r_s, o)``
``up``              :math:`[B_p\;B_s]`                :math:`B_{par}`, :math:`B_{seq}`    ``(o, r_p + r_s)``
``down_bias``       :math:`[a_p\;a_s]`                biases of the two "down"            ``(r_p + r_s,)``
``up_bias``         :math:`\beta=\beta_p+\beta_s`     biases of the two "up"              ``(o,)``
==================  ================================  ==================================  =====================

Differs from the official code: both branches go up in one product, with one bias where the code has two of which only
the sum matters; every target is merged, attention too, whose branches the code adds to the MLP's weight
(https://github.com/extremebird/Hydra/blob/4138457/vtab1k/hydra.py#L118-L123); and the sequential branch reads the
frozen output, whatever other adapters a layer has, so that adapters add in any order.

>>> import torch
>>> from torch import nn
>>> from peftref.adapters.core.injection import adapters, inject, merge
>>> net, x = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)), torch.randn(5, 4)
>>> before = net(x)
>>> inject(net, Hydra, ["0", "2"], r_par=1, r_seq=2)
['0', '2']
>>> torch.equal(net(x), before)                                  # B = 0: nothing has changed
True
>>> for adapter in adapters(net).values():
...     _ = nn.init.normal_(adapter.up)
>>> y = net(x)
>>> A, B, b = as_lora(adapters(net)["0"], net[0].base_layer)     # the same update as a LoRA
>>> A.shape, B.shape, b.shape
(torch.Size([3, 4]), torch.Size([8, 3]), torch.Size([8]))
>>> torch.allclose(net[0](x), net[0].base_layer(x) + x @ A.T @ B.T + b, atol=1e-5)
True
>>> merge(net)
>>> torch.allclose(net(x), y, atol=1e-5)
True
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import integer, number
from .core.adapter import Adapter
from .core.files import config, write_files
from .core.injection import adapters
from .core.layers import Layer, view
from .core.targets import frozen_module, modules_by_name
from .core.trained import PREFIX, kept, keyed

__all__ = ["Hydra", "as_lora", "save_as_lora"]


class Hydra(Adapter):
    """Two branches on one layer, ``f = s [B_p (A_p x + a_p) + B_s (A_s y0 + a_s) + beta]`` (eq-hydra-update).

    Args:
        base: the frozen layer.
        r_par: rank of the parallel branch (2: the official vision configurations; 4 for language); 0 leaves it out.
        r_seq: rank of the sequential branch (2: the official vision configurations; 8 for language); 0 leaves it out,
            and what is left is a LoRA.
        scale: of the update (1: official for CLIP and for language; VTAB has one for each data set, 0.1 to 4.5).
        bias: train the biases of the branches too (official for vision; not for language).
        dropout: share of the bottleneck's units that are dropped in training (0 to 0.2 on VTAB).

    Raises:
        ValueError: ranks that are no integers, negative or both zero; a scale that is not finite; a dropout outside
            [0, 1).
    """

    kind = "hydra"
    options = ("r_par", "r_seq", "scale", "bias", "dropout")

    def __init__(
        self, base: Layer, r_par: int = 2, r_seq: int = 2, scale: float = 1.0, bias: bool = True, dropout: float = 0.0
    ) -> None:
        super().__init__()
        integer("r_par", r_par, 0)
        integer("r_seq", r_seq, 0)
        if r_par + r_seq == 0:
            raise ValueError("r_par, r_seq: expected at least one branch, got ranks 0 and 0")
        number("scale", scale)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: expected a number in [0, 1), got {dropout!r}")
        self.r_par = r_par
        self.r_seq = r_seq
        self.scale = scale
        self.bias = bias
        self.dropout = dropout
        o = base.out_features
        i = base.in_features
        self.par_down = nn.Parameter(nn.init.xavier_uniform_(torch.empty(r_par, i))) if r_par else None
        self.seq_down = nn.Parameter(nn.init.xavier_uniform_(torch.empty(r_seq, o))) if r_seq else None
        self.up = nn.Parameter(torch.zeros(o, r_par + r_seq))
        self.down_bias = nn.Parameter(torch.zeros(r_par + r_seq)) if bias else None
        self.up_bias = nn.Parameter(torch.zeros(o)) if bias else None

    def forward(self, x: Tensor, y0: Tensor, base: Layer) -> Tensor:
        parts = []
        if self.par_down is not None:
            parts.append(base.linear(x, self.par_down))  # (..., r_p)
        if self.seq_down is not None:
            parts.append(F.linear(y0, self.seq_down))  # (..., r_s), from the frozen output
        h = torch.cat(parts, -1) if self.down_bias is None else torch.cat(parts, -1) + self.down_bias
        h = F.dropout(h, self.dropout, self.training)
        # eq-hydra-update:  s [B_p B_s] [A_p x + a_p; A_s y0 + a_s] + s beta, scaled where it is thin
        return F.linear(self.scale * h, self.up, None if self.up_bias is None else self.scale * self.up_bias)

    def delta(self, base: Layer) -> tuple[Tensor, Tensor | None]:
        A, B, db = _as_lora(self, base)
        return B @ A, db


def as_lora(adapter: Hydra, module: nn.Module) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same update as a LoRA of scale one with a bias, ``dW = B A`` (eq-hydra-lora).

    Args:
        adapter: of the layer.
        module: the frozen layer.

    Returns:
        A ``(r_p + r_s, i)``, B ``(o, r_p + r_s)``, and the bias ``(o,)``, or None where there is none: neither the
        adapter nor the layer (or no sequential branch) has one.
    """
    with torch.no_grad():
        return _as_lora(adapter, view(frozen_module(module), adapter.dtype))


def _as_lora(adapter: Hydra, base: Layer) -> tuple[Tensor, Tensor, Tensor | None]:
    up: Tensor = adapter.scale * adapter.up
    h: Tensor | None = adapter.down_bias
    rows: list[Tensor] = []
    if adapter.par_down is not None:
        rows.append(adapter.par_down)
    if adapter.seq_down is not None:
        rows.append(adapter.seq_down @ base.weight)  # A_s W_0 first: never an (o, o)
        if base.bias is not None:
            A_s_b = F.pad(adapter.seq_down @ base.bias, (adapter.r_par, 0))
            h = A_s_b if h is None else h + A_s_b
    # eq-hydra-lora:  dW = s [B_p B_s] [A_p; A_s W_0],  db = s ([B_p B_s] [a_p; A_s b_0 + a_s] + beta)
    db = None if h is None else up @ h
    if adapter.up_bias is not None:
        assert db is not None  # the two biases come together
        db = db + adapter.scale * adapter.up_bias
    return torch.cat(rows), up, db


def save_as_lora(
    model: nn.Module, path: str | Path, name: str = "default", *, modules: Iterable[str] | None = None
) -> None:
    """Write a Hydra as a LoRA that PEFT opens, exact up to rounding; the model does not change.

    The tie to the frozen weight is lost: trained further, it is an ordinary LoRA with a bias (``lora_bias``).

    Args:
        model: with Hydras, not merged; compiled, parallel or not.
        path: a folder, which is made if need be.
        name: of the adapter.
        modules: that go along, as in :func:`~peftref.adapters.core.files.save`.

    Raises:
        ValueError: no adapter of that name; or as in :func:`~peftref.adapters.core.files.save`.
        TypeError: one that is no Hydra; or as in :func:`~peftref.adapters.core.files.save`.
        RuntimeError: the model is merged; its frozen weights are needed.
    """
    found = adapters(model, name)
    hosts = {n: modules_by_name(model)[n] for n in found}
    hydras = {n: a for n, a in found.items() if isinstance(a, Hydra)}
    other = [n for n in found if n not in hydras]
    if other:
        raise TypeError(f"name: expected a Hydra, got {found[other[0]].kind} on {other[0]}")
    if any(getattr(hosts[n], "merged", False) for n in found):
        raise RuntimeError("model: expected one that is not merged, got a merged one; unmerge it first")
    tensors = {}
    ranks = {}
    bias = False
    for n, adapter in hydras.items():
        A, B, db = as_lora(adapter, hosts[n])
        base = view(frozen_module(hosts[n]))
        ones = (1,) * (len(base.window) - 1)
        tensors[f"{PREFIX}{n}.lora_A.weight"] = A.unflatten(1, base.window)
        tensors[f"{PREFIX}{n}.lora_B.weight"] = B.reshape(*B.shape, *ones)
        tensors[f"{PREFIX}{n}.lora_B.bias"] = torch.zeros(len(B)) if db is None else db
        ranks[n] = len(A)
        bias = bias or db is not None
    if not bias:
        tensors = {key: t for key, t in tensors.items() if not key.endswith("lora_B.bias")}
    common = max(ranks.values(), key=list(ranks.values()).count)
    pattern = {"^" + re.escape(n): r for n, r in ranks.items() if r != common}
    own = config(model, name, modules=modules)
    spec: dict[str, Any] = {
        "peft_type": "LORA",
        "r": common,
        "lora_alpha": common,
        "lora_bias": bias,
        "lora_dropout": 0.0,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "use_rslora": False,
        "inference_mode": True,
        "target_modules": own["target_modules"],
        "modules_to_save": own.get("modules_to_save"),
        "fan_in_fan_out": any(type(frozen_module(hosts[n])).__name__ == "Conv1D" for n in found),
    }
    write_files(path, {**tensors, **keyed(kept(model, modules))}, spec)
