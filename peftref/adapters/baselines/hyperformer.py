r"""Hyperformer: one network writes the bottleneck adapters of all layers and tasks.

Karimi Mahabadi, Ruder, Dehghani, Henderson, "Parameter-efficient Multi-task Fine-tuning for Transformers via Shared
Hypernetworks", ACL 2021, arXiv 2106.04489; as a baseline in :mod:`peftref.adapters.vl_adapter`'s paper.

Task :math:`\tau` and layer :math:`\ell` are learned vectors :math:`z_\tau,l_\ell\in\mathbb R^t`. Together they give a
point :math:`e`, and every weight of an adapter is linear in it (eq-vl_adapter-hyper):

.. math:: e_{\tau\ell}=\mathrm{LN}(\mathrm{MLP}([z_\tau;l_\ell]))\in\mathbb R^p,\qquad
   D_{\tau\ell}=\mathrm{reshape}_{r\times d}(H_De_{\tau\ell}+h_D),

and likewise :math:`U` with :math:`(d,r)`, :math:`b`, :math:`c`, each with an :math:`H,h` of its own for each position
in a block (after attention, after the MLP), shared by all layers.

==================  =======================  =====================  ==========
argument            here                     paper                  shape
==================  =======================  =====================  ==========
``task``            :math:`z_\tau`           :math:`z_\tau`         ``(T, t)``
``layer``           :math:`l_\ell`           :math:`l_i`            ``(L, t)``
``p``               :math:`p`                :math:`d`              integer
``dim``             :math:`t`                :math:`t`              integer
==================  =======================  =====================  ==========

Differs from the code of that paper (https://github.com/ylsung/VL_adapter/tree/545fcbb/VL-T5/src/adapters):
:math:`H_U,h_U,H_c,h_c` start at zero, so that every adapter is the identity (``init="paper"`` draws them); a batch may
mix tasks.

>>> import torch
>>> from peftref.adapters.core.injection import adapters, inject
>>> from peftref.adapters.core.switch import Tasks
>>> from peftref.models.vit import ViT
>>> net, targets, tasks = ViT(embed_dim=8, num_heads=2), r"blocks\.\d+\.(attn\.proj|mlp\.fc2)", Tasks(["a", "b"])
>>> where = places(net, targets)
>>> where["blocks.3.mlp.fc2"]
{'layer': 3, 'position': 1}
>>> hyper = HyperNet(d=8, tasks=2, layers=4, positions=2, reduction=4, dim=16, hidden=32)
>>> _ = inject(net, Hyperformer, targets, tasks=tasks, hyper=hyper, per_layer=where)
>>> sum(p.numel() for p in net.parameters() if p.requires_grad) == sum(p.numel() for p in hyper.parameters())
True
>>> D, b, U, c = hyper(layer=3, position=1)                    # of both tasks
>>> D.shape, b.shape, U.shape, c.shape
(torch.Size([2, 2, 8]), torch.Size([2, 2]), torch.Size([2, 8, 2]), torch.Size([2, 8]))
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ..._checks import integer, number, one_of
from ..core.adapter import Adapter
from ..core.layers import Layer
from ..core.switch import Tasks, agreed_names
from ..core.targets import find
from ..vl_adapter import INITS, VLAdapter, bottleneck, check_batch_dim

__all__ = ["HyperNet", "Hyperformer", "places"]


class HyperNet(nn.Module):
    """The network that writes adapters, ``D = reshape(H_D e + h_D)`` with ``e = LN(MLP([z; l]))``; give one to all.

    Args:
        d: width of the adapted outputs, the same everywhere.
        tasks: T.
        layers: L.
        positions: adapters in a block.
        reduction: r is ``d / reduction``, rounded down, at least 1.
        p: dimension of the point, at least 2: the normalisation makes one number a constant (8: official scripts).
        dim: t (512: official scripts, for d = 768).
        hidden: width of the MLP (128: official scripts).
        init: "zero" starts as the identity; "paper" draws what writes U and c too.

    Raises:
        ValueError: a size that is no positive integer, a ``p`` below 2, or an unknown ``init``.
    """

    def __init__(
        self,
        d: int,
        tasks: int,
        layers: int,
        positions: int = 1,
        *,
        reduction: float = 8,
        p: int = 8,
        dim: int = 512,
        hidden: int = 128,
        init: str = "zero",
    ) -> None:
        super().__init__()
        sizes = {"d": d, "tasks": tasks, "layers": layers, "positions": positions, "dim": dim, "hidden": hidden}
        for name, size in sizes.items():
            integer(name, size, 1)
        integer("p", p, 2)  # LayerNorm makes a single entry a zero
        number("reduction", reduction, 0, open_low=True)
        one_of("init", init, INITS)
        self.d = d
        self.reduction = reduction
        self.layers = layers
        self.positions = positions
        self.r = max(1, int(d / reduction))
        self.task = nn.Parameter(torch.randn(tasks, dim))
        self.layer = nn.Parameter(torch.randn(layers, dim))
        self.mlp = nn.Sequential(nn.Linear(2 * dim, hidden), nn.ReLU(), nn.Linear(hidden, p))
        self.norm = nn.LayerNorm(p, eps=1e-6)
        outputs = {"D": d * self.r, "b": self.r, "U": d * self.r, "c": d}
        self.write = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(p, size) for name, size in outputs.items()}) for _ in range(positions)
        )
        for linear in (m for m in self.modules() if isinstance(m, nn.Linear)):
            nn.init.normal_(linear.weight, std=0.01)
            nn.init.zeros_(linear.bias)
        if init == "zero":
            for weight in (writer.get_parameter(f"{name}.weight") for writer in self.write for name in ("U", "c")):
                nn.init.zeros_(weight)

    def embed(self, layer: int, one: int | None = None) -> Tensor:
        """The points e of all tasks, or of one: ``(T, p)``."""
        z = self.task if one is None else self.task[one : one + 1]
        # eq-vl_adapter-hyper:  e = LN(MLP([z; l]))
        e: Tensor = self.norm(self.mlp(torch.cat([z, self.layer[layer].expand_as(z)], 1)))
        return e

    def forward(self, layer: int, position: int = 0, one: int | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """D ``(T, r, d)``, b ``(T, r)``, U ``(T, d, r)`` and c ``(T, d)`` of one place."""
        e = self.embed(layer, one)
        write = cast(nn.ModuleDict, self.write[position])
        # eq-vl_adapter-hyper:  D = reshape(H_D e + h_D)
        return (
            write["D"](e).unflatten(1, (self.r, self.d)),
            write["b"](e),
            write["U"](e).unflatten(1, (self.d, self.r)),
            write["c"](e),
        )


class Hyperformer(Adapter):
    """A bottleneck whose weights a :class:`HyperNet` writes (eq-vl_adapter-hyper).

    Args:
        base: the frozen layer, with ``hyper.d`` outputs.
        layer: of this adapter; :func:`places` finds it.
        position: in the block; :func:`places` finds it.
        task_names: of a file, to be compared with ``tasks``; leave it out.
        tasks: the object that knows the task.
        hyper: the network.
        batch_dim: as of :class:`~peftref.adapters.vl_adapter.VLAdapter`.

    Raises:
        ValueError: no network, one for another width or number of tasks, or a place that it does not have.
    """

    kind = "hyperformer"
    mergeable = False
    options = ("layer", "position", "task_names", "batch_dim")

    def __init__(
        self,
        base: Layer,
        layer: int = 0,
        position: int = 0,
        task_names: Sequence[str] | None = None,
        *,
        tasks: Tasks | None = None,
        hyper: HyperNet | None = None,
        batch_dim: int = 0,
    ) -> None:
        super().__init__()
        self.batch_dim = check_batch_dim(batch_dim, base)
        self.task_names = agreed_names(tasks, task_names)
        assert tasks is not None
        if hyper is None or hyper.d != base.out_features:
            got = "None" if hyper is None else f"one for {hyper.d}"
            raise ValueError(f"hyper: expected a HyperNet for {base.out_features} outputs, got {got}")
        if len(hyper.task) != len(self.task_names):
            raise ValueError(f"hyper: expected one for {len(self.task_names)} tasks, got one for {len(hyper.task)}")
        if not (0 <= layer < hyper.layers and 0 <= position < hyper.positions):
            have = f"{hyper.layers} layers and {hyper.positions} positions"
            raise ValueError(f"layer, position: expected numbers below those of {have}, got {layer} and {position}")
        self.layer = layer
        self.position = position
        self.tasks = tasks
        self.hyper = hyper

    def forward(self, x: Tensor, y0: Tensor, base: Layer) -> Tensor:
        D, b, U, c = self.hyper(self.layer, self.position, self.tasks.one)
        pick = self.tasks.pick
        return bottleneck(y0, pick(D), pick(b), pick(U), pick(c), self.batch_dim)

    @torch.no_grad()
    def written(self, base: Layer) -> VLAdapter:
        """An ordinary adapter with the weights of this moment, for use without the network: nothing is computed twice.

        Put those of all layers in with :func:`~peftref.adapters.core.injection.install`.
        """
        adapter = VLAdapter(base, self.hyper.reduction, "multiple", tasks=self.tasks, batch_dim=self.batch_dim)
        adapter.to(self.hyper.task)
        D, b, U, c = self.hyper(self.layer, self.position)
        for half, weight, bias in ((adapter.down, D, b), (adapter.up, U, c)):
            half.get_parameter("weight").copy_(weight)
            half.get_parameter("bias").copy_(bias)
        return adapter


def places(model: nn.Module, targets: str | Iterable[str]) -> dict[str, dict[str, int]]:
    """Layer and position of each target, for ``inject(..., per_layer=...)``.

    In ``blocks.3.mlp.fc2`` the first number tells the block; what stands around it, the position. Blocks are counted
    from zero among those that have a target, so a stack that starts at block 6 needs no six layers more.

    Raises:
        ValueError: a name without a number; or as in :func:`~peftref.adapters.core.targets.find`.
    """
    names = list(find(model, targets))
    found = {name: re.fullmatch(r"(\D*)(\d+)(.*)", name) for name in names}
    parts = {name: match for name, match in found.items() if match}
    unnumbered = [name for name in names if name not in parts]
    if unnumbered:
        raise ValueError(f"targets: expected layers in numbered blocks, got {unnumbered}")
    numbers = sorted({int(match[2]) for match in parts.values()})
    around = list(dict.fromkeys((match[1], match[3]) for match in parts.values()))
    return {
        name: {"layer": numbers.index(int(match[2])), "position": around.index((match[1], match[3]))}
        for name, match in parts.items()
    }
