"""The naive twins of LAE: plain loops, and what the published code does, written from a description of it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


# --- the specification ------------------------------------------------------------------------------------------------
def loop_prefix_attention(q, k, v, p_k, p_v, compensate: bool) -> tuple[list[list[float]], list[list[float]]]:
    """One head, lists of rows: outputs, and the weights of prefix and tokens of each query (each softmax by hand)."""
    out = []
    weights = []
    for query in q:
        keys = [*p_k, *k]
        values = [*p_v, *v]
        e = [math.exp(sum(a * b for a, b in zip(query, key, strict=True)) / math.sqrt(len(query))) for key in keys]
        w = [x / sum(e) for x in e]
        share = sum(w[: len(p_k)])
        if compensate:
            w = [x / share for x in w[: len(p_k)]] + w[len(p_k) :]
        out.append([sum(x * row[i] for x, row in zip(w, values, strict=True)) for i in range(len(v[0]))])
        weights.append(w)
    return out, weights


def loop_ema(start: list[float], online: list[list[float]], alpha: float) -> list[float]:
    """The offline numbers after one step for each online state."""
    offline = list(start)
    for state in online:
        offline = [alpha * a + (1 - alpha) * b for a, b in zip(offline, state, strict=True)]
    return offline


def loop_vote(probs: list[list[list[float]]]) -> list[int]:
    """Experts x images x classes -> class of each image; of equal ones the first."""
    chosen = []
    for n in range(len(probs[0])):
        best = -1.0
        which = -1
        for k in range(len(probs[0][0])):
            surest = max(expert[n][k] for expert in probs)
            if surest > best:
                best = surest
                which = k
        chosen.append(which)
    return chosen


def loop_local_loss(logits: list[list[float]], y: list[int], start: int) -> float:
    total = 0.0
    for row, label in zip(logits, y, strict=True):
        total += math.log(sum(math.exp(z) for z in row[start:])) - row[label]
    return total / len(y)


# --- the published form -----------------------------------------------------------------------------------------------
def published_prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, p_k: Tensor, p_v: Tensor, compensate: bool = True, position: int = 1
) -> Tensor:
    """The whole attention matrix, with the prefix after the class token, its columns divided by their sum."""
    p_k, p_v = (p.expand(*k.shape[:-2], *p.shape[-2:]) for p in (p_k, p_v))
    keys = torch.cat([k[..., :position, :], p_k, k[..., position:, :]], -2)
    values = torch.cat([v[..., :position, :], p_v, v[..., position:, :]], -2)
    attn = (q @ keys.mT * q.shape[-1] ** -0.5).softmax(-1)
    if compensate:
        own = slice(position, position + p_k.shape[-2])
        share = attn[..., own].sum(-1, keepdim=True)
        scaled = attn[..., own] / share.clamp(min=1e-12)
        attn = torch.cat([attn[..., : own.start], scaled, attn[..., own.stop :]], -1)
    return attn @ values


def materialised_lse(q: Tensor, k: Tensor, v: Tensor, p_k: Tensor, p_v: Tensor) -> Tensor:
    """Two attentions combined by the log-sum-exps of their scores."""
    scale = q.shape[-1] ** -0.5
    share = torch.sigmoid(torch.logsumexp(q @ p_k.mT * scale, -1) - torch.logsumexp(q @ k.mT * scale, -1))[..., None]
    p_k, p_v = (p.expand(*k.shape[:-2], *p.shape[-2:]) for p in (p_k, p_v))
    tokens = F.scaled_dot_product_attention(q, k, v)
    own = F.scaled_dot_product_attention(q, p_k, p_v)
    return (1 - share) * tokens + own


def published_kv_lora(x: Tensor, qkv: nn.Linear, A_k, B_k, A_v, B_v, s_k=1.0, s_v=1.0) -> Tensor:
    """The dense update is made at every call."""
    d = qkv.out_features // 3
    zero = torch.zeros(d, qkv.in_features, dtype=x.dtype)
    return F.linear(x, qkv.weight + torch.cat([zero, s_k * (B_k @ A_k), s_v * (B_v @ A_v)]), qkv.bias)


def published_ema(offline: nn.Module, online: nn.Module, alpha: float) -> None:
    """Tensor by tensor over the state dict."""
    with torch.no_grad():
        for slow, fast in zip(offline.state_dict().values(), online.state_dict().values(), strict=True):
            slow.copy_(alpha * slow + (1.0 - alpha) * fast)


def published_after(host, layer, x: Tensor) -> Tensor:
    """``"after"`` in the published code: the input is added, not the host's output."""
    return layer(host(x)) + x
