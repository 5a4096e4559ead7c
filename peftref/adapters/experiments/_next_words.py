"""LoRA's starts in a language model that learns to continue film reviews; see :mod:`peftref.adapters.experiments.eva`.

One rank, one strength and one learning rate for all starts: those of the paper's Table 4. Its batches, its schedule and
its LoRA on the head are not taken over.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from ...fitting import minimise
from ..baselines.lora import LoRA
from ..core.injection import adapters, inject
from ..eva import collect, inject_eva
from ._pieces import Claim, judged
from ._sentences import linears

__all__ = ["NEXT_WORDS_ARMS", "next_words"]

NEXT_WORDS_ARMS = ("LoRA", "orthogonal", "EVA", "EVA, not centred")
CLAIMS = (
    Claim("next words, held-out loss: EVA - LoRA", "EVA", "LoRA", "abstract", side="below", column="held out"),
    Claim("next words, held-out loss: EVA - orthogonal", "EVA", "orthogonal", side="below", column="held out"),
    Claim("next words, held-out loss: orthogonal - LoRA", "orthogonal", "LoRA", side="below", column="held out"),
    Claim("next words, held-out loss: not centred - EVA", "EVA, not centred", "EVA", side="below", column="held out"),
    Claim("next words, training loss: EVA - LoRA", "EVA", "LoRA", "abstract", side="below", column="training"),
)


def next_words(
    each: Callable[..., Any],
    seeds: Sequence[int],
    load: Callable[[], tuple[nn.Module, Tensor]],
    *,
    looked_at: int,
    steps: int,
    batch_size: int,
    held_out: int,
    **setting: Any,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows and arrays of the trainings.

    Args:
        each: of :func:`peftref.recording.record`.
        seeds: each draws its blocks, without overlap within a seed, and the initialisation.
        load: gives the model and blocks of tokens ``(N, tokens)`` to draw from.
        looked_at: blocks that EVA looks at; not trained on.
        steps: of each training.
        batch_size: blocks of a step.
        held_out: blocks for the loss before and after.
        setting: learning rate, rank and ``lora_alpha``.
    """

    def one(arm: str, seed: int) -> dict[str, Any]:
        model, blocks = load()
        order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))
        parts = blocks[order].split([looked_at, steps * batch_size, held_out, len(blocks) - _used()])
        return _learn(model, arm, parts[0], parts[1].split(batch_size), parts[2], seed, **setting)

    def _used() -> int:
        return looked_at + steps * batch_size + held_out

    runs = {arm: [each(f"next words, {arm}, seed {s}", one, arm, s) for s in seeds] for arm in NEXT_WORDS_ARMS}
    table = pd.DataFrame(
        [
            {"method": arm, "seed": seed, "held out": run["after"], "training": sum(run["losses"]) / steps}
            for arm, found in runs.items()
            for seed, run in zip(seeds, found, strict=True)
        ]
    )
    rows = judged(table, *CLAIMS)
    for row in rows:
        row["unit"] = "nats"
    arrays = {
        "before": [run["before"] for run in runs["LoRA"]],
        "after": {arm: [run["after"] for run in found] for arm, found in runs.items()},
        "losses": {arm: [run["losses"] for run in found] for arm, found in runs.items()},
    }
    return rows, {"next_words": arrays}


def _learn(
    model: nn.Module,
    arm: str,
    looked_at: Tensor,
    batches: Sequence[Tensor],
    held_out: Tensor,
    seed: int,
    *,
    lr: float,
    r: int,
    lora_alpha: float,
) -> dict[str, Any]:
    """One training: the loss of each step; and on held-out blocks, before and after."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = copy.deepcopy(model)
        before = _loss(net, held_out)
        names = linears(net)
        if arm in ("LoRA", "orthogonal"):
            inject(net, LoRA, names, r=r, lora_alpha=lora_alpha)
            for adapter in adapters(net).values() if arm == "orthogonal" else ():
                nn.init.orthogonal_(adapter.get_parameter("lora_A.weight"))
        else:
            parts = [{"input_ids": part} for part in looked_at.split(4)]
            center = arm == "EVA"
            found = collect(net, names, parts, r=r, rho=1.0, route="lowrank", tau=1.0, center=center)
            inject_eva(net, found, lora_alpha=lora_alpha)
        rest = iter(batches)

        def loss() -> Tensor:
            batch = next(rest)
            value: Tensor = net(input_ids=batch, labels=batch).loss
            return value

        losses = minimise(loss, net.parameters(), lr=lr, steps=len(batches))
    return {"before": before, "after": _loss(net, held_out), "losses": losses.tolist()}


@torch.no_grad()
def _loss(net: nn.Module, blocks: Tensor) -> float:
    """Mean loss of a token, in nats."""
    return float(torch.stack([net(input_ids=part, labels=part).loss for part in blocks.split(1)]).mean())
