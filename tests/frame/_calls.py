"""A valid call of everything public: what :mod:`tests.frame.test_fuzz` spoils, one argument at a time."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from peftref import models, results
from peftref.adapters import adaptformer, bone, eva, hydra, tera, tlora, vl_adapter
from peftref.adapters.baselines import hyperformer, lora
from peftref.adapters.core import (
    activations as inputs,
)
from peftref.adapters.core import (
    adapter as contract,
)
from peftref.adapters.core import (
    files,
    layers,
    phm,
    spectra,
)
from peftref.adapters.core import (
    injection as core,
)
from peftref.adapters.core import (
    targets as finding,
)
from peftref.adapters.experiments import multitask
from peftref.adapters.experiments import transfer as tasks
from peftref.continual import adab2n, classp, fsa, lae
from peftref.continual.baselines import ewc, norms, rehearsal
from peftref.continual.core import (
    balanced_norm as adab2n_statistics,
)
from peftref.continual.core import (
    film,
    lda,
    metrics,
    prefix,
    replay,
    train,
)
from peftref.continual.core import (
    growing_head as lae_head,
)
from peftref.continual.core import (
    small_modules as pet,
)
from peftref.continual.core import streams as task_streams
from peftref.data import corruptions, orders, read, sets, streams
from peftref.merging import bang, rws
from peftref.merging.baselines import arithmetic, ties
from peftref.merging.core import batchnorm, patching, quantise, units
from peftref.merging.core import loop as merging
from peftref.merging.experiments import colournets, corrupted, multicolor, spurious
from peftref.models import vit
from peftref.panel import dml_panel
from peftref.panel.baselines import linear
from peftref.panel.core import (
    columns,
    crossfit,
    folds,
    gram,
    inference,
    layout,
    learners,
    ridge,
)
from peftref.panel.core import (
    estimators as information,
)
from peftref.panel.experiments import dgp, study
from peftref.tta import cotta, lame
from peftref.tta.baselines import bn_adapt, tent
from peftref.tta.core import views
from peftref.tta.experiments import evaluate

Call = tuple[Callable[..., Any], dict[str, Any]]


# --- What a valid call is made of -------------------------------------------------------------------------------------


def t(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gen() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def fixed(make: Callable[[], Any]) -> Any:
    """Made from one seed, so that two calls get equal models."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def mlp() -> nn.Sequential:
    return fixed(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)))


def normed() -> nn.Sequential:
    return fixed(lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)))


def cnn() -> models.SmallCNN:
    return fixed(lambda: models.SmallCNN(width=4, num_classes=4))


def small_vit() -> vit.ViT:
    return fixed(lambda: vit.ViT(14, 7, 1, 4, embed_dim=8, depth=1, num_heads=2))


def base() -> layers.Layer:
    return layers.view(fixed(lambda: nn.Linear(6, 4)))


def adapted(kind: type = lora.LoRA, **options: Any) -> nn.Sequential:
    net = mlp()
    fixed(lambda: core.inject(net, kind, ["0"], **options))
    return net


def shared() -> tuple[nn.Sequential, vl_adapter.Tasks]:
    net, names = mlp(), vl_adapter.Tasks(["a", "b"])
    core.inject(net, vl_adapter.VLAdapter, ["0"], reduction=4, sharing="multiple", tasks=names)
    names.use("a")
    return net, names


def labels(n: int = 8, classes: int = 4) -> Tensor:
    return torch.arange(n) % classes


def split(n: int = 16) -> sets.Split:
    return sets.Split(t(n, 1, 8, 8).sigmoid(), labels(n))


def rows_split(n: int = 16) -> sets.Split:
    return sets.Split(t(n, 6), labels(n))


def dataset() -> sets.Dataset:
    return sets.Dataset("toy", split(40), split(20), tuple("abcd"), "0" * 64)


def stream_tasks() -> list[task_streams.Task]:
    return [
        task_streams.Task(
            ("a", "b"), range(2 * k, 2 * k + 2), *(sets.Split(t(8, 6), labels(8, 2) + 2 * k) for _ in range(3))
        )
        for k in (0, 1)
    ]


def one_task() -> tasks.Task:
    parts = [sets.Split(t(12, 6, seed=s), labels(12)) for s in range(3)]
    return tasks.Task("toy", *parts)


def toy(_: int = 0) -> nn.Module:
    """Stands for :func:`peftref.adapters.experiments.transfer.fresh`: small, with a ``head``."""
    return fixed(lambda: Headed())


class Headed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.body(x).relu()

    def forward_head(self, h: Tensor, pre_logits: bool = False) -> Tensor:
        return h if pre_logits else self.head(h)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def stream() -> streams.Stream:
    n = 12
    zeros = torch.zeros(n, dtype=torch.long)
    return streams.Stream(t(n, 6), labels(n), zeros, zeros + 5, zeros, ("one",), 4)


def run_of() -> evaluate.Run:
    return evaluate.run(mlp(), stream())


def states() -> tuple[dict[str, Tensor], ...]:
    return tuple({"w": t(6, 4, seed=s), "b": t(4, seed=s + 9)} for s in range(3))


def spectrum() -> spectra.Spectrum:
    return spectra.absorb(None, t(20, 6), 4)


def found() -> eva.Directions:
    return eva.collect(mlp(), ["0", "2"], [t(20, 6)], r=2)


def moments(seed: int = 0) -> lda.Moments:
    return lda.moments(t(12, 5, seed=seed), labels(12, 3), 3)


def lay() -> layout.Layout:
    unit = torch.arange(8).repeat_interleave(3)
    return layout.Layout.of(unit, torch.arange(3).repeat(8))


def simulated() -> dgp.Simulated:
    return dgp.dgp_fuhr_papies_2024(n_units=12, n_periods=3, seeds=(0, 1))


def made_folds(n: int = 2) -> folds.Folds:
    return folds.make_folds(simulated().panel.layout, n, "unit")


def frame() -> dict[str, Any]:
    table = simulated().frame()
    return {name: table[name] for name in table.columns}


def sorted_rows() -> tuple[Tensor, Tensor]:
    fold = torch.arange(12).view(1, 12) % 3
    return t(1, 4, 12).double(), fold


def gram_moments() -> gram.Moments:
    rows, fold = sorted_rows()
    ordered, counts, _ = gram.by_fold(rows, fold, 3)
    return gram.moments(ordered, counts)


def keep() -> Tensor:
    return ~torch.eye(3, dtype=torch.bool)


def reservoir() -> replay.Reservoir:
    buffer = replay.Reservoir(8)
    buffer.add(t(8, 6), labels(8))
    return buffer


def with_logits() -> replay.Reservoir:
    buffer = replay.Reservoir(8)
    buffer.add(t(8, 6), labels(8), t(8, 4))
    return buffer


def balanced(tasks: int = 2) -> nn.Module:
    net = adab2n.convert(normed(), tasks, 0.5)
    adab2n.begin_task(net, 0)
    return net


def accuracies() -> Tensor:
    return torch.tensor([[0.9, math.nan, math.nan], [0.8, 0.7, math.nan], [0.6, 0.5, 0.9]])


def continual_lae() -> lae.LAE:
    net = Headed()
    core.inject(net, lora.LoRA, ["body"], name="online")
    method = fixed(lambda: lae.LAE(net, features=8))
    method.begin_task(4)
    return method


def fitted_fsa() -> fsa.FSA:
    return fsa.FSA(toy(), "none").observe(t(12, 6), labels(12))


