"""A LoRA trained by several processes, each on its share of every batch; on one machine or on many.

    torchrun --nproc-per-node 2 examples/lora_ddp.py --out adapter        # GPUs where there are any, else CPUs
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 examples/lora_ddp.py

Every process draws the same batch and takes every n-th image of it. DistributedDataParallel averages the gradients, and
a mean over equal shares is the mean over the batch: the result is that of one process, up to rounding. Only what is
trained is sent between processes: here a twelfth of the network.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from peftref.adapters.baselines.lora import LoRA
from peftref.adapters.core.files import save
from peftref.adapters.core.injection import inject
from peftref.adapters.experiments.transfer import LINEARS, fresh, shifted


def main(out: Path | None, steps: int, batch_size: int, lr: float) -> None:
    """Train and, in the first process, print the loss and save the adapter."""
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    device = (
        torch.device("cuda", rank % torch.cuda.device_count()) if torch.cuda.is_available() else torch.device("cpu")
    )
    if batch_size % world:
        raise ValueError(f"batch_size: expected a multiple of the {world} processes, got {batch_size}")

    torch.manual_seed(0)  # the same start everywhere; DDP would send the first process's anyway
    net, task = fresh(), shifted("digits")
    inject(net, LoRA, LINEARS, r=4)
    net.head.requires_grad_(True)
    model = DistributedDataParallel(net.to(device))
    optimizer = torch.optim.AdamW((p for p in net.parameters() if p.requires_grad), lr, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)  # the same batches everywhere
    for _ in range(steps):
        mine = torch.randint(len(task.train.y), (batch_size,), generator=generator)[rank::world]
        loss = F.cross_entropy(model(task.train.x[mine].to(device)), task.train.y[mine].to(device))
        optimizer.zero_grad()
        loss.backward()  # here the gradients become those of the whole batch
        optimizer.step()
    dist.all_reduce(loss := loss.detach() / world)
    if rank == 0:
        print(f"{world} processes on {device.type}, {steps} steps: last loss {loss.item():.3f}")
        if out:
            save(net.cpu(), out)
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the adapter")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-3)
    arguments = parser.parse_args()
    main(arguments.out, arguments.steps, arguments.batch_size, arguments.lr)
