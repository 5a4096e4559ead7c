"""A valid call of everything public in peftref.adapters: tests.frame.test_fuzz spoils its arguments one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from peftref import adapters, data
from tests.frame._inputs import Call, adapted_toy, base, fixed, labels, mlp, small_vit, t, toy


def adapted(kind: type = adapters.LoRA, **options: Any) -> nn.Sequential:
    net = mlp()
    fixed(lambda: adapters.inject(net, kind, ["0"], **options))
    return net


def shared() -> tuple[nn.Sequential, adapters.Tasks]:
    net, names = mlp(), adapters.Tasks(["a", "b"])
    adapters.inject(net, adapters.VLAdapter, ["0"], reduction=4, sharing="multiple", tasks=names)
    names.use("a")
    return net, names


def one_task() -> adapters.Task:
    parts = [data.Split(t(12, 6, seed=s), labels(12)) for s in range(3)]
    return adapters.Task("toy", *parts)


def spectrum() -> adapters.Spectrum:
    return adapters.absorb(None, t(20, 6), 4)


def found() -> adapters.Directions:
    return adapters.collect(mlp(), ["0", "2"], [t(20, 6)], r=2)


def formed() -> nn.Module:
    net = small_vit()
    fixed(lambda: adapters.inject(net, adapters.AdaptFormer, [r"blocks.0"], bottleneck=2))
    return net.eval()


def merged() -> nn.Module:
    net = adapted()
    adapters.merge(net)
    return net


CALLS: dict[str, Callable[[], Call]] = {
    "AdaptFormer": lambda: (
        adapters.AdaptFormer,
        dict(base=adapters.view(small_vit().blocks[0], torch.float32), bottleneck=2, scale=0.1, dropout=0.1),
    ),
    "AdaptFormer.forward": lambda: (formed(), dict(x=t(2, 1, 14, 14))),
    "branch": lambda: (
        adapters.branch,
        dict(u=t(3, 6), down=t(2, 6), down_bias=t(2), up=t(4, 2), up_bias=t(4), scale=0.5, dropout=0.0),
    ),
    "dead_share": lambda: (adapters.dead_share, dict(model=formed(), x=t(2, 1, 14, 14), name="default")),
    "head": lambda: (adapters.head, dict(features=6, classes=4)),
    "width": lambda: (adapters.width, dict(child=nn.Linear(6, 4))),
    "Bone": lambda: (adapters.Bone, dict(base=base(), r=2, variant="bone", mini_r=1)),
    "Bone.forward": lambda: (adapted(adapters.Bone, r=2, variant="bone"), dict(input=t(3, 6))),
    "bat": lambda: (adapters.bat, dict(weight=t(4, 6), block=t(2, 2, 2))),
    "pool": lambda: (adapters.pool, dict(x=t(3, 6), r=2)),
    "pooled": lambda: (adapters.pooled, dict(block=t(2, 4), i=6)),
    "tiles": lambda: (adapters.tiles, dict(r=2, i=6)),
    "Host": lambda: (adapters.Host, dict(base_layer=nn.Linear(6, 4))),
    "Host.forward": lambda: (adapted(r=2), dict(input=t(3, 6))),
    "activate": lambda: ((lambda model, name: adapters.activate(model, name)), dict(model=adapted(), name="default")),
    "adapters": lambda: (adapters.adapters, dict(model=adapted(), name="default")),
    "build": lambda: (adapters.build, dict(model=mlp(), kind=adapters.LoRA, targets=["0"], exclude=["2"], r=2)),
    "inject": lambda: (
        adapters.inject,
        dict(model=mlp(), kind=adapters.LoRA, targets=["0"], name="one", r=2, lora_alpha=8),
    ),
    "install": lambda: (
        adapters.install,
        dict(model=mlp(), new={"0": adapters.LoRA(adapters.view(nn.Linear(6, 8)))}, name="one"),
    ),
    "merge": lambda: (adapters.merge, dict(model=adapted())),
    "unload": lambda: (adapters.unload, dict(model=adapted())),
    "unmerge": lambda: (adapters.unmerge, dict(model=merged())),
    "collect": lambda: (
        adapters.collect,
        dict(model=mlp(), targets=["0", "2"], batches=[t(20, 6)], r=2, rho=2.0, max_batches=4, tau=0.99),
    ),
    "inject_eva": lambda: (adapters.inject_eva, dict(model=mlp(), found=found(), lora_alpha=8, name="eva")),
    "redistribute": lambda: (adapters.redistribute, dict(ratios={"a": t(3).abs(), "b": t(3).abs()}, budget=3)),
    "start": lambda: (adapters.start, dict(spectrum=spectrum(), r=2)),
    "config": lambda: (adapters.config, dict(model=adapted(), name="default", modules=["2"])),
    "state": lambda: (adapters.state, dict(model=adapted(), name="default", modules=["2"])),
    "frozen_module": lambda: (adapters.frozen_module, dict(module=nn.Linear(6, 4))),
    "find": lambda: (adapters.find, dict(model=mlp(), targets=["0"], exclude=["2"])),
    "matches": lambda: (adapters.matches, dict(label="targets", wanted=["0"], model=mlp())),
    "modules_by_name": lambda: (adapters.modules_by_name, dict(model=mlp())),
    "Hydra": lambda: (adapters.Hydra, dict(base=base(), r_par=2, r_seq=2, scale=1.0, dropout=0.0)),
    "Hydra.forward": lambda: (adapted(adapters.Hydra), dict(input=t(3, 6))),
    "as_lora": lambda: (
        (lambda adapter: adapters.as_lora(adapter, nn.Linear(6, 4))),
        dict(adapter=adapters.Hydra(base())),
    ),
    "HyperNet": lambda: (
        adapters.HyperNet,
        dict(d=8, tasks=2, layers=2, positions=1, reduction=4, p=4, dim=6, hidden=4),
    ),
    "HyperNet.forward": lambda: (
        adapters.HyperNet(8, 2, 2, reduction=4, p=4, dim=6, hidden=4),
        dict(layer=0, position=0, one=1),
    ),
    "Hyperformer": lambda: (
        adapters.Hyperformer,
        dict(
            base=base(),
            layer=0,
            position=0,
            batch_dim=0,
            tasks=adapters.Tasks(["a", "b"]),
            hyper=adapters.HyperNet(4, 2, 2, p=4, dim=6, hidden=4, reduction=2),
        ),
    ),
    "places": lambda: (
        adapters.places,
        dict(model=small_vit(), targets=[r"blocks\.0\.mlp\.fc2"]) | dict(targets=r"blocks\.\d+\.mlp\.fc2"),
    ),
    "input_rows": lambda: (
        adapters.input_rows,
        dict(name="0", module=nn.Linear(6, 4), x=t(3, 6), mask=torch.ones(3, dtype=torch.bool)),
    ),
    "run": lambda: (adapters.run, dict(model=mlp(), batch=t(3, 6))),
    "shared_inputs": lambda: (adapters.shared_inputs, dict(model=(m := mlp()), layers={"0": m[0]}, batch=t(3, 6))),
    "token_mask": lambda: (
        adapters.token_mask,
        dict(batch={"attention_mask": torch.ones(2, 3), "labels": torch.ones(2, 3).long()}, ignore=-100),
    ),
    "Layer": lambda: (adapters.Layer, dict(module=nn.Linear(6, 4), dtype=torch.float32)),
    "bypassed": lambda: (adapters.bypassed, dict(parent=nn.TransformerEncoderLayer)),
    "refusal": lambda: (adapters.refusal, dict(module=nn.Linear(6, 4))),
    "view": lambda: (adapters.view, dict(module=nn.Linear(6, 4))),
    "LoRA": lambda: (adapters.LoRA, dict(base=base(), r=2, lora_alpha=8, lora_dropout=0.0)),
    "LoRA.forward": lambda: (adapted(r=2), dict(input=t(3, 6))),
    "scaling": lambda: (adapters.scaling, dict(r=2, lora_alpha=8)),
    "Heads": lambda: (adapters.Heads, dict(d=6, classes=[2, 3], tasks=adapters.Tasks(["a", "b"]))),
    "TaskToken": lambda: (adapters.TaskToken, dict(base=base(), tasks=adapters.Tasks(["a", "b"]))),
    "relabelled": lambda: (adapters.relabelled, dict(task=one_task(), labels=(1, 0, 1, 0), name="even")),
    "PHM": lambda: (adapters.PHM, dict(copies=2, i=6, o=4, n=2, rank=1)),
    "PHM.forward": lambda: (adapters.PHM(2, 6, 4, 2), dict(one=1)),
    "Rule": lambda: (adapters.Rule, dict(n=2, std=0.01, copies=2)),
    "phm_linear": lambda: (adapters.phm_linear, dict(x=t(3, 6), A=t(2, 2, 2), B=t(2, 3, 2))),
    "phm_weight": lambda: (adapters.phm_weight, dict(A=t(2, 2, 2), B=t(2, 3, 2))),
    "Accumulator": lambda: (adapters.Accumulator, dict(k=2, route="gram", center=True)),
    "Accumulator.update": lambda: (adapters.Accumulator(3).update, dict(rows=t(20, 6))),
    "Moments": lambda: (adapters.Moments, dict(center=True)),
    "Moments.update": lambda: (adapters.Moments().update, dict(rows=t(20, 6))),
    "absorb": lambda: (adapters.absorb, dict(old=spectrum(), rows=t(20, 6, seed=1), k=3)),
    "agreement": lambda: (adapters.agreement, dict(new=spectrum(), old=spectrum(), r=2)),
    "adapt": lambda: (
        adapters.adapt,
        dict(build=adapters.full, task=one_task(), lr=0.01, seed=0, steps=2, batch_size=4, start=toy),
    ),
    "compare": lambda: (
        adapters.compare,
        dict(
            methods={"full": adapters.full}, task=one_task(), seeds=(0,), lrs=(0.01,), steps=1, batch_size=4, start=toy
        ),
    ),
    "fresh": lambda: (adapters.fresh, dict(num_classes=4)),
    "full": lambda: (adapters.full, dict(net=toy())),
    "probe": lambda: (adapters.probe, dict(net=toy())),
    "summary": lambda: (
        adapters.summary,
        dict(
            runs=adapters.compare(
                {"full": adapters.full}, one_task(), seeds=(0,), lrs=(0.01,), steps=1, batch_size=4, start=toy
            )
        ),
    ),
    "trainable": lambda: (adapters.trainable, dict(model=toy())),
    "update_rank": lambda: (adapters.update_rank, dict(model=adapted_toy(), rtol=1e-5)),
    "Bank": lambda: (adapters.Bank, dict(seed=0, given=[(t(4, 6), [t(4, 4)], [t(2, 2), t(3, 3)])])),
    "TeRA": lambda: (adapters.TeRA, dict(base=base(), out_modes=[4], in_modes=[2, 3], r=[4, 2, 3], seed=0)),
    "TeRA.forward": lambda: (adapted(adapters.TeRA, seed=0), dict(input=t(3, 6))),
    "error_terms": lambda: (
        adapters.error_terms,
        dict(target=t(4, 6), core=t(4, 6), left=[t(4, 4)], right=[t(2, 2), t(3, 3)]),
    ),
    "expand": lambda: (adapters.expand, dict(vectors=[t(2), t(3)])),
    "multiply": lambda: (adapters.multiply, dict(x=t(5, 6), factors=[t(2, 2), t(3, 3)])),
    "rank_bound": lambda: (adapters.rank_bound, dict(left=[4], right=[2, 3])),
    "rank_one": lambda: (adapters.rank_one, dict(tensor=t(2, 3, 2), steps=5)),
    "update": lambda: (
        adapters.update,
        dict(core=t(4, 6), left=[t(4, 4)], right=[t(2, 2), t(3, 3)], d_left=[t(4)], d_right=[t(2), t(3)]),
    ),
    "TLoRA": lambda: (
        adapters.TLoRA,
        dict(base=base(), transform_rank=2, residual_rank=2, order=2, out_modes=[2, 2], in_modes=[2, 3]),
    ),
    "TLoRA.forward": lambda: (adapted(adapters.TLoRA, residual_rank=2), dict(input=t(3, 6))),
    "identity_cores": lambda: (adapters.identity_cores, dict(dims=[2, 3], rank=2, init="slot")),
    "identity_distance": lambda: (adapters.identity_distance, dict(cores=adapters.identity_cores([2, 3], 2, "paper"))),
    "identity_penalty": lambda: (adapters.identity_penalty, dict(cores=adapters.identity_cores([2, 3], 2, "paper"))),
    "orthogonal_penalty": lambda: (
        adapters.orthogonal_penalty,
        dict(cores=adapters.identity_cores([2, 3], 2, "paper")),
    ),
    "product": lambda: (
        adapters.product,
        dict(left=[t(2, 2, 2, 2), t(3, 3, 2, 2)], right=[t(2, 2, 2, 2), t(3, 3, 2, 2)]),
    ),
    "ring_factors": lambda: (
        adapters.ring_factors,
        dict(up=[t(2, 2, 3), t(2, 3, 2)], down=[t(3, 2, 3), t(2, 3, 2)]),
    ),
    "ring_matrix": lambda: (adapters.ring_matrix, dict(cores=[t(2, 2, 2, 2), t(3, 3, 2, 2)])),
    "transform": lambda: (adapters.transform, dict(cores=[t(2, 2, 2, 2), t(3, 3, 2, 2)], x=t(5, 6))),
    "Stack": lambda: (adapters.Stack, dict(copies=2, i=6, o=4)),
    "Stack.forward": lambda: (fixed(lambda: adapters.Stack(2, 6, 4)), dict(one=1)),
    "agreed_names": lambda: (adapters.agreed_names, dict(tasks=adapters.Tasks(["a", "b"]), task_names=["a", "b"])),
    "Tasks": lambda: (adapters.Tasks, dict(names=["a", "b"])),
    "Tasks.use": lambda: (adapters.Tasks(["a", "b"]).use, dict(which=torch.tensor([0, 1]))),
    "VLAdapter": lambda: (
        adapters.VLAdapter,
        dict(base=base(), reduction=2, tasks=adapters.Tasks(["a", "b"]), batch_dim=1),
    ),
    "VLAdapter.forward": lambda: (shared()[0], dict(input=t(3, 6))),
    "affine": lambda: (adapters.affine, dict(h=t(2, 5, 3), W=t(2, 4, 3), b=t(2, 4))),
    "bottleneck": lambda: (adapters.bottleneck, dict(h=t(5, 6), D=t(2, 6), b=t(2), U=t(6, 2), c=t(6), batch_dim=0)),
}


# Lines of mathematics whose docstring gives the shapes: torch names the sizes that do not fit.
KERNELS = {
    "HyperNet.forward",
    "Stack",
    "affine",
    "bat",
    "bottleneck",
    "branch",
    "error_terms",
    "expand",
    "identity_cores",
    "identity_distance",
    "identity_penalty",
    "multiply",
    "orthogonal_penalty",
    "phm_linear",
    "phm_weight",
    "pool",
    "pooled",
    "product",
    "rank_one",
    "ring_factors",
    "ring_matrix",
    "input_rows",
    "scaling",
    "tiles",
    "token_mask",
    "transform",
    "update",
}


# Cases that stay as they are, and why.
SPARED = {
    ("pool", "r", "0"): "a division by zero",
    ("pooled", "block", "empty"): "a division by zero",
    ("pooled", "block", "no rows"): "a division by zero",
    ("tiles", "r", "0"): "a division by zero",
    ("scaling", "r", "0"): "a division by zero",
    ("multiply", "factors", "[0] empty"): "nothing at this place",
    ("multiply", "factors", "[0] fewer dims"): "nothing at this place",
    ("multiply", "factors", "[0] no columns"): "a division by zero",
    ("update", "left", "[0] empty"): "nothing at this place",
    ("update", "left", "[0] no rows"): "a division by zero",
    ("update", "left", "[0] fewer dims"): "nothing at this place",
    ("update", "right", "[0] empty"): "nothing at this place",
    ("update", "right", "[0] no rows"): "a division by zero",
    ("update", "right", "[0] fewer dims"): "nothing at this place",
    ("identity_distance", "cores", "empty sequence"): "nothing at this place",
    ("identity_penalty", "cores", "[0] text"): "a text is taken for a device",
    ("transform", "cores", "[0] empty"): "nothing at this place",
    ("Stack", "i", "-1"): "outside a logarithm or a root",
    ("Stack", "i", "0"): "a division by zero",
}


# Names without a row, and why.
NAMELESS = {
    "balanced": "called by TeRA and TLoRA alone, with sizes that they checked",
    "modes": "called by TeRA and TLoRA alone, whose rows spoil the modes",
    "by_pattern": "called by load alone, see adapters/test_files",
    "load": "files, see adapters/test_files",
    "save": "files, see adapters/test_files",
    "save_as_lora": "files, see adapters/test_hydra",
    "call_with_taps": "called by a Host alone, with what the network gave it",
    "swap": "called by install alone, with what it found",
    "record_inputs": "a context for hooks, without numbers",
    "Adapter": "abstract",
    "PeftFormat": "names and functions of a method, for files alone",
    "compare_sharing": "many trainings: learn's checks",
    "conflict": "takes what learn returns",
    "learn": "minimise's checks",
    "shifted": "the shipped data",
}