def fitted_dml() -> dml_panel.PanelDML:
    return dml_panel.PanelDML(folds=2).fit(**{k: frame()[k] for k in ("y", "w", "unit", "time")}, x=xs())


def xs() -> pd.DataFrame:
    table = simulated().frame()
    return table[[c for c in table.columns if str(c).startswith("x")]]


def bn() -> nn.BatchNorm1d:
    return nn.BatchNorm1d(8)


# --- A valid call of everything public --------------------------------------------------------------------------------
# A class is called twice: "LoRA" builds it, "LoRA.forward" uses it.

ADAPTERS: dict[str, Callable[[], Call]] = {
    "AdaptFormer": lambda: (
        adaptformer.AdaptFormer,
        dict(base=layers.view(small_vit().blocks[0], torch.float32), bottleneck=2, scale=0.1, dropout=0.1),
    ),
    "AdaptFormer.forward": lambda: (formed(), dict(x=t(2, 1, 14, 14))),
    "branch": lambda: (
        adaptformer.branch,
        dict(u=t(3, 6), down=t(2, 6), down_bias=t(2), up=t(4, 2), up_bias=t(4), scale=0.5, dropout=0.0),
    ),
    "dead_share": lambda: (adaptformer.dead_share, dict(model=formed(), x=t(2, 1, 14, 14), name="default")),
    "head": lambda: (adaptformer.head, dict(features=6, classes=4)),
    "width": lambda: (adaptformer.width, dict(child=nn.Linear(6, 4))),
    "Bone": lambda: (bone.Bone, dict(base=base(), r=2, variant="bone", mini_r=1)),
    "Bone.forward": lambda: (adapted(bone.Bone, r=2, variant="bone"), dict(input=t(3, 6))),
    "bat": lambda: (bone.bat, dict(weight=t(4, 6), block=t(2, 2, 2))),
    "pool": lambda: (bone.pool, dict(x=t(3, 6), r=2)),
    "pooled": lambda: (bone.pooled, dict(block=t(2, 4), i=6)),
    "tiles": lambda: (bone.tiles, dict(r=2, i=6)),
    "Host": lambda: (contract.Host, dict(base_layer=nn.Linear(6, 4))),
    "Host.forward": lambda: (adapted(r=2), dict(input=t(3, 6))),
    "activate": lambda: ((lambda model, name: core.activate(model, name)), dict(model=adapted(), name="default")),
    "adapters": lambda: (core.adapters, dict(model=adapted(), name="default")),
    "build": lambda: (core.build, dict(model=mlp(), kind=lora.LoRA, targets=["0"], exclude=["2"], r=2)),
    "inject": lambda: (
        core.inject,
        dict(model=mlp(), kind=lora.LoRA, targets=["0"], name="one", r=2, lora_alpha=8),
    ),
    "install": lambda: (
        core.install,
        dict(model=mlp(), new={"0": lora.LoRA(layers.view(nn.Linear(6, 8)))}, name="one"),
    ),
    "merge": lambda: (core.merge, dict(model=adapted())),
    "unload": lambda: (core.unload, dict(model=adapted())),
    "unmerge": lambda: (core.unmerge, dict(model=merged())),
    "collect": lambda: (
        eva.collect,
        dict(model=mlp(), targets=["0", "2"], batches=[t(20, 6)], r=2, rho=2.0, max_batches=4, tau=0.99),
    ),
    "inject_eva": lambda: (eva.inject_eva, dict(model=mlp(), found=found(), lora_alpha=8, name="eva")),
    "redistribute": lambda: (eva.redistribute, dict(ratios={"a": t(3).abs(), "b": t(3).abs()}, budget=3)),
    "start": lambda: (eva.start, dict(spectrum=spectrum(), r=2)),
    "config": lambda: (files.config, dict(model=adapted(), name="default")),
    "state": lambda: (files.state, dict(model=adapted(), name="default")),
    "bare": lambda: (finding.bare, dict(module=nn.Linear(6, 4))),
    "find": lambda: (finding.find, dict(model=mlp(), targets=["0"], exclude=["2"])),
    "matches": lambda: (finding.matches, dict(label="targets", wanted=["0"], model=mlp())),
    "named": lambda: (finding.named, dict(model=mlp())),
    "Hydra": lambda: (hydra.Hydra, dict(base=base(), r_par=2, r_seq=2, scale=1.0, dropout=0.0)),
    "Hydra.forward": lambda: (adapted(hydra.Hydra), dict(input=t(3, 6))),
    "as_lora": lambda: (
        (lambda adapter: hydra.as_lora(adapter, nn.Linear(6, 4))),
        dict(adapter=hydra.Hydra(base())),
    ),
    "HyperNet": lambda: (
        hyperformer.HyperNet,
        dict(d=8, tasks=2, layers=2, positions=1, reduction=4, p=4, dim=6, hidden=4),
    ),
    "HyperNet.forward": lambda: (
        hyperformer.HyperNet(8, 2, 2, reduction=4, p=4, dim=6, hidden=4),
        dict(layer=0, position=0, one=1),
    ),
    "Hyperformer": lambda: (
        hyperformer.Hyperformer,
        dict(
            base=base(),
            layer=0,
            position=0,
            tasks=vl_adapter.Tasks(["a", "b"]),
            hyper=hyperformer.HyperNet(4, 2, 2, p=4, dim=6, hidden=4, reduction=2),
        ),
    ),
    "places": lambda: (
        hyperformer.places,
        dict(model=small_vit(), targets=[r"blocks\.0\.mlp\.fc2"]) | dict(targets=r"blocks\.\d+\.mlp\.fc2"),
    ),
    "rows": lambda: (
        inputs.rows,
        dict(name="0", module=nn.Linear(6, 4), x=t(3, 6), mask=torch.ones(3, dtype=torch.bool)),
    ),
    "run": lambda: (inputs.run, dict(model=mlp(), batch=t(3, 6))),
    "together": lambda: (inputs.together, dict(model=(m := mlp()), layers={"0": m[0]}, batch=t(3, 6))),
    "token_mask": lambda: (
        inputs.token_mask,
        dict(batch={"attention_mask": torch.ones(2, 3), "labels": torch.ones(2, 3).long()}, ignore=-100),
    ),
    "Layer": lambda: (layers.Layer, dict(module=nn.Linear(6, 4), dtype=torch.float32)),
    "bypassed": lambda: (layers.bypassed, dict(parent=nn.TransformerEncoderLayer)),
    "refusal": lambda: (layers.refusal, dict(module=nn.Linear(6, 4))),
    "view": lambda: (layers.view, dict(module=nn.Linear(6, 4))),
    "LoRA": lambda: (lora.LoRA, dict(base=base(), r=2, lora_alpha=8, lora_dropout=0.0)),
    "LoRA.forward": lambda: (adapted(r=2), dict(input=t(3, 6))),
    "scaling": lambda: (lora.scaling, dict(r=2, lora_alpha=8)),
    "Heads": lambda: (multitask.Heads, dict(d=6, classes=[2, 3], tasks=vl_adapter.Tasks(["a", "b"]))),
    "TaskToken": lambda: (multitask.TaskToken, dict(base=base(), tasks=vl_adapter.Tasks(["a", "b"]))),
    "relabelled": lambda: (multitask.relabelled, dict(task=one_task(), labels=(1, 0, 1, 0), name="even")),
    "PHM": lambda: (phm.PHM, dict(copies=2, i=6, o=4, n=2, rank=1)),
    "PHM.forward": lambda: (phm.PHM(2, 6, 4, 2), dict(one=1)),
    "Rule": lambda: (phm.Rule, dict(n=2, std=0.01, copies=2)),
    "phm_linear": lambda: (phm.phm_linear, dict(x=t(3, 6), A=t(2, 2, 2), B=t(2, 3, 2))),
    "phm_weight": lambda: (phm.phm_weight, dict(A=t(2, 2, 2), B=t(2, 3, 2))),
    "Moments": lambda: (spectra.Moments, dict(center=True)),
    "Moments.update": lambda: (spectra.Moments().update, dict(rows=t(20, 6))),
    "absorb": lambda: (spectra.absorb, dict(old=spectrum(), rows=t(20, 6, seed=1), k=3)),
    "agreement": lambda: (spectra.agreement, dict(new=spectrum(), old=spectrum(), r=2)),
    "accuracy": lambda: (tasks.accuracy, dict(logits=t(8, 4), y=labels())),
    "adapt": lambda: (
        tasks.adapt,
        dict(build=tasks.full, task=one_task(), lr=0.01, seed=0, steps=2, batch_size=4, start=toy),
    ),
    "best_rate": lambda: (tasks.best_rate, dict(lrs=(0.1, 0.2, 0.3), score=lambda lr: (-abs(lr - 0.2),))),
    "compare": lambda: (
        tasks.compare,
        dict(methods={"full": tasks.full}, task=one_task(), seeds=(0,), lrs=(0.01,), steps=1, batch_size=4, start=toy),
    ),
    "fresh": lambda: (tasks.fresh, dict(num_classes=4)),
    "full": lambda: (tasks.full, dict(net=toy())),
    "probe": lambda: (tasks.probe, dict(net=toy())),
    "summary": lambda: (
        tasks.summary,
        dict(
            runs=tasks.compare(
                {"full": tasks.full}, one_task(), seeds=(0,), lrs=(0.01,), steps=1, batch_size=4, start=toy
            )
        ),
    ),
    "train": lambda: (
        tasks.train,
        dict(model=mlp(), x=t(8, 6), y=labels(), lr=0.01, steps=2, batch_size=4, clip=1.0),
    ),
    "trainable": lambda: (tasks.trainable, dict(model=toy())),
    "update_rank": lambda: (tasks.update_rank, dict(model=adapted_toy(), rtol=1e-5)),
    "Bank": lambda: (tera.Bank, dict(seed=0)),
    "TeRA": lambda: (tera.TeRA, dict(base=base(), out_modes=1, in_modes=2, r=2, seed=0)),
    "TeRA.forward": lambda: (adapted(tera.TeRA, seed=0), dict(input=t(3, 6))),
    "error_terms": lambda: (
        tera.error_terms,
        dict(target=t(4, 6), core=t(4, 6), left=[t(4, 4)], right=[t(2, 2), t(3, 3)]),
    ),
    "expand": lambda: (tera.expand, dict(vectors=[t(2), t(3)])),
    "multiply": lambda: (tera.multiply, dict(x=t(5, 6), factors=[t(2, 2), t(3, 3)])),
    "rank_bound": lambda: (tera.rank_bound, dict(left=[4], right=[2, 3])),
    "rank_one": lambda: (tera.rank_one, dict(tensor=t(2, 3, 2), steps=5)),
    "update": lambda: (
        tera.update,
        dict(core=t(4, 6), left=[t(4, 4)], right=[t(2, 2), t(3, 3)], d_left=[t(4)], d_right=[t(2), t(3)]),
    ),
    "TLoRA": lambda: (tlora.TLoRA, dict(base=base(), transform_rank=2, residual_rank=2, order=2)),
    "TLoRA.forward": lambda: (adapted(tlora.TLoRA, residual_rank=2), dict(input=t(3, 6))),
    "identity_cores": lambda: (tlora.identity_cores, dict(dims=[2, 3], rank=2, init="slot")),
    "identity_distance": lambda: (tlora.identity_distance, dict(cores=tlora.identity_cores([2, 3], 2, "paper"))),
    "identity_penalty": lambda: (tlora.identity_penalty, dict(cores=tlora.identity_cores([2, 3], 2, "paper"))),
    "orthogonal_penalty": lambda: (
        tlora.orthogonal_penalty,
        dict(cores=tlora.identity_cores([2, 3], 2, "paper")),
    ),
    "product": lambda: (
        tlora.product,
        dict(left=[t(2, 2, 2, 2), t(3, 3, 2, 2)], right=[t(2, 2, 2, 2), t(3, 3, 2, 2)]),
    ),
    "ring_factors": lambda: (
        tlora.ring_factors,
        dict(up=[t(2, 2, 3), t(2, 3, 2)], down=[t(3, 2, 3), t(2, 3, 2)]),
    ),
    "ring_matrix": lambda: (tlora.ring_matrix, dict(cores=[t(2, 2, 2, 2), t(3, 3, 2, 2)])),
    "transform": lambda: (tlora.transform, dict(cores=[t(2, 2, 2, 2), t(3, 3, 2, 2)], x=t(5, 6))),
    "Stack": lambda: (vl_adapter.Stack, dict(copies=2, i=6, o=4)),
    "Stack.forward": lambda: (fixed(lambda: vl_adapter.Stack(2, 6, 4)), dict(one=1)),
    "Tasks": lambda: (vl_adapter.Tasks, dict(names=["a", "b"])),
    "Tasks.use": lambda: (vl_adapter.Tasks(["a", "b"]).use, dict(which=torch.tensor([0, 1]))),
    "VLAdapter": lambda: (
        vl_adapter.VLAdapter,
        dict(base=base(), reduction=2, tasks=vl_adapter.Tasks(["a", "b"])),
    ),
    "VLAdapter.forward": lambda: (shared()[0], dict(input=t(3, 6))),
    "affine": lambda: (vl_adapter.affine, dict(h=t(2, 5, 3), W=t(2, 4, 3), b=t(2, 4))),
    "bottleneck": lambda: (vl_adapter.bottleneck, dict(h=t(5, 6), D=t(2, 6), b=t(2), U=t(6, 2), c=t(6))),
}

