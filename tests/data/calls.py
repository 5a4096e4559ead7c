"""A valid call of everything public in peftref.data: tests.frame.test_fuzz spoils its arguments one by one."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from peftref import data
from tests.frame._inputs import Call, gen, labels, pictures, stream


def cifar_file() -> Path:
    path = Path(tempfile.gettempdir()) / "peftref_fuzz.bin"
    path.write_bytes(bytes(3073 * 2))
    return path


def pictures_split() -> data.Split:
    return data.Split(pictures(20), labels(20))


class Letters:
    """A tokenizer whose tokens are letters."""

    eos_token_id = 0

    def __call__(self, documents: list[str], add_special_tokens: bool) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(c) for c in document] for document in documents]}


CALLS: dict[str, Callable[[], Call]] = {
    "corrupt": lambda: (
        data.corrupt,
        dict(x=pictures(), name="contrast", severity=3, seed=0, table="cifar"),
    ),
    "as_stored": lambda: (data.as_stored, dict(y=labels(), generator=gen())),
    "dirichlet": lambda: (
        (lambda y, **rest: data.dirichlet(**rest)(y, gen())),
        dict(y=labels(40), delta=1.0, min_size=1, attempts=100),
    ),
    "grouped": lambda: ((lambda groups: data.grouped(groups)(labels(), gen())), dict(groups=labels())),
    "label_shift": lambda: (
        (lambda prior: data.label_shift(prior)(labels(), gen())),
        dict(prior=torch.ones(4)),
    ),
    "long_tail_prior": lambda: (data.long_tail_prior, dict(classes=4, imbalance=10.0)),
    "power_prior": lambda: (data.power_prior, dict(prior=torch.ones(4), rho=0.5)),
    "shuffled": lambda: (data.shuffled, dict(y=labels(), generator=gen())),
    "sorted_by_class": lambda: (data.sorted_by_class, dict(y=labels(), generator=gen())),
    "zipf": lambda: (
        (lambda y, **rest: data.zipf(**rest)(y, gen())),
        dict(y=torch.arange(1000) % 10, a=2.0, head=0.1, head_share=0.5, attempts=10000),
    ),
    "read_cifar_binary": lambda: (data.read_cifar_binary, dict(path=cifar_file(), classes=10)),
    "load": lambda: (data.load, dict(name="digits")),
    "continual": lambda: (
        data.continual,
        dict(data=pictures_split(), domains=["contrast"], severity=3, batch_size=4, cycles=1, seed=0),
    ),
    "gradual": lambda: (
        data.gradual,
        dict(data=pictures_split(), domains=["contrast"], batch_size=4, seed=0),
    ),
    "mixed": lambda: (
        data.mixed,
        dict(data=pictures_split(), domains=["contrast"], severity=3, batch_size=4, seed=0),
    ),
    "token_blocks": lambda: (
        (lambda documents, length: data.token_blocks(documents, Letters(), length)),
        dict(documents=["abc", "de"], length=2),
    ),
    "Stream": lambda: (data.Stream, vars(stream()).copy()),
}


# Names without a row, and why.
NAMELESS = {
    "movie_reviews": "files, see data/test_text",
    "read_tiny_imagenet": "files, see data/test_read",
    "read_cifar_c": "files, see data/test_read",
    "read_cifar_names": "files, see data/test_read",
    "read_cifar_python": "files, see data/test_read",
    "read_idx": "files, see data/test_read",
}


# Modules without a row, and why.
APART = {
    "domains": "called by streams, which check",
    "fetch": "the network, see data/test_fetch",
}
