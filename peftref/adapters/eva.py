r"""EVA: LoRA started from the directions in which a layer's inputs vary most, with ranks where they explain most.

Paischer, Hauzenberger, Schmied, Alkin, Deisenroth, Hochreiter, "Parameter Efficient Fine-tuning via Explained Variance
Adaptation", NeurIPS 2025, arXiv 2410.07170.

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
batches; ``route="incremental"`` is the paper's. Differs from PEFT: whitening divides a copy, where layers with one
input would be divided again and again; short batches wait for more, instead of being skipped for ever; layers share an
input if it is the same tensor, which needs no look at its numbers; convolutions are adapted too; with ``use_rslora``
updates of any rank keep one scale.

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

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from .baselines.lora import LoRA
from .core.activations import input_rows, record_inputs, run, shared_inputs, token_mask
from .core.injection import build, install
from .core.layers import view
from .core.spectra import Moments, Spectrum, absorb, agreement
from .core.targets import find

__all__ = ["Directions", "collect", "inject_eva", "redistribute", "start"]

ROUTES = ("auto", "gram", "incremental", "lowrank")
WIDE = 2048  # inputs up to which the i x i scatter matrix is the cheapest way


def redistribute(ratios: Mapping[str, Tensor], budget: int) -> dict[str, int]:
    """Deal ``budget`` ranks out to layers (eq-eva-ranks): how many of its ratios are among the largest of all.

    A layer with a flat spectrum gets more than one whose first component explains everything. Of equal ratios the
    layer named first is served first.

    Args:
        ratios: of each layer, ``(k,)``, falling.
        budget: ranks in all; fewer are dealt out if there are fewer ratios.

    Raises:
        ValueError: no layers, ratios that are no vectors, or a negative budget.
    """
    if not isinstance(budget, int) or budget < 0:
        raise ValueError(f"budget: expected an integer from 0 on, got {budget!r}")
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
    r"""The first ``A``, ``(r, i)``, a new tensor (eq-eva-start); whitened, row j is divided by :math:`\sqrt{s_j}`."""
    if not isinstance(r, int) or not 0 <= r <= len(spectrum.components):
        raise ValueError(f"r: expected an integer from 0 to {len(spectrum.components)}, got {r!r}")
    # eq-eva-start:  A = V_:r, whitened diag(s_:r)^(-1/2) V_:r
    A = spectrum.components[:r].clone()
    if whiten and r and spectrum.singular[0] > 0:
        floor = torch.finfo(A.dtype).eps * spectrum.singular[0]  # a direction without variance is not blown up
        A = A / spectrum.singular[:r].clamp_min(floor).sqrt()[:, None]
    return A


@dataclass(frozen=True)
class Directions:
    """What :func:`collect` found.

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
    """Run some batches through the model in eval mode, and find the directions and ranks of its layers' inputs.

    The model is left as it was, after an error too. Adapters that it has take part if they are active. Which layers
    share an input is seen on the first batch, which is passed through once more.

    Args:
        model: any module.
        targets, exclude: as in :func:`~peftref.adapters.core.injection.inject`.
        batches: of the new task, such as a ``DataLoader``; of a kind that ``forward`` can run. Passed through once.
        r: ranks a layer gets on average (8: PEFT's default).
        rho: no layer gets more than ``rho * r`` (2: PEFT's default); 1 gives each ``r``.
        max_batches: of them to look at (64: ours).
        route: "gram" (exact, an ``(i, i)`` matrix for each input), "incremental" (the paper's, exact SVD of each step),
            "lowrank" (approximate, as PEFT's), or "auto": "gram" up to 2048 inputs, "lowrank" above.
        center: as in :func:`~peftref.adapters.core.spectra.absorb`.
        tau: a layer on an incremental route rests as long as its :func:`~peftref.adapters.core.spectra.agreement` is
            this high, and collecting ends when all rest (0.99: PEFT's default).
        subspace: as in :func:`~peftref.adapters.core.spectra.agreement`.
        mask: batch -> which tokens count (True), in the shape of all layers' inputs but the last axis; None for all.
        forward: runs the model on a batch, ``forward(model, batch)``.

    Raises:
        TypeError: as in :func:`~peftref.adapters.core.injection.inject`.
        ValueError: an option outside its range, no batches, a layer that no batch reaches, inputs that are not finite,
            or a mask that does not fit a layer's input.
    """
    _check(r, rho, tau, max_batches, route)
    layers = find(model, targets, exclude)
    k = {n: min(round(rho * r), view(module).in_features) for n, module in layers.items()}
    budget = sum(min(r, most) for most in k.values())
    groups: list[_Input] = []
    dealt: dict[str, int] = {}
    seen = 0
    for batch in islice(batches, max_batches):
        if not groups:
            shared = shared_inputs(model, layers, batch, forward)
            groups = [_Input(names, k[names[0]], route, center) for names in shared]
        awake = {group.leader: group for group in groups if group.moving(dealt, tau, subspace)}
        if not awake:
            break
        mark = None if mask is None else mask(batch)

        def see(name: str, x: Tensor, awake: dict[str, _Input] = awake, mark: Tensor | None = mark) -> None:
            with torch.autocast(x.device.type, enabled=False):  # products of bfloat16 are too coarse
                awake[name].take(input_rows(name, layers[name], x, mark))

        with record_inputs(model, {n: layers[n] for n in awake}, see):
            forward(model, batch)
        seen += 1
        if all(group.state for group in groups):  # on an incremental route, and beyond the first rows
            dealt = redistribute({n: g.state.ratio for n, g in _by_layer(groups, layers) if g.state}, budget)
    if not seen:
        raise ValueError("batches: expected at least one, got none")
    if unseen := [n for group in groups for n in group.members if not group.finish()]:
        raise ValueError(f"targets: expected layers that the batches reach, got none for {unseen}; exclude them")
    spectra = {n: group.state for n, group in _by_layer(groups, layers) if group.state}
    dealt = redistribute({n: spectrum.ratio for n, spectrum in spectra.items()}, budget)
    moving = [n for n, g in _by_layer(groups, layers) if not g.moments and g.moving(dealt, tau, subspace)]
    return Directions(spectra, dealt, r, seen, moving)


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
    """Put :class:`~peftref.adapters.baselines.lora.LoRA` with EVA's directions and ranks into the model, in place.

    Make the optimizer afterwards. A file of the adapter is LoRA's, with ``rank_pattern`` and ``alpha_pattern``.

    Args:
        model: the one that was looked at, or its equal.
        found: by :func:`collect`.
        ranks: by layer, instead of those found.
        whiten: as in :func:`start` (False: PEFT's default; said to help in vision).
        adjust: scale ``lora_alpha`` with a layer's rank, so that all updates keep one scale (True: PEFT's default).
        lora_alpha, name, freeze, options: as of LoRA and :func:`~peftref.adapters.core.injection.inject`.

    Returns:
        The full names of the adapted layers; those of rank 0 are left out.

    Raises:
        ValueError: ranks of unknown layers, outside of what was found, or all 0; otherwise as in
            :func:`~peftref.adapters.core.injection.inject`.
    """
    ranks = dict(found.ranks if ranks is None else ranks)
    most = {n: len(s.components) for n, s in found.spectra.items()}
    if wrong := {n: q for n, q in ranks.items() if not 0 <= q <= most.get(n, -1)}:
        raise ValueError(f"ranks: expected at most {most}, and at least 0, got {wrong}")
    ranks = {n: q for n, q in ranks.items() if q}
    if not ranks:
        raise ValueError("ranks: expected at least one layer with a rank above 0, got none")
    power = 0.5 if options.get("use_rslora") else 1.0
    # eq-eva-alpha:  alpha_l = alpha r_l / r, so that alpha_l / r_l is the same everywhere
    own = {
        n: {"r": q, "lora_alpha": lora_alpha * (q / found.r) ** power if adjust else lora_alpha}
        for n, q in ranks.items()
    }
    new = build(model, LoRA, "|".join(map(re.escape, ranks)), per_layer=own, **options)
    for n, adapter in new.items():
        A = adapter.get_parameter("lora_A.weight")
        A.data.copy_(start(found.spectra[n], ranks[n], whiten=whiten).view_as(A))
    install(model, new, name, freeze=freeze)
    return list(new)