CONTINUAL: dict[str, Callable[[], Call]] = {
    "AdaB2N": lambda: (adab2n.AdaB2N, dict(layer=bn(), tasks=2, kappa=0.5)),
    "AdaB2N.forward": lambda: (balanced(), dict(input=t(4, 6))),
    "adaptation_loss": lambda: (
        (lambda model: (model(t(4, 6)), adab2n.adaptation_loss(model))[1]),
        dict(model=balanced()),
    ),
    "balance": lambda: (
        adab2n.balance,
        dict(rule=rehearsal.FineTune(), model=balanced(), tasks=stream_tasks(), strength=0.1, start=0),
    ),
    "begin_task": lambda: (adab2n.begin_task, dict(model=balanced(), task=1)),
    "convert": lambda: (adab2n.convert, dict(model=normed(), tasks=2, kappa=0.5)),
    "eta": lambda: (adab2n.eta, dict(k=3, momentum=0.1, kappa=0.5)),
    "parameter_groups": lambda: (adab2n.parameter_groups, dict(model=balanced(), weight_decay=0.1)),
    "task_batch": lambda: (entering(adab2n.task_batch), dict(model=balanced(), task_ids=torch.zeros(4).long())),
    "task_weights": lambda: (adab2n.task_weights, dict(psi=t(2), counts=torch.tensor([1.0, 3.0]))),
    "balanced_norm": lambda: (
        adab2n_statistics.balanced_norm,
        dict(x=t(4, 6), weights=torch.full((4,), 0.25), scale=t(6), shift=t(6), eps=1e-5),
    ),
    "balanced_statistics": lambda: (
        adab2n_statistics.balanced_statistics,
        dict(x=t(4, 6), weights=torch.full((4,), 0.25)),
    ),
    "CLASSP": lambda: (
        classp.CLASSP,
        dict(params=[nn.Parameter(t(3))], lr=0.2, threshold=0.5, epsilon=1e-5, power=1.0),
    ),
    "classp_step": lambda: (
        classp.classp_step,
        dict(w=[t(3)], g=[t(3, seed=1)], s=[t(3).abs()], lr=0.2, power=1.0, threshold=0.5, eps=1e-5),
    ),
    "gate": lambda: (classp.gate, dict(g=t(3), threshold=0.5)),
    "EWC": lambda: (ewc.EWC, dict(strength=1.0, decay=1.0, chunk_size=50)),
    "EWC.end_task": lambda: (ewc.EWC(1.0).end_task, dict(model=mlp(), x=t(8, 6), y=labels())),
    "diagonal_fisher": lambda: (ewc.diagonal_fisher, dict(model=mlp(), x=t(8, 6), y=labels(), chunk_size=4)),
    "ewc_penalty": lambda: (
        ewc.ewc_penalty,
        dict(theta={"w": t(3)}, anchor={"w": t(3, seed=1)}, fisher={"w": t(3).abs()}),
    ),
    "FiLM": lambda: (film.FiLM, dict(norm=bn().eval())),
    "FiLM.forward": lambda: (film.FiLM(bn().eval()), dict(x=t(4, 8))),
    "film_parameters": lambda: (film.film_parameters, dict(model=filmed())),
    "inject_film": lambda: (film.inject_film, dict(model=normed(), layers=["1"])),
    "merge_film": lambda: (film.merge_film, dict(model=filmed())),
    "remove_film": lambda: (film.remove_film, dict(model=filmed())),
    "FSA": lambda: (fsa.FSA, dict(model=toy(), body="none", ridge=1.0, ridge_rel=0.0, num_classes=4, chunk=8)),
    "FSA.adapt": lambda: (fsa.FSA(toy(), "full", epochs=2, batch_size=4).adapt, dict(x=t(12, 6), y=labels(12))),
    "FSA.observe": lambda: (fitted_fsa().observe, dict(x=t(12, 6), y=labels(12))),
    "FSA.forward": lambda: (fitted_fsa(), dict(x=t(12, 6))),
    "cosine_distance": lambda: (fsa.cosine_distance, dict(features=t(4, 5))),
    "embed": lambda: (fsa.embed, dict(model=toy(), x=t(3, 6))),
    "first_session": lambda: (
        fsa.first_session,
        dict(
            model=toy(),
            x=t(12, 6),
            y=labels(12),
            lr=0.01,
            epochs=2,
            milestones=(0.5,),
            decay=0.7,
            batch_size=4,
            dropout=0.5,
            seed=0,
        ),
    ),
    "LAE": lambda: (lae.LAE, dict(model=adapted_toy(), alpha=0.99, lr=0.01, rule="max", features=8)),
    "LAE.begin_task": lambda: (continual_lae().begin_task, dict(classes=2)),
    "LAE.step": lambda: (continual_lae().step, dict(x=t(8, 6), y=labels())),
    "LAE.learn": lambda: (
        continual_lae().learn,
        dict(task=rows_split(), generator=gen(), epochs=2, frozen_epochs=1, batch_size=4),
    ),
    "LAE.forward": lambda: (continual_lae(), dict(x=t(8, 6))),
    "alpha_for": lambda: (lae.alpha_for, dict(kept=0.5, steps=10)),
    "ema_": lambda: (lae.ema_, dict(offline=[t(3)], online=[t(3, seed=1)], alpha=0.9)),
    "vote": lambda: (lae.vote, dict(logits=t(2, 3, 4), rule="max")),
    "DynamicHead": lambda: (lae_head.DynamicHead, dict(features=6)),
    "DynamicHead.grow": lambda: (lae_head.DynamicHead(6).grow, dict(classes=2)),
    "DynamicHead.forward": lambda: (grown(), dict(h=t(3, 6))),
    "local_loss": lambda: (lae_head.local_loss, dict(logits=t(8, 4), y=labels(8, 2) + 2, start=2)),
    "LDA": lambda: (lda.LDA, dict(scatter="total", ridge=1.0, ridge_rel=0.0)),
    "LDA.partial_fit": lambda: (
        lda.LDA().partial_fit(t(12, 5), labels(12)).partial_fit,
        dict(features=t(12, 5), labels=labels(12)),
    ),
    "LDA.forward": lambda: (lda.LDA().partial_fit(t(12, 5), labels(12)), dict(features=t(3, 5))),
    "discriminant": lambda: (lda.discriminant, dict(m=moments(), scatter="total", ridge=1.0, ridge_rel=0.0)),
    "merge": lambda: (lda.merge, dict(a=moments(), b=moments(1))),
    "moments": lambda: (lda.moments, dict(features=t(12, 5), codes=labels(12, 3), classes=3)),
    "average_accuracy": lambda: (
        metrics.average_accuracy,
        dict(a=accuracies(), counts=torch.tensor([10, 20, 30])),
    ),
    "average_incremental": lambda: (metrics.average_incremental, dict(a=accuracies())),
    "backward_transfer": lambda: (metrics.backward_transfer, dict(a=accuracies())),
    "evaluate": lambda: (metrics.evaluate, dict(predict=mlp(), tasks=stream_tasks(), batch_size=4)),
    "forgetting": lambda: (metrics.forgetting, dict(a=accuracies())),
    "forward_transfer": lambda: (
        metrics.forward_transfer,
        dict(a=torch.rand(3, 3, generator=gen()), untrained=torch.full((3,), 0.1)),
    ),
    "last_accuracy": lambda: (metrics.last_accuracy, dict(a=accuracies())),
    "plasticity": lambda: (metrics.plasticity, dict(a=accuracies())),
    "summary": lambda: (metrics.summary, dict(a=accuracies())),
    "continual_norm": lambda: (norms.continual_norm, dict(layer=bn(), groups=4)),
    "group_norm": lambda: (norms.group_norm, dict(layer=bn(), groups=4)),
    "replace_batch_norms": lambda: (
        norms.replace_batch_norms,
        dict(model=normed(), make=lambda m: norms.group_norm(m, 4)),
    ),
    "Experts": lambda: (
        (lambda one, two: pet.Experts(one, two)),
        dict(one=lora.LoRA(base()), two=lora.LoRA(base())),
    ),
    "KVLoRA": lambda: (pet.KVLoRA, dict(base=layers.view(nn.Linear(6, 18)), r=2)),
    "ParallelAdapter": lambda: (pet.ParallelAdapter, dict(base=base(), hidden=2)),
    "ParallelAdapter.forward": lambda: (squared(), dict(input=t(3, 6))),
    "AttentionHost": lambda: (prefix.AttentionHost, dict(base_layer=small_vit().blocks[0].attn)),
    "Prefix": lambda: (
        prefix.Prefix,
        dict(base=layers.view(small_vit().blocks[0].attn, torch.float32), length=2),
    ),
    "Prefix.forward": lambda: (prefixed(), dict(x=t(2, 1, 14, 14))),
    "heads": lambda: (prefix.heads, dict(attn=small_vit().blocks[0].attn, x=t(2, 5, 8))),
    "inject_prefix": lambda: (prefix.inject_prefix, dict(model=small_vit(), targets=["attn"], length=2)),
    "prefix_attention": lambda: (
        prefix.prefix_attention,
        dict(q=t(2, 2, 5, 4), k=t(2, 2, 5, 4), v=t(2, 2, 5, 4), p_k=t(2, 3, 4), p_v=t(2, 3, 4)),
    ),
    "prefix_share": lambda: (prefix.prefix_share, dict(q=t(2, 2, 5, 4), k=t(2, 2, 5, 4), p_k=t(2, 3, 4))),
    "DERpp": lambda: (rehearsal.DERpp, dict(buffer=replay.Reservoir(8), batch_size=4, alpha=0.1, beta=0.5)),
    "DERpp.loss": lambda: (rehearsal.DERpp(with_logits(), 4).loss, dict(model=mlp(), x=t(8, 6), y=labels())),
    "ER": lambda: (rehearsal.ER, dict(buffer=replay.Reservoir(8), batch_size=4)),
    "ER.loss": lambda: (rehearsal.ER(reservoir(), 4).loss, dict(model=mlp(), x=t(8, 6), y=labels())),
    "ERACE": lambda: (rehearsal.ERACE, dict(buffer=replay.Reservoir(8), batch_size=4)),
    "ERACE.loss": lambda: (
        begun(rehearsal.ERACE(reservoir(), 4)).loss,
        dict(model=mlp(), x=t(8, 6), y=labels()),
    ),
    "FineTune": lambda: (rehearsal.FineTune, {}),
    "FineTune.loss": lambda: (rehearsal.FineTune().loss, dict(model=mlp(), x=t(8, 6), y=labels())),
    "ace_mask": lambda: (rehearsal.ace_mask, dict(logits=t(8, 4), y=labels(), seen=2)),
    "derpp_loss": lambda: (
        rehearsal.derpp_loss,
        dict(
            new=t(8, 4),
            y=labels(),
            first=t(4, 4),
            stored=t(4, 4, seed=1),
            second=t(4, 4),
            y_second=labels(4),
            alpha=0.1,
            beta=0.5,
        ),
    ),
    "er_ace_loss": lambda: (
        rehearsal.er_ace_loss,
        dict(new=t(8, 4), y=labels(), seen=2, old=t(4, 4), y_old=labels(4)),
    ),
    "er_loss": lambda: (rehearsal.er_loss, dict(new=t(8, 4), y=labels(), old=t(4, 4), y_old=labels(4))),
    "Reservoir": lambda: (replay.Reservoir, dict(size=8, seed=0)),
    "Reservoir.add": lambda: ((lambda x, y: reservoir().add(x, y)), dict(x=t(8, 6), y=labels())),
    "Reservoir.draw": lambda: (reservoir().draw, dict(n=3)),
    "batches": lambda: (
        listing(task_streams.batches),
        dict(split=rows_split(), batch_size=4, epochs=1, generator=gen()),
    ),
    "class_incremental": lambda: (
        task_streams.class_incremental,
        dict(data=dataset(), tasks=2, seed=0, per_class=3, val=0.2),
    ),
    "domain_incremental": lambda: (
        (lambda data: task_streams.domain_incremental(data, data)),
        dict(data=dataset()),
    ),
    "task_of": lambda: (task_streams.task_of, dict(tasks=stream_tasks())),
    "joint": lambda: (
        train.joint,
        dict(model=mlp(), tasks=stream_tasks(), lr=0.01, batch_size=4, epochs=1, seed=0),
    ),
    "learn": lambda: (
        train.learn,
        dict(model=mlp(), tasks=stream_tasks(), rule=rehearsal.FineTune(), lr=0.01, batch_size=4, epochs=1, seed=0),
    ),
}


