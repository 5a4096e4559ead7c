r"""Calibrated prefixes: learned keys and values in a frozen attention that learn as fast as other small modules.

With :math:`L` learned rows :math:`P_k,P_v` beside the keys and values :math:`K,V`, the softmax over the union splits
exactly (eq-lae-split), with a share :math:`\lambda` (eq-lae-share) that the prefix takes from the tokens:

.. math::
    \mathrm{Attn}(q,[P_k;K],[P_v;V])=(1-\lambda)\,\mathrm{Attn}(q,K,V)+\lambda\,\mathrm{Attn}(q,P_k,P_v),\\
    \lambda(q)=\frac{\sum_ie^{qP_{k,i}^\top/\sqrt{d_h}}}
    {\sum_ie^{qP_{k,i}^\top/\sqrt{d_h}}+\sum_je^{qK_j^\top/\sqrt{d_h}}} .

Beside 200 tokens ten rows have :math:`\lambda\approx0.05`, and so has their gradient. LAE divides their attention by
:math:`\lambda` (eq-lae-compensated). No division is needed: a prefix whose values are *zero* takes the same share from
the tokens (eq-lae-zeros), so that two calls of any fused attention give the result,

.. math::
    (1-\lambda)\,\mathrm{Attn}(q,K,V)+\mathrm{Attn}(q,P_k,P_v)
    =\mathrm{Attn}(q,[P_k;K],[0;V])+\mathrm{Attn}(q,P_k,P_v) .

=================  =====================  ====================
argument           here                   shape
=================  =====================  ====================
``q, k, v``        :math:`q, K, V`        ``(..., H, T, d_h)``
``p_k, p_v``       :math:`P_k, P_v`       ``(..., H, L, d_h)``
``s_k, s_v``       scales of the rows     ``()``
=================  =====================  ====================

Paper and code: see :mod:`peftref.continual.lae`. Differs from the official code, which makes the attention matrix and
divides its columns by a :math:`\lambda` clamped at 1e-12: here no T x (L + T) matrix is held where the attention is
fused, and a share that underflows does no harm. As there, :math:`\lambda` is part of the graph, both scales sit on the
rows (:math:`s_k` therefore enters :math:`\lambda`), and the part of the tokens is *not* scaled back up. Where among the
tokens the prefix stands makes no difference: attention is a sum.

>>> q, k, v = torch.randn(3, 1, 2, 6, 4).unbind(0)           # one image, two heads, six tokens
>>> p_k, p_v = torch.randn(2, 2, 3, 4).unbind(0)             # three learned rows in each head
>>> share, tokens = prefix_share(q, k, p_k), F.scaled_dot_product_attention(q, k, v)
>>> prefix = F.scaled_dot_product_attention(q, p_k.expand(1, 2, 3, 4), p_v.expand(1, 2, 3, 4))
>>> plain = prefix_attention(q, k, v, p_k, p_v, compensate=False)
>>> torch.allclose(plain, (1 - share) * tokens + share * prefix, atol=1e-6)
True
>>> torch.allclose(prefix_attention(q, k, v, p_k, p_v), (1 - share) * tokens + prefix, atol=1e-6)
True
>>> from peftref.models.vit import ViT
>>> net = ViT(embed_dim=32, depth=3)
>>> inject_prefix(net, r"blocks\.[01]\.attn", length=4)
['blocks.0.attn', 'blocks.1.attn']
>>> sum(p.numel() for p in net.parameters() if p.requires_grad)     # 2 blocks x (2 L d + 2), d = 32
516
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...adapters.core.adapter import Adapter
from ...adapters.core.host import Host
from ...adapters.core.injection import build, install
from ...adapters.core.layers import Layer, view
from ...adapters.core.targets import modules_by_name
from ._steps import in_mode, tensor_of

__all__ = ["AttentionHost", "Prefix", "heads", "inject_prefix", "prefix_attention", "prefix_share"]


def prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, p_k: Tensor, p_v: Tensor, *, compensate: bool = True, mask: Tensor | None = None
) -> Tensor:
    """Attention with a prefix: (1 - lambda) Attn(q, K, V) + Attn(q, P_k, P_v) (eq-lae-compensated).

    ``(..., H, T, d_h)``.

    Args:
        q: queries of the tokens.
        k: their keys.
        v: their values.
        p_k: keys of the prefix; leading dimensions broadcast, so ``(H, L, d_h)`` serves a whole batch. Without rows
            (L = 0) this is the attention itself.
        p_v: values of the prefix.
        compensate: eq-lae-compensated, else eq-lae-split.
        mask: True where a query may see a token, ``(..., T, T)``; every query sees the prefix.

    Raises:
        ValueError: keys and values of unequal numbers, or a mask that is not boolean.
    """
    if p_k.shape != p_v.shape:
        raise ValueError(f"p_k, p_v: expected one shape, got {tuple(p_k.shape)} and {tuple(p_v.shape)}")
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"mask: expected booleans, got {mask.dtype}")
    rows = p_k.shape[-2]
    if not rows:
        return F.scaled_dot_product_attention(q, k, v, mask)
    p_k, p_v = (p.to(k.dtype).expand(*k.shape[:-2], *p.shape[-2:]) for p in (p_k, p_v))
    seen = None if mask is None else F.pad(mask, (rows, 0), value=True)  # (..., T, L + T)
    keys = torch.cat([p_k, k], -2)
    if not compensate:
        # eq-lae-split:  Attn(q, [P_k; K], [P_v; V])
        return F.scaled_dot_product_attention(q, keys, torch.cat([p_v, v], -2), seen)
    # eq-lae-zeros:  Attn(q, [P_k; K], [0; V]) is (1 - lambda) Attn(q, K, V), whatever lambda is
    tokens = F.scaled_dot_product_attention(q, keys, F.pad(v, (0, 0, rows, 0)), seen)
    # eq-lae-compensated:  (1 - lambda) Attn(q, K, V) + Attn(q, P_k, P_v)
    return tokens + F.scaled_dot_product_attention(q, p_k, p_v)


def prefix_share(q: Tensor, k: Tensor, p_k: Tensor) -> Tensor:
    r"""The share lambda of the prefix: the sum of e^(q P_i / sqrt d) over that of prefix and tokens (eq-lae-share).

    Of each query, ``(..., H, T, 1)``, without an attention matrix.

    Args:
        q: queries of the tokens.
        k: their keys.
        p_k: keys of the prefix.

    >>> q = torch.zeros(1, 1, 4)                              # a query that prefers nothing: L / (L + T)
    >>> prefix_share(q, torch.randn(1, 6, 4), torch.randn(1, 2, 4))
    tensor([[[0.2500]]])
    """
    p_k = p_k.to(k.dtype).expand(*k.shape[:-2], *p_k.shape[-2:])
    # eq-lae-share: the attention whose values are 1 on the prefix and 0 on the tokens
    one = F.pad(torch.ones_like(p_k), (0, 0, 0, k.shape[-2]))
    return F.scaled_dot_product_attention(q, torch.cat([p_k, k], -2), one)[..., :1]


class Prefix(Adapter):
    """Learned keys and values of one attention; put in by :func:`inject_prefix`.

    Unlike other adapters it is not zero at first: even a prefix of zeros takes its share from the tokens.

    Args:
        base: an attention with ``qkv``, ``proj`` and ``num_heads``, as timm's and
            :class:`peftref.models.vit.Attention`.
        length: rows L (10: official configuration); 0 leaves the attention as it is.
        compensate: divide by the share (True: official configuration).

    Raises:
        ValueError: a length that is no natural number, or an attention of another form.
    """

    kind = "prefix"
    options = ("length", "compensate")
    mergeable = False
    any_module = True

    def __init__(self, base: Layer, length: int = 10, compensate: bool = True) -> None:
        super().__init__()
        if isinstance(length, bool) or not isinstance(length, int) or length < 0:
            raise ValueError(f"length: expected an integer from 0 on, got {length!r}")
        _check(base.module)
        self.length = length
        self.compensate = compensate
        d = base.module.qkv.out_features // 3
        self.p_k, self.p_v = (nn.Parameter(torch.empty(length, d).uniform_(0, 0.01)) for _ in range(2))
        self.s_k, self.s_v = (nn.Parameter(torch.ones(())) for _ in range(2))

    def rows(self, heads: int) -> tuple[Tensor, Tensor]:
        """Scaled rows, split over the heads as keys and values are: ``(H, L, d_h)`` each."""
        scaled = self.s_k * self.p_k, self.s_v * self.p_v
        return tuple(p.unflatten(-1, (heads, -1)).transpose(0, 1) for p in scaled)

    def whole(self, x: Tensor, base: Layer) -> Tensor:
        attn: Any = base.module  # with what _check asked for
        q, k, v = heads(attn, x)
        y = prefix_attention(q, k, v, *self.rows(attn.num_heads), compensate=self.compensate)
        out: Tensor = attn.proj(y.transpose(1, 2).flatten(2))  # (N, T, d)
        return out

    def forward(self, x: Tensor, y0: Tensor, base: Layer) -> Tensor:
        return self.whole(x.to(next(base.module.parameters()).dtype), base) - y0


class AttentionHost(Host):
    """A host whose adapter may compute the attention itself, instead of correcting what was computed without it."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, **more: Any) -> Tensor:
        if attn_mask is not None or is_causal:
            raise ValueError("attn_mask, is_causal: expected None and False, as in an image network")
        if given := [name for name, value in more.items() if value is not None]:
            raise ValueError(f"{', '.join(given)}: expected None, as the attention with a prefix uses tokens alone")
        return super().forward(x)

    def _whole(self, adapter: Adapter, x: Tensor) -> Tensor | None:
        return adapter.whole(x, view(self.base_layer, adapter.dtype)) if self._is_plain() else None


