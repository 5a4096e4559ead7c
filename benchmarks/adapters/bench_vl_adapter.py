"""VL-Adapter: one training step against the modules as published, mixed batches against a loop over tasks, products.

Adapters sit where the paper has them, on the outputs of attention and of the MLP; r = 96. Peers follow the official
code (tests/_naive has its arithmetic number by number): linear layers with a residual, one set per task; Kronecker
products by an einsum over all k, summed afterwards.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks._timing import Row, compare
from benchmarks.adapters._step import BATCH, HEADS, WIDTH, block, step_row, stir, tokens
from peftref.adapters.core.injection import adapters, inject
from peftref.adapters.core.phm import phm_linear, phm_weight
from peftref.adapters.core.switch import Tasks
from peftref.adapters.vl_adapter import VLAdapter

SIZE = {"width": WIDTH, "heads": HEADS}
TARGETS = ["proj", "fc2"]
NAMES = ["vqa", "gqa", "nlvr", "coco"]


class Linears(nn.Module):
    """The two linear layers of one task."""

    def __init__(self, twin: VLAdapter, t: int) -> None:
        super().__init__()
        halves = []
        for half in (twin.down, twin.up):
            t_own = t if len(half.weight) > 1 else 0
            linear = nn.Linear(half.weight.shape[2], half.weight.shape[1])
            with torch.no_grad():
                linear.weight.copy_(half.weight[t_own])
                linear.bias.copy_(half.bias[t_own])
            halves.append(linear)
        self.down, self.up = halves

    def forward(self, h: Tensor) -> Tensor:
        return self.up(F.gelu(self.down(h), approximate="tanh")) + h


class Published(nn.Module):
    """A layer with the adapters of all tasks; of a mixed batch, the elements of each task in turn."""

    def __init__(self, layer: nn.Module, twin: VLAdapter, task: Tensor | None) -> None:
        super().__init__()
        self.layer, self.task = layer, task
        copies = 1 if task is None else len(NAMES)
        self.adapters = nn.ModuleList(Linears(twin, t) for t in range(copies))

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        if self.task is None:
            return self.adapters[0](h)
        y = torch.zeros_like(h)
        for t, adapter in enumerate(self.adapters):
            rows = (self.task == t).nonzero()[:, 0]
            if len(rows):
                y = y.index_add(0, rows, adapter(h[rows]))
        return y


class Einsum(VLAdapter):
    """Products as published: all terms, then their sum, once more in every step."""

    kind = "bench_vl_adapter_einsum"

    def forward(self, x: Tensor, y0: Tensor, base: object) -> Tensor:
        h = y0
        for half in (self.down, self.up):
            A, B = half.rule.A[0], half.right[0]
            H = torch.einsum("bac,bkp->bakcp", A, B).reshape(len(A), A.shape[1] * B.shape[1], -1).sum(0)
            h = torch.matmul(h if half is self.down else F.gelu(h, approximate="tanh"), H) + half.bias[0]
        return h


def ours(size: dict[str, int], kind: type[VLAdapter] = VLAdapter, **options: object) -> nn.Module:
    model = block(**size)
    torch.manual_seed(0)
    inject(model, kind, TARGETS, **options)
    return stir(model)


def published(size: dict[str, int], twin: nn.Module, task: Tensor | None = None) -> nn.Module:
    model = block(**size)
    for name, adapter in adapters(twin).items():
        parent, _, attr = name.rpartition(".")
        setattr(model.get_submodule(parent), attr, Published(model.get_submodule(name), adapter, task))
    return model


def product_row(claim: str, rows: int, d: int, r: int, n: int) -> Row:
    """x W without W, against W built and multiplied."""
    g = torch.Generator().manual_seed(0)
    A, B, x = (torch.randn(*s, generator=g) for s in ((n, n, n), (n, d // n, r // n), (rows, d)))
    torch.testing.assert_close(phm_linear(x, A, B), x @ phm_weight(A, B), rtol=1e-4, atol=1e-3)
    name = "W built, then one product"
    return compare(claim, lambda: phm_linear(x, A, B), lambda: x @ phm_weight(A, B), peer_name=name, repeats=15)


def rows(size: dict[str, int] = SIZE, x: Tensor | None = None) -> list[Row]:
    x, tasks = tokens() if x is None else x, Tasks(NAMES)
    single, what = ours(size), "training step, block of ViT-B/16, r = 96"
    many = ours(size, sharing="multiple", tasks=tasks)
    task = torch.randint(len(NAMES), (len(x),), generator=torch.Generator().manual_seed(0))
    tasks.use(task)
    d = size["width"]
    return [
        step_row(what, single, published(size, single), peer_name="modules as published", x=x, target=1.0),
        step_row(f"{what}, batch of 4 tasks", many, published(size, many, task), peer_name="a loop over tasks", x=x),
        step_row(f"{what}, PHM n = 2", ours(size, phm=2), ours(size, Einsum, phm=2), peer_name="products as published",
                 x=x, target=1.0),
        product_row(f"x W of 1 row, n = 2, {d} to {d // 8}", 1, d, d // 8, 2),
        product_row(f"x W of {BATCH * 197} rows, n = 2, {d} to {d // 8}", BATCH * 197, d, d // 8, 2),
    ]  # fmt: skip
