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

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Tasks", "agreed_names"]


class Tasks:
    """Names of the tasks, and which of them are in the batch: all adapters of a model read it from one such object.

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

    def __len__(self) -> int:
        return len(self.names)

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

    @property
    def one(self) -> int | None:
        """The number of the task, where the batch is of one task."""
        return self.current if isinstance(self.current, int) else None

    def pick(self, stack: Tensor) -> Tensor:
        """Of ``(T, ...)`` the task's entry, or ``(N, ...)`` for a mixed batch; of a shared ``(1, ...)`` that one."""
        if len(stack) == 1:
            return stack[0]
        if self.current is None:
            raise ValueError(f"tasks: expected one of {self.names} to be chosen by use(), got none")
        if isinstance(self.current, int):
            return stack[self.current]
        return stack.index_select(0, self.current.to(stack.device))  # whose gradient is faster than that of stack[...]


def agreed_names(tasks: Tasks | None, task_names: Sequence[str] | None) -> list[str]:
    """The names of the tasks, where a file, if there is one, has them in the same order."""
    if tasks is None:
        raise ValueError("tasks: expected a Tasks, from which the adapter reads the task, got None")
    if task_names is not None and list(task_names) != tasks.names:
        raise ValueError(f"tasks: expected those that the weights were made for, {list(task_names)}, got {tasks.names}")
    return list(tasks.names)
