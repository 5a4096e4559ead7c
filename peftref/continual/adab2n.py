r"""AdaB2N: BatchNorm whose statistics do not follow the latest task.

Lyu, Wang, Zhang, Sun, Su, Zhu, Jing, "Overcoming Recency Bias of Normalization Statistics in Continual Learning:
Balance and Adaptation", NeurIPS 2023, arXiv 2310.08855.

Sample b of a batch belongs to task :math:`t_b`, of which the batch has :math:`n_t` samples. A Dirichlet prior of
concentration :math:`e^{\psi_t}`, learned for each layer, gives task t the weight (eq-adab2n-omega), and with the mean
and the biased variance :math:`m_{bc},u_{bc}` of each channel of each image, the statistics in training are
(eq-adab2n-statistics)

.. math::
   \omega_t=\frac{e^{\psi_t}+n_t}{\sum_s(e^{\psi_s}+n_s)},\quad w_b=\frac{\omega_{t_b}}{n_{t_b}},\qquad
   \mu_c=\sum_bw_bm_{bc},\quad v_c=\sum_bw_b\big[u_{bc}+(m_{bc}-\mu_c)^2\big].

In testing they are a running average with the step size :math:`\eta_k` in batch k (eq-adab2n-eta, eq-adab2n-running),

.. math::
   \frac1{\eta_k}=m^{-\kappa}+(1-a^{k-1})\Big(\frac1{1-a}-m^{-\kappa}\Big),\quad a=(1-m)^\kappa,\qquad
   \hat\mu\leftarrow(1-\eta_k)\hat\mu+\eta_k\mu,\quad\hat v\leftarrow(1-\eta_k)\hat v+\eta_kv,

and the two are tied by a loss, in which :math:`\hat\mu,\hat v` are constants (eq-adab2n-loss):
:math:`L_{\mathrm{ada}}=\sum_{\text{layers}}\frac1C\|\mu-\hat\mu\|^2+\frac1C\|v-\hat v\|^2`.

==================  ========================  =======================  ===============
argument            here                      paper                    shape
==================  ========================  =======================  ===============
``psi``             :math:`\psi`              :math:`\psi`             ``(T,)``
``counts``          :math:`n_t`               :math:`N_t`              ``(T,)``
``weights``         :math:`w_b`               --                       ``(B,)``
``momentum``        :math:`m`                 :math:`\eta` (of BN)     scalar
``kappa``           :math:`\kappa`            :math:`\kappa`           scalar in [0, 1]
==================  ========================  =======================  ===============

Differs from the official code (``lvyilin/AdaB2N@9aaba7e:models/utils/adab2n.py``): the step size is a closed form of
the stored number of batches, so a run goes on after a checkpoint where it stood (there the recursion starts anew), and
counting starts at 0 for every kappa, also on a BatchNorm that was trained before; task identities are given for one
batch and cleared after it; they are never guessed from labels; a batch that is not finite leaves the running statistics
as they were. As there: the running variance averages biased variances; a seen task that is absent from a batch keeps
its weight, so the weights of the batch sum to less than 1 (``renormalize=True`` deals it out to the others).

>>> [round(float(eta(k, 0.1, kappa=0.5)), 4) for k in (1, 2, 3, 1000)]
[0.3162, 0.25, 0.2086, 0.0513]
>>> task_weights(torch.zeros(2), torch.tensor([9, 1]))  # one pseudo-sample each: 10 to 2
tensor([0.8333, 0.1667])
>>> net = convert(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)), tasks=2, kappa=0.5)
>>> begin_task(net, 1)
>>> with task_batch(net, torch.tensor([0, 1, 1])):
...     y = net(torch.rand(3, 1, 5, 5))
>>> loss = adaptation_loss(net)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .._checks import at_least_float32, integer, number, upcast
from .baselines.norms import replace_batch_norms
from .core.balanced_norm import balanced_norm, check_batch
from .core.rule import FineTune, Forward
from .core.streams import Task, task_of

__all__ = [
    "AdaB2N",
    "adaptation_loss",
    "balance",
    "begin_task",
    "convert",
    "eta",
    "parameter_groups",
    "task_batch",
    "task_weights",
]

Before = Callable[[int], None]
MAX_PSI = 20.0  # a pseudo-count of 5e8 outweighs any batch; beyond 88 its exponential overflows


def eta(k: Tensor | int, momentum: float, kappa: float) -> Tensor:
    r"""Step size of a batch: 1/eta_k = m^-kappa + (1 - a^(k-1)) (1/(1-a) - m^-kappa), a = (1-m)^kappa (eq-adab2n-eta).

    Constant m at kappa = 1, 1/k at kappa = 0. Solves :math:`\eta_1=m^\kappa,\ \eta_{k+1}=\eta_k/(\eta_k+a)`
    (eq-adab2n-recursion); no digits are lost in the sum, whose terms are non-negative.

    Args:
        k: number of the batch, counted from 1; of any shape.
        momentum: m, of BatchNorm.
        kappa: in [0, 1].
    """
    n: Tensor = torch.as_tensor(k)
    n = n if n.is_floating_point() else n.float()
    if kappa < 1e-30:  # 0, or so close that float32 would underflow
        return n.reciprocal()
    log_a = kappa * math.log1p(-momentum)
    first = momentum**-kappa
    # eq-adab2n-eta:  1/eta_k = m^-kappa + (1 - a^(k-1)) (1/(1-a) - m^-kappa)
    inverse: Tensor = first - torch.expm1((n - 1) * log_a) * (-1 / math.expm1(log_a) - first)
    return inverse.reciprocal()


def task_weights(psi: Tensor, counts: Tensor, *, renormalize: bool = False) -> Tensor:
    """Posterior mean of the task proportions: omega_t = (exp psi_t + n_t) / sum_s (exp psi_s + n_s) (eq-adab2n-omega).

    ``(..., T), (T,) -> (..., T)``, in float32 at least. Its derivative is eq-adab2n-jacobian.

    Args:
        psi: logarithms of the pseudo-counts of the tasks seen so far; above 20 they count as 20.
        counts: samples of each of these tasks in the batch.
        renormalize: give tasks that the batch lacks no weight; the rest then sum to 1.
    """
    # eq-adab2n-omega:  omega_t = (exp psi_t + n_t) / sum_s (exp psi_s + n_s)
    total = at_least_float32(psi).clamp(max=MAX_PSI).exp() + counts
    total = total * (counts > 0) if renormalize else total
    return total / total.sum(-1, keepdim=True)


class AdaB2N(nn.Module):
    """BatchNorm by weighted statistics: mu = sum_b w_b m_b, v = sum_b w_b [u_b + (m_b - mu)^2] (eq-adab2n-statistics).

    It takes the place of a BatchNorm layer, and takes over its parameters and running statistics. In train mode:
    balanced statistics inside :func:`task_batch`, else those of the plain batch. In eval mode: ordinary BatchNorm,
    which may be folded into a convolution as any other.

    Args:
        layer: with running statistics and a momentum.
        tasks: T, how many there will be at most.
        kappa: 1 is the running average of BatchNorm, 0 the mean of all batches (the paper's grid: .1, .4, .7, 1).
        renormalize: see :func:`task_weights` (False: official code).

    Attributes:
        psi: ``(T,)``, 0 at first, as in the official code: a pseudo-count of 1 for each task.
        seen_tasks: 1 until :func:`begin_task`; a buffer, as is ``num_batches_tracked``, which counts from 0.

    Raises:
        TypeError: not a BatchNorm layer, or one with a forward of its own: a synchronised one, or one with more to it,
            such as timm's ``BatchNormAct2d``, which :func:`convert` takes apart.
        ValueError: a layer without running statistics or with ``momentum=None``, T below 1, kappa outside [0, 1].
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    seen_tasks: Tensor

    def __init__(self, layer: _BatchNorm, tasks: int, kappa: float, renormalize: bool = False) -> None:
        super().__init__()
        if not isinstance(layer, _BatchNorm) or type(layer).forward is not _BatchNorm.forward:  # synchronised, timm's
            raise TypeError(f"layer: expected a BatchNorm layer with torch's forward, got {type(layer).__name__}")
        if layer.running_mean is None or not layer.momentum or not 0 < layer.momentum < 1:
            raise ValueError(f"layer: expected running statistics and a momentum in (0, 1), got {layer}")
        integer("tasks", tasks, 1)
        self.kappa = number("kappa", kappa, 0.0, 1.0)
        self.num_features = layer.num_features
        self.eps = layer.eps
        self.momentum = float(layer.momentum)
        self.renormalize = renormalize
        self.weight = layer.weight
        self.bias = layer.bias  # the same parameters: an optimiser that has them keeps them
        self.psi = nn.Parameter(torch.zeros(tasks, device=layer.running_mean.device))
        for name in ("running_mean", "running_var"):
            self.register_buffer(name, getattr(layer, name).clone())
        for name, first in (("num_batches_tracked", 0), ("seen_tasks", 1)):
            self.register_buffer(name, torch.tensor(first, device=layer.running_mean.device))
        self._batch: tuple[Tensor, Tensor, Tensor] | None = None
        self._tie: tuple[Tensor, Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:  # a step under way is not copied; its graph could not be
        return self.__dict__ | {"_batch": None, "_tie": None}

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        y, mu, v = balanced_norm(x, self._weights(x), self.weight, self.bias, self.eps)
        batch = torch.stack([mu, v])
        self._tie = batch, self._track(batch.detach())
        return y

    def _weights(self, x: Tensor) -> Tensor:
        """Weight of each sample; complains before anything is changed."""
        check_batch(x, self.num_features)
        if self._batch is None:
            return x.new_full((len(x),), 1 / len(x), dtype=upcast(x.dtype))
        ids, counts, each = self._batch
        if len(ids) != len(x):
            raise ValueError(f"x: expected the {len(ids)} samples that task_batch was told of, got {len(x)}")
        return task_weights(self.psi[: len(counts)], counts, renormalize=self.renormalize)[ids] / each

    @torch.no_grad()
    def _track(self, batch: Tensor) -> Tensor:
        """One step of the running mean and variance ``(2, C)``, unless the batch has a NaN; returns them, as a copy."""
        old = torch.stack([self.running_mean, self.running_var])
        wide = torch.promote_types(old.dtype, batch.dtype)
        step = eta((self.num_batches_tracked + 1).to(wide), self.momentum, self.kappa)
        finite = batch.isfinite().all()
        # eq-adab2n-running:  running <- (1 - eta_k) running + eta_k batch
        new = torch.where(finite, old.to(wide).lerp(batch.to(wide), step), old.to(wide))
        self.running_mean.copy_(new[0])
        self.running_var.copy_(new[1])
        self.num_batches_tracked.add_(finite)
        return new.to(batch)


def convert(model: nn.Module, tasks: int, kappa: float, *, renormalize: bool = False) -> nn.Module:
    """Make every BatchNorm layer of a model an :class:`AdaB2N`, in place.

    Args:
        model: with BatchNorm layers.
        tasks: T, how many there will be at most.
        kappa: see :class:`AdaB2N`.
        renormalize: see :func:`task_weights`.

    Returns:
        The same model.
    """
    return replace_batch_norms(model, partial(AdaB2N, tasks=tasks, kappa=kappa, renormalize=renormalize))


def begin_task(model: nn.Module, task: int) -> None:
    """Tell the layers which task has begun: its weight and those of all before it take part from now on.

    Args:
        model: converted by :func:`convert`.
        task: its number, from 0.

    Raises:
        ValueError: no such layers, or a number out of range.
    """
    layers = _layers(model)
    tasks = min(len(layer.psi) for layer in layers)
    if not 0 <= task < tasks:
        raise ValueError(f"task: expected a number from 0 to {tasks - 1}, got {task}")
    for layer in layers:
        layer.seen_tasks.fill_(task + 1)


@contextmanager
def task_batch(model: nn.Module, task_ids: Tensor) -> Iterator[None]:
    """While it lasts, forward passes in train mode are of this batch; several are allowed, of the same samples.

    Args:
        model: converted by :func:`convert`.
        task_ids: task of each sample, ``(B,)`` integers from 0 to the task begun last.

    Raises:
        TypeError: task numbers that are no integers.
        ValueError: not one for each sample, or numbers out of range.
        RuntimeError: inside another one for the same layers.
    """
    layers = _layers(model)
    if task_ids.is_floating_point():
        raise TypeError(f"task_ids: expected integers, got {task_ids.dtype}")
    if task_ids.ndim != 1 or not len(task_ids):
        raise ValueError(f"task_ids: expected one for each sample, (B,), got shape {tuple(task_ids.shape)}")
    seen, low, high = (int(t) for t in (layers[0].seen_tasks, task_ids.min(), task_ids.max()))
    if low < 0 or high >= seen:
        raise ValueError(f"task_ids: expected numbers from 0 to {seen - 1}, the task begun, got {low} to {high}")
    if any(layer._batch is not None for layer in layers):
        raise RuntimeError("task_batch: expected no other batch under way, got one inside another")
    ids = task_ids.to(layers[0].psi.device, torch.long)
    counts = ids.bincount(minlength=seen)
    batch = ids, counts, counts[ids]  # the task of each sample, the samples of each task, those of the sample's task
    for layer in layers:
        layer._batch = batch
        layer._tie = None
    try:
        yield
    finally:
        for layer in layers:
            layer._batch = None


def adaptation_loss(model: nn.Module) -> Tensor:
    """Sum over layers of |mu - running mean|^2 / C + |v - running variance|^2 / C (eq-adab2n-loss), a scalar.

    Of the last forward pass in train mode; the running statistics are constants.

    Args:
        model: converted by :func:`convert`.

    Raises:
        RuntimeError: there was no such pass yet.
    """
    ties = [layer._tie for layer in _layers(model) if layer._tie is not None]
    if not ties:
        raise RuntimeError("adaptation_loss: expected a forward pass in train mode before, got none")
    # eq-adab2n-loss:  sum over layers of |mu - running mean|^2 / C + |v - running variance|^2 / C
    return torch.stack([F.mse_loss(batch, running, reduction="sum") / batch.shape[1] for batch, running in ties]).sum()


def balance(rule: FineTune, model: nn.Module, tasks: Sequence[Task], strength: float, start: int = 0) -> Before:
    """Let ``rule`` tell a converted ``model`` the task of every sample, new or replayed, and add the adaptation loss.

    Args:
        rule: with all parts of a batch in one forward pass; it is wrapped, see
            :meth:`peftref.continual.core.rule.FineTune.wrap`.
        model: converted by :func:`convert`.
        tasks: of the stream, each with classes of its own, which tell the task of a sample.
        strength: lambda (the paper's grid: .01, .1, 1, 10).
        start: first task in which the loss counts (the paper's grid: 0, 1).

    Returns:
        For the argument ``before`` of :func:`peftref.continual.core.train.learn`.

    Raises:
        ValueError: a rule with several forward passes, a strength out of range, layers for fewer tasks, or a class that
            comes in several tasks (``domain_incremental``): a replayed sample then does not say which one it is of.
    """
    forwards = getattr(rule, "forwards", "one")
    if forwards != "one":
        raise ValueError(f'rule: expected forwards="one", so that a batch mixes tasks, got {forwards!r}')
    number("strength", strength, 0.0)
    least = min(len(layer.psi) for layer in _layers(model))
    if least < len(tasks):
        raise ValueError(f"model: expected layers for {len(tasks)} tasks, got {least}")
    owner = task_of(tasks, apart=True)

    def told(forward: Forward) -> Forward:
        def balanced(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            with task_batch(model, owner.to(y.device)[y]):
                return forward(model, x, y)

        return balanced

    def penalty(model: nn.Module) -> Tensor | float:
        return strength * adaptation_loss(model) if strength and rule.task >= start else 0.0

    rule.wrap(told, penalty)
    return partial(begin_task, model)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for an optimiser: weight decay on all parameters but psi, which it would pull to equal pseudo-counts.

    Args:
        model: converted by :func:`convert`.
        weight_decay: of all other parameters.
    """
    psi = [layer.psi for layer in _layers(model)]
    rest = [p for p in model.parameters() if p.requires_grad and all(p is not q for q in psi)]
    return [{"params": rest, "weight_decay": weight_decay}, {"params": psi, "weight_decay": 0.0}]


def _layers(model: nn.Module) -> list[AdaB2N]:
    found = [m for m in model.modules() if isinstance(m, AdaB2N)]
    if not found:
        raise ValueError("model: expected AdaB2N layers, see convert(), got none")
    return found
