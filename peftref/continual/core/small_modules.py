r"""Two small modules that LAE tunes beside the attention, and two experts in one batch.

Both are adapters in the sense of :mod:`peftref.adapters.core.adapter` and go in by
:func:`~peftref.adapters.core.injection.inject`. With :math:`x` the input of the attention, already normalised, and
:math:`\sigma` the GELU, :class:`ParallelAdapter` adds to the attention's output (eq-lae-adapter), and :class:`KVLoRA`
to the keys and values alone (eq-lae-kvlora):

.. math::
    f(x) = s\,\bigl(\sigma(xW_d^\top+b_d)\,W_u^\top+b_u\bigr),\qquad
    \Delta W_{qkv} = \begin{bmatrix}0\\ s_kB_kA_k\\ s_vB_vA_v\end{bmatrix}.

:math:`W_u, b_u, B_k, B_v` start at zero, so the model starts as it was; the scales, trained too, start at 1.

=========================  =========================  ==========
argument                   here                       shape
=========================  =========================  ==========
``down``, ``up``           :math:`W_d, W_u`           ``(h, d)``, ``(d, h)``
``A_k``, ``A_v``           :math:`A_k, A_v`           ``(r, i)``
``B_k``, ``B_v``           :math:`B_k, B_v`           ``(kv, r)``
``s``, ``s_k``, ``s_v``    :math:`s, s_k, s_v`        ``()``
=========================  =========================  ==========

Paper and code: see :mod:`peftref.continual.lae`. Differs from the official code: LoRA is two thin products, where that
code makes the dense update at every call; behind a module (``placement="after"``) the adapter is added to the module's
output, where that code adds it to the module's *input* and so bypasses the module as long as the adapter is zero.

>>> import torch
>>> from peftref.adapters.core.injection import adapters, inject
>>> from peftref.models.vit import ViT
>>> net, x = ViT(embed_dim=32, depth=2).eval(), torch.rand(3, 1, 28, 28)
>>> before = net(x)
>>> inject(net, ParallelAdapter, r"blocks\.\d+\.attn", name="a")
['blocks.0.attn', 'blocks.1.attn']
>>> torch.equal(net(x), before)                        # nothing has changed yet
True
>>> sum(p.numel() for p in net.parameters() if p.requires_grad)   # 2 blocks x (2 d h + d + h + 1), d = 32, h = 5
716
>>> inject(net, KVLoRA, ["qkv"], name="b", r=2)
['blocks.0.attn.qkv', 'blocks.1.attn.qkv']
>>> _ = torch.nn.init.ones_(adapters(net, "b")["blocks.0.attn.qkv"].B_v)
>>> torch.equal(net(x), before)
False
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..._checks import integer
from ...adapters.core.adapter import Adapter
from ...adapters.core.layers import Layer, view, width

__all__ = ["Experts", "KVLoRA", "ParallelAdapter"]

PLACEMENTS = ("parallel", "before", "after")


class ParallelAdapter(Adapter):
    r"""A bottleneck f(x) = s (gelu(x W_d^T + b_d) W_u^T + b_u) beside a module (eq-lae-adapter).

    The module, such as the attention of a block, maps ``(..., d)`` to ``(..., d)``.

    Args:
        base: the frozen module.
        hidden: h (5: official configuration); a float below 1 is a share of d.
        placement: ``"parallel"`` adds :math:`f(x)` (official configuration), ``"after"`` :math:`f(g(x))` of the
            module's output; ``"before"`` gives the module :math:`x+f(x)`, and runs it twice.

    Raises:
        ValueError: no hidden unit, an unknown placement, or a module that does not say how wide it is.
    """

    kind = "parallel_adapter"
    options = ("hidden", "placement")
    mergeable = False
    any_module = True

    def __init__(self, base: Layer, hidden: int | float = 5, placement: str = "parallel") -> None:
        super().__init__()
        d = width(base.module)
        units = int(hidden * d) if isinstance(hidden, float) and 0 < hidden < 1 else hidden
        if isinstance(units, bool) or not isinstance(units, int) or units < 1:
            raise ValueError(f"hidden: expected a positive integer, or a share of {d} that gives one, got {hidden!r}")
        if placement not in PLACEMENTS:
            raise ValueError(f"placement: expected one of {PLACEMENTS}, got {placement!r}")
        self.hidden = hidden
        self.placement = placement
        self.down = nn.Linear(d, units)
        self.up = nn.Linear(units, d)  # down: as Linear draws it, kaiming with a^2 = 5
        self.s = nn.Parameter(torch.ones(()))
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor, y0: Tensor, base: Layer) -> Tensor:
        if self.placement == "before":
            kept = next(base.module.parameters()).dtype
            moved: Tensor = base.module((x + self.branch(x)).to(kept))
            return moved - y0
        return self.branch(x if self.placement == "parallel" else y0)

    def branch(self, x: Tensor) -> Tensor:
        """The bottleneck on each row, ``(..., d) -> (..., d)``."""
        # eq-lae-adapter:  f = s (gelu(x W_d^T + b_d) W_u^T + b_u), scaled where it is small: in the weights
        return F.linear(F.gelu(self.down(x)), self.s * self.up.weight, self.s * self.up.bias)


class KVLoRA(Adapter):
    """Low-rank updates s_k B_k A_k and s_v B_v A_v of keys and values (eq-lae-kvlora); the queries stay as they are.

    In one projection to queries, keys and values.

    Args:
        base: the frozen ``qkv``, with all queries first, then all keys, then all values; not head by head, as in
            GPT-NeoX, BLOOM and Falcon, which a layer does not show.
        r: rank (5: official configuration). Above the width it adds weights and no freedom, but is allowed.
        kv: outputs that are keys, and as many that are values; default: a third each, of three times the inputs. To be
            given where heads share their keys (number of key heads times their width) or are narrower or wider.

    Raises:
        ValueError: a rank that is no positive integer, or outputs of which ``kv`` has to say which are the keys.
    """

    kind = "kv_lora"
    options = ("r", "kv")

    def __init__(self, base: Layer, r: int = 5, kv: int | None = None) -> None:
        super().__init__()
        if isinstance(r, bool) or not isinstance(r, int) or r < 1:
            raise ValueError(f"r: expected a positive integer, got {r!r}")
        outputs = base.out_features
        if kv is None and outputs != 3 * base.in_features:
            got = f"{outputs} outputs of {base.in_features} inputs"
            raise ValueError(f"base: expected as many queries, keys and values as inputs, or kv to be given, got {got}")
        width = integer("kv", outputs // 3 if kv is None else kv, 1, (outputs - 1) // 2)
        self.r = r
        self.kv = kv
        bound = 1 / math.sqrt(base.in_features)
        self.A_k, self.A_v = (nn.Parameter(torch.empty(r, base.in_features).uniform_(-bound, bound)) for _ in range(2))
        self.B_k, self.B_v = (nn.Parameter(torch.zeros(width, r)) for _ in range(2))
        self.s_k, self.s_v = (nn.Parameter(torch.ones(())) for _ in range(2))

    def forward(self, x: Tensor, y0: Tensor, base: Layer) -> Tensor:
        # eq-lae-kvlora:  (0, s_k (x A_k^T) B_k^T, s_v (x A_v^T) B_v^T), never a d x d matrix
        k, v = base.linear(x, torch.cat([self.A_k, self.A_v])).chunk(2, -1)  # (..., r) each
        k = F.linear(self.s_k * k, self.B_k)
        v = F.linear(self.s_v * v, self.B_v)  # (..., kv) each
        return F.pad(torch.cat([k, v], -1), (base.out_features - 2 * k.shape[-1], 0))

    def delta(self, base: Layer) -> tuple[Tensor, None]:
        # eq-lae-kvlora
        k = self.s_k * self.B_k @ self.A_k
        v = self.s_v * self.B_v @ self.A_v
        return F.pad(torch.cat([k, v]), (0, 0, base.out_features - 2 * len(k), 0)), None


class Experts(Adapter):
    """Adapters of one place, each on its own part of the batch: the first gets the first images, and so on.

    The members stay where they are, under names of their own; this one has no weights.

    Args:
        members: adapters for the same module.
    """

    kind = "experts"
    any_module = True
    mergeable = False

    def __init__(self, *members: Adapter) -> None:
        super().__init__()
        self.members = members
        self.tap = members[0].tap  # a tuple: no children, so no weight is there twice

    @property
    def dtype(self) -> torch.dtype:
        return self.members[0].dtype

    def forward(self, x: Tensor, y0: Tensor, base: Layer) -> Tensor:
        parts = zip(self.members, self._parts(x), self._parts(y0), strict=True)
        return torch.cat([m(u.to(m.dtype), y.to(m.dtype), view(base.module, m.dtype)) for m, u, y in parts])

    def whole(self, x: Tensor, base: Layer) -> Tensor | None:
        outputs = [m.whole(u, view(base.module, m.dtype)) for m, u in zip(self.members, self._parts(x), strict=True)]
        given = [y for y in outputs if y is not None]
        return torch.cat(given) if len(given) == len(outputs) else None

    def _parts(self, t: Tensor) -> tuple[Tensor, ...]:
        if len(t) % len(self.members):
            raise ValueError(f"x: expected {len(self.members)} copies of a batch, got {len(t)} images")
        return t.chunk(len(self.members)) if len(t) else (t,) * len(self.members)