def entering(manager: Callable[..., Any]) -> Callable[..., None]:
    def enter(**arguments: Any) -> None:
        with manager(**arguments):
            pass

    return enter


def listing(make: Callable[..., Iterator[Any]]) -> Callable[..., list[Any]]:
    return lambda **arguments: list(make(**arguments))


def formed() -> nn.Module:
    net = small_vit()
    fixed(lambda: core.inject(net, adaptformer.AdaptFormer, [r"blocks.0"], bottleneck=2))
    return net.eval()


def squared() -> nn.Module:
    net = fixed(lambda: nn.Sequential(nn.Linear(6, 6)))
    fixed(lambda: core.inject(net, pet.ParallelAdapter, ["0"], hidden=2))
    return net


def merged() -> nn.Module:
    net = adapted()
    core.merge(net)
    return net


def cifar_file() -> Path:
    path = Path(tempfile.gettempdir()) / "peftref_fuzz.bin"
    path.write_bytes(bytes(3073 * 2))
    return path


def filmed() -> nn.Module:
    net = normed().eval()
    film.inject_film(net, ["1"])
    return net


def adapted_toy() -> nn.Module:
    net = toy()
    core.inject(net, lora.LoRA, ["body"], name="online", r=2)
    return net


def grown() -> lae_head.DynamicHead:
    head = fixed(lambda: lae_head.DynamicHead(6))
    fixed(lambda: head.grow(4))
    return head


