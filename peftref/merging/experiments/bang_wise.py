"""Two starts, four losses of fine-tuning, and the averages: the second and third experiment of the chapter on BANG."""

from __future__ import annotations

from typing import Any

import torch

from ...data import load
from . import bang_studies as studies
from .bang_studies import LOUDNESS, STRENGTHS, TENTHS, Worlds, between, outputs, score
from .colournets import ColourNets, hits

ALPHAS = (0.38, 0.45, 0.5, 0.56, 0.6, 0.7, 0.8, 0.9, 1.0)
BOTH = {"smoothing": 0.1, "mixing": 0.2}


def wise_and_bang(count: int, first: int, second: int, few: bool) -> dict[str, Any]:
    """Everything measured on the pairs of a start and its fine-tuned versions; accuracies in %, one for each world.

    Args:
        count: of the worlds.
        first: batches of the starts.
        second: batches of fine-tuning.
        few: a small stand-in for the digits.
    """
    worlds = Worlds.of(load("digits" if few else "mnist5k"), range(count))
    seeds = range(10, 10 + count)

    def begin(smoothing: float) -> ColourNets:
        nets = ColourNets(seeds)
        return studies.trained(nets, worlds.first, worlds.fit.y, first, seed=1, smoothing=smoothing)

    starts = {"modest": begin(0.2), "confident": begin(0.0)}
    fine: dict[tuple[str, str], ColourNets] = {}
    chosen: dict[str, dict[str, float]] = {}
    for s, start in starts.items():
        fine[s, "plain"], rate = studies.tuned(start, worlds, [{"lr": lr} for lr in (3e-4, 1e-3, 3e-3)], second)
        chosen[f"{s}, plain"] = rate
        for loss, trials in STRENGTHS.items():
            nets, setting = studies.tuned(start, worlds, [rate | trial for trial in trials], second)
            fine[s, loss] = nets
            chosen[f"{s}, {loss}"] = setting
    found = {f"{s}, {loss}": _pair(starts[s], nets, worlds) for (s, loss), nets in fine.items()}
    kinds = ("right", "described", "law", "cases", "path")
    by_kind = {kind: {pair: values[kind] for pair, values in found.items()} for kind in kinds}
    firsts = {s: studies.described(outputs(nets, worlds.shifted), worlds) for s, nets in starts.items()}
    harder = _harder(starts["modest"], [fine["modest", loss] for loss in ("plain", "both")], chosen, worlds, second)
    scaled = {n: _weights_by_loudness(starts["modest"], fine["modest", n], worlds) for n in ("plain", "both")}
    return {
        **by_kind,
        "firsts": firsts,
        "chosen": chosen,
        "same": score(fine["modest", "plain"], worlds.same, worlds.y).tolist(),
        "weights": scaled,
        "head only": _head_only(starts["modest"], fine["modest", "plain"], worlds),
        **harder,
    }


def _pair(start: ColourNets, tuned: ColourNets, worlds: Worlds) -> dict[str, Any]:
    """Who is right, how sure, how loud; and accuracy along the line, in distribution and under the shift."""
    f0, f1, middle = (outputs(n, worlds.shifted) for n in (start, tuned, between(start, tuned)))
    logits = {"first": f0, "fine-tuned": f1, "weights": middle, "outputs": f0 + f1}
    line = [between(start, tuned, a) for a in TENTHS]
    return {
        "right": {name: (100 * hits(f, worlds.y).mean(0)).tolist() for name, f in logits.items()},
        "described": {"loudness": studies.loudness(f0, f1), **studies.described(f1, worlds)},
        "law": studies.law(start, tuned, worlds),
        "cases": {str(a): studies.counted(start, tuned, a, worlds) for a in (0.0, 0.25, 0.5, 0.75, 1.0)},
        "path": {
            "validation": [score(n, worlds.check, worlds.validation.y).mean().item() for n in line],
            "shifted": torch.stack([score(n, worlds.shifted, worlds.y) for n in line], 1).tolist(),
        },
    }


def _weights_by_loudness(start: ColourNets, tuned: ColourNets, worlds: Worlds) -> list[float]:
    """Accuracy of the average of weights when all layers of the fine-tuned network are scaled to a loudness."""
    measured = studies.loudness(outputs(start, worlds.shifted), outputs(tuned, worlds.shifted))
    scaled = [between(start, studies.louder(tuned, to / measured)) for to in LOUDNESS.tolist()]
    return [score(n, worlds.shifted, worlds.y).mean().item() for n in scaled]


def _head_only(start: ColourNets, tuned: ColourNets, worlds: Worlds) -> list[float]:
    """Accuracy of the average when the head alone is scaled by 0.1, 1 and 10."""
    head = {"w3": 1, "b3": 1}
    scaled = [between(start, studies.louder(tuned, f, head, root=1)) for f in (0.1, 1.0, 10.0)]
    return [score(n, worlds.shifted, worlds.y).mean().item() for n in scaled]


def _harder(
    start: ColourNets, gentle: list[ColourNets], chosen: dict[str, dict[str, float]], worlds: Worlds, steps: int
) -> dict[str, Any]:
    """Larger learning rates from the modest start; at 0.001 also the best mixing coefficient and equal loudness."""
    pairs = {chosen["modest, plain"]["lr"]: gentle}
    for lr in (1e-3, 2e-3):
        options: list[dict[str, float]] = [{"lr": lr}, {"lr": lr, **BOTH}]
        pairs[lr] = [studies.trained(start, worlds.second, worlds.fit.y, steps, seed=2, **o) for o in options]
    y = worlds.y
    harder = {}
    for lr, nets in pairs.items():
        begun = outputs(start, worlds.shifted)
        wise, bang = (score(between(start, n), worlds.shifted, y).tolist() for n in nets)
        inside = score(nets[0], worlds.check, worlds.validation.y).mean().item()
        loud = [studies.loudness(begun, outputs(n, worlds.shifted)) for n in nets]
        laws = [studies.law(start, n, worlds) for n in nets]
        harder[str(lr)] = {"WiSE-FT": wise, "BANG": bang, "validation": inside, "loudness": loud, "laws": laws}
    rough = pairs[1e-3]
    levels = {
        name: [score(between(start, n, a), worlds.shifted, y).mean().item() for a in ALPHAS]
        for name, n in zip(("WiSE-FT", "BANG"), rough, strict=True)
    }
    f0, f1 = (outputs(n, worlds.shifted) for n in (start, rough[0]))
    lam = studies.loudness(f0, f1)
    alphas = (0.5, 1 / (1 + lam), 1 / (1 + lam ** (1 / 3)))
    equal = {
        "alphas": alphas,
        "outputs": [100 * hits((1 - a) * f0 + a * f1, y).mean().item() for a in alphas],
        "weights": [score(between(start, rough[0], a), worlds.shifted, y).mean().item() for a in alphas],
    }
    return {"harder": harder, "levels": levels, "equal": equal}
