"""The switch of multi-task adapters: one object that says which task a batch belongs to.

>>> import torch
>>> tasks, stack = Tasks(["vqa", "gqa"]), torch.tensor([[1.0], [2.0]])  # one row for each task
>>> tasks.use("gqa")
>>> tasks.pick(stack)
tensor([2.])
>>> tasks.use(["gqa", "vqa", "gqa"])                                     # a mixed batch
>>> tasks.pick(stack).flatten()
tensor([2., 1., 2.])
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from ._calls import recomputing, will_be_recomputed

__all__ = ["Tasks", "agreed_names"]


class Tasks:
    """Names of the tasks, and which of them are in the batch: all adapters of a model read it from one such object.

    A copy of the model, such as an average of its weights, reads it from the same object; one that was saved and loaded
    has its own. A layer that ``torch.utils.checkpoint`` recomputes in the backward pass must meet the task of its
    forward pass again. Where another was chosen since, it raises, unless the task travels with the call:
    ``checkpoint(layer, x, use_reentrant=False, context_fn=tasks.contexts)``, and in transformers
    ``gradient_checkpointing_enable({"use_reentrant": False, "context_fn": tasks.contexts})``.

    Args:
        names: of the tasks, in the order of the weights.

    Attributes:
        current: a number for a batch of one task, ``(N,)`` numbers for one of many; None until :meth:`use` is called.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        if isinstance(names, str) or not self.names or len(set(self.names)) < len(self.names):
            raise ValueError(f"names: expected a list of different names, got {names!r}")
        self.current: int | Tensor | None = 0 if len(self.names) == 1 else None
        self._told = False  # whether the task of what is recomputed was brought along
        self._since: list[int | Tensor | None] = []  # tasks of the passes that may still be recomputed
        self._spent = False  # whether a backward pass came since

    def __len__(self) -> int:
        return len(self.names)

    def __deepcopy__(self, memo: dict[int, object]) -> Tasks:
        return self

    def use(self, which: str | Sequence[str] | Tensor) -> None:
        """Say which task comes next: one name, or for a mixed batch a name or a number for every element.

        Raises:
            ValueError: a name or a number that is not there.
        """
        if isinstance(which, Tensor):
            if which.ndim != 1 or which.is_floating_point() or not ((which >= 0) & (which < len(self))).all():
                raise ValueError(f"which: expected (N,) integers below {len(self)}, got {which}")
            self.current = which.long()
            return
        asked = [which] if isinstance(which, str) else list(which)
        if any(name not in self.names for name in asked):
            raise ValueError(f"which: expected some of {self.names}, got {which!r}")
        numbers = [self.names.index(name) for name in asked]
        self.current = numbers[0] if isinstance(which, str) else torch.tensor(numbers, dtype=torch.long)

    def contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """For ``context_fn`` of ``torch.utils.checkpoint``: what is recomputed meets the task of now."""
        return nullcontext(), self._back_to(self.current)

    @contextmanager
    def _back_to(self, task: int | Tensor | None) -> Iterator[None]:
        now = self.current, self._told
        self.current = task
        self._told = True
        try:
            yield
        finally:
            self.current, self._told = now

    @property
    def one(self) -> int | None:
        """The number of the task, where the batch is of one task."""
        return self.current if isinstance(self.current, int) else None

    def pick(self, stack: Tensor) -> Tensor:
        """Of ``(T, ...)`` the task's entry, or ``(N, ...)`` for a mixed batch; of a shared ``(1, ...)`` that one.

        Raises:
            ValueError: no task was chosen.
            RuntimeError: a checkpointed layer is recomputed, and since its forward pass another task was chosen.
        """
        if len(stack) == 1:
            return stack[0]
        self._watch()
        if self.current is None:
            raise ValueError(f"tasks: expected one of {self.names} to be chosen by use(), got none")
        if isinstance(self.current, int):
            return stack[self.current]
        return stack.index_select(0, self.current.to(stack.device))  # whose gradient is faster than that of stack[...]

    def _watch(self) -> None:
        """Remember the tasks that a backward pass may come back to; within one, refuse another."""
        if self._told or torch.compiler.is_compiling():
            return
        if recomputing():
            self._spent = True
            if any(task is not self.current and not same(task, self.current) for task in self._since):
                raise RuntimeError(
                    "tasks: expected, for a layer that is recomputed in the backward pass, the task of its forward "
                    "pass, got others chosen since; give checkpoint(use_reentrant=False, context_fn=tasks.contexts)"
                )
        elif will_be_recomputed():
            if self._spent:
                self._since.clear()
            self._spent = False
            if not any(task is self.current for task in self._since):
                self._since.append(self.current)


def same(a: int | Tensor | None, b: int | Tensor | None) -> bool:
    """Whether two choices are of the same tasks."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    return type(a) is type(b) and not isinstance(a, Tensor) and a == b


def agreed_names(tasks: Tasks | None, task_names: Sequence[str] | None) -> list[str]:
    """The names of the tasks, where a file, if there is one, has them in the same order."""
    if tasks is None:
        raise ValueError("tasks: expected a Tasks, from which the adapter reads the task, got None")
    if task_names is not None and list(task_names) != tasks.names:
        raise ValueError(f"tasks: expected those that the weights were made for, {list(task_names)}, got {tasks.names}")
    return list(tasks.names)