def prefixed() -> nn.Module:
    net = small_vit()
    fixed(lambda: prefix.inject_prefix(net, ["attn"], length=2))
    return net


def begun(rule: rehearsal.FineTune) -> rehearsal.FineTune:
    rule.begin_task(0, 4)
    return rule


def patch() -> dict[str, Tensor]:
    return rws.signature(*states(), ["w"])


def quantised() -> quantise.Quantised:
    return quantise.quantise({"w": t(6, 4)}, 16)


def pictures(n: int = 3) -> Tensor:
    return torch.rand(n, 3, 16, 16, generator=gen())


def calls_merged(rule: Callable[..., Any]) -> Callable[..., Any]:
    """A rule is checked when it is made, or when it first meets tensors."""
    w0, w1, w2 = states()
    return lambda **arguments: merging.merge(w0, [w1, w2], rule(**arguments))


MERGING: dict[str, Callable[[], Call]] = {
    "average": lambda: (calls_merged(arithmetic.average), {}),
    "dare": lambda: (
        calls_merged(arithmetic.dare),
        dict(drop=0.5, then=arithmetic.task_arithmetic(), seed=0),
    ),
    "fisher_wise_ft": lambda: (
        (
            lambda alpha, fisher0, fisher1, floor: merging.merge(
                states()[0], [states()[1]], arithmetic.fisher_wise_ft(alpha, fisher0, fisher1, floor)
            )
        ),
        dict(
            alpha=0.5,
            fisher0={k: v.abs() for k, v in states()[0].items()},
            fisher1={k: v.abs() for k, v in states()[1].items()},
            floor=1e-6,
        ),
    ),
    "linear": lambda: (calls_merged(arithmetic.linear), dict(weights=[0.5, 0.5])),
    "task_arithmetic": lambda: (calls_merged(arithmetic.task_arithmetic), dict(scale=0.3)),
    "wise_ft": lambda: (
        (lambda alpha: merging.merge(states()[0], [states()[1]], arithmetic.wise_ft(alpha))),
        dict(alpha=0.5),
    ),
    "bang_loss": lambda: (
        bang.bang_loss,
        dict(model=mlp(), x=t(8, 6), y=labels(), smoothing=0.1, mixing=0.5, generator=gen()),
    ),
    "calibration_error": lambda: (bang.calibration_error, dict(probs=t(8, 4).softmax(1), y=labels(), bins=5)),
    "confidence": lambda: (bang.confidence, dict(probs=t(8, 4).softmax(1))),
    "fine_tune": lambda: (
        bang.fine_tune,
        dict(
            model=mlp(),
            x=t(8, 6),
            y=labels(),
            smoothing=0.1,
            mixing=0.5,
            epochs=1,
            lr=0.01,
            batch_size=4,
            weight_decay=0.0,
            seed=0,
        ),
    ),
    "mixup": lambda: (
        bang.mixup,
        dict(x=t(8, 6), targets=t(8, 4).softmax(1), mixing=0.5, generator=gen(), nu=0.5),
    ),
    "outcomes": lambda: (
        bang.outcomes,
        dict(y=labels(), first=labels(), second=labels().flip(0), average=labels()),
    ),
    "smooth": lambda: (bang.smooth, dict(targets=t(8, 4).softmax(1), smoothing=0.1)),
    "soft_cross_entropy": lambda: (bang.soft_cross_entropy, dict(logits=t(8, 4), targets=t(8, 4).softmax(1))),
    "batchnorms": lambda: (batchnorm.batchnorms, dict(model=normed())),
    "recalibrate": lambda: (batchnorm.recalibrate, dict(model=normed(), batches=[t(8, 6)])),
    "ColourNets": lambda: (colournets.ColourNets, dict(seeds=[0, 1], hidden=4)),
    "ColourNets.forward": lambda: (colournets.ColourNets([0, 1], 4), dict(x=t(5, 2, 292))),
    "distinct": lambda: (colournets.distinct, dict(x=t(5, 3, 42, 42))),
    "hits": lambda: (colournets.hits, dict(outputs=t(8, 2, 10), y=labels())),
    "train": lambda: (
        colournets.train,
        dict(
            nets=colournets.ColourNets([0, 1], 4),
            x=t(8, 2, 292),
            y=labels(),
            steps=2,
            smoothing=0.1,
            mixing=0.5,
            lr=0.01,
            batch_size=4,
            seed=0,
            snapshots=(1,),
        ),
    ),
    "scenes": lambda: (
        colournets.scenes,
        dict(
            split=sets.Split(torch.rand(4, 1, 28, 28, generator=gen()), labels(4)),
            p=0.5,
            seeds=[0],
            lower=0.2,
            colours=32,
        ),
    ),
    "check_aligned": lambda: (
        merging.check_aligned,
        dict(base=states()[0], models=list(states()[1:]), skip=["b"]),
    ),
    "delta": lambda: (merging.delta, dict(state=states()[0], base=states()[1], names=["w"])),
    "elementwise": lambda: (merging.elementwise, dict(rule=arithmetic.average())),
    "fill": lambda: (
        merging.fill,
        dict(
            base=states()[0],
            models=list(states()[1:]),
            rule=arithmetic.average(),
            place=lambda name, like: torch.empty_like(like),
        ),
    ),
    "merge": lambda: (
        merging.merge,
        dict(base=states()[0], models=list(states()[1:]), rule=arithmetic.average(), skip=["b"]),
    ),
    "upcast": lambda: (merging.upcast, dict(t=t(3))),
    "Corrupting": lambda: (corrupted.Corrupting, dict(model=nn.Identity(), name="contrast", seed=0)),
    "Corrupting.forward": lambda: (
        corrupted.Corrupting(nn.Identity(), "contrast"),
        dict(x=torch.rand(3, 1, 28, 28, generator=gen())),
    ),
    "accuracy": lambda: (corrupted.accuracy, dict(model=mlp(), state=mlp().state_dict(), data=rows_split())),
    "corrupted": lambda: (
        corrupted.corrupted,
        dict(data=sets.Split(torch.rand(4, 1, 28, 28, generator=gen()), labels(4)), name="contrast", seed=0),
    ),
    "first": lambda: (units.first, dict(units=[["a"], ["b", "c"]], k=1)),
    "units": lambda: (units.units, dict(model=cnn())),
    "Patched": lambda: (patching.Patched, dict(model=mlp(), patch={"0.weight": t(8, 6)})),
    "Patched.on": lambda: (patching.Patched(mlp(), {"0.weight": t(8, 6)}).on, dict(strength=0.5)),
    "apply": lambda: (patching.apply, dict(host=states()[0], patch=patch())),
    "quantise": lambda: (quantise.quantise, dict(signature={"w": t(6, 4)}, levels=16)),
    "Quantised.dequantise": lambda: (quantised().dequantise, {}),
    "average_batchnorm": lambda: (rws.average_batchnorm, dict(model=normed(), robust=[normed().state_dict()])),
    "blend_statistics": lambda: (rws.blend_statistics, dict(model=normed(), batches=[t(8, 6)], strength=1.0)),
    "compose": lambda: (rws.compose, dict(signatures=[patch(), patch()], weights=[1.0, 2.0], strength=1.0)),
    "signature": lambda: (
        rws.signature,
        dict(pretrained=states()[0], clean=states()[1], robust=states()[2], names=["w"]),
    ),
    "spurious_accuracy": lambda: (spurious.spurious_accuracy, dict(x=1.0, p=0.5, classes=3)),
    "imbalance_gain": lambda: (spurious.imbalance_gain, dict(scale=2.0)),
    "margin_ose": lambda: (spurious.margin_ose, dict(p=0.5, n_v=2, n_s=3, n_v2=2, n_s2=3, scale=1.0)),
    "margin_single": lambda: (spurious.margin_single, dict(p=0.5, n_v=2, n_s=3)),
    "margin_wse": lambda: (
        spurious.margin_wse,
        dict(p=0.5, n_v=2, n_s=3, n_v2=2, n_s2=3, scale=1.0, feature_scale=1.0),
    ),
    "simulate": lambda: (
        spurious.simulate,
        dict(p=0.5, n_v=2, n_s=3, classes=3, generator=gen(), scale=1.0, feature_scale=1.0, draws=100, noise=1e-6),
    ),
    "ties": lambda: (calls_merged(ties.ties), dict(density=0.5, scale=1.0, weights=[1.0, 2.0], elect="mass")),
    "trim_thresholds": lambda: (
        ties.trim_thresholds,
        dict(base=states()[0], models=list(states()[1:]), density=0.5),
    ),
}