def _by_layer(groups: list[_Input], layers: Iterable[str]) -> list[tuple[str, _Input]]:
    """Each layer with its input, in the model's order."""
    of = {n: group for group in groups for n in group.members}
    return [(n, of[n]) for n in layers]


class _Input:
    """The rows of one input, shared by its ``members``, on their way into a spectrum."""

    def __init__(self, members: list[str], k: int, route: str, center: bool) -> None:
        self.members = members
        self.leader = members[0]
        self.k = k
        self.route = route
        self.center = center
        self.moments: Moments | None = None
        self.state: Spectrum | None = None
        self.before: Spectrum | None = None
        self.waiting: list[Tensor] = []

    def take(self, new: Tensor) -> None:
        if not len(new):
            return
        route = self.route if self.route != "auto" else "gram" if new.shape[1] <= WIDE else "lowrank"
        if route == "gram":
            self.moments = self.moments or Moments(self.center)
            self.moments.update(new)
            return
        self.waiting.append(new)
        if self.state or sum(map(len, self.waiting)) >= self.k:
            self._absorb(route == "lowrank")

    def _absorb(self, lowrank: bool) -> None:
        new = torch.cat(self.waiting)
        self.waiting = []
        self.before = self.state
        self.state = absorb(self.state, new, self.k, center=self.center, lowrank=lowrank)

    def moving(self, dealt: Mapping[str, int], tau: float, subspace: bool) -> bool:
        """Whether the directions that the members' ranks need have moved in the last step."""
        if not dealt or self.before is None or self.state is None:
            return True
        return agreement(self.state, self.before, max(dealt[n] for n in self.members), subspace=subspace) < tau

    def finish(self) -> Spectrum | None:
        if self.waiting:  # fewer rows in all than components were wanted
            self._absorb(lowrank=False)
        if self.moments and not self.state:
            self.state = self.moments.spectrum(self.k)
        return self.state


def _check(r: int, rho: float, tau: float, max_batches: int, route: str) -> None:
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise ValueError(f"r: expected a positive integer, got {r!r}")
    if not 1 <= rho < float("inf"):
        raise ValueError(f"rho: expected a finite number of at least 1, got {rho!r}")
    if not 0 <= tau <= 1:
        raise ValueError(f"tau: expected a number in [0, 1], got {tau!r}")
    if max_batches < 1:
        raise ValueError(f"max_batches: expected at least 1, got {max_batches!r}")
    if route not in ROUTES:
        raise ValueError(f"route: expected one of {ROUTES}, got {route!r}")
