"""Train the shipped vision transformer: ``python -m peftref.weights.make_vit`` (about three minutes on one core).

:class:`~peftref.models.vit.ViT` on the embedded training images of clothes, shifted by up to two pixels, in half
precision.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from peftref._replacing import replacing
from peftref.data import load
from peftref.fitting import fit, predict
from peftref.models.vit import ViT

EPOCHS = 60
RATE = 1e-3
SEED = 0


def main() -> None:
    torch.set_num_threads(1)  # one thread: the same sums in the same order wherever this runs
    data = load("fashion8k")
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        model = ViT()
    fit(model, data.train.x, data.train.y, epochs=EPOCHS, lr=RATE, seed=SEED)
    state = {k: v.half() for k, v in model.state_dict().items()}
    model.load_state_dict(state)  # the error of what is shipped
    error = 100 * (predict(model, data.test.x).argmax(-1) != data.test.y).float().mean().item()
    note = {"data": f"fashion8k sha256 {data.sha256}", "seed": str(SEED), "epochs": str(EPOCHS), "rate": str(RATE)}
    note |= {"test_error": f"{error:.2f}", "torch": torch.__version__, "script": "make_vit.py"}
    with replacing(Path(__file__).parent / "vit_fashion8k.safetensors") as part:
        save_file(state, part, metadata=note)
    print(f"test error {error:.2f} %")


if __name__ == "__main__":
    main()
