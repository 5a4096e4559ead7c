r"""EVA: LoRA started from the directions in which a layer's inputs vary most, with ranks where they explain most.

Paischer, Hauzenberger, Schmied, Alkin, Deisenroth, Hochreiter, "Parameter Efficient Fine-tuning via Explained Variance
Adaptation", NeurIPS 2025, arXiv 2410.07170; official code: https://github.com/ml-jku/EVA/tree/e047fe4.

LoRA's layer stays what it is; where training starts does not. A few minibatches of the new task pass through the
frozen model. With the right singular vectors :math:`V` and singular values :math:`s` of a layer's centred inputs
(eq-eva-start, eq-eva-ratio, eq-eva-ranks):

.. math:: A = V_{:r_\ell},\quad B = 0;\qquad \xi_{\ell j} = \frac{s_{\ell j}^2}{\|X_\ell-\mathbf 1\mu_\ell^\top\|_F^2},
   \quad r_\ell = \#\{j : \xi_{\ell j}\text{ is among the }\textstyle\sum_\ell r\text{ largest of all}\}.

================  ===============  ===============  =================================================
argument          here             paper            shape
================  ===============  ===============  =================================================
``r``             :math:`r`        :math:`r`        integer: ranks a layer has on average
``rho``           :math:`\rho`     :math:`\rho`     number: no layer gets more than ``rho * r``
``tau``           :math:`\tau`     :math:`\tau`     number: similarity at which a layer rests
``components``    :math:`V`        :math:`V^\top`   ``(k, i)``, k the integer at ``rho * r``
``singular``      :math:`s`        :math:`\Sigma`   ``(k,)``
``ratio``         :math:`\xi`      :math:`\xi`      ``(k,)``
================  ===============  ===============  =================================================

Differs from the paper, whose text decomposes the inputs and whose code their deviations from the mean (so do we;
``center=False`` is the text): by default products are summed and decomposed once, which is exact in any order of the
batches; ``route="incremental"`` is the paper's. Differs from PEFT: whitening divides a copy, where PEFT divides in
place what layers with one input share
(https://github.com/huggingface/peft/blob/51c2ff666/src/peft/tuners/lora/eva.py#L467-L477); short batches wait for more,
where PEFT leaves them out (lines 154 to 157 there); layers share an input if it is the same tensor, which needs no look
at its numbers; convolutions are adapted too; with ``use_rslora`` updates of any rank keep one scale.

>>> import torch
>>> from torch import nn
>>> redistribute({"peaked": torch.tensor([0.9, 0.1]), "flat": torch.tensor([0.5, 0.4])}, budget=3)
{'peaked': 1, 'flat': 2}
>>> net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
>>> batches = torch.randn(4, 32, 6, generator=torch.Generator().manual_seed(0))
>>> before = net(batches[0])
>>> found = collect(net, ["0", "2"], batches, r=2)      # the model is only looked at
>>> sum(found.ranks.values()), found.batches
(4, 4)
>>> names = inject_eva(net, found)                      # LoRA: everything in peftref.adapters.core.injection applies
>>> torch.equal(net(batches[0]), before)                # B = 0
True
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import integer, number, one_of
from .._wrapped import unwrapped
from .baselines.lora import LoRA
from .core.activations import input_rows, masks_of, record_inputs, run, shared_inputs, token_mask
from .core.injection import build, install
from .core.layers import view
from .core.spectra import ROUTES, Accumulator, Spectrum
from .core.targets import exactly, find

__all__ = ["Directions", "collect", "inject_eva", "redistribute", "start"]


def redistribute(ratios: Mapping[str, Tensor], budget: int) -> dict[str, int]:
    """Deal ranks out: r_l = how many ratios of layer l are among the ``budget`` largest of all layers (eq-eva-ranks).

    A layer with a flat spectrum gets more than one whose first component explains everything. Of equal ratios the
    layer named first is served first.

    Args:
        ratios: of each layer, ``(k,)``, falling.
        budget: ranks in all; fewer are dealt out if there are fewer ratios.

    Raises:
        ValueError: no layers, ratios that are no vectors, or a negative budget.
    """
    integer("budget", budget, 0)
    if not ratios or any(xi.ndim != 1 for xi in ratios.values()):
        raise ValueError(f"ratios: expected (k,) for each layer, got {[tuple(xi.shape) for xi in ratios.values()]}")
    owner = [name for name, xi in ratios.items() for _ in xi]
    # eq-eva-ranks:  r_l = how many xi_lj are among the b largest
    order = torch.cat([xi.detach().cpu().double() for xi in ratios.values()]).argsort(descending=True, stable=True)
    dealt = dict.fromkeys(ratios, 0)
    for j in order[:budget].tolist():
        dealt[owner[j]] += 1
    return dealt


def start(spectrum: Spectrum, r: int, *, whiten: bool = False) -> Tensor:
    """The first ``A``, ``(r, i)``: A = V_:r, the leading right singular vectors of the layer's inputs (eq-eva-start).

    Of all orthonormal rows they expect the largest first gradient of B, tr(A Sigma A^T) (eq-eva-signal).

    Args:
        spectrum: of the inputs.
        r: rows of ``A``.
        whiten: divide row j by the root of the singular value s_j.

    Returns:
        A new tensor.

    Raises:
        ValueError: more rows than the spectrum has components.
    """
    integer("r", r, 0, len(spectrum.components))
    # eq-eva-start:  A = V_:r, whitened diag(s_:r)^(-1/2) V_:r
    A = spectrum.components[:r].clone()
    if whiten and r and spectrum.singular[0] > 0:
        floor = torch.finfo(A.dtype).eps * spectrum.singular[0]  # a direction without variance is not blown up
        A = A / spectrum.singular[:r].clamp_min(floor).sqrt()[:, None]
    return A


@dataclass(frozen=True)
class Directions:
    """What :func:`collect` found: for each layer V and s of its inputs, and its rank r_l.

    Attributes:
        spectra: by layer; layers with the same input share one object.
        ranks: by layer; 0 for a layer that gets no adapter.
        r: ranks a layer has on average.
        batches: how many were looked at.
        unconverged: on an incremental route, layers whose directions still moved at the last batch.
    """

    spectra: dict[str, Spectrum]
    ranks: dict[str, int]
    r: int
    batches: int
    unconverged: list[str]


def collect(
    model: nn.Module,
    targets: str | Iterable[str],
    batches: Iterable[Any],
    *,
    r: int = 8,
    rho: float = 2.0,
    exclude: str | Iterable[str] = (),
    max_batches: int = 64,
    route: str = "auto",
    center: bool = True,
    tau: float = 0.99,
    subspace: bool = False,
    mask: Callable[[Any], Tensor | None] | None = token_mask,
    forward: Callable[[nn.Module, Any], object] = run,
) -> Directions:
    """Find the directions V of the layers' inputs (X - mean = U diag(s) V), and the layers' ranks, on some batches.

    The batches pass through the model in eval mode and without gradients. The model is left as it was, after an error
    too. Adapters that it has take part if they are active. Which layers share an input is seen on the first batch,
    which is passed through once more.

    Args:
        model: any module.
        targets: layers, as in :func:`~peftref.adapters.core.injection.inject`.
        batches: of the new task, such as a ``DataLoader``; of a kind that ``forward`` can run. Passed through once.
        r: ranks a layer gets on average (8: PEFT's default).
        rho: no layer gets more than ``rho * r`` (2: PEFT's default); 1 gives each ``r``.
        exclude: layers that are left out, as in :func:`~peftref.adapters.core.injection.inject`.
        max_batches: of them to look at (64: ours).
        route: "gram" (exact, an ``(i, i)`` matrix for each input), "incremental" (the paper's, exact SVD of each step),
            "lowrank" (approximate, as PEFT's), or "auto": "gram" up to 2048 inputs, "lowrank" above.
        center: decompose the inputs' deviations from their mean (True: the authors' code and PEFT); False: the inputs
            themselves (the paper's text). Where inputs have a large mean, most of the gradient may lie along it.
        tau: a layer on an incremental route rests as long as its :func:`~peftref.adapters.core.spectra.agreement` is
            this high, and collecting ends when all rest (0.99: PEFT's default).
        subspace: compare spaces instead of single directions, as in
            :func:`~peftref.adapters.core.spectra.agreement`.
        mask: batch -> which tokens count (True), in the shape of all layers' inputs but the last axis; None for all.
            By default those attended to that have a label; of an encoder-decoder model of transformers, the encoder's
            by the attention mask, the decoder's by the decoder's own and the labels.
        forward: runs the model on a batch, ``forward(model, batch)``.

    Raises:
        TypeError: as in :func:`~peftref.adapters.core.injection.inject`.
        ValueError: an option outside its range, no batches, a layer that no batch reaches, inputs that are not finite,
            or a mask that does not fit a layer's input.
    """
    integer("r", r, 1)
    number("rho", rho, 1)
    number("tau", tau, 0, 1)
    integer("max_batches", max_batches, 1)
    one_of("route", route, ROUTES)
    model = unwrapped(model)  # hooks are not seen by what is compiled
    layers = find(model, targets, exclude)
    k = {n: min(round(rho * r), view(module).in_features) for n, module in layers.items()}
    budget = sum(min(r, most) for most in k.values())
    groups: dict[str, list[str]] = {}  # first of the layers with one input -> all of them
    inputs: dict[str, Accumulator] = {}  # first -> what has gone in
    dealt: dict[str, int] = {}
    seen = 0
    for batch in islice(batches, max_batches):
        if not groups:
            groups = {names[0]: names for names in shared_inputs(model, layers, batch, forward)}
            inputs = {n: Accumulator(k[n], route=route, center=center) for n in groups}
        awake = _moving(inputs, groups, dealt, tau, subspace)
        if not awake:
            break
        with masks_of(model, layers, batch, mask) as mask_for:
            take = partial(_take, inputs, layers, mask_for)
            with record_inputs(model, {n: layers[n] for n in awake}, take):
                forward(model, batch)
        seen += 1
        states = {n: found.state for n, found in inputs.items() if found.state}
        if len(states) == len(inputs):  # on an incremental route, and beyond the first rows
            dealt = redistribute({n: s.ratio for n, s in _by_layer(states, groups, layers).items()}, budget)
    if not seen:
        raise ValueError("batches: expected at least one, got none")
    found = {n: accumulator.finish() for n, accumulator in inputs.items()}
    spectra = _by_layer({n: spectrum for n, spectrum in found.items() if spectrum}, groups, layers)
    unseen = [n for n in layers if n not in spectra]
    if unseen:
        raise ValueError(f"targets: expected layers that the batches reach, got none for {unseen}; exclude them")
    dealt = redistribute({n: spectrum.ratio for n, spectrum in spectra.items()}, budget)
    incremental = {n: accumulator for n, accumulator in inputs.items() if not accumulator.moments}
    moving = [n for leader in _moving(incremental, groups, dealt, tau, subspace) for n in groups[leader]]
    return Directions(spectra, dealt, r, seen, [n for n in layers if n in moving])


def inject_eva(
    model: nn.Module,
    found: Directions,
    *,
    ranks: Mapping[str, int] | None = None,
    whiten: bool = False,
    adjust: bool = True,
    lora_alpha: float = 8,
    name: str = "default",
    freeze: bool = True,
    **options: Any,
) -> list[str]:
    """Put LoRAs that start from A_l = V_:r_l, B_l = 0 into the model, in place; scale alpha_l / r_l = alpha / r.

    They are :class:`~peftref.adapters.baselines.lora.LoRA` with EVA's directions and ranks. Make the optimizer
    afterwards. A file of the adapter is LoRA's, with ``rank_pattern`` and ``alpha_pattern``.

    Args:
        model: the one that was looked at, or its equal.
        found: by :func:`collect`.
        ranks: by layer, instead of those found.
        whiten: as in :func:`start` (False: PEFT's default; said to help in vision).
        adjust: scale ``lora_alpha`` with a layer's rank, so that all updates keep one scale (True: PEFT's default).
        lora_alpha: :math:`\\alpha` of LoRA, for a layer of rank ``r``.
        name: of the adapter, as in :func:`~peftref.adapters.core.injection.inject`.
        freeze: stop training what is in the model, as in :func:`~peftref.adapters.core.injection.inject`.
        options: further arguments of LoRA.

    Returns:
        The full names of the adapted layers; those of rank 0 are left out.

    Raises:
        ValueError: ranks of unknown layers, outside of what was found, or all 0; otherwise as in
            :func:`~peftref.adapters.core.injection.inject`.
    """
    ranks = dict(found.ranks if ranks is None else ranks)
    most = {n: len(s.components) for n, s in found.spectra.items()}
    wrong = {n: q for n, q in ranks.items() if not 0 <= q <= most.get(n, -1)}
    if wrong:
        raise ValueError(f"ranks: expected at most {most}, and at least 0, got {wrong}")
    ranks = {n: q for n, q in ranks.items() if q}
    if not ranks:
        raise ValueError("ranks: expected at least one layer with a rank above 0, got none")
    power = 0.5 if options.get("use_rslora") else 1.0
    # eq-eva-alpha:  alpha_l = alpha r_l / r, so that alpha_l / r_l is the same everywhere
    scaled = {n: lora_alpha * (q / found.r) ** power if adjust else lora_alpha for n, q in ranks.items()}
    own = {n: {"r": q, "lora_alpha": scaled[n]} for n, q in ranks.items()}
    new = build(model, LoRA, exactly(ranks), per_layer=own, **options)
    for n, adapter in new.items():
        A = adapter.get_parameter("lora_A.weight")
        A.data.copy_(start(found.spectra[n], ranks[n], whiten=whiten).view_as(A))
    install(model, new, name, freeze=freeze)
    return list(new)


def _take(
    inputs: Mapping[str, Accumulator],
    layers: Mapping[str, nn.Module],
    mask_for: Callable[[str, Tensor], Tensor | None],
    name: str,
    x: Tensor,
) -> None:
    """Hand what goes into the layer ``name`` to the accumulator of its input."""
    with torch.autocast(x.device.type, enabled=False):  # products of bfloat16 are too coarse
        inputs[name].update(input_rows(name, layers[name], x, mask_for(name, x)))


def _moving(
    inputs: Mapping[str, Accumulator],
    groups: Mapping[str, list[str]],
    dealt: Mapping[str, int],
    tau: float,
    subspace: bool,
) -> list[str]:
    """Inputs of which the directions that their layers' ranks need moved in the last step."""
    if not dealt:
        return list(inputs)
    most = {n: max(dealt[member] for member in groups[n]) for n in inputs}
    return [n for n, one in inputs.items() if one.moved(most[n], tau, subspace=subspace)]


def _by_layer(
    spectra: Mapping[str, Spectrum], groups: Mapping[str, list[str]], layers: Iterable[str]
) -> dict[str, Spectrum]:
    """The spectrum of each layer, in the model's order; layers with one input share an object."""
    found = {n: spectrum for leader, spectrum in spectra.items() for n in groups[leader]}
    return {n: found[n] for n in layers if n in found}
