r"""EVA on language: what it finds in SmolLM2-135M, and how MiniLM learns from it.

**Forward passes.** Film reviews, as blocks of tokens, pass through SmolLM2-135M (30 layers, 210 adapted matrices). The
directions and ranks that EVA finds are held against the gradient of the loss on *other* reviews: the share of its
squared length that lies along :math:`r` directions. A seed draws the reviews.

**Curves.** The last layers of MiniLM-L6 learn whether a sentence of Rotten Tomatoes is positive. The arms differ in
where :math:`A` starts, and in how ranks are dealt. They run twice: with :math:`\alpha=r`, each arm at its own learning
rate, chosen on validation sentences; and in the published setting, where rank, :math:`\alpha` and rate are the same for
all. A seed draws the training sentences, the initialisation and the order anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
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
from ._curves import ARMS, PUBLISHED, curves
from ._language import StandIn, study
from ._pieces import Claim
from .at_scale import LARGE, held_out, record_large
from .transfer import LINEARS

__all__ = ["MINUTES", "NEEDS", "PRESETS", "run"]

KINDS = ("q", "k", "v", "o", "gate", "up", "down")  # of matrices in a layer of SmolLM2
RHOS = [1.0, 1.5, 2.0, 4.0]
RATES = [3e-4, 1e-3, 3e-3]

PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {
        "seeds": [0, 1],
        "language": {"model": "stand-in", "reviews": 8, "tokens": 8, "held_out": 4, "r": 2, "rhos": RHOS},
        "sentences": {"task": "stand-in", "train": 32},
        "training": {"arms": list(ARMS), "lrs": [1e-2], "steps": 4, "every": 2, "batch_size": 8, "r": 2},
        "published": {"arms": list(PUBLISHED), "lr": 1e-2, "r": 4, "lora_alpha": 1},
    },
    "cpu": {
        "seeds": [0, 1, 2, 3, 4],
        "language": {"model": "SmolLM2-135M", "reviews": 8, "tokens": 128, "held_out": 4, "r": 16, "rhos": RHOS},
        "sentences": {"pool": 4000, "val": None, "test": None, "layers": 3, "length": 32, "train": 1000},
        "training": {"arms": list(ARMS), "lrs": RATES, "steps": 240, "every": 60, "batch_size": 16, "r": 4},
        "published": {"arms": list(PUBLISHED), "lr": 5e-4, "r": 16, "lora_alpha": 1},  # Table 4
    },
    "gpu": {"large": LARGE},
}
MINUTES = {"smoke": 0.1, "cpu": 80, "gpu": 8}
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
    """Both studies, or the large network.

    Args:
        each: of :func:`peftref.recording.record`.
        data: the reader's folder, for the large network.
        large: settings of the large network.
        settings: of the small ones: seeds, forward passes, sentences, training, the published setting.
    """
    if large:
        return record_large(each, _large_methods(data), BIG_CLAIMS, data, **large)
    seeds = settings["seeds"]
    rows, arrays = _language(each, seeds, **settings["language"])
    more_rows, more_arrays, protocol = curves(
        each, seeds, settings["sentences"], published=settings["published"], **settings["training"]
    )
    return {"rows": rows + more_rows, "arrays": arrays | more_arrays, "protocol": protocol}


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


def _language(
    each: Callable[..., Any], seeds: Sequence[int], model: str, reviews: int, tokens: int, held_out: int, **options: Any
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows and arrays of the forward passes."""
    loaded: dict[str, Any] = {}

    def one(seed: int) -> dict[str, Any]:
        if not loaded:
            loaded["model"], loaded["blocks"] = _model_and_blocks(
                model, tokens, (reviews + held_out) * (max(seeds) + 1)
            )
        order = torch.randperm(len(loaded["blocks"]), generator=torch.Generator().manual_seed(seed))
        chosen = loaded["blocks"][order[: reviews + held_out]]
        return study(loaded["model"], chosen[:reviews], chosen[reviews:], **options)

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
