r"""LAE (learning, accumulation, ensemble): a fast and a slow copy of any small module, which vote.

Gao, Zhao, Sun, Xi, Zhang, Ghanem, Zhang, "A Unified Continual Learning Framework with General Parameter-Efficient
Tuning", ICCV 2023, arXiv 2303.10070; code: github.com/gqk/LAE, read at commit 1680e49.

A frozen backbone with a small trained module :math:`\theta` (an adapter, LoRA or prefix) meets tasks of new classes;
each brings a block of its own to a linear head. The *online* copy learns with a softmax over the new classes
:math:`\mathcal C_t` alone (eq-lae-local); the *offline* copy follows it slowly, from the second task on (eq-lae-ema),
so that after n steps it is a weighted mean of all that the online copy was (eq-lae-memory):

.. math::
    L_t=-\log\frac{e^{z_y}}{\sum_{k\in\mathcal C_t}e^{z_k}},\qquad
    \theta^{off}\leftarrow\alpha\,\theta^{off}+(1-\alpha)\,\theta,\\
    \theta^{off}_n=\alpha^n\theta^{off}_0+(1-\alpha)\sum_{i=1}^n\alpha^{n-i}\theta_i .

A test image gets the class of which either copy is surest, among all classes seen (eq-lae-ensemble):

.. math:: \hat y=\arg\max_k\,\max\{p^{on}_k,\,p^{off}_k\}.

=================  ==============================  ========================  ===============
argument           here                            paper                     shape
=================  ==============================  ========================  ===============
``logits``         :math:`z`                       same                      ``(..., N, K)``
``start``          first class of the new block                              integer
``online``         :math:`\theta`                  :math:`\theta^{on}`       tensors
``offline``        :math:`\theta^{off}`            :math:`\theta^{off}`      tensors
``alpha``          :math:`\alpha`                  :math:`\alpha`            scalar
=================  ==============================  ========================  ===============

The small module is any adapter of this package under the name ``"online"``; those of the paper are in
:mod:`peftref.continual.core.small_modules` and :mod:`peftref.continual.core.prefix`. Differs from the official code:
both copies see one doubled batch; while the module is frozen, features are computed once for all epochs and the
offline copy takes its steps at once (its target stands still); the head blocks of earlier tasks are frozen, where
there they get zero gradients; the offline copy is float32 at least, or :math:`1-\alpha=10^{-4}` would vanish in it.

>>> from peftref.adapters.core.injection import inject
>>> from peftref.continual.core.small_modules import KVLoRA
>>> from peftref.continual.core.streams import class_incremental
>>> from peftref.fitting import batches
>>> from peftref.data import load
>>> from peftref.models.vit import pretrained_vit
>>> net, tasks = pretrained_vit(), class_incremental(load("mnist5k"), 5, per_class=24)
>>> inject(net, KVLoRA, r"blocks\.[01]\.attn\.qkv", name="online")
['blocks.0.attn.qkv', 'blocks.1.attn.qkv']
>>> learner, generator = LAE(net, alpha=0.99), torch.Generator().manual_seed(0)
>>> for t, task in enumerate(tasks[:2]):
...     _ = learner.begin_task(len(task.classes))
...     losses = learner.learn(task.train, epochs=3, frozen_epochs=2 if t else 0, generator=generator)
>>> learner.experts(tasks[0].test.x).shape, learner(tasks[0].test.x).shape      # online, offline; and their vote
(torch.Size([2, 200, 4]), torch.Size([200, 4]))
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import at_least_float32, number, one_of, upcast
from .._taps import features_of
from ..adapters.core.host import Host
from ..adapters.core.injection import activate, adapters, install
from ..data import Split
from ..fitting import batches
from .core._steps import descend, finite_images, tensor_of, timms
from .core.growing_head import DynamicHead, check_labels, local_loss
from .core.small_modules import Experts

__all__ = ["LAE", "alpha_for", "ema_", "vote"]

RULES = ("max", "mean")
ONLINE = "online"
OFFLINE = "offline"
BOTH = "both"  # names of the adapters in each host


@torch.no_grad()
def ema_(offline: Sequence[Tensor], online: Sequence[Tensor], alpha: float) -> None:
    """One step of the offline tensors, off <- alpha off + (1 - alpha) on, in place (eq-lae-ema); integers are copied.

    Args:
        offline: float32 or wider, in which 1 - alpha does not vanish.
        online: of the same shapes.
        alpha: in [0, 1].

    Raises:
        ValueError: tensors that do not match, an alpha outside [0, 1], or an offline copy in half precision.
    """
    number("alpha", alpha, 0.0, 1.0)
    if [t.shape for t in offline] != [t.shape for t in online]:
        raise ValueError(f"online: expected {len(offline)} tensors of the offline shapes, got {len(online)} others")
    low = [t.dtype for t in offline if t.dtype in (torch.float16, torch.bfloat16)]
    if low:
        raise ValueError(f"offline: expected float32 or wider, in which 1 - alpha does not vanish, got {low[0]}")
    for off, on in zip(offline, online, strict=True):
        if not off.is_floating_point():
            off.copy_(on)
    slow = [off for off in offline if off.is_floating_point()]
    fast = [on.to(off.dtype) for off, on in zip(offline, online, strict=True) if off.is_floating_point()]
    if slow:
        # eq-lae-ema:  theta_off <- theta_off + (1 - alpha) (theta - theta_off), all tensors at once
        torch._foreach_lerp_(slow, fast, 1 - alpha)


def alpha_for(kept: float, steps: int) -> float:
    r"""The alpha with alpha^n = ``kept``, the share of the start that is left after n steps (eq-lae-memory).

    Args:
        kept: share of the offline copy that is left, in [0, 1].
        steps: n, of a task.

    >>> round(alpha_for(0.9, 1040), 4)                           # the official setting: 0.9999, 1,040 steps a task
    0.9999
    """
    number("kept", kept, 0.0, 1.0)
    number("steps", steps, 1)
    # eq-lae-memory: the factor alpha^n of theta_0
    return float(kept ** (1 / steps))


def vote(logits: Tensor, rule: str = "max") -> Tensor:
    """Log of the largest probability, max_e log softmax(z_e)_k, or of the mean one (eq-lae-ensemble).

    Scores of all classes from the experts' logits, ``(E, N, K) -> (N, K)``; of each pixel, ``(E, N, K, ...)``.

    Args:
        logits: of the experts; half precision is computed in float32.
        rule: ``"max"`` (paper) or ``"mean"``.

    >>> two = torch.tensor([[[0.6, 0.4]], [[0.1, 0.9]]]).log()   # one is unsure, the other is not
    >>> vote(two).argmax(-1)
    tensor([1])
    """
    one_of("rule", rule, RULES)
    log_p = at_least_float32(logits).log_softmax(2)
    # eq-lae-ensemble:  max over the experts of log p_k
    return log_p.amax(0) if rule == "max" else log_p.logsumexp(0) - math.log(len(log_p))


class LAE(nn.Module):
    """Learns task after task: theta_off <- alpha theta_off + (1 - alpha) theta, y = argmax_k max(p_on, p_off).

    ``forward(x)`` is the vote of both copies over all classes seen, ``(N, K)``. The network stays in eval mode whatever
    ``train()`` is called with, so that no running statistics move.

    Args:
        model: with an adapter named ``"online"``, and timm's ``forward_features`` and ``forward_head``; used in place.
        alpha: of the offline copy (0.9999: official configuration; see :func:`alpha_for` for short streams).
        lr: of head and adapter (0.0028125: official configuration for CIFAR-100, with batches of 24).
        local: let only the new classes compete, else all seen so far, whose blocks are then trained too (True: paper).
        optimizer: a new one for every task, ``optimizer(parameters, lr=lr)`` (Adam: official configuration).
        rule: of :func:`vote`.
        features: width of the features; default: ``model.num_features``.

    Raises:
        ValueError: no adapter of that name, a model without timm's methods, an adapter named ``"offline"`` or
            ``"both"``, or a setting out of its range.
        RuntimeError: the model is merged.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        alpha: float = 0.9999,
        lr: float = 0.0028125,
        local: bool = True,
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
        rule: str = "max",
        features: int | None = None,
    ) -> None:
        super().__init__()
        adapters(model, ONLINE)  # an error where there is none, or where the model is merged
        number("alpha", alpha, 0.0, 1.0)
        number("lr", lr, 0.0)
        one_of("rule", rule, RULES)
        names = {name for host in model.modules() if isinstance(host, Host) for name in host.adapters}
        taken = names & {OFFLINE, BOTH}
        if taken:
            raise ValueError(f"model: expected no adapter of these names, which are given later, got {sorted(taken)}")
        self.model = timms(model)
        self.alpha = alpha
        self.lr = lr
        self.local = local
        self.rule = rule
        self.optimizer = optimizer
        self.tasks = 0
        self.start = 0
        self.head = DynamicHead(self.model.num_features if features is None else features)
        self.pairs: list[tuple[nn.Module, nn.Module]] = []  # of every layer, the offline and the online adapter
        activate(model, ONLINE)
        self.train(False)

    def train(self, mode: bool = True) -> LAE:
        return super().train(False)  # see the class docstring

    def begin_task(self, classes: int) -> range:
        """Begin a task: a new block of the head, a new optimiser, and at task 2 the offline copy.

        Args:
            classes: how many new ones.

        Returns:
            Their labels.
        """
        online = adapters(self.model, ONLINE)
        new = self.head.grow(classes, next(self.model.parameters()))
        self.start = new.start
        self.tasks += 1
        if self.tasks == 2:
            slow = {n: copy.deepcopy(a).to(upcast(a.dtype)) for n, a in online.items()}
            install(self.model, slow, OFFLINE, freeze=False)
            install(self.model, {n: Experts(a, slow[n]) for n, a in online.items()}, BOTH, freeze=False)
            activate(self.model, ONLINE)
            self.pairs = [(slow[n], a) for n, a in online.items()]
        for block in self.head.blocks[:-1]:
            block.requires_grad_(not self.local)  # a zero gradient would still move them by decay or momentum
        trained = [*self.head.parameters(), *(p for a in online.values() for p in a.parameters())]
        self.descent = self.optimizer(trained, lr=self.lr)
        return new

    def features(self, x: Tensor) -> Tensor:
        """Pooled features before the head, ``(N, d)``."""
        return tensor_of(features_of(self.model, x), "features (N, d)")

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """One step of head, online copy and offline copy on images of the new classes; the loss, before it."""
        finite_images(x)
        loss = self._update(self.features(x), y)
        self.accumulate(1)
        return loss

    def learn(
        self,
        task: Split,
        *,
        generator: torch.Generator,
        epochs: int = 5,
        frozen_epochs: int = 0,
        batch_size: int = 24,
        drop_last: bool = True,
        augment: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Train on the images of the task that was begun.

        Args:
            task: images, and labels among those that :meth:`begin_task` returned.
            generator: of the order of the batches.
            epochs: in all (5: official configuration for CIFAR-100).
            frozen_epochs: the first of them train the head alone (official: 3 of 5, but 0 in the first task).
            batch_size: 24: official configuration.
            drop_last: leave out what does not fill a batch (True: official configuration).
            augment: a random change of each batch of images; frozen epochs then compute features anew.

        Returns:
            The loss of each step.

        Raises:
            RuntimeError: no task was begun.
            ValueError: more frozen epochs than epochs, labels of other classes, or images that are not finite.
        """
        if not self.tasks:
            raise RuntimeError("learn: expected begin_task before, got no task")
        if not isinstance(epochs, int) or frozen_epochs not in range(epochs + 1):
            raise ValueError(f"frozen_epochs: expected from 0 to {epochs}, got {frozen_epochs!r}")
        check_labels(task.y, self.start, self.head.classes)
        finite_images(task.x, "task.x")
        change = augment or (lambda x: x)
        deal = partial(batches, batch_size=batch_size, drop_last=drop_last, generator=generator)
        losses = []
        if frozen_epochs:  # the module stands still, and so do the features: one pass serves all these epochs
            fixed = augment is None
            data = Split(self._frozen_features(task.x), task.y) if fixed else task
            for x, y in deal(data, epochs=frozen_epochs):
                losses.append(self._update(x if fixed else self._frozen_features(change(x)), y))
            self.accumulate(len(losses))
        for x, y in deal(task, epochs=epochs - frozen_epochs):
            losses.append(self.step(change(x), y))
        return torch.stack(losses) if losses else torch.empty(0)

    @torch.no_grad()
    def experts(self, x: Tensor) -> Tensor:
        """Logits of each copy, online first, from one forward pass of the doubled batch: ``(E, N, K)``.

        E = 1 in the first task, which has no offline copy. Whatever happens, the online copy is active afterwards.
        """
        if not self.pairs:
            return cast(Tensor, self.head(self.features(x))[None])
        flags = [(p, p.requires_grad) for p in self.model.parameters()]
        try:
            activate(self.model, BOTH)
            h = self.features(torch.cat([x, x]))
        finally:
            activate(self.model, ONLINE)
            for p, flag in flags:
                p.requires_grad_(flag)
        return cast(Tensor, self.head(h).unflatten(0, (2, len(x))))

    def forward(self, x: Tensor) -> Tensor:
        return vote(self.experts(x), self.rule)

    def _update(self, h: Tensor, y: Tensor) -> Tensor:
        """A step on features; where they carry no graph the online copy gets no gradient, and Adam leaves it alone."""
        logits = self.head(h)
        loss = local_loss(logits, y, self.start) if self.local else F.cross_entropy(logits, y.long())
        return descend(loss, self.descent)

    def accumulate(self, n: int) -> None:
        """n steps of the offline copy towards an online copy that has not moved meanwhile: alpha^n of it stays."""
        for off, on in self.pairs:
            ema_(_tensors(off), _tensors(on), self.alpha**n)

    @torch.no_grad()
    def _frozen_features(self, x: Tensor) -> Tensor:
        return torch.cat([self.features(part) for part in x.split(500)])


def _tensors(module: nn.Module) -> list[Tensor]:
    return list(module.state_dict(keep_vars=True).values())
