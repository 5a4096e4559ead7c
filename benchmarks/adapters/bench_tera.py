"""TeRA: one training step against the other ways to compute it, and against PEFT's VeRA.

The other ways: scale and multiply token by token, as VeRA's code does; or form the dense update from Kronecker products
that are written out. Both give the same numbers. VeRA is what TeRA generalises; at rank 768 its update can have rank
768 too, and it trains 9,984 numbers where TeRA trains 7,192.
"""

from __future__ import annotations

import functools

import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks._timing import Row
from benchmarks.adapters._step import HEADS, TARGETS, WIDTH, block, step_row, stir, tokens
from peftref.adapters.core.injection import inject
from peftref.adapters.core.layers import Layer
from peftref.adapters.tera import Bank, TeRA, expand, multiply

SIZE = {"width": WIDTH, "heads": HEADS}


class ByToken(TeRA):
    """Every token through the network: M, v, G, u, L."""

    kind = "bench_tera_token"

    def forward(self, x: Tensor, y0: Tensor, base: Layer) -> Tensor:
        core, left, right = self.network.parts(y0)
        z = F.linear(multiply(x, right) * expand(list(self.d_right)), core) * expand(list(self.d_left))
        return multiply(z, [factor.T for factor in left])


class Dense(TeRA):
    """The dense update, by dense Kronecker products."""

    kind = "bench_tera_dense"

    def forward(self, x: Tensor, y0: Tensor, base: Layer) -> Tensor:
        core, left, right = self.network.parts(y0)
        L, M = functools.reduce(torch.kron, left).T, functools.reduce(torch.kron, right)
        return F.linear(x, L @ (expand(list(self.d_left))[:, None] * core * expand(list(self.d_right))) @ M)


def adapted(kind: type[TeRA], size: dict[str, int]) -> nn.Module:
    model = block(**size)
    inject(model, kind, TARGETS, bank=Bank(0))
    return stir(model)


def rows(size: dict[str, int] = SIZE, x: Tensor | None = None) -> list[Row]:
    x = tokens() if x is None else x
    ours, few = adapted(TeRA, size), x[:1].detach().requires_grad_()
    config = peft.VeraConfig(target_modules=TARGETS, r=size["width"])
    vera = stir(peft.get_peft_model(block(**size), config))
    what = "training step, block of ViT-B/16"
    return [
        step_row(what, ours, adapted(ByToken, size), peer_name="token by token", x=x),
        step_row(what + ", one image", ours, adapted(ByToken, size), peer_name="token by token", x=few),
        step_row(what, ours, adapted(Dense, size), peer_name="dense update, Kronecker products written out", x=x),
        step_row(what, ours, vera, peer_name="PEFT's VeRA, r = 768", x=x, equal=False),
    ]