def inject_prefix(
    model: nn.Module,
    targets: str | Iterable[str],
    *,
    name: str = "default",
    freeze: bool = True,
    length: int = 10,
    compensate: bool = True,
) -> list[str]:
    """Put a prefix into attentions of the model, in place; what :func:`~peftref.adapters.core.injection.inject` is for
    others.

    Args:
        model: any module.
        targets: which attentions, as for ``inject``.
        name: of the adapter, as for ``inject``.
        freeze: as for ``inject``.
        length: rows of the prefix.
        compensate: divide by the share.

    Returns:
        The full names of the attentions.

    Raises:
        ValueError: as ``inject``; the model is then as it was.
        TypeError: as ``inject``; the model is then as it was.
    """
    new = build(model, Prefix, targets, length=length, compensate=compensate)
    install(model, new, name, freeze=freeze)
    for n, module in modules_by_name(model).items():
        if n in new:  # the same host, with other adapters it may have, from now on lets them compute the attention
            module.__class__ = AttentionHost
    return list(new)


def heads(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of an attention, ``(N, T, d) -> (N, H, T, d_h)`` each."""
    q, k, v = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return getattr(attn, "q_norm", nn.Identity())(q), getattr(attn, "k_norm", nn.Identity())(k), v


def _reproduced(attn: Any, x: Tensor) -> Tensor:
    """The attention without a prefix, as :meth:`Prefix.whole` computes it."""
    y = F.scaled_dot_product_attention(*heads(attn, x))
    out: Tensor = attn.proj(y.transpose(1, 2).flatten(2))
    return out


def _check(attn: Any) -> None:
    """Refuse what :meth:`Prefix.whole` would leave out."""
    kind = type(attn).__name__
    missing = [n for n in ("qkv", "proj", "num_heads") if not hasattr(attn, n)]
    if missing:
        raise ValueError(f"base: expected an attention with qkv, proj and num_heads, got a {kind} without {missing}")
    outputs = getattr(attn.qkv, "out_features", 0)
    if not outputs or outputs % (3 * attn.num_heads):
        raise ValueError(f"base: expected queries, keys and values of all heads, got {outputs} outputs of a {kind}")
    more = [n for n in ("norm", "gate") if not isinstance(getattr(attn, n, None), (nn.Identity, type(None)))]
    more += [n for n in ("attn_drop", "proj_drop") if getattr(getattr(attn, n, None), "p", 0.0)]
    if more:
        raise ValueError(f"base: expected an attention without {', '.join(more)}, got a {kind} that has them")
    parts = {name.partition(".")[0] for name, _ in [*attn.named_parameters(), *attn.named_buffers()]}
    if unused := sorted(parts - {"qkv", "proj", "q_norm", "k_norm"}):
        raise ValueError(f"base: expected an attention of qkv and proj alone, got a {kind} with {unused} too")
    _compare(attn, kind)


@torch.no_grad()
def _compare(attn: Any, kind: str) -> None:
    """Refuse an attention that gives something else, on tokens drawn at random, than its qkv and proj do here."""
    like = next(attn.parameters())
    if like.is_meta:
        return
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(2, 5, attn.qkv.in_features, generator=generator).to(like)
    with in_mode(attn, False):
        try:
            theirs = attn(x)
            gap = (tensor_of(theirs) - _reproduced(attn, x)).abs().max()
            share = gap / theirs.abs().max().clamp_min(torch.finfo(like.dtype).tiny)
        except (RuntimeError, TypeError, ValueError, AttributeError, AssertionError, IndexError) as error:
            raise ValueError(f"base: expected an attention of tokens (N, T, d), got a {kind}: {error}") from None
    if not share <= torch.finfo(like.dtype).eps ** 0.5:
        raise ValueError(f"base: expected softmax(q k^T / sqrt d) v, got a {kind}, which is {share:.0%} off it")
