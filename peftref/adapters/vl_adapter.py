r"""VL-Adapter: bottleneck adapters that several tasks share, in whole, by half, or not at all.

Sung, Cho, Bansal, "VL-Adapter: Parameter-Efficient Transfer Learning for Vision-and-Language Tasks", CVPR 2022,
arXiv 2112.06825; official code: https://github.com/ylsung/VL_adapter/tree/545fcbb.

On the output :math:`h\in\mathbb R^d` of a frozen sub-layer (attention's projection, the MLP's second layer) task
:math:`\tau` adds (eq-vl_adapter-bottleneck)

.. math:: f_\tau(h)=U_\tau\,\phi(D_\tau h+b_\tau)+c_\tau,\qquad D_\tau\in\mathbb R^{r\times d},\
   U_\tau\in\mathbb R^{d\times r},\ r=\lfloor d/\text{reduction}\rfloor .

Which halves carry the index :math:`\tau` is the question of the paper: none (*single*), both (*multiple*), or one
(*half-shared*). A shared half gets the sum of the gradients of the tasks' losses (eq-vl_adapter-gradient),
:math:`\nabla_U\sum_\tau L_\tau=\sum_\tau\nabla_UL_\tau`: tasks with little data borrow, tasks at odds interfere.
:math:`D,U` may also be sums of Kronecker products (:mod:`peftref.adapters.core.phm`), or come from a network
(:mod:`peftref.adapters.baselines.hyperformer`).

==================  =======================  =====================  ==========
argument            here                     paper                  shape
==================  =======================  =====================  ==========
``down.weight``     :math:`D`                :math:`\theta_D`       ``(T, r, d)``, or ``(1, r, d)`` where shared
``down.bias``       :math:`b`                                       ``(T, r)``
``up.weight``       :math:`U`                :math:`\theta_U`       ``(T, d, r)``
``up.bias``         :math:`c`                                       ``(T, d)``
``reduction``                                reduction factor       number
``phm``             :math:`n`                :math:`k`              integer
==================  =======================  =====================  ==========

Differs from the official code: the adapter starts as the identity (:math:`U=0,c=0`; ``init="paper"`` draws it as
there); weights of all tasks lie in one tensor, so that a batch may mix tasks, and a shared half is there once, in
memory and in files. The non-linearity is the official one, GELU in its tanh form.

>>> import torch
>>> from torch import nn
>>> from peftref.adapters.core.injection import adapters, inject
>>> from peftref.adapters.core.switch import Tasks
>>> net, tasks = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)), Tasks(["vqa", "gqa"])
>>> inject(net, VLAdapter, ["0"], reduction=4, sharing="half-up", tasks=tasks)
['0']
>>> {name: tuple(p.shape) for name, p in adapters(net)["0"].named_parameters()}
{'down.weight': (2, 2, 8), 'down.bias': (2, 2), 'up.weight': (1, 8, 2), 'up.bias': (1, 8)}
>>> x = torch.randn(3, 4)
>>> tasks.use("gqa")                               # a batch of one task,
>>> y = net(x)
>>> tasks.use(["vqa", "gqa", "gqa"])               # or the task of each row
>>> torch.allclose(net(x), y)                      # still the identity, for every task
True
>>> tasks.use("nlvr")
Traceback (most recent call last):
ValueError: which: expected some of ['vqa', 'gqa'], got 'nlvr'
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import integer, number, one_of
from .core.adapter import Adapter
from .core.layers import Layer
from .core.phm import PHM, Rule
from .core.switch import Tasks, agreed_names

__all__ = ["SHARING", "Stack", "VLAdapter", "affine", "bottleneck"]

INITS = ("zero", "paper")
SHARING = ("single", "multiple", "half-up", "half-down")  # "half-up": U is shared, each task has its D


def affine(h: Tensor, W: Tensor, b: Tensor) -> Tensor:
    """``h @ W.T + b`` with one matrix ``(o, i)``, or ``(N, o, i)``: one for each element of a batch ``(N, ..., i)``.

    >>> h, W, b = torch.ones(2, 5, 3), torch.ones(2, 4, 3), torch.zeros(2, 4)
    >>> affine(h, W, b).shape
    torch.Size([2, 5, 4])
    """
    if W.ndim == 2:
        return F.linear(h, W, b)
    if h.ndim < 2 or len(h) != len(W):
        raise ValueError(
            f"tasks: expected the task of each of the {len(W)} elements of a batch, got {tuple(h.shape)}; "
            "if the batch is not the first axis, say so by batch_dim"
        )
    rows = h.reshape(len(h), math.prod(h.shape[1:-1]), h.shape[-1])  # (N, tokens, i)
    return torch.baddbmm(b[:, None], rows, W.mT).reshape(*h.shape[:-1], W.shape[1])


def bottleneck(h: Tensor, D: Tensor, b: Tensor, U: Tensor, c: Tensor, batch_dim: int = 0) -> Tensor:
    """The increment ``f(h) = U gelu(D h + b) + c`` (eq-vl_adapter-bottleneck).

    Args:
        h: output of the sub-layer, ``(..., d)``.
        D: ``(r, d)``, or one for each element of the batch.
        b: ``(r,)``, likewise.
        U: ``(d, r)``, likewise.
        c: ``(d,)``, likewise.
        batch_dim: the axis of ``h`` over which the elements of the batch run, where they differ.

    Raises:
        ValueError: another number of elements than of matrices.
    """
    if batch_dim and 3 in (D.ndim, U.ndim):
        if h.ndim < batch_dim + 2:
            raise ValueError(f"batch_dim: expected an axis before the last one of {tuple(h.shape)}, got {batch_dim}")
        return bottleneck(h.transpose(0, batch_dim), D, b, U, c).transpose(0, batch_dim)
    # eq-vl_adapter-bottleneck:  f(h) = U gelu(D h + b) + c
    return affine(F.gelu(affine(h, D, b), approximate="tanh"), U, c)


class VLAdapter(Adapter):
    """A bottleneck on the output of a sub-layer, ``f(h) = U gelu(D h + b) + c``, with a sharing pattern over tasks.

    Args:
        base: the frozen layer, with d outputs.
        reduction: r is ``d / reduction``, rounded down, at least 1 (8: the official scripts).
        sharing: one of :data:`SHARING`; "single" (the default, and the paper's choice) ignores the task.
        phm: n of the Kronecker products, 1 for ordinary matrices (2: the official Compacter scripts).
        rank: of Compacter's factors, 0 for whole ones (0: as in the official scripts).
        init: "zero" starts as the identity; "paper" draws U and the biases at random too.
        task_names: of a file, to be compared with ``tasks``; leave it out.
        tasks: the object that knows the task; for all but "single".
        rule: :math:`A_k` shared with other layers (and by D and U); by default each matrix has its own.
        batch_dim: the axis of the layer's output over which the elements of a mixed batch run: 0 for ``(N, ..., d)``;
            1 for ``(tokens, N, d)``, as in PyTorch's own transformer layers without ``batch_first``. It is not seen
            from the numbers: where there are as many tokens as elements, the wrong axis gives each token a task.

    Raises:
        ValueError: an option out of its range; tasks that are missing or not those of the file; an n that does not
            divide d and r.
    """

    kind = "vl_adapter"
    mergeable = False
    options = ("reduction", "sharing", "phm", "rank", "init", "task_names", "batch_dim")

    def __init__(
        self,
        base: Layer,
        reduction: float = 8,
        sharing: str = "single",
        phm: int = 1,
        rank: int = 0,
        init: str = "zero",
        task_names: Sequence[str] | None = None,
        *,
        tasks: Tasks | None = None,
        rule: Rule | None = None,
        batch_dim: int = 0,
    ) -> None:
        super().__init__()
        self.batch_dim = check_batch_dim(batch_dim, base)
        number("reduction", reduction, 0, open_low=True)
        one_of("sharing", sharing, SHARING)
        integer("phm", phm, 1)
        if phm == 1 and (rank or rule is not None):
            raise ValueError(f"phm: expected 2 or more for a rank or a rule, got 1 with rank={rank}, rule={rule}")
        one_of("init", init, INITS)
        self.task_names = None if sharing == "single" else agreed_names(tasks, task_names)
        self.reduction = reduction
        self.sharing = sharing
        self.phm = phm
        self.rank = rank
        self.init = init
        self.tasks = tasks or Tasks(["all"])
        self.own = {"down": sharing in ("multiple", "half-up"), "up": sharing in ("multiple", "half-down")}
        d = base.out_features
        r = max(1, int(d / reduction))
        zero = init == "zero"
        copies = {half: len(self.tasks) if own else 1 for half, own in self.own.items()}
        self.down: Stack | PHM
        self.up: Stack | PHM
        if phm == 1:
            self.down = Stack(copies["down"], d, r, zero_bias=zero)
            self.up = Stack(copies["up"], r, d, zero=zero, zero_bias=zero)
        else:
            self.down = PHM(copies["down"], d, r, phm, rank, rule)
            self.up = PHM(copies["up"], r, d, phm, rank, rule, zero=zero)

    def forward(self, x: Tensor, y0: Tensor, base: Layer) -> Tensor:
        pick = self.tasks.pick
        one = self.tasks.one
        D, b = self.down(one)
        U, c = self.up(one)
        return bottleneck(y0, pick(D), pick(b), pick(U), pick(c), self.batch_dim)

    def subset(self, tasks: Tasks) -> VLAdapter:
        """A copy for some of the tasks, in the order of ``tasks``; halves that are shared stay as they are.

        Raises:
            ValueError: a task that the adapter has no weights for.
        """
        names = tasks.names if self.task_names is None else self.task_names
        unknown = [name for name in tasks.names if name not in names]
        if unknown:
            raise ValueError(f"tasks: expected some of {names}, got {unknown}")
        shared = [m for m in self.modules() if isinstance(m, Rule) and m.A.ndim == 3]
        new = copy.deepcopy(self, {id(self.tasks): tasks} | {id(rule): rule for rule in shared})
        if self.task_names is not None:
            new.task_names = list(tasks.names)
            keep = [names.index(name) for name in tasks.names]
            for half in (half for half, own in self.own.items() if own):
                for p in (p for p in getattr(new, half).parameters() if all(p is not rule.A for rule in shared)):
                    p.data = p.data[keep]
        return new


def check_batch_dim(batch_dim: int, base: Layer) -> int:
    """The axis, where the layer's output can have the batch there: a convolution has it first."""
    return integer("batch_dim", batch_dim, 0, None if len(base.window) == 1 else 0)


class Stack(nn.Module):
    """Matrices with biases, one for each task or one for all.

    Args:
        copies: T.
        i: inputs of each.
        o: outputs of each.
        zero: start the matrices at zero, or else as ``nn.Linear`` does.
        zero_bias: start the biases at zero, likewise.
    """

    def __init__(self, copies: int, i: int, o: int, zero: bool = False, zero_bias: bool = True) -> None:
        super().__init__()
        bound = 1 / math.sqrt(i)
        self.weight = nn.Parameter(torch.empty(copies, o, i).uniform_(-bound, bound) * (not zero))
        self.bias = nn.Parameter(torch.empty(copies, o).uniform_(-bound, bound) * (not zero_bias))

    def forward(self, one: int | None = None) -> tuple[Tensor, Tensor]:
        """``(T, o, i)`` and ``(T, o)``."""
        return self.weight, self.bias
