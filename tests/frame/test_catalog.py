"""The catalogue lists what the book promises, and the pages made from it are up to date."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from peftref import catalog
from tools import readme

ROOT = Path(__file__).resolve().parents[2]
COUNTS = dict(adapters=10, tta=3, continual=5, merging=8, sharing=5, training=5, shift=3, panel=1, decisions=2)


def test_the_42_methods_in_their_parts() -> None:
    parts = [method.part for method in catalog.METHODS]
    assert {part.slug: parts.count(part.slug) for part in catalog.PARTS} == COUNTS
    assert len(parts) == 42


def test_slugs_name_modules_and_papers_are_distinct() -> None:
    slugs = [method.slug for method in catalog.METHODS]
    assert len(set(slugs)) == len(slugs) and all(slug.isidentifier() for slug in slugs)
    papers = [method.arxiv for method in catalog.METHODS]
    assert len(set(papers)) == len(papers)
    assert all(re.fullmatch(r"\d{4}\.\d{5}", paper) for paper in papers)
    # an arXiv number tells its year; a paper appears there the year before its venue, rarely two
    assert all(0 <= method.year - 2000 - int(method.arxiv[:2]) <= 2 for method in catalog.METHODS)


def test_parts_come_in_the_order_of_the_methods() -> None:
    assert list(dict.fromkeys(method.part for method in catalog.METHODS)) == [part.slug for part in catalog.PARTS]


def test_table_has_a_row_per_method() -> None:
    table = catalog.table()
    assert table.index.tolist() == [method.slug for method in catalog.METHODS]
    assert table.loc["lame", "reference"] == "Boudiaf et al., CVPR 2022"
    assert not table.isna().any().any()


def test_readme_and_map_are_up_to_date() -> None:
    assert readme.main(["--check"]) == 0


@pytest.mark.parametrize(("text", "base"), [(catalog.readme_table(), ROOT), (catalog.map_page(), ROOT / "book")])
def test_exactly_the_ready_methods_are_linked(text: str, base: Path) -> None:
    links = {link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("https://arxiv.org/abs/")}
    ready = [method for method in catalog.METHODS if method.status == "ready"]
    assert links == {f"{'book/' if base == ROOT else ''}{method.part}/{method.slug}.ipynb" for method in ready}
    assert all(method.title in text for method in catalog.METHODS)


def test_writing_replaces_only_what_stands_between_the_markers(tmp_path: Path) -> None:
    (tmp_path / "book").mkdir()
    (tmp_path / "_toc.yml").write_text("root: book/intro\n", encoding="utf-8")
    page = tmp_path / "README.md"
    page.write_text(f"before\n{readme.START}\nSTALE\n{readme.STOP}\nafter\n", encoding="utf-8")
    assert readme.main(["--check"], tmp_path) == 1 and "STALE" in page.read_text("utf-8")
    assert readme.main([], tmp_path) == 0 and readme.main(["--check"], tmp_path) == 0
    text = page.read_text("utf-8")
    assert text.startswith("before\n") and text.endswith("after\n") and "STALE" not in text and "LAME" in text


def test_a_readme_without_markers_is_refused(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("nothing", encoding="utf-8")
    with pytest.raises(ValueError, match="catalog:start"):
        readme.main([], tmp_path)