DATA: dict[str, Callable[[], Call]] = {
    "corrupt": lambda: (
        corruptions.corrupt,
        dict(x=pictures(), name="contrast", severity=3, seed=0, table="cifar"),
    ),
    "colour_maps": lambda: (multicolor.colour_maps, dict(generator=gen(), colours=32)),
    "multicolor": lambda: (
        multicolor.multicolor,
        dict(x=torch.rand(4, 1, 28, 28, generator=gen()), y=labels(4), p=0.5, generator=gen(), colours=32),
    ),
    "as_stored": lambda: (orders.as_stored, dict(y=labels(), generator=gen())),
    "dirichlet": lambda: (
        (lambda y, **rest: orders.dirichlet(**rest)(y, gen())),
        dict(y=labels(40), delta=1.0, min_size=1, attempts=100),
    ),
    "grouped": lambda: ((lambda groups: orders.grouped(groups)(labels(), gen())), dict(groups=labels())),
    "label_shift": lambda: (
        (lambda prior: orders.label_shift(prior)(labels(), gen())),
        dict(prior=torch.ones(4)),
    ),
    "long_tail_prior": lambda: (orders.long_tail_prior, dict(classes=4, imbalance=10.0)),
    "power_prior": lambda: (orders.power_prior, dict(prior=torch.ones(4), rho=0.5)),
    "shuffled": lambda: (orders.shuffled, dict(y=labels(), generator=gen())),
    "sorted_by_class": lambda: (orders.sorted_by_class, dict(y=labels(), generator=gen())),
    "zipf": lambda: (
        (lambda y, **rest: orders.zipf(**rest)(y, gen())),
        dict(y=torch.arange(1000) % 10, a=2.0, head=0.1, head_share=0.5, attempts=10000),
    ),
    "read_cifar_binary": lambda: (read.read_cifar_binary, dict(path=cifar_file(), classes=10)),
    "load": lambda: (sets.load, dict(name="digits")),
    "continual": lambda: (
        streams.continual,
        dict(data=pictures_split(), domains=["contrast"], severity=3, batch_size=4, cycles=1, seed=0),
    ),
    "gradual": lambda: (
        streams.gradual,
        dict(data=pictures_split(), domains=["contrast"], batch_size=4, seed=0),
    ),
    "mixed": lambda: (
        streams.mixed,
        dict(data=pictures_split(), domains=["contrast"], severity=3, batch_size=4, seed=0),
    ),
    "Stream": lambda: (streams.Stream, vars(stream()).copy()),
}


