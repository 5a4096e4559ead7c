r"""EWC (elastic weight consolidation): weights that earlier tasks depended on are held by springs.

Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", PNAS 2017, arXiv 1612.00796.

After a task the network's weights are :math:`\theta^*`, and how much each one mattered is read off the diagonal of the
Fisher information on the task's n images, the mean over *samples* of a squared derivative (eq-continual-fisher):

.. math:: F_i=\frac1n\sum_x\Big(\frac{\partial\log p(y\mid x)}{\partial\theta_i}\Big)^2 .

Here y is the label (the *empirical* Fisher), or the mean is also taken over y as the network itself predicts it (the
exact one). While the next task is learned, the loss has one term more (eq-continual-ewc),

.. math:: L_{\mathrm{EWC}}=\mathrm{CE}(f(x),y)+\frac\lambda2\sum_iF_i(\theta_i-\theta_i^*)^2,
          \qquad F\leftarrow\gamma F+F^{\text{new}},\quad\theta^*\leftarrow\theta\quad\text{after each task},

with :math:`\gamma=1` for EWC and below 1 for online EWC (Schwarz et al., "Progress & Compress", ICML 2018, arXiv
1805.06370), which lets old tasks fade.

==============  ===================  ======================  ==========================
argument        here                 paper                   shape
==============  ===================  ======================  ==========================
``fisher``      :math:`F`            same                    of each trainable weight
``anchor``      :math:`\theta^*`     same                    of each trainable weight
``strength``    :math:`\lambda`      same                    scalar
``decay``       :math:`\gamma`       same (Schwarz)          scalar
==============  ===================  ======================  ==========================

Differs from the paper, which adds a penalty with its own anchor for each earlier task: here the anchor is the last
:math:`\theta^*` alone. That is what the Laplace approximation asks for (Huszar, "Note on the quadratic penalties in
elastic weight consolidation", PNAS 2018, arXiv 1712.03847), since the last :math:`\theta^*` was found under the earlier
penalties; the two agree after one task. Many public codes square the gradient of a *batch* instead, which is smaller
by about the batch size, and leave out the 1/2.

A step of size :math:`\eta` along a spring overshoots where :math:`\eta\lambda F_i>2`: then the loss explodes.

>>> net = nn.Linear(1, 2, bias=False)
>>> _ = net.weight.data.zero_()  # p = (1/2, 1/2), so every squared derivative is x^2 / 4
>>> x, y = torch.tensor([[1.0], [3.0]]), torch.tensor([0, 1])
>>> fisher = diagonal_fisher(net, x, y)
>>> fisher["weight"].flatten()  # the mean of 1/4 and 9/4
tensor([1.2500, 1.2500])
>>> ewc_penalty({"weight": net.weight + 2}, {"weight": net.weight}, fisher).item()  # (1.25 * 4 + 1.25 * 4) / 2
5.0
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap

from ..._checks import at_least_float32, integer, number
from ..._wrapped import plain_name, unwrapped
from ..core._steps import finite_images, in_mode, tensor_of
from ..core.rule import FineTune

__all__ = ["EWC", "diagonal_fisher", "ewc_penalty"]


def diagonal_fisher(
    model: nn.Module,
    x: Tensor,
    y: Tensor | None = None,
    *,
    chunk_size: int = 50,
    names: Collection[str] | None = None,
) -> dict[str, Tensor]:
    """Fisher diagonal F_i = 1/n sum_x (d log p(y|x) / d theta_i)^2 (eq-continual-fisher), ``name -> F``.

    Of each weight, in its shape, under the name that ``model.named_parameters()`` gives it. The network is measured in
    eval mode, where the samples of a batch do not act on each other, without autocast, and left as it was.

    Args:
        model: images -> logits ``(N, K)``.
        x: images, ``(n, ...)``.
        y: labels, ``(n,)``, for the empirical Fisher. None: the expectation over all K classes with the network's own
            probabilities, the exact Fisher, at the cost of K backward passes.
        chunk_size: samples whose gradients (n copies of all weights, times K without y) are in memory at a time.
        names: of the weights to measure; default: those that are trainable.

    Returns:
        F in the precision of the weights, float32 at least.

    Raises:
        TypeError: a model that returns something else than a tensor.
        ValueError: no sample, other labels than images, no trainable weight, names that the model does not have, a
            chunk below 1, or other logits than ``(N, K)``.
    """
    integer("chunk_size", chunk_size, 1)
    if len(x) == 0 or (y is not None and y.shape != x.shape[:1]):
        raise ValueError(f"x, y: expected n > 0 images and labels (n,), got {len(x)} and {y if y is None else y.shape}")
    measured = _parameters(model, names)
    inner = unwrapped(model)  # whose forward vmap can follow
    theta = {name: p.detach() for name, p in inner.named_parameters() if p in measured}
    fixed = {name: buffer.clone() for name, buffer in inner.named_buffers()}

    def log_p(theta: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        z = tensor_of(functional_call(inner, (theta, fixed), (x[None],)))
        if z.ndim != 2:
            raise ValueError(f"model: expected logits (N, K), got shape {tuple(z.shape)} of one image")
        z = z[0]  # (K,)
        return (z.log_softmax(-1),) * 2  # what is differentiated, and what is given beside the derivative

    def observed(theta: dict[str, Tensor], x: Tensor, y: Tensor) -> dict[str, Tensor]:
        gradient = grad(lambda theta: log_p(theta, x)[0].gather(0, y[None])[0])(theta)
        return {name: g.square() for name, g in _wide(gradient).items()}

    def expected(theta: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        jacobian, log_q = jacrev(log_p, has_aux=True)(theta, x)  # (K, ...) for each weight, and (K,)
        q = log_q.exp()
        return {n: torch.einsum("k,k...->...", q.to(j), j.square()) for n, j in _wide(jacobian).items()}

    parts = zip(*(t.split(chunk_size) for t in ((x,) if y is None else (x, y))), strict=True)
    squares = vmap(expected if y is None else observed, (None, *[0] * (1 if y is None else 2)))
    total = {name: torch.zeros_like(t) for name, t in _wide(theta).items()}
    with in_mode(model, False), torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        for part in parts:
            # eq-continual-fisher:  F = 1/n sum_x (d log p(y|x) / d theta)^2, squared before it is summed
            for name, square in squares(theta, *part).items():
                total[name] += square.sum(0) / len(x)
    return dict(zip(measured.values(), total.values(), strict=True))


def ewc_penalty(theta: Mapping[str, Tensor], anchor: Mapping[str, Tensor], fisher: Mapping[str, Tensor]) -> Tensor:
    r"""Penalty 1/2 sum_i F_i (theta_i - theta*_i)^2 over the weights that ``fisher`` names (eq-continual-ewc).

    Args:
        theta: weights by name.
        anchor: theta*, by name.
        fisher: F, by name.

    Raises:
        ValueError: ``theta`` or ``anchor`` lacks one of them, or has it in another shape.
    """
    shapes = {name: f.shape for name, f in fisher.items()}
    for argument, weights in (("theta", theta), ("anchor", anchor)):
        odd = [name for name, shape in shapes.items() if name not in weights or weights[name].shape != shape]
        if odd:
            raise ValueError(f"{argument}: expected the weights that fisher has, in the same shapes, got others: {odd}")
    # In float32 at least: of half-precision weights that are close to theta* the squares would vanish.
    now, then, stiffness = ([at_least_float32(of[n]) for n in shapes] for of in (theta, anchor, fisher))
    # eq-continual-ewc:  1/2 sum_i F_i (theta_i - theta*_i)^2
    distance = torch._foreach_sub(now, then)
    springs = torch._foreach_mul(torch._foreach_mul(distance, distance), stiffness)
    return torch.stack([spring.sum() for spring in springs]).sum() / 2


class EWC(FineTune):
    r"""Fine-tuning with a spring on every trainable weight, measured after each task by its own images.

    A weight that was trainable at the end of a task keeps its spring, and is measured again after every later task,
    even while it is frozen.

    Args:
        strength: :math:`\lambda`, at least 0; problem-dependent, to be swept in decades. 0 is fine-tuning.
        decay: :math:`\gamma` in [0, 1], what the earlier Fisher is multiplied by (1: EWC; below: online EWC).
        empirical: measure by the labels (usual, K times cheaper), not by the network's own distribution.
        chunk_size: see :func:`diagonal_fisher`.

    Attributes:
        fisher: F by name, without the words that ``torch.compile`` or ``DataParallel`` add; empty before the first
            task has ended.
        anchor: theta* by name, likewise.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(self, strength: float, *, decay: float = 1.0, empirical: bool = True, chunk_size: int = 50) -> None:
        super().__init__()
        number("strength", strength, 0.0)
        number("decay", decay, 0.0, 1.0)
        integer("chunk_size", chunk_size, 1)
        self.strength = strength
        self.decay = decay
        self.empirical = empirical
        self.chunk_size = chunk_size
        self.fisher: dict[str, Tensor] = {}
        self.anchor: dict[str, Tensor] = {}

    def penalty(self, model: nn.Module) -> Tensor | float:
        """What is added to the loss, strength included; 0 in the first task."""
        if not self.fisher:
            return 0.0
        theta = dict(unwrapped(model).named_parameters())
        if not self.fisher.keys() <= theta.keys():  # a part of the model is wrapped
            theta = {plain_name(model, name): p for name, p in model.named_parameters()}
        return self.strength * ewc_penalty(theta, self.anchor, self.fisher)

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return super().loss(model, x, y) + self.penalty(model)

    def end_task(self, model: nn.Module, x: Tensor, y: Tensor) -> None:
        finite_images(x)  # they would stay in the Fisher; a network that has diverged is spoiled anyway
        plain = {plain_name(model, name): (name, p) for name, p in model.named_parameters()}
        # What was measured once is measured again, also while it is frozen.
        held = {n: name for n, (name, p) in plain.items() if p.requires_grad or n in self.fisher}
        new = diagonal_fisher(
            model, x, y if self.empirical else None, chunk_size=self.chunk_size, names=held.values() or None
        )
        # eq-continual-ewc:  F <- gamma F + F_new
        self.fisher = {n: self.decay * self.fisher.get(n, 0.0) + new[name] for n, name in held.items()}
        self.anchor = {n: plain[n][1].detach().clone() for n in held}


def _parameters(model: nn.Module, names: Collection[str] | None) -> dict[nn.Parameter, str]:
    """The weights to measure, in the model's order, and their names."""
    every = dict(model.named_parameters())
    if unknown := sorted(set(names or ()) - every.keys()):
        raise ValueError(f"names: expected some of the model's weights, got {unknown} too")
    found = {p: name for name, p in every.items() if (p.requires_grad if names is None else name in names)}
    if not found:
        raise ValueError("model: expected trainable weights, got none that requires a gradient")
    return found


def _wide(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: at_least_float32(t) for name, t in tensors.items()}
