r"""Robust weight signatures: what training on one corruption changed in the shallow layers, as a patch to add at will.

Cai, Zhang, Wang, "Robust Weight Signatures: Gaining Robustness as Easy as Patching Weights?", ICML 2023,
arXiv 2302.12480.

Three networks of one architecture: pretrained :math:`\theta_0`, and both fine-tuned from it, :math:`\theta_s` on clean
images and :math:`\theta_c` on images with corruption c. Their plain difference (eq-rws-naive)

.. math:: \delta_c=\theta_c-\theta_s

holds the robustness that :math:`\theta_c` learned, but also another amount of the common task, whose direction is
:math:`\tau_s=\theta_s-\theta_0`. The signature is what remains after projecting each tensor (each weight and bias for
itself) on the complement of that direction (eq-rws-signature):

.. math:: \rho_c=\delta_c-\beta_c\,\tau_s,\qquad\beta_c=\frac{\langle\delta_c,\tau_s\rangle}{\|\tau_s\|^2}.

The paper projects :math:`\tau_c=\theta_c-\theta_0`, which gives the same :math:`\rho_c`, as :math:`\tau_c-\delta_c` is
:math:`\tau_s`. A host :math:`\theta_h`, usually :math:`\theta_s`, is patched in its first K layers
:math:`\mathcal S_K` only (eq-rws-patch):

.. math:: \theta^k\leftarrow\theta_h^k+\sum_c\alpha_c\,\rho_c^k,\quad k\in\mathcal S_K .

=========================  ====================  ===================  ============
argument                   here                  paper                shape
=========================  ====================  ===================  ============
``pretrained``             :math:`\theta_0`      pre-trained weights  a state dict
``clean``                  :math:`\theta_s`      standard model       a state dict
``robust``                 :math:`\theta_c`      robust model         a state dict
``names``                  :math:`\mathcal S_K`  shallow layers       tensor names
``strength``, ``weights``  :math:`\alpha_c`      :math:`\alpha`       scalars
=========================  ====================  ===================  ============

Differs from the official code (``VITA-Group/Robust_Weight_Signatures@4c796da:model_patching.py``): two dot products for
each tensor, where it builds a d x d projector; a tensor that clean training left as it was gives :math:`\rho_c=\tau_c`
(there: NaN); the strength acts once, as in the paper (there: twice, so that 0.5 adds a quarter;
``official_scale=True``), and multiplies explicit weights (there: they replace it); layers are units of the network's
structure, or any names you list (there: order and names of the state dict); taking a patch off restores every bit; no
input is changed.

The two directions that leave the start have names in the chapter (eq-rws-directions).

>>> import torch
>>> from peftref.merging import Patched, apply, first, units
>>> zero = {"w": torch.zeros(2)}
>>> clean, foggy = {"w": torch.tensor([2.0, 0.0])}, {"w": torch.tensor([3.0, 1.0])}
>>> fog = signature(zero, clean, foggy, ["w"])  # the first axis is the task: what fog adds to it is left out
>>> fog
{'w': tensor([0., 1.])}
>>> apply(clean, compose([fog], strength=0.5))
{'w': tensor([2.0000, 0.5000])}
>>> from peftref.models import SmallCNN
>>> net = SmallCNN()
>>> first(units(net), 1)
['stages.0.0.weight', 'stages.0.1.weight', 'stages.0.1.bias']
>>> with Patched(net, {"stages.0.1.bias": torch.ones(16)}):
...     net.stages[0][1].bias.sum().item()
16.0
>>> net.stages[0][1].bias.sum().item()
0.0
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from .._checks import number
from .baselines.arithmetic import average
from .core.aligned import (
    State,
    check_codes,
    check_dense,
    check_finite,
    check_names,
    check_states,
    check_tensors,
    layout_of,
)
from .core.batchnorm import batchnorms, recalibrate
from .core.loop import merge, upcast

__all__ = ["average_batchnorm", "blend_statistics", "compose", "signature"]

SHORTCUTS = ("downsample", "shortcut")  # the path beside a residual block: torchvision and timm; others


@torch.no_grad()
def signature(
    pretrained: State,
    clean: State,
    robust: State,
    names: Iterable[str] | Callable[[str], bool],
    *,
    project: bool = True,
) -> dict[str, Tensor]:
    r"""The signature of one corruption (eq-rws-signature); each tensor has clean's device and type, at least float32.

    For each tensor: rho = delta - beta tau, with delta = robust - clean, tau = clean - pretrained, and
    beta = <delta, tau> / |tau|^2. Tensors outside ``names`` may differ in anything.

    Args:
        pretrained: :math:`\theta_0`, the common start.
        clean: :math:`\theta_s`, fine-tuned on clean images.
        robust: :math:`\theta_c`, fine-tuned on images with the corruption.
        names: tensors wanted, as of :func:`~peftref.merging.core.units.first`; or a function that says of each of
            clean's floating-point tensors, by its name, whether it is wanted.
        project: False gives the plain difference (eq-rws-naive).

    Raises:
        TypeError: something is no state dict, or ``names`` are no names.
        ValueError: a state lacks one of the tensors, or holds it in another shape, as integers, or with an entry that
            is not finite; integers beside them differ, as those of quantised weights; a function that wants none.
    """
    states = {"clean": clean, "pretrained": pretrained, "robust": robust}
    check_states(**states)
    if callable(names):
        check_dense(clean=clean)
        names = [name for name, t in layout_of(clean).items() if t.is_floating_point() and names(name)]
        if not names:
            raise ValueError("names: expected a function that wants some of clean's tensors, got one that wants none")
    names = check_names(names)
    check_tensors(names, **states)
    check_codes(names, clean, [pretrained, robust])
    rho: dict[str, Tensor] = {}
    beta: dict[str, Tensor] = {}  # kept where they are: a look at each would stall the device's queue
    for name in names:
        theta_s = upcast(clean[name])
        theta_0 = pretrained[name].detach().to(theta_s)
        theta_c = robust[name].detach().to(theta_s)
        # eq-rws-naive:  delta_c = theta_c - theta_s
        rho[name] = theta_c - theta_s
        if project:
            # eq-rws-signature:  rho_c = delta_c - beta_c tau_s,  tau_s = theta_s - theta_0
            tau = theta_s - theta_0
            beta[name] = _task_share(rho[name], tau, theta_0)
            rho[name].addcmul_(tau, beta[name], value=-1)
    broken = [name for name, b in beta.items() if not b.isfinite()]
    if broken:
        raise ValueError(f"pretrained, clean, robust: expected finite weights, got others in {', '.join(broken)}")
    if not project:
        check_finite("clean, robust", rho)
    return rho


@torch.no_grad()
def compose(
    signatures: Sequence[State],
    weights: Sequence[float] | None = None,
    *,
    strength: float = 1.0,
    official_scale: bool = False,
) -> dict[str, Tensor]:
    r"""One patch from any number of signatures: the sum in eq-rws-patch. No signature, or no weight: an empty patch.

    patch = sum over c of alpha_c rho_c, with alpha_c = strength times weight.

    Args:
        signatures: of :func:`signature`, or of a quantised one's ``dequantise()``. They may cover different layers.
        weights: one for each signature (1/n: official code).
        strength: multiplies them all: :math:`\alpha_c` is strength times weight (1: official code).
        official_scale: use :math:`\alpha_c^2`, as the official code does.

    Raises:
        TypeError: ``signatures`` is one signature instead of a sequence.
        ValueError: not as many weights as signatures, one that is not finite, shapes that do not match, or signatures
            or a sum with entries that are not finite.
    """
    if isinstance(signatures, Mapping) or not isinstance(signatures, Sequence):
        raise TypeError(f"signatures: expected a sequence of signatures, got one {type(signatures).__name__}")
    weights = [1 / max(len(signatures), 1)] * len(signatures) if weights is None else weights
    if len(weights) != len(signatures):
        raise ValueError(f"weights: expected {len(signatures)}, one for each signature, got {len(weights)}")
    strength = number("strength", strength)
    scales = [strength * number("weights", w) for w in weights]
    seen: dict[str, Tensor] = {}
    for i, rho in enumerate(signatures):
        label = f"signatures[{i}]"
        check_states(**{label: rho})
        check_tensors(rho, **{label: rho})
        check_tensors([n for n in rho if n in seen], **{"those before": seen, label: rho})
        check_finite(label, rho)
        seen = {**rho, **seen}

    patch: dict[str, Tensor] = {}
    for scale, rho in zip(scales, signatures, strict=True):
        scale = scale**2 if official_scale else scale
        if scale == 0.0:  # leave out: adding 0 turns a weight of -0.0 into 0.0, so it is not the same as adding nothing
            continue
        both = [n for n in rho if n in patch]
        new = [n for n in rho if n not in patch]
        # eq-rws-patch:  sum_c alpha_c rho_c
        if both:
            torch._foreach_add_([patch[n] for n in both], [rho[n] for n in both], alpha=scale)
        patch |= {n: upcast(rho[n]) * scale for n in new}
    check_finite("weights, strength", patch)
    return patch


def average_batchnorm(model: nn.Module, robust: Sequence[State]) -> dict[str, Tensor]:
    r"""The model's state dict with the tensors of BatchNorm and of shortcuts averaged over the robust models.

    For a residual network the paper's code replaces them in the whole network, shortcut convolutions included, instead
    of adding their signature: a plain mean, without weights or strength. Load the result into the model.

    Args:
        model: the patched model, which also tells which tensors these are; not changed.
        robust: the state dicts :math:`\theta_c` of the corruptions that the patch is for.
    """
    layers = [*batchnorms(model), *(n for n, _ in model.named_modules() if n.rpartition(".")[2] in SHORTCUTS)]
    host = model.state_dict()
    rest = {name for name in host if not any(name.startswith(f"{layer}.") for layer in layers)}
    return dict(merge(host, robust, average(), skip=rest))


@torch.no_grad()
def blend_statistics(model: nn.Module, batches: Iterable[Tensor], strength: float = 1.0) -> nn.Module:
    r"""Move BatchNorm's running statistics towards those of ``batches``, in place (eq-rws-statistics):

    .. math:: (\mu,\sigma^2)\leftarrow(1-\alpha)\,(\mu,\sigma^2)+\alpha\,(\hat\mu,\hat\sigma^2),

    with the statistics before, which for the paper are those of :func:`average_batchnorm`, and those re-estimated by
    :func:`peftref.merging.core.batchnorm.recalibrate`.

    Args:
        model: in any mode, which it keeps.
        batches: corrupted training images.
        strength: :math:`\alpha` in [0, 1], the strength of the patch (1: official code).

    Returns:
        ``model``.
    """
    strength = number("strength", strength, 0, 1)
    layers = batchnorms(model).values()
    running = [t for m in layers for t in (m.running_mean, m.running_var) if t is not None]
    before = [t.clone() for t in running]
    recalibrate(model, batches)
    for now, then in zip(running, before, strict=True):
        now.copy_(torch.lerp(then, now, strength))  # eq-rws-statistics
    return model


def _task_share(delta: Tensor, tau: Tensor, theta_0: Tensor) -> Tensor:
    """The coefficient beta of one tensor: ``<delta, tau> / |tau|^2``."""
    # sum() adds in pairs; dot() piles up rounding in long chains: on 2 million float32 weights it is 1e-4 off
    dot = (delta * tau).sum()
    square = tau.square().sum()
    # A change below the rounding of the weights has no direction: dividing by its square would give NaN, or noise.
    # Nothing is removed then, and delta is all that happened since pretraining.
    untouched = square.sqrt() <= torch.finfo(tau.dtype).eps * torch.linalg.vector_norm(theta_0)
    return torch.where(untouched & square.isfinite(), 0.0, dot / square)