def pictures_split() -> sets.Split:
    return sets.Split(pictures(20), labels(20))


def panel_columns() -> dict[str, Any]:
    given = {k: v for k, v in frame().items() if k in ("y", "w", "unit", "time")}
    return given | {"x": xs()}


PANEL: dict[str, Callable[[], Call]] = {
    "read_panel": lambda: (columns.read_panel, panel_columns() | dict(estimator="cre")),
    "check_shapes": lambda: (
        crossfit.check_shapes,
        dict(
            z=t(1, 2, 36).double(),
            targets=t(1, 2, 36).double(),
            folds=made_folds(),
            uses=[[0], [1]],
            unit=None,
            linear=0,
        ),
    ),
    "crossfit": lambda: (
        crossfit.crossfit,
        dict(
            z=t(1, 2, 36).double(), targets=t(1, 2, 36).double(), folds=made_folds(), learner=ridge.PolynomialRidge(1)
        ),
    ),
    "dgp_clarke_polselli_2025": lambda: (
        dgp.dgp_clarke_polselli_2025,
        dict(design=1, n_units=5, n_periods=3, n_covariates=4, theta=0.5, seeds=(0,)),
    ),
    "dgp_fuhr_papies_2024": lambda: (
        dgp.dgp_fuhr_papies_2024,
        dict(
            structure="C",
            shape="u-shaped",
            n_units=5,
            n_periods=3,
            n_covariates=1,
            beta=1.0,
            gamma=1.0,
            delta=1.0,
            rho=0.0,
            seeds=(0,),
        ),
    ),
    "PanelDML": lambda: (
        (lambda **options: dml_panel.PanelDML(**options).fit(**panel_columns())),
        dict(
            estimator="cre",
            model="plr",
            score="partialling out",
            agg="dml2",
            folds=2,
            scheme="unit",
            repeats=1,
            clip=0.01,
            seed=0,
        ),
    ),
    "PanelDML.fit": lambda: (
        dml_panel.PanelDML(folds=2).fit,
        {k: v.to_numpy() for k, v in panel_columns().items()},
    ),
    "PanelDML.confint": lambda: (fitted_dml().confint, dict(level=0.9)),
    "aipw_score": lambda: (
        dml_panel.aipw_score,
        dict(y=t(8), w=labels(8, 2).double(), g0=t(8), g1=t(8), m=t(8).sigmoid(), clip=0.01),
    ),
    "plr_score": lambda: (dml_panel.plr_score, dict(v=t(8), u=t(8, seed=1), w=t(8, seed=2))),
    "Folds": lambda: (
        folds.Folds,
        dict(fold=torch.arange(6).view(1, 6) % 2, keep=~torch.eye(2, dtype=torch.bool)),
    ),
    "make_folds": lambda: (folds.make_folds, dict(layout=lay(), folds=2, scheme="unit", repeats=1, seed=0)),
    "by_fold": lambda: (gram.by_fold, dict(rows=sorted_rows()[0], fold=sorted_rows()[1], k=3)),
    "fit": lambda: (
        gram.fit,
        dict(parts=gram_moments(), keep=keep(), columns=torch.tensor([0, 1]), targets=torch.tensor([3]), alphas=[1.0]),
    ),
    "inverse_times": lambda: (gram.inverse_times, dict(a=torch.eye(3).double(), b=t(3, 2).double(), alpha=1.0)),
    "moments": lambda: (gram.moments, dict(columns=t(1, 3, 4, 5).double(), counts=torch.full((1, 3), 5))),
    "standardised": lambda: (
        gram.standardised,
        dict(train=gram_moments(), columns=torch.tensor([0, 1]), targets=torch.tensor([3])),
    ),
    "over_repeats": lambda: (inference.over_repeats, dict(coefs=t(3), ses=t(3).abs())),
    "row_weights": lambda: (
        inference.row_weights,
        dict(layout=simulated().panel.layout, folds=made_folds(), cluster="unit"),
    ),
    "solve": lambda: (
        inference.solve,
        dict(
            psi_a=t(1, 36).double().abs(),
            psi_b=t(1, 36).double(),
            weights=torch.ones(1, 36).double(),
            folds=made_folds(),
        ),
    ),
    "standard_error": lambda: (
        inference.standard_error,
        dict(
            psi=t(1, 36).double(),
            psi_a=t(1, 36).double().abs(),
            layout=simulated().panel.layout,
            folds=made_folds(),
            cluster="unit",
        ),
    ),
    "partial_out": lambda: (
        information.partial_out,
        dict(
            estimators=["cre"],
            panel=simulated().panel,
            folds=made_folds(),
            fit=lambda *a, **k: crossfit.crossfit(*a, learner=ridge.PolynomialRidge(1), **k),
        ),
    ),
    "transform": lambda: (information.transform, dict(estimator="fd", panel=simulated().panel)),
    "variables": lambda: (information.variables, dict(panel=simulated().panel, wanted="xbm")),
    "Layout": lambda: (layout.Layout.of, dict(unit=[0, 0, 1, 1], time=[0, 1, 0, 1])),
    "group_sums": lambda: (layout.group_sums, dict(a=t(8), group=labels(), size=4)),
    "means": lambda: (layout.means, dict(a=t(8), group=labels())),
    "within": lambda: (layout.within, dict(a=t(24).double(), layout=lay(), tol=1e-9)),
    "crossfit_sklearn": lambda: (
        learners.crossfit_sklearn,
        dict(
            z=t(1, 2, 36).double(),
            targets=t(1, 1, 36).double(),
            folds=made_folds(),
            learners=[ridge.PolynomialRidge(1)],
        ),
    ),
    "follow_folds": lambda: (
        learners.follow_folds,
        dict(learner=ridge.PolynomialRidge(1), fold=np.arange(8) % 2),
    ),
    "linear_residuals": lambda: (
        linear.linear_residuals,
        dict(estimator="fe", panel=simulated().panel) | dict(estimator="pols"),
    ),
    "panel_ols": lambda: (
        linear.panel_ols,
        {k: v.to_numpy() for k, v in panel_columns().items() if k != "w"} | dict(effects="fixed"),
    ),
    "PolynomialRidge": lambda: (
        (lambda **options: ridge.PolynomialRidge(**options).fit(t(12, 2).numpy(), t(12).numpy())),
        dict(degree=2, alpha=1.0),
    ),
    "PolynomialRidge.fit": lambda: (ridge.PolynomialRidge(2).fit, dict(X=t(12, 2).numpy(), y=t(12).numpy())),
    "check_learner": lambda: (ridge.check_learner, dict(learner=ridge.PolynomialRidge(2))),
    "monomials": lambda: (ridge.monomials, dict(n=2, degree=2, linear=0)),
    "polynomial": lambda: (
        ridge.polynomial,
        dict(z=t(1, 2, 5).double(), exponents=ridge.monomials(2, 2), room=0),
    ),
    "standardise": lambda: (ridge.standardise, dict(z=t(1, 2, 5).double())),
    "estimate": lambda: (
        study.estimate,
        dict(estimators=["pols"], data=simulated(), folds=made_folds(), agg="dml1"),
    ),
    "monte_carlo": lambda: (
        study.monte_carlo,
        dict(
            simulate=lambda seeds: dgp.dgp_fuhr_papies_2024(n_units=12, n_periods=3, seeds=seeds),
            estimators=["pols"],
            seeds=[0],
            folds=2,
            chunk=8,
            n_jobs=1,
        ),
    ),
}

