"""Train the shipped families: ``python -m peftref.merging.experiments.make_families`` (about fifteen minutes on one
core).

What they are: :mod:`peftref.merging.experiments.corrupted`. In half precision; a number before each name keeps their
order.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from peftref._replacing import replacing
from peftref.data import Split, load
from peftref.fitting import fit
from peftref.merging.experiments.corrupted import DOMAINS, Corrupting, accuracy, corrupted, deal
from peftref.models.cnn import PlainCNN, SmallCNN

FAMILIES: dict[str, tuple[type[nn.Module], range, list[str]]] = {
    "plain": (PlainCNN, range(5), [*DOMAINS]),
    "norm": (SmallCNN, range(3), ["contrast"]),
}
UPSTREAM: dict[str, Any] = {"epochs": 30, "lr": 5e-3}
TUNE: dict[str, Any] = {"epochs": 25, "lr": 4e-3}


def main(kind: str, seed: int) -> None:
    torch.set_num_threads(1)  # one thread: the same sums in the same order wherever this runs
    make, _, domains = FAMILIES[kind]
    fashion = load("fashion8k")
    digits = load("mnist5k")
    parts = deal(fashion.train, seed)
    digits_tune = Split(*(t[:3000] for t in digits.train))

    def fresh_head(model: nn.Module) -> nn.Module:
        model = copy.deepcopy(model)
        with torch.random.fork_rng():
            torch.manual_seed(seed + 100)
            head = model.get_submodule("fc")
            assert isinstance(head, nn.Linear)
            head.reset_parameters()
        return model

    def tuned(model: nn.Module, data: Split, domain: str) -> nn.Module:
        model = copy.deepcopy(model)
        fit(Corrupting(model, domain, seed), *data, seed=seed + 1 + list(["clean", *DOMAINS]).index(domain), **TUNE)
        return model

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        start = make(width=8)
    far = copy.deepcopy(start)
    models = {"start": fit(start, *parts["upstream"], seed=seed, **UPSTREAM)}
    models |= {name: tuned(start, parts["tune"], name) for name in ["clean", *domains]}
    if kind == "plain":
        other = fresh_head(start)
        models |= {
            "digits": tuned(other, digits_tune, "clean"),
            "digits contrast": tuned(other, digits_tune, "contrast"),
        }
        far = fresh_head(fit(far, *digits.train, seed=seed, **UPSTREAM))
        models["far start"] = far
        models |= {f"far {name}": tuned(far, parts["tune"], name) for name in ("clean", "contrast")}

    tensors: dict[str, Tensor] = {}
    note = {"data": f"fashion8k sha256 {fashion.sha256}, mnist5k sha256 {digits.sha256}", "seed": str(seed)}
    for i, (name, model) in enumerate(models.items()):
        state = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
        tensors |= {f"{chr(97 + i)} {name}/{k}": v for k, v in state.items()}
        data = digits.test if name.startswith("digits") else fashion.test
        own = corrupted(data, name.split()[-1]) if name.split()[-1] in DOMAINS else data
        state = {k: v.float() for k, v in state.items()}
        note[f"accuracy of {name}"] = (
            f"{accuracy(model.eval(), state, data):.1f} clean, {accuracy(model, state, own):.1f} own"
        )
        print(kind, seed, name, note[f"accuracy of {name}"], flush=True)
    note |= {"torch": torch.__version__, "script": "make_families.py"}
    with replacing(Path(__file__).parent / f"family_{kind}_{seed}.safetensors") as part:
        save_file(tensors, part, metadata=note)


if __name__ == "__main__":
    for kind, family in FAMILIES.items():
        for seed in family[1]:
            if not sys.argv[1:] or f"{kind}_{seed}" in sys.argv[1:]:
                main(kind, seed)
