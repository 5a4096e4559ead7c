"""A valid call of everything public in peftref.continual: tests.frame.test_fuzz spoils its arguments one by one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from peftref import adapters, continual, data
from tests.frame._inputs import (
    Call,
    Headed,
    adapted_toy,
    base,
    fixed,
    gen,
    labels,
    mlp,
    normed,
    rows_split,
    small_vit,
    split,
    t,
    toy,
)


def dataset() -> data.Dataset:
    return data.Dataset("toy", split(40), split(20), tuple("abcd"), "0" * 64)


def stream_tasks() -> list[continual.Task]:
    return [
        continual.Task(
            ("a", "b"), range(2 * k, 2 * k + 2), *(data.Split(t(8, 6), labels(8, 2) + 2 * k) for _ in range(3))
        )
        for k in (0, 1)
    ]


def moments(seed: int = 0) -> continual.Moments:
    return continual.moments(t(12, 5, seed=seed), labels(12, 3), 3)


def reservoir() -> continual.Reservoir:
    buffer = continual.Reservoir(8)
    buffer.add(t(8, 6), labels(8))
    return buffer


def with_logits() -> continual.Reservoir:
    buffer = continual.Reservoir(8)
    buffer.add(t(8, 6), labels(8), t(8, 4))
    return buffer


def balanced(tasks: int = 2) -> nn.Module:
    net = continual.convert(normed(), tasks, 0.5)
    continual.begin_task(net, 0)
    return net


def accuracies() -> Tensor:
    return torch.tensor([[0.9, math.nan, math.nan], [0.8, 0.7, math.nan], [0.6, 0.5, 0.9]])


def continual_lae() -> continual.LAE:
    net = fixed(Headed)
    fixed(lambda: adapters.inject(net, adapters.LoRA, ["body"], name="online"))
    method = fixed(lambda: continual.LAE(net, features=8))
    fixed(lambda: method.begin_task(4))
    return method


def fitted_fsa() -> continual.FSA:
    return continual.FSA(toy(), "none").observe(t(12, 6), labels(12))


def bn() -> nn.BatchNorm1d:
    return nn.BatchNorm1d(8)


def entering(manager: Callable[..., Any]) -> Callable[..., None]:
    def enter(**arguments: Any) -> None:
        with manager(**arguments):
            pass

    return enter


def squared() -> nn.Module:
    net = fixed(lambda: nn.Sequential(nn.Linear(6, 6)))
    fixed(lambda: adapters.inject(net, continual.ParallelAdapter, ["0"], hidden=2))
    return net


def filmed() -> nn.Module:
    net = normed().eval()
    continual.inject_film(net, ["1"])
    return net


def grown() -> continual.DynamicHead:
    head = fixed(lambda: continual.DynamicHead(6))
    fixed(lambda: head.grow(4))
    return head


def prefixed() -> nn.Module:
    net = small_vit()
    fixed(lambda: continual.inject_prefix(net, ["attn"], length=2))
    return net


def begun(rule: continual.FineTune) -> continual.FineTune:
    rule.begin_task(0, 4)
    return rule


CALLS: dict[str, Callable[[], Call]] = {
    "AdaB2N": lambda: (continual.AdaB2N, dict(layer=bn(), tasks=2, kappa=0.5)),
    "AdaB2N.forward": lambda: (balanced(), dict(input=t(4, 6))),
    "adaptation_loss": lambda: (
        (lambda model: (model(t(4, 6)), continual.adaptation_loss(model))[1]),
        dict(model=balanced()),
    ),
    "balance": lambda: (
        continual.balance,
        dict(rule=continual.FineTune(), model=balanced(), tasks=stream_tasks(), strength=0.1, start=0),
    ),
    "begin_task": lambda: (continual.begin_task, dict(model=balanced(), task=1)),
    "convert": lambda: (continual.convert, dict(model=normed(), tasks=2, kappa=0.5)),
    "eta": lambda: (continual.eta, dict(k=3, momentum=0.1, kappa=0.5)),
    "parameter_groups": lambda: (continual.parameter_groups, dict(model=balanced(), weight_decay=0.1)),
    "task_batch": lambda: (entering(continual.task_batch), dict(model=balanced(), task_ids=torch.zeros(4).long())),
    "task_weights": lambda: (continual.task_weights, dict(psi=t(2), counts=torch.tensor([1.0, 3.0]))),
    "balanced_norm": lambda: (
        continual.balanced_norm,
        dict(x=t(4, 6), weights=torch.full((4,), 0.25), scale=t(6), shift=t(6), eps=1e-5),
    ),
    "balanced_statistics": lambda: (
        continual.balanced_statistics,
        dict(x=t(4, 6), weights=torch.full((4,), 0.25)),
    ),
    "CLASSP": lambda: (
        continual.CLASSP,
        dict(params=[nn.Parameter(t(3))], lr=0.2, threshold=0.5, epsilon=1e-5, power=1.0),
    ),
    "classp_step": lambda: (
        continual.classp_step,
        dict(w=[t(3)], g=[t(3, seed=1)], s=[t(3).abs()], lr=0.2, power=1.0, threshold=0.5, eps=1e-5),
    ),
    "gate": lambda: (continual.gate, dict(g=t(3), threshold=0.5)),
    "EWC": lambda: (continual.EWC, dict(strength=1.0, decay=1.0, chunk_size=50)),
    "EWC.end_task": lambda: (continual.EWC(1.0).end_task, dict(model=mlp(), x=t(8, 6), y=labels())),
    "diagonal_fisher": lambda: (
        continual.diagonal_fisher,
        dict(model=mlp(), x=t(8, 6), y=labels(), chunk_size=4, names=[next(n for n, _ in mlp().named_parameters())]),
    ),
    "ewc_penalty": lambda: (
        continual.ewc_penalty,
        dict(theta={"w": t(3)}, anchor={"w": t(3, seed=1)}, fisher={"w": t(3).abs()}),
    ),
    "FiLM": lambda: (continual.FiLM, dict(norm=bn().eval())),
    "FiLM.forward": lambda: (continual.FiLM(bn().eval()), dict(x=t(4, 8))),
    "film_parameters": lambda: (continual.film_parameters, dict(model=filmed())),
    "inject_film": lambda: (continual.inject_film, dict(model=normed(), layers=["1"])),
    "merge_film": lambda: (continual.merge_film, dict(model=filmed())),
    "remove_film": lambda: (continual.remove_film, dict(model=filmed())),
    "FSA": lambda: (continual.FSA, dict(model=toy(), body="none", ridge=1.0, ridge_rel=0.0, num_classes=4, chunk=8)),
    "FSA.adapt": lambda: (continual.FSA(toy(), "full", epochs=2, batch_size=4).adapt, dict(x=t(12, 6), y=labels(12))),
    "FSA.observe": lambda: (fitted_fsa().observe, dict(x=t(12, 6), y=labels(12))),
    "FSA.forward": lambda: (fitted_fsa(), dict(x=t(12, 6))),
    "cosine_distance": lambda: (continual.cosine_distance, dict(features=t(4, 5))),
    "embed": lambda: (continual.embed, dict(model=toy(), x=t(3, 6))),
    "first_session": lambda: (
        continual.first_session,
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
    "LAE": lambda: (continual.LAE, dict(model=adapted_toy(), alpha=0.99, lr=0.01, rule="max", features=8)),
    "LAE.begin_task": lambda: (continual_lae().begin_task, dict(classes=2)),
    "LAE.step": lambda: (continual_lae().step, dict(x=t(8, 6), y=labels())),
    "LAE.learn": lambda: (
        continual_lae().learn,
        dict(task=rows_split(), generator=gen(), epochs=2, frozen_epochs=1, batch_size=4),
    ),
    "LAE.forward": lambda: (continual_lae(), dict(x=t(8, 6))),
    "alpha_for": lambda: (continual.alpha_for, dict(kept=0.5, steps=10)),
    "ema_": lambda: (continual.ema_, dict(offline=[t(3)], online=[t(3, seed=1)], alpha=0.9)),
    "vote": lambda: (continual.vote, dict(logits=t(2, 3, 4), rule="max")),
    "DynamicHead": lambda: (continual.DynamicHead, dict(features=6)),
    "DynamicHead.grow": lambda: (continual.DynamicHead(6).grow, dict(classes=2)),
    "DynamicHead.forward": lambda: (grown(), dict(h=t(3, 6))),
    "local_loss": lambda: (continual.local_loss, dict(logits=t(8, 4), y=labels(8, 2) + 2, start=2)),
    "LDA": lambda: (continual.LDA, dict(scatter="total", ridge=1.0, ridge_rel=0.0)),
    "LDA.partial_fit": lambda: (
        continual.LDA().partial_fit(t(12, 5), labels(12)).partial_fit,
        dict(features=t(12, 5), labels=labels(12)),
    ),
    "LDA.forward": lambda: (continual.LDA().partial_fit(t(12, 5), labels(12)), dict(features=t(3, 5))),
    "discriminant": lambda: (continual.discriminant, dict(m=moments(), scatter="total", ridge=1.0, ridge_rel=0.0)),
    "merge": lambda: (continual.merge, dict(a=moments(), b=moments(1))),
    "moments": lambda: (continual.moments, dict(features=t(12, 5), codes=labels(12, 3), classes=3)),
    "average_accuracy": lambda: (
        continual.average_accuracy,
        dict(a=accuracies(), counts=torch.tensor([10, 20, 30])),
    ),
    "average_incremental": lambda: (continual.average_incremental, dict(a=accuracies())),
    "backward_transfer": lambda: (continual.backward_transfer, dict(a=accuracies())),
    "evaluate": lambda: (continual.evaluate, dict(predict=mlp(), tasks=stream_tasks(), batch_size=4)),
    "forgetting": lambda: (continual.forgetting, dict(a=accuracies())),
    "forward_transfer": lambda: (
        continual.forward_transfer,
        dict(a=torch.rand(3, 3, generator=gen()), untrained=torch.full((3,), 0.1)),
    ),
    "last_accuracy": lambda: (continual.last_accuracy, dict(a=accuracies())),
    "plasticity": lambda: (continual.plasticity, dict(a=accuracies())),
    "summary": lambda: (continual.summary, dict(a=accuracies())),
    "continual_norm": lambda: (continual.continual_norm, dict(layer=bn(), groups=4)),
    "group_norm": lambda: (continual.group_norm, dict(layer=bn(), groups=4)),
    "replace_batch_norms": lambda: (
        continual.replace_batch_norms,
        dict(model=normed(), make=lambda m: continual.group_norm(m, 4)),
    ),
    "Experts": lambda: (
        (lambda one, two: continual.Experts(one, two)),
        dict(one=adapters.LoRA(base()), two=adapters.LoRA(base())),
    ),
    "KVLoRA": lambda: (continual.KVLoRA, dict(base=adapters.view(nn.Linear(6, 18)), r=2, kv=6)),
    "ParallelAdapter": lambda: (continual.ParallelAdapter, dict(base=base(), hidden=2)),
    "ParallelAdapter.forward": lambda: (squared(), dict(input=t(3, 6))),
    "AttentionHost": lambda: (continual.AttentionHost, dict(base_layer=small_vit().blocks[0].attn)),
    "Prefix": lambda: (
        continual.Prefix,
        dict(base=adapters.view(small_vit().blocks[0].attn, torch.float32), length=2),
    ),
    "Prefix.forward": lambda: (prefixed(), dict(x=t(2, 1, 14, 14))),
    "heads": lambda: (continual.heads, dict(attn=small_vit().blocks[0].attn, x=t(2, 5, 8))),
    "inject_prefix": lambda: (continual.inject_prefix, dict(model=small_vit(), targets=["attn"], length=2)),
    "prefix_attention": lambda: (
        continual.prefix_attention,
        dict(q=t(2, 2, 5, 4), k=t(2, 2, 5, 4), v=t(2, 2, 5, 4), p_k=t(2, 3, 4), p_v=t(2, 3, 4)),
    ),
    "prefix_share": lambda: (continual.prefix_share, dict(q=t(2, 2, 5, 4), k=t(2, 2, 5, 4), p_k=t(2, 3, 4))),
    "DERpp": lambda: (continual.DERpp, dict(buffer=continual.Reservoir(8), batch_size=4, alpha=0.1, beta=0.5)),
    "DERpp.loss": lambda: (continual.DERpp(with_logits(), 4).loss, dict(model=mlp(), x=t(8, 6), y=labels())),
    "ER": lambda: (continual.ER, dict(buffer=continual.Reservoir(8), batch_size=4)),
    "ER.loss": lambda: (continual.ER(reservoir(), 4).loss, dict(model=mlp(), x=t(8, 6), y=labels())),
    "ERACE": lambda: (continual.ERACE, dict(buffer=continual.Reservoir(8), batch_size=4)),
    "ERACE.loss": lambda: (
        begun(continual.ERACE(reservoir(), 4)).loss,
        dict(model=mlp(), x=t(8, 6), y=labels()),
    ),
    "FineTune": lambda: (continual.FineTune, {}),
    "FineTune.loss": lambda: (continual.FineTune().loss, dict(model=mlp(), x=t(8, 6), y=labels())),
    "ace_mask": lambda: (continual.ace_mask, dict(logits=t(8, 4), y=labels(), seen=2)),
    "derpp_loss": lambda: (
        continual.derpp_loss,
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
        continual.er_ace_loss,
        dict(new=t(8, 4), y=labels(), seen=2, old=t(4, 4), y_old=labels(4)),
    ),
    "er_loss": lambda: (continual.er_loss, dict(new=t(8, 4), y=labels(), old=t(4, 4), y_old=labels(4))),
    "Reservoir": lambda: (continual.Reservoir, dict(size=8, seed=0)),
    "Reservoir.add": lambda: ((lambda x, y: reservoir().add(x, y)), dict(x=t(8, 6), y=labels())),
    "Reservoir.draw": lambda: (reservoir().draw, dict(n=3)),
    "class_incremental": lambda: (
        continual.class_incremental,
        dict(data=dataset(), tasks=2, seed=0, per_class=3, val=0.2),
    ),
    "domain_incremental": lambda: (
        (lambda data: continual.domain_incremental(data, data)),
        dict(data=dataset()),
    ),
    "task_of": lambda: (continual.task_of, dict(tasks=stream_tasks(), apart=True)),
    "joint": lambda: (
        continual.joint,
        dict(model=mlp(), tasks=stream_tasks(), lr=0.01, batch_size=4, epochs=1, seed=0),
    ),
    "learn": lambda: (
        continual.learn,
        dict(model=mlp(), tasks=stream_tasks(), rule=continual.FineTune(), lr=0.01, batch_size=4, epochs=1, seed=0),
    ),
}


# Lines of mathematics whose docstring gives the shapes: torch names the sizes that do not fit.
KERNELS = {
    "DERpp.loss",
    "ER.loss",
    "ERACE.loss",
    "EWC.end_task",
    "FineTune.loss",
    "LAE.learn",
    "LAE.step",
    "balanced_norm",
    "balanced_statistics",
    "classp_step",
    "derpp_loss",
    "diagonal_fisher",
    "er_ace_loss",
    "er_loss",
    "eta",
    "ewc_penalty",
    "gate",
    "heads",
    "local_loss",
    "moments",
    "prefix_attention",
    "prefix_share",
    "task_weights",
    "vote",
}


# Cases that stay as they are, and why.
SPARED = {
    ("eta", "momentum", "inf"): "outside a logarithm or a root",
    ("gate", "threshold", "-1.0"): "outside a logarithm or a root",
    ("moments", "features", "empty"): "nothing at this place",
    ("moments", "features", "fewer dims"): "nothing at this place",
}
