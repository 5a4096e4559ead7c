r"""First session adaptation: the body learns once, on the first session; a discriminant head learns all sessions.

Panos, Kobe, Olmeda Reino, Aljundi, Turner, "First Session Adaptation: A Strong Replay-Free Baseline for
Class-Incremental Learning", ICCV 2023, arXiv 2303.13199.

A pre-trained body :math:`\phi=f_\theta(x)\in\mathbb R^d` is tuned with a temporary linear head on the first session
:math:`D_1` alone (eq-fsa-first)

.. math:: \theta^\ast,\cdot=\arg\min_{\theta,(U,u)}\ \frac1{|D_1|}\sum_{(x,y)\in D_1}
          \mathrm{CE}\big(U\,\mathrm{dropout}(f_\theta(x))+u,\ y\big),

where :math:`\theta` is all of the body (FSA) or the FiLM scales and shifts only (FSA-FiLM;
:mod:`peftref.continual.core.film`). U is thrown away, the body is frozen, and from then on each session, the first
included, only adds to the moments of :class:`peftref.continual.core.lda.LDA`. No sample is kept, and the head after
the last session is the one that all sessions together would have given.

A score of the features of the pre-trained body says how far apart unlabelled images lie there (eq-fsa-score): with
:math:`u_i=\phi_i/\|\phi_i\|`, the mean cosine distance between two samples,

.. math:: 1-\frac1{n(n-1)}\sum_{i\ne j}u_i^\top u_j
          =1-\frac{\big\|\sum_iu_i\big\|^2-\sum_i\|u_i\|^2}{n(n-1)} .

The paper's abstract proposes a measure of unlabelled inputs that predicts the benefit of adapting; the mean over all
pairs is the form chosen here.

===============================  =====================================  ==================  ==========
argument                         here                                   official code       shape
===============================  =====================================  ==================  ==========
``model``                        :math:`f_\theta`                       feature extractor   module
``features``                     :math:`\phi`                           same                ``(n, d)``
``lr, epochs, milestones``       Adam, steps of the learning rate       same                --
===============================  =====================================  ==================  ==========

Differs from the official code, `aresPanos/fsa@e151d896
<https://github.com/aresPanos/fsa/tree/e151d896657246733da62f6ba552b4c23485cd28>`_:

- The full body is in train mode during the first session and in eval mode ever after. There it is put into train mode
  (``src/methods/cil_trainer.py#L188``) and the features of the head are computed without leaving it (``#L238-L259``);
  then the full body stops at ``self.film_params``, which only FiLM has (``#L267``, ``#L173``), so what the published
  code runs to its end is FSA-FiLM.
- FiLM is folded into the normalisation layers when the first session is over.
- A first session of one class, which teaches cross-entropy nothing, leaves the body as it is.

For the head see :mod:`peftref.continual.core.lda`.

>>> from peftref.continual.core.streams import class_incremental
>>> from peftref.data import load
>>> from peftref.models import pretrained
>>> tasks = class_incremental(load("fashion8k"), [4, 2, 2, 2], per_class=20)
>>> fsa = FSA(pretrained("mnist5k"), "film", epochs=5, ridge=0.0, ridge_rel=0.1).adapt(*tasks[0].train)
>>> for task in tasks[:2]:
...     fsa = fsa.observe(*task.train)
>>> fsa(tasks[0].test.x[:5]).shape, fsa.head.classes_.tolist()
(torch.Size([5, 6]), [0, 1, 2, 3, 4, 5])
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import integer, number, one_of
from .._taps import features_of
from .._wrapped import unwrapped
from ..data import Split
from ..fitting import batches
from .core._steps import descend, finite_images, tensor_of
from .core.film import FiLM, film_parameters, inject_film, merge_film
from .core.lda import LDA

__all__ = ["FSA", "cosine_distance", "embed", "first_session"]

BODIES = ("full", "film", "none")
STATISTICS = ("batch", "source")


def cosine_distance(features: Tensor) -> Tensor:
    """Mean cosine distance, 1 - (|sum_i u_i|^2 - sum_i |u_i|^2) / n(n - 1) with u = phi / |phi| (eq-fsa-score).

    ``(n, d) -> ()``, float64, in O(nd). A zero vector has no direction: it counts as orthogonal to all others.

    >>> cosine_distance(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]]))  # 0, 1 and 1
    tensor(0.6667, dtype=torch.float64)
    """
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features: expected two rows or more, (n, d), got shape {tuple(features.shape)}")
    n = len(features)
    u = F.normalize(features.double(), dim=1)
    # eq-fsa-score:  1 - (|sum_i u_i|^2 - sum_i |u_i|^2) / n(n - 1)
    return 1 - (u.sum(0).square().sum() - u.square().sum()) / (n * (n - 1))


def embed(model: Any, x: Tensor) -> Tensor:
    """Features ``(N, d)``: the input of the head of a model with timm's protocol, else what the model returns.

    Args:
        model: any module; one in the wrappers of torch is asked itself.
        x: a batch ``(N, ...)``.

    Raises:
        ValueError: a single image.
        TypeError: a model that returns something else than a tensor.
    """
    model = unwrapped(model)
    if x.ndim < 2:
        raise ValueError(f"x: expected a batch (N, ...), got shape {tuple(x.shape)}")
    return tensor_of(features_of(model, x), "features (N, d)").flatten(1)


def first_session(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    body: str = "full",
    *,
    lr: float = 5e-3,
    epochs: int = 200,
    milestones: Sequence[float] = (0.25, 0.5, 0.75),
    decay: float = 0.7,
    batch_size: int = 256,
    dropout: float = 0.5,
    statistics: str = "batch",
    layers: str | Sequence[str] | None = None,
    seed: int = 0,
    after: Callable[[int, float], object] | None = None,
) -> nn.Module:
    r"""A copy of ``model``, adapted to the first session by min CE(U dropout(f(x)) + u, y), then frozen (eq-fsa-first).

    The defaults are those of the official code.

    Args:
        model: body, see :func:`embed`; never changed. Of ``torch.compile`` or ``DataParallel``, what they hold.
        x: images of the first session.
        y: their labels, any integers; of one class, nothing is trained.
        body: ``"full"``: every parameter; ``"film"``: FiLM alone, all else in eval mode; ``"none"``: nothing.
        lr: of Adam, for body and temporary head alike.
        epochs: passes over the images.
        milestones: shares of the epochs after which the rate is multiplied (with few shots 1/8, 1/4 and 1/2).
        decay: what it is multiplied by (with few shots 0.3).
        batch_size: a rest that does not fill a batch is left out, since BatchNorm needs several images.
        dropout: of the features in training.
        statistics: of BatchNorm while the full body is trained: ``"batch"`` (train mode, as in the official code) or
            ``"source"`` (eval mode, as with FiLM), which is safer for batches of few or small images.
        layers: of FiLM, see :func:`peftref.continual.core.film.inject_film`; those named must be on the way to the
            features.
        seed: of the head, the order and the dropout; the global generator is left as it was.
        after: called after each epoch with its number, from 0, and the mean loss.

    Raises:
        ValueError: bad settings, images and labels that do not match, or images that are not finite.
        FloatingPointError: the loss is not finite.
    """
    _check(body, lr, epochs, decay, dropout, statistics)
    if len(x) != len(y) or not len(y):
        raise ValueError(f"x, y: expected equal, positive numbers of images and labels, got {len(x)} and {len(y)}")
    if body != "none":
        finite_images(x)
    model = copy.deepcopy(unwrapped(model)).eval()
    classes, codes = y.unique(return_inverse=True)
    if body != "none" and len(classes) > 1:
        with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng():
            torch.manual_seed(seed)
            trained = _trainable(model, body, layers)
            features = embed(model, x[:1])
            if layers is not None and body == "film":
                _check_reached(model, features)
            head = nn.Linear(features.shape[1], len(classes), device=x.device, dtype=trained[0].dtype)
            optimizer = torch.optim.Adam([*trained, *head.parameters()], lr)
            steps = [round(share * epochs) for share in milestones]
            schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [step for step in steps if step], decay)
            generator = torch.Generator().manual_seed(seed)
            model.train(body == "full" and statistics == "batch")
            for epoch in range(epochs):
                losses = []
                for images, labels in batches(Split(x, codes), batch_size, drop_last=True, generator=generator):
                    # eq-fsa-first:  CE(U dropout(f(x)) + u, y)
                    loss = F.cross_entropy(head(F.dropout(embed(model, images), dropout)), labels)
                    losses.append(descend(loss, optimizer))
                schedule.step()
                mean = float(torch.stack(losses).mean())
                if not math.isfinite(mean):
                    raise FloatingPointError(f"loss: expected a finite number, got {mean} in epoch {epoch}; lower lr")
                if after is not None:
                    after(epoch, mean)
            merge_film(model)
    model.zero_grad(set_to_none=True)
    return model.eval().requires_grad_(False)  # from here on statistics and weights stand still


class FSA(nn.Module):
    """Adapt once, then observe session after session: ``adapt(x, y)``, ``observe(x, y)``, ``forward(x)``.

    The logits are phi.w_c + b_c of the features phi = f(x) of the adapted body, with w_c = S^-1 mu_c and
    b_c = -mu_c.w_c / 2. ``forward`` returns those of labels 0 to K - 1, minus infinity for a label not yet seen;
    ``predict`` returns labels, which may be any integers. The body is in eval mode whatever ``train()`` is called with.

    Args:
        model: pre-trained body, see :func:`first_session`; copied, never changed.
        body: what the first session adapts: "full", "film" or "none", see :func:`first_session`.
        scatter: "total" or "within", see :func:`peftref.continual.core.lda.discriminant`.
        ridge: absolute ridge of the head.
        ridge_rel: ridge of the head as a share of the mean variance.
        prior: None (uniform) or "empirical".
        num_classes: K of ``forward``; default: the largest label seen, plus one.
        chunk: images of a forward pass when nothing is trained.
        training: further settings of :func:`first_session`.
    """

    def __init__(
        self,
        model: nn.Module,
        body: str = "full",
        *,
        scatter: str = "total",
        ridge: float = 1.0,
        ridge_rel: float = 0.0,
        prior: str | None = None,
        num_classes: int | None = None,
        chunk: int = 500,
        **training: Any,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        _check(body)
        self.head = LDA(scatter, ridge, ridge_rel, prior).eval()
        self.body = copy.deepcopy(unwrapped(model)).eval().requires_grad_(False)
        self.kind = body
        self.num_classes = num_classes
        self.chunk = chunk
        self.settings = training
        self.training = False

    def train(self, mode: bool = True) -> FSA:
        return self  # see the class docstring

    def adapt(self, x: Tensor, y: Tensor) -> FSA:
        """Tune the body on the first session, which is to be observed afterwards like every other.

        Args:
            x: images of the first session.
            y: their labels.

        Raises:
            RuntimeError: something was observed: its moments are of the features as they were.
        """
        if len(self.head.classes_):
            raise RuntimeError("adapt: expected nothing observed yet, as moments belong to the body that gave them")
        self.body = first_session(self.body, x, y, self.kind, **self.settings)
        return self

    def observe(self, x: Tensor, y: Tensor) -> FSA:
        """Add the samples of a session, or of a part of one, to the moments of the head.

        Args:
            x: images, of old or new classes.
            y: their labels.
        """
        self.head.partial_fit(self.features(x), y)
        return self

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """Features of the body, ``(N, ...) -> (N, d)``, in chunks."""
        return torch.cat([embed(self.body, part) for part in x.split(self.chunk)])

    def forward(self, x: Tensor) -> Tensor:
        z = self.head(self.features(x))
        classes = self.head.classes_
        k = int(classes[-1]) + 1 if self.num_classes is None else self.num_classes
        if classes[0] < 0 or classes[-1] >= k:
            raise ValueError(f"labels: expected them in [0, {k}) for logits, got {classes.tolist()}; use predict")
        logits: Tensor = z.new_full((len(z), k), -math.inf).index_copy_(1, classes.to(z.device), z)
        return logits

    def predict(self, x: Tensor) -> Tensor:
        """Labels of the largest logits, ``(N, ...) -> (N,)``."""
        return self.head.predict(self.features(x))


def _trainable(model: nn.Module, body: str, layers: str | Sequence[str] | None) -> list[nn.Parameter]:
    """Parameters that the first session moves, the only ones that then require a gradient."""
    model.requires_grad_(body == "full")
    if body == "full":
        return list(model.parameters())
    inject_film(model, layers)
    return film_parameters(model)


def _check_reached(model: nn.Module, features: Tensor) -> None:
    """Refuse FiLM that was asked for on layers which the features do not depend on."""
    films = {name: m.gamma for name, m in model.named_modules() if isinstance(m, FiLM)}
    found = torch.autograd.grad(features.sum(), list(films.values()), allow_unused=True) if features.grad_fn else ()
    idle = [name for name, g in itertools.zip_longest(films, found) if g is None]
    if idle:
        raise ValueError(f"layers: expected normalisation layers that the features pass through, got {idle}")


def _check(
    body: str, lr: float = 1.0, epochs: int = 1, decay: float = 1.0, dropout: float = 0.0, statistics: str = "batch"
) -> None:
    one_of("body", body, BODIES)
    one_of("statistics", statistics, STATISTICS)
    number("lr", lr, 0.0, open_low=True)
    integer("epochs", epochs, 0)
    number("decay", decay, 0.0, 1.0, open_low=True)
    if number("dropout", dropout, 0.0, 1.0) == 1:
        raise ValueError("dropout: expected a number in [0, 1), got 1")
