r"""CoTTA: continual test-time adaptation with averaged targets and stochastic restoration.

Wang, Fink, Van Gool, Dai, "Continual Test-Time Domain Adaptation", CVPR 2022, arXiv 2203.13591.

Three copies of one network: a student :math:`\theta_t` that learns, a teacher :math:`\theta'_t` that averages it and
gives the answers, an anchor :math:`\theta_0` that never changes. Each batch :math:`x` of :math:`B` images:

.. math::
   \tilde z &= \begin{cases}\tfrac1N\sum_{n=1}^N f_{\theta'_t}(a_n(x)) & c < p_{th}\\ f_{\theta'_t}(x) & \text{else}
   \end{cases},\qquad c = \tfrac1B\sum_i\max_k\,\mathrm{softmax}(f_{\theta_0}(x_i))_k
   && \text{(eq-cotta-target)}\\
   L &= -\tfrac1B\sum_{i,k}\tilde q_{ik}\log p_{ik},\qquad \tilde q=\mathrm{softmax}(\tilde z),\;
   p=\mathrm{softmax}(f_{\theta_t}(x)) && \text{(eq-cotta-loss)}\\
   \theta'_{t+1} &= m\,\theta'_t + (1-m)\,\theta_{t+1} && \text{(eq-cotta-ema)}\\
   \theta_{t+1} &\leftarrow M\odot\theta_0 + (1-M)\odot\theta_{t+1},\qquad M_j\sim\mathrm{Bernoulli}(r)
   && \text{(eq-cotta-restore)}

=================  ======================  ================  ======================
argument           here                    paper             shape
=================  ======================  ================  ======================
``x``              :math:`x`               :math:`x_t`       ``(B, C, H, W)``
``target``         :math:`\tilde z`        :math:`y'`        ``(B, K)`` logits
``momentum``       :math:`m`               :math:`\alpha`    scalar
``restore_p``      :math:`r`               :math:`p`         scalar
``threshold``      :math:`p_{th}`          :math:`p_{th}`    scalar
``n_views``        :math:`N`               :math:`N`         integer
=================  ======================  ================  ======================

The published ImageNet code has the mean of both directions as its loss (eq-cotta-symmetric); see ``symmetric``.

Differs from the published code. Same numbers: augmented passes run only when their mean is used (the CIFAR script
always runs them), the plain teacher pass only when it is, and the anchor is also the copy that weights are restored
from. On purpose: dropout and stochastic depth are off; every parameter is trained and restored, a tied one once (the
script takes those called ``weight`` or ``bias`` and restores a tied one twice); a batch with a non-finite loss is
answered but not learned from; for half-precision models teacher and anchor are kept in float32, where 1 - m = 0.001
is representable.

The chapter also derives the gradient of the loss (eq-cotta-gradient).

>>> import torch
>>> from torch import nn
>>> net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
>>> CoTTA(net, n_views=4)(torch.rand(5, 1, 8, 8)).shape
torch.Size([5, 3])
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from .._checks import at_least_float32, class_scores, integer, number
from .core.adapted import (
    Learning,
    OptimizerFactory,
    adapting,
    batch_norms,
    gradient_step,
    use_batch_statistics,
)
from .core.views import RandomViews

__all__ = ["CoTTA", "confidence", "consistency_loss", "ema", "restoration_mask", "restore"]


def confidence(logits: Tensor) -> Tensor:
    """Mean over the batch of the largest class probability, c = 1/B sum_i max_k p_ik: ``(B, K) -> ()``."""
    return at_least_float32(class_scores("logits", logits)).softmax(-1).amax(-1).mean()


def consistency_loss(student: Tensor, target: Tensor, symmetric: bool = False) -> Tensor:
    r"""Cross-entropy of the target's and the student's class probabilities, -1/B sum_ik q_ik log p_ik.

    Args:
        student: logits ``(B, K)`` that learn.
        target: logits ``(B, K)``, a constant.
        symmetric: average with the reverse cross-entropy (published ImageNet code). At agreement the plain form has no
            gradient, the symmetric one half the gradient of the entropy.
    """
    log_p = at_least_float32(class_scores("student", student)).log_softmax(-1)
    log_q = at_least_float32(class_scores("target", target, len(student)).detach()).log_softmax(-1)
    # eq-cotta-loss:  -1/B sum_ik q_ik log p_ik
    loss = -(log_q.exp() * log_p).sum(-1).mean()
    if symmetric:
        # eq-cotta-symmetric:  the mean of both directions
        loss = 0.5 * loss - 0.5 * (log_p.exp() * log_q).sum(-1).mean()
    return loss


def ema(teacher: Sequence[Tensor], student: Sequence[Tensor], momentum: float) -> list[Tensor]:
    """The moved average, m theta' + (1 - m) theta, tensor by tensor, in the teacher's precision.

    Args:
        teacher: theta'.
        student: theta, tensors of the same shapes.
        momentum: m.
    """
    # eq-cotta-ema:  theta' <- m theta' + (1 - m) theta
    return list(torch._foreach_lerp(list(teacher), _like(student, teacher), 1 - momentum))


def restoration_mask(params: Sequence[Tensor], p: float, generator: torch.Generator | None = None) -> list[Tensor]:
    """Masks M_j ~ Bernoulli(p), 0 or 1, in shape and dtype of each parameter, from one flat draw.

    Args:
        params: tensors.
        p: probability of a 1.
        generator: its device draws; torch's default generator if not given.
    """
    device = params[0].device if generator is None else generator.device
    sizes = [t.numel() for t in params]
    flat = torch.rand(sum(sizes), generator=generator, device=device).lt_(p).to(params[0].device)  # in place: 1 copy
    return [m.view_as(t).to(t.dtype) for m, t in zip(flat.split(sizes), params, strict=True)]


def restore(
    params: Sequence[Tensor], source: Sequence[Tensor], p: float, generator: torch.Generator | None = None
) -> list[Tensor]:
    """Replace each SCALAR by that of the source with probability p: M theta_0 + (1 - M) theta; inputs stay unchanged.

    Args:
        params: finite tensors.
        source: tensors of the same shapes.
        p: probability in [0, 1].
        generator: its device draws the mask; ``None`` draws from torch's default generator.
    """
    number("p", p, 0, 1)
    # eq-cotta-restore: with weights 0 and 1 the interpolation returns one of its ends, bit for bit
    return list(torch._foreach_lerp(list(params), _like(source, params), restoration_mask(params, p, generator)))


class CoTTA(Learning):
    """Learns from an averaged teacher, theta' <- m theta' + (1 - m) theta, and restores weights with probability r.

    ``forward(x)`` returns the TEACHER's logits of ``x``, then adapts; ``reset()`` restores the source exactly.
    Defaults are the published CIFAR-10-C configuration. ImageNet-C: ``lr=0.01``, ``restore_p=0.001``,
    ``threshold=0.1``, ``symmetric=True``, SGD with Nesterov momentum 0.9, batches of 64. To adapt to each batch alone
    ("episodic"), call ``reset()`` before it. After ``.to(torch.bfloat16)`` or ``half()`` the student is narrow; teacher
    and anchor keep their precision.

    Args:
        model: any classifier; copied, never changed.
        lr: step size.
        momentum: m of the teacher's average; 0.999.
        restore_p: r, probability that a weight goes back to its source value after a step; 0.01.
        threshold: p_th; views are averaged when the anchor's mean confidence is below (0.92). The authors' rule: the
            5 % quantile of the source model's confidence on source images, minus 0.05.
        n_views: N, number of augmented passes; 32. With 0 the plain teacher is always used.
        symmetric: symmetric loss, see :func:`consistency_loss`.
        steps: repetitions of the whole update on each batch; 1.
        views: callable giving one random view of a batch; default :class:`~peftref.tta.core.views.RandomViews`. A
            ``check`` that it has is asked before anything changes; the state of a ``generator`` that it has is saved.
        optimizer: called as ``optimizer(parameters, lr=lr)``.
        seed: of the restoration masks and the default views.

    Shape:
        ``x``: ``(B, C, H, W)`` in [0, 1], B >= 2 where the model has BatchNorm; returns ``(B, K)``.

    Raises:
        TypeError: a model that returns no tensor.
        ValueError: a number outside its range; a batch of one; images outside [0, 1], unless there are own views; a
            model that returns other than logits ``(B, K)``.
    """

    wide = ("source", "teacher")  # in half precision 1 - m would be nothing

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        momentum: float = 0.999,
        restore_p: float = 0.01,
        threshold: float = 0.92,
        n_views: int = 32,
        *,
        symmetric: bool = False,
        steps: int = 1,
        views: Callable[[Tensor], Tensor] | None = None,
        optimizer: OptimizerFactory = torch.optim.Adam,
        seed: int = 0,
    ) -> None:
        super().__init__(model)
        if math.isnan(threshold):
            raise ValueError("threshold: expected a number, got nan")
        if next(model.parameters(), None) is None:
            raise ValueError("model: expected at least one parameter to adapt, got none")
        self.lr = number("lr", lr, 0)
        self.momentum = number("momentum", momentum, 0, 1)
        self.restore_p = number("restore_p", restore_p, 0, 1)
        self.threshold = threshold
        self.n_views = integer("n_views", n_views, 0)
        self.symmetric = symmetric
        self.steps = integer("steps", steps, 1)
        self.smallest = 2 if batch_norms(self.source) else 1
        self.views = RandomViews(seed) if views is None else views
        self.optimizer_factory = optimizer
        self.seed = seed
        # Anchor and source weights are one copy; BatchNorm's running statistics are never used again.
        use_batch_statistics(self.source).requires_grad_(False)
        self.dtypes = [t.dtype for t in _tensors(self.source)]
        self.source._apply(lambda t: at_least_float32(t) if t.is_floating_point() else t)
        self.reset()

    @torch.inference_mode(False)  # copies made in a caller's inference mode could never learn
    def reset(self) -> None:
        self.teacher = copy.deepcopy(self.source)
        self.student = copy.deepcopy(self.source).requires_grad_(True)
        for t, dtype in zip(_tensors(self.student), self.dtypes, strict=True):
            t.data = t.data.to(dtype)
        self.optimizer = self.optimizer_factory(list(self.student.parameters()), lr=self.lr)
        self.generator = torch.Generator(next(self.source.parameters()).device).manual_seed(self.seed)
        if hasattr(self.views, "reset"):
            self.views.reset()

    def target(self, x: Tensor) -> Tensor:
        """The averaged logits that the student learns and the user gets, ``(B, K)``."""
        # eq-cotta-target; BatchNorm needs the statistics of each view by itself, hence one pass a view
        if self.may_view and confidence(self.logits(self.source, x)) < self.threshold:
            view = self.views._unchecked if type(self.views) is RandomViews else self.views  # forward has checked x
            answers = (self.logits(self.teacher, view(x)) for _ in range(self.n_views))
            return functools.reduce(torch.add, answers) / self.n_views
        return self.logits(self.teacher, x)

    @property
    def may_view(self) -> bool:
        """Whether there are batches whose views are averaged."""
        return self.n_views > 0 and self.threshold > 0

    @adapting
    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        if self.may_view and hasattr(self.views, "check"):
            self.views.check(x)
        if len(x) == 0:
            return self.empty(self.student, x)
        for _ in range(self.steps):
            answer = self._step(x)
        return answer

    def _step(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            target = self.target(_as(x, self.teacher))
        target = target.clone()  # a normal tensor again, which autograd may keep
        loss = consistency_loss(self.logits(self.student, x), target.to(x.dtype), self.symmetric)
        if gradient_step(loss, self.optimizer):
            self.average_and_restore()
        return target.to(x.dtype)

    @torch.no_grad()
    def average_and_restore(self) -> None:
        """What follows each gradient step: the teacher moves, and some of the student's weights go back."""
        student: list[Tensor] = list(self.student.parameters())
        teacher: list[Tensor] = list(self.teacher.parameters())
        # eq-cotta-ema in place: the teacher averages the student BEFORE it is restored
        torch._foreach_lerp_(teacher, _like(student, teacher), 1 - self.momentum)
        if self.restore_p:  # eq-cotta-restore in place
            mask = restoration_mask(student, self.restore_p, self.generator)
            torch._foreach_lerp_(student, _like(self.source.parameters(), student), mask)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CoTTA:
        super()._apply(fn, recurse)
        self.dtypes = [t.dtype for t in _tensors(self.student)]
        return self


def _like(tensors: Iterable[Tensor], others: Iterable[Tensor]) -> list[Tensor]:
    return [t.to(o.dtype) for t, o in zip(tensors, others, strict=True)]


def _as(x: Tensor, model: nn.Module) -> Tensor:
    return x.to(next(model.parameters()).dtype)


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
