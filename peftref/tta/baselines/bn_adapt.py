r"""BN-adapt: replace the training statistics of BatchNorm by those of the test batch.

Schneider, Rusak, Eck, Bringmann, Brendel, Bethge, "Improving robustness against common corruptions by covariate shift
adaptation", NeurIPS 2020, arXiv 2006.16971; Nado et al., "Evaluating Prediction-Time Batch Normalization for Robustness
under Covariate Shift", 2020, arXiv 2006.10963.

With source statistics :math:`\mu_s,\sigma_s^2` and those of the test batch :math:`\mu_b,\sigma_b^2` (eq-tta-bn)

.. math:: \mu = (1-\alpha)\,\mu_s + \alpha\,\mu_b, \qquad \sigma^2 = (1-\alpha)\,\sigma_s^2 + \alpha\,\sigma_b^2 .

:math:`\alpha=1` (the default) is prediction-time BatchNorm, :math:`\alpha=0` the source model. No weight changes and
nothing carries over to the next batch.

=================  ======================  =========================  ==========
argument           here                    paper                      shape
=================  ======================  =========================  ==========
``alpha``          :math:`\alpha`          :math:`n/(N+n)`            scalar
(batch)            :math:`\mu_b`           :math:`\mu_t`              ``(C,)``
=================  ======================  =========================  ==========

Differs from the paper: the mixing weight is given directly (the paper writes it through a pseudo-count N of source
samples). The batch variance is the biased one, as in BatchNorm's own normalisation.

>>> import torch
>>> net = torch.nn.Sequential(torch.nn.BatchNorm1d(2, affine=False))
>>> x = torch.tensor([[1.0, 10.0], [3.0, 30.0]])
>>> BNAdapt(net)(x)                                # each column becomes standardised
tensor([[-1.0000, -1.0000],
        [ 1.0000,  1.0000]])
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..._checks import at_least_float32, number
from ..core.adapted import Adapted, batch_norms, use_batch_statistics
from ..core.called import check_called

__all__ = ["BNAdapt"]


class BNAdapt(Adapted):
    """Mixes BatchNorm's statistics, mu = (1 - alpha) mu_source + alpha mu_batch, and returns the logits; stateless.

    Args:
        model: a classifier with BatchNorm layers; copied, never changed.
        alpha: weight of the batch in [0, 1]. 1 uses the batch alone; 0.1 is a common choice for small batches.

    Shape:
        ``x``: ``(N, ...)``, N >= 2 when ``alpha`` = 1; returns what the model does, ``(N, K)`` or ``(N, K, H, W)``.

    Raises:
        TypeError: a model that returns no tensor.
        ValueError: no BatchNorm layer; BatchNorm layers without running statistics when ``alpha`` < 1; a batch of one;
            at the first batch, layers whose statistics the model uses without calling them.
    """

    def __init__(self, model: nn.Module, alpha: float = 1.0) -> None:
        super().__init__(model)
        self.alpha = number("alpha", alpha, 0, 1)
        layers = batch_norms(self.source)
        if not layers:
            raise ValueError("model: expected at least one BatchNorm layer, got none")
        if alpha < 1 and any(m.running_mean is None for m in layers):
            raise ValueError("model: expected BatchNorm layers with running statistics to mix with, got one without")
        self.smallest = 2 if self.alpha == 1 else 1
        self.called = self.alpha == 0  # whether the layers are known to be called
        self.reset()

    def reset(self) -> None:
        self.model = copy.deepcopy(self.source).requires_grad_(False)
        if self.alpha == 1:
            use_batch_statistics(self.model)
        elif self.alpha > 0:
            for source in batch_norms(self.model):
                source.register_forward_pre_hook(self._mix)

    def _mix(self, layer: _BatchNorm, inputs: tuple[Tensor]) -> tuple[Tensor]:
        """Feed the layer an input whose normalisation by the SOURCE statistics equals that by the mixed ones."""
        x = inputs[0]
        shape = (1, -1) + (1,) * (x.ndim - 2)
        assert layer.running_mean is not None and layer.running_var is not None  # else __init__ has refused the model
        wide = at_least_float32(x)  # a variance may be beyond half precision
        var_b, mean_b = torch.var_mean(wide, dim=[d for d in range(x.ndim) if d != 1], correction=0)
        mean_s = layer.running_mean.to(mean_b)
        var_s = layer.running_var.to(var_b)
        # eq-tta-bn
        mean = torch.lerp(mean_s, mean_b, self.alpha)
        var = torch.lerp(var_s, var_b, self.alpha)
        ratio = ((var_s + layer.eps) / (var + layer.eps)).sqrt()
        return (((wide - mean.view(shape)) * ratio.view(shape) + mean_s.view(shape)).to(x.dtype),)

    @torch.inference_mode()
    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        if len(x) == 0:
            return self.empty(self.model, x)
        if not self.called:
            check_called(self.source, x)
            self.called = True
        return self.logits(self.model, x)

    def logits(self, model: nn.Module, x: Tensor) -> Tensor:
        """Of any shape: nothing is computed from them."""
        out = model(x)
        if not isinstance(out, Tensor):
            raise TypeError(f"model: expected logits (N, K), got {type(out).__name__}")
        return out