TTA: dict[str, Callable[[], Call]] = {
    "BNAdapt": lambda: (bn_adapt.BNAdapt, dict(model=normed(), alpha=0.5)),
    "BNAdapt.forward": lambda: (bn_adapt.BNAdapt(normed(), 0.5), dict(x=t(8, 6))),
    "CoTTA": lambda: (
        cotta.CoTTA,
        dict(model=normed(), lr=0.001, momentum=0.99, restore_p=0.1, threshold=0.9, n_views=2, steps=1, seed=0),
    ),
    "CoTTA.forward": lambda: (  # SGD: Adam's first step is the sign of a gradient, even of rounding
        cotta.CoTTA(normed(), n_views=2, views=lambda x: x, optimizer=torch.optim.SGD),
        dict(x=t(8, 6)),
    ),
    "confidence": lambda: (cotta.confidence, dict(logits=t(8, 4))),
    "consistency_loss": lambda: (cotta.consistency_loss, dict(student=t(8, 4), target=t(8, 4).softmax(1))),
    "ema": lambda: (cotta.ema, dict(teacher=[t(3)], student=[t(3, seed=1)], momentum=0.9)),
    "restoration_mask": lambda: (cotta.restoration_mask, dict(params=[t(3)], p=0.5, generator=gen())),
    "restore": lambda: (cotta.restore, dict(params=[t(3)], source=[t(3, seed=1)], p=0.5, generator=gen())),
    "drift": lambda: (evaluate.drift, dict(method=tent.Tent(normed()), model="model")),
    "error_by_domain": lambda: (evaluate.error_by_domain, dict(result=run_of())),
    "mean_error": lambda: (evaluate.mean_error, dict(result=run_of())),
    "mean_recall": lambda: (evaluate.mean_recall, dict(result=run_of(), num_classes=4)),
    "run": lambda: (evaluate.run, dict(method=tent.Tent(normed()), stream=stream(), reset="first")),
    "running_error": lambda: (evaluate.running_error, dict(result=run_of(), window=2)),
    "run_seeds": lambda: (
        evaluate.run_seeds,
        dict(methods={"tent": tent.Tent}, models=[normed()], streams=[stream()], n_jobs=1),
    ),
    "summary": lambda: (evaluate.summary, dict(runs={"tent": [run_of()]})),
    "Lame": lambda: (lame.Lame, dict(model=toy(), kind="knn", k=2, strength=1.0, max_iterations=10)),
    "Lame.forward": lambda: (lame.Lame(toy(), k=2, head="head"), dict(x=t(8, 6))),
    "affinity": lambda: (lame.affinity, dict(features=t(8, 5), kind="knn", k=2)),
    "energy": lambda: (
        lame.energy,
        dict(
            z=t(8, 4).softmax(1), log_probs=t(8, 4).log_softmax(1), affinity=lame.affinity(t(8, 5), k=2), strength=1.0
        ),
    ),
    "laplacian_assign": lambda: (
        lame.laplacian_assign,
        dict(
            log_probs=t(8, 4).log_softmax(1),
            affinity=lame.affinity(t(8, 5), k=2),
            strength=1.0,
            floor=0.0,
            max_iterations=10,
            tolerance=1e-8,
        ),
    ),
    "Tent": lambda: (tent.Tent, dict(model=normed(), lr=0.001)),
    "Tent.forward": lambda: (tent.Tent(normed()), dict(x=t(8, 6))),
    "entropy": lambda: (tent.entropy, dict(logits=t(8, 4))),
    "RandomViews": lambda: (views.RandomViews, dict(seed=0)),
    "RandomViews.__call__": lambda: (views.RandomViews(0), dict(x=pictures())),
    "apply_view": lambda: (views.apply_view, dict(x=pictures(), view=views.View(brightness=1.1, angle=3.0))),
    "draw_view": lambda: (views.draw_view, dict(size=(16, 16), generator=gen())),
}

SHARED: dict[str, Callable[[], Call]] = {
    "models.Normalised": lambda: (models.Normalised, dict(model=nn.Identity(), mean=(0.5,), std=(0.5,))),
    "models.Normalised.forward": lambda: (models.Normalised(cnn(), (0.5,), (0.5,)), dict(x=t(2, 1, 28, 28))),
    "models.PlainCNN": lambda: (models.PlainCNN, dict(in_chans=1, num_classes=4, width=4)),
    "models.PlainCNN.forward": lambda: (fixed(lambda: models.PlainCNN(width=4)), dict(x=t(2, 1, 28, 28))),
    "models.SmallCNN": lambda: (models.SmallCNN, dict(in_chans=1, num_classes=4, width=4)),
    "models.SmallCNN.forward": lambda: (cnn().eval(), dict(x=t(2, 1, 28, 28))),
    "models.fit": lambda: (
        models.fit,
        dict(model=cnn(), x=t(8, 1, 28, 28), y=labels(), epochs=1, lr=0.01, batch_size=4, seed=0),
    ),
    "models.predict": lambda: (models.predict, dict(model=mlp(), x=t(8, 6), batch_size=4)),
    "models.pretrained": lambda: (models.pretrained, dict(name="fashion8k", seed=0)),
    "results.record": lambda: (results.record, dict(slug="no_such", rows=[], folder="/nowhere")),
    "models.Attention": lambda: (vit.Attention, dict(dim=8, num_heads=2)),
    "models.Block": lambda: (vit.Block, dict(dim=8, num_heads=2)),
    "models.Mlp": lambda: (vit.Mlp, dict(dim=8, hidden=4)),
    "models.ViT": lambda: (
        vit.ViT,
        dict(img_size=14, patch_size=7, in_chans=1, num_classes=4, embed_dim=8, depth=1, num_heads=2),
    ),
    "models.ViT.forward": lambda: (small_vit(), dict(x=t(2, 1, 14, 14))),
}

CASES = {
    f"{part}{name}": make
    for part, table in (
        ("adapters.", ADAPTERS),
        ("continual.", CONTINUAL),
        ("data.", DATA),
        ("merging.", MERGING),
        ("panel.", PANEL),
        ("tta.", TTA),
        ("", SHARED),
    )
    for name, make in table.items()
}
