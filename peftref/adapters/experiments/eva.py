r"""EVA on language: what it finds in SmolLM2-135M, and how MiniLM learns from it.

**Forward passes.** Film reviews, as blocks of tokens, pass through SmolLM2-135M (30 layers, 210 adapted matrices). The
directions and ranks that EVA finds are held against the gradient of the loss on *other* reviews: the share of its
squared length that lies along :math:`r` directions. A seed draws the reviews.

**Next words.** LoRAs on all of these matrices learn to continue reviews, from four starts, with rank, :math:`\alpha`
and learning rate of the paper's Table 4, the same for all. A seed draws the reviews and the initialisation.

**Sentences.** The last layers of MiniLM-L6 learn whether a sentence of Rotten Tomatoes is positive. The arms differ in
where :math:`A` starts; a head without any LoRA is the control. Each has its own learning rate, chosen on validation
sentences. A seed draws the training sentences, the initialisation and the order anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...at_scale import pick_device
from ...data import load
from ...data.text import movie_reviews, token_blocks
from ...models.text import smollm2
from ...results import finding
from ..baselines.lora import LoRA
from ..core.injection import inject
from ..eva import collect, inject_eva
from ._curves import ARMS, curves
from ._language import StandIn, study
from ._next_words import next_words
from ._pieces import Claim
from .at_scale import LARGE, held_out, record_large
from .transfer import LINEARS

__all__ = ["MINUTES", "NEEDS", "PRESETS", "run"]

KINDS = ("q", "k", "v", "o", "gate", "up", "down")  # of matrices in a layer of SmolLM2
RHOS = [1.0, 1.5, 2.0, 4.0]
POOL = 80  # reviews for each seed
RATES = [3e-4, 1e-3, 3e-3]
PUBLISHED = {"lr": 5e-4, "r": 16, "lora_alpha": 1}  # Table 4

PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {
        "seeds": [0, 1],
        "language": {"model": "stand-in", "reviews": 8, "tokens": 8, "held_out": 4, "r": 2, "rhos": RHOS},
        "next_words": {"looked_at": 4, "steps": 2, "batch_size": 2, "held_out": 2, "lr": 1e-2, "r": 2, "lora_alpha": 1},
        "sentences": {"task": "stand-in", "train": 32},
        "training": {"arms": list(ARMS), "lrs": [1e-2], "steps": 4, "every": 2, "batch_size": 8, "r": 2},
    },
    "cpu": {
        "seeds": [0, 1, 2, 3, 4],
        "language": {"model": "SmolLM2-135M", "reviews": 8, "tokens": 128, "held_out": 4, "r": 16, "rhos": RHOS},
        "next_words": {"looked_at": 8, "steps": 24, "batch_size": 2, "held_out": 16, **PUBLISHED},
        "sentences": {"pool": 4000, "val": 500, "test": None, "layers": 3, "length": 32, "train": 1000},
        "training": {"arms": list(ARMS), "lrs": RATES, "steps": 140, "every": 70, "batch_size": 16, "r": 4},
    },
    "gpu": {"large": LARGE},
}
MINUTES = {"smoke": 0.1, "cpu": 60, "gpu": 8}
NEEDS = {"cpu": ("text", "llm"), "gpu": ("cuda", "cifar100")}


BIG_CLAIMS = (
    Claim("ViT-B/16: EVA - LoRA", "EVA", "LoRA", "Table 20: VTAB-1k, DINOv2-g", 1.3),
    Claim("ViT-B/16: dealt ranks - uniform ranks", "EVA, dealt ranks", "EVA"),
)


def run(
    each: Callable[..., Any],
    *,
    data: Path | None = None,
    large: dict[str, Any] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """All three studies, or the large network.

    Args:
        each: of :func:`peftref.recording.record`.
        data: the reader's folder, for the large network.
        large: settings of the large network.
        settings: of the small ones: seeds, forward passes, next words, sentences, training.
    """
    if large:
        return record_large(each, _large_methods(data), BIG_CLAIMS, data, **large)
    seeds = settings["seeds"]
    language = settings["language"]
    pool = POOL * (max(seeds) + 1)
    load = cache(lambda: _model_and_blocks(language["model"], language["tokens"], pool))
    captured, arrays = _captured(each, seeds, load, **language)
    continued, more = next_words(each, seeds, load, **settings["next_words"])
    learned, curve_arrays, protocol = curves(each, seeds, settings["sentences"], **settings["training"])
    return {"rows": captured + continued + learned, "arrays": arrays | more | curve_arrays, "protocol": protocol}


def _large_methods(data: Path | None) -> dict[str, Callable[[nn.Module], object]]:
    """LoRA and EVA of rank 16; EVA looks at 1,024 training images."""
    photographs = held_out(load("cifar100", data)).train.x[:1024].split(64)

    def eva(rho: float, net: nn.Module) -> None:
        net.to(pick_device(None))  # directions are found where training will be
        inject_eva(net, collect(net, LINEARS, photographs, r=16, rho=rho), lora_alpha=16)

    return {
        "LoRA": lambda net: inject(net, LoRA, LINEARS, r=16, lora_alpha=16),
        "EVA": partial(eva, 1.0),
        "EVA, dealt ranks": partial(eva, 2.0),
    }


def _captured(
    each: Callable[..., Any],
    seeds: Sequence[int],
    load: Callable[[], tuple[nn.Module, Tensor]],
    model: str,
    reviews: int,
    held_out: int,
    tokens: int,
    **options: Any,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows and arrays of the forward passes."""

    def one(seed: int) -> dict[str, Any]:
        network, blocks = load()
        order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))
        chosen = blocks[order[: reviews + held_out]]
        return study(network, chosen[:reviews], chosen[reviews:], **options)

    found = [each(f"{model}, reviews {seed}", one, seed) for seed in seeds]
    share = {kind: torch.tensor([f["captured"][kind] for f in found]) for kind in found[0]["captured"]}
    size = torch.tensor([f["size"] for f in found])
    total = {kind: 100 * (s * size).sum(1) / size.sum(1) for kind, s in share.items()}
    level = {kind: float(v.mean()) for kind, v in total.items()}
    saved = [100 * (f["parameters"]["2.0"] / f["parameters"]["1.0"] - 1) for f in found]
    kept = {rho: 100 * torch.tensor([f["kept"][rho] for f in found]) for rho in found[0]["kept"]}

    def gap(what: str, values: Tensor, names: Sequence[str], where: str = "ours") -> dict[str, Any]:
        some = {name: level[name] for name in names}
        return finding(what, values.tolist(), where=where, unit="points", level=some)

    rows = [
        gap("gradient captured: EVA - random", total["EVA"] - total["random"], ("EVA", "random"), "abstract"),
        finding(
            "trained parameters: dealt ranks against uniform ranks",
            saved,
            where="Table 11: Llama-2-7B, 40.6 M to 39.3 M",
            unit="%",
            claim="below",
            paper=-3.2,
            level={"rho = 1 (thousands)": found[0]["parameters"]["1.0"] / 1e3},
        ),
        gap(
            "gradient captured: not centred - centred",
            total["EVA, not centred"] - total["EVA"],
            ("EVA, not centred", "EVA"),
        ),
        gap("gradient captured: its own directions - EVA", total["gradient's own"] - total["EVA"], ("gradient's own",)),
        gap("gradient captured: dealt ranks - uniform ranks", kept["2.0"] - kept["1.0"], ()),
    ]
    blocks = len(found[0]["names"]) // len({n.rsplit(".", 2)[-1] + n.rsplit(".", 2)[-2] for n in found[0]["names"]})

    def by_layer(values: Any) -> Tensor:
        """``(layers, matrices of a layer)``, mean over the seeds."""
        return torch.as_tensor(values, dtype=torch.float32).mean(0).view(blocks, -1)

    arrays = {
        "input": found[0]["input"],  # of each matrix: which input it has
        "ratio": found[0]["ratio"],  # of each input, for the first reviews
        "explained": by_layer([f["explained"] for f in found]),
        "ranks": {rho: by_layer([f["ranks"][rho] for f in found]) for rho in found[0]["ranks"]},
        "captured": {kind: by_layer(s.tolist()) for kind, s in share.items()},
        "captured_total": total,
        "kept": kept,
        "parameters": {rho: [f["parameters"][rho] for f in found] for rho in found[0]["parameters"]},
    }
    return rows, arrays


def _model_and_blocks(model: str, tokens: int, count: int) -> tuple[nn.Module, Tensor]:
    if model == "stand-in":
        g = torch.Generator().manual_seed(0)
        return StandIn(), torch.randint(20, (count, tokens), generator=g)
    network, tokenizer = smollm2()
    reviews = movie_reviews("imdb", "train").sample(frac=1, random_state=0)["text"]
    return network, token_blocks(reviews[:count], tokenizer, tokens)[:count]  # a review has more than 128 tokens
