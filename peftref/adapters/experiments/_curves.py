"""EVA and its rivals learn to judge sentences; see :mod:`peftref.adapters.experiments.eva`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...fitting import minimise
from ..baselines.lora import LoRA
from ..core.injection import adapters, inject
from ..eva import Directions, collect, inject_eva
from ._pieces import Claim, judged
from ._sentences import Features, SentenceTask, linears, rotten_tomatoes, stand_in

__all__ = ["ARMS", "curves"]

HEAD = "head only"
LORA = "LoRA"
EVA = "EVA"
MINOR = "minor components"
ARMS = (HEAD, LORA, EVA, MINOR)
TUNING_SEEDS = (1000,)  # of the runs that choose a learning rate; none of the runs that count

MINOR_TABLE = "Table 12, whose EVA is the LoRA+ of Table 10: commonsense, Llama-2-7B"
CLAIMS = (
    Claim("early training loss: EVA - LoRA", EVA, LORA, "abstract", side="below", column="early"),
    Claim("accuracy: EVA - LoRA", EVA, LORA, "Table 2: GLUE, RoBERTa-large", 0.3),
    Claim("accuracy: EVA - minor components", EVA, MINOR, MINOR_TABLE, 1.4),
    Claim("accuracy: LoRA - head only", LORA, HEAD),
)


def curves(
    each: Callable[..., Any],
    seeds: Sequence[int],
    sentences: dict[str, Any],
    arms: Sequence[str],
    lrs: Sequence[float],
    every: int,
    r: int,
    **options: Any,
) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any]]:
    """Rows, arrays and protocol of the curves.

    Args:
        each: of :func:`peftref.recording.record`.
        seeds: of the runs that count.
        sentences: of :func:`peftref.adapters.experiments._sentences.rotten_tomatoes`, and how many are trained on.
        arms: each at the best of its learning rates.
        lrs: learning rates to choose from.
        every: how many steps there are between two tests.
        r: rank.
        options: of every training.
    """
    loaded: list[SentenceTask] = []

    def one(arm: str, seed: int, scored: str, **settings: Any) -> dict[str, Any]:
        if not loaded:
            given = {k: v for k, v in sentences.items() if k not in ("task", "train")}
            loaded.append(rotten_tomatoes(**given) if given else stand_in())
        return _learn(loaded[0], arm, seed=seed, scored=scored, train=sentences["train"], **settings, **options)

    def tune(arm: str, lr: float) -> list[dict[str, Any]]:
        settings = {"lr": lr, "r": r, "every": options["steps"]}
        return [each(f"{arm}, rate {lr:g}, tuning {s}", one, arm, s, "val", **settings) for s in TUNING_SEEDS]

    tuning = {arm: {lr: _score(tune(arm, lr)) for lr in lrs} for arm in arms}
    chosen = {arm: max(lrs, key=tuning[arm].__getitem__) for arm in arms}
    runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    for seed in seeds:
        for arm in arms:
            settings = {"lr": chosen[arm], "r": r, "every": every}
            runs[arm].append(each(f"{arm}, rate {chosen[arm]:g}, seed {seed}", one, arm, seed, "test", **settings))
    rows = _rows(runs, seeds)
    arrays = {
        "losses": {name: [run["losses"] for run in found] for name, found in runs.items()},
        "accuracy": {name: [run["accuracy"] for run in found] for name, found in runs.items()},
        "tuning": {arm: {f"{lr:g}": scores[lr][0] for lr in lrs} for arm, scores in tuning.items()},
    }
    return rows, arrays, {"rates": chosen, "trained": {name: found[0]["trained"] for name, found in runs.items()}}


def _score(runs: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Mean accuracy on validation sentences and, between equals, mean training loss at the end."""
    accuracy = sum(run["accuracy"][-1] for run in runs)
    loss = sum(float(run["losses"][-1]) for run in runs)
    return accuracy / len(runs), -loss / len(runs)


def _rows(runs: dict[str, list[dict[str, Any]]], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Findings of the claims whose arms there are."""
    table = pd.DataFrame(
        [
            {"method": arm, "seed": seed, "accuracy": run["accuracy"][-1], "early": run["early"]}
            for arm, found in runs.items()
            for seed, run in zip(seeds, found, strict=True)
        ]
    )
    found = judged(table, *(claim for claim in CLAIMS if {claim.one, claim.other} <= set(runs)))
    for row in found:
        row["unit"] = "nats" if "loss" in row["claim"] else "points"
    return found


def _learn(
    task: SentenceTask,
    arm: str,
    *,
    lr: float,
    seed: int,
    scored: str,
    train: int,
    steps: int,
    every: int,
    batch_size: int,
    r: int,
) -> dict[str, Any]:
    """One training: losses, in twenty means; and accuracy on one part of the sentences, every so many steps."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = copy.deepcopy(task.top)
        nn.init.trunc_normal_(net.head.weight, std=0.02)
        nn.init.zeros_(net.head.bias)
        sentences = task.train.rows(torch.randperm(len(task.train.y))[:train])
        order = torch.cat([torch.randperm(train) for _ in range(steps * batch_size // train + 1)]).split(batch_size)
        _adapt(net, arm, sentences, r)
        net.head.requires_grad_(True)
        part: Features = getattr(task, scored)
        parts = iter(order)
        curve: list[float] = []
        done = 0

        def loss() -> Tensor:
            nonlocal done
            if done % every == 0 and done:
                curve.append(_accuracy(net, part))
            done += 1
            batch = sentences.rows(next(parts))
            return F.cross_entropy(net(**batch.inputs()), batch.y)

        losses = minimise(loss, net.parameters(), lr=lr, steps=steps)
    width = max(1, steps // 20)
    head = {id(p) for p in net.head.parameters()}
    return {
        "losses": losses[: steps // width * width].view(-1, width).mean(1),
        "early": losses[: max(2, steps // 4)].mean(),
        "accuracy": [*curve, _accuracy(net, part)],
        "trained": sum(p.numel() for p in net.parameters() if p.requires_grad and id(p) not in head),
    }


def _adapt(net: nn.Module, arm: str, sentences: Features, r: int) -> None:
    """Put the arm's LoRA into the network."""
    names = linears(net)
    if arm == HEAD:
        net.requires_grad_(False)
        return
    if arm == LORA:
        inject(net, LoRA, names, r=r, lora_alpha=r)
        return
    batches = [sentences.rows(i).inputs() for i in torch.arange(len(sentences.y)).split(50)]
    if arm == MINOR:  # all components, of which the last are taken
        widest = max(net.get_parameter(f"{n}.weight").shape[1] for n in names)
        every = collect(net, names, batches, r=widest, rho=1.0).spectra
        found = Directions(every, dict.fromkeys(names, r), r, len(batches), [])
        inject_eva(net, found, lora_alpha=r)
        for name, adapter in adapters(net).items():
            adapter.get_parameter("lora_A.weight").data.copy_(every[name].components[-r:])
        return
    inject_eva(net, collect(net, names, batches, r=r, rho=1.0), lora_alpha=r)


@torch.no_grad()
def _accuracy(net: nn.Module, part: Features) -> float:
    """Share of sentences classified correctly, in %."""
    right = [(net(**b.inputs()).argmax(-1) == b.y).sum() for b in map(part.rows, torch.arange(len(part.y)).split(100))]
    return 100 * float(torch.stack(right).sum()) / len(part.y)
