"""Train the shipped source networks: ``python -m peftref.weights.make_weights`` (about two minutes on one core).

Three seeds of :class:`~peftref.models.SmallCNN` on each embedded set, clean training images only, in half precision.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from peftref._replacing import replacing
from peftref.data import load
from peftref.fitting import fit, predict
from peftref.models.cnn import SEEDS, SmallCNN

EPOCHS = 20


def main() -> None:
    torch.set_num_threads(1)  # one thread: the same sums in the same order wherever this runs
    for name in ("fashion8k", "mnist5k"):
        data = load(name)
        for seed in SEEDS:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                model = SmallCNN()
            fit(model, data.train.x, data.train.y, epochs=EPOCHS, seed=seed)
            error = 100 * (predict(model, data.test.x).argmax(-1) != data.test.y).float().mean().item()
            state = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
            note = {"data": f"{name} sha256 {data.sha256}", "seed": str(seed), "epochs": str(EPOCHS)}
            note |= {"test_error": f"{error:.2f}", "torch": torch.__version__, "script": "make_weights.py"}
            with replacing(Path(__file__).parent / f"cnn_{name}_{seed}.safetensors") as part:
                save_file(state, part, metadata=note)
            print(f"{name} seed {seed}: test error {error:.2f} %")


if __name__ == "__main__":
    main()
