"""The catalogue lists what the book promises, and the pages made from it are up to date."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from peftref import catalog
from tools import catalog_pages, readme

ROOT = Path(__file__).resolve().parents[2]


def test_every_part_has_methods() -> None:
    assert {method.part for method in catalog.METHODS} == {part.slug for part in catalog.PARTS}
    assert {method.status for method in catalog.METHODS} <= {"ready", "planned"}


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


@pytest.mark.parametrize(
    ("text", "base"), [(catalog_pages.readme_table(), ROOT), (catalog_pages.map_page(), ROOT / "book")]
)
def test_exactly_the_ready_methods_are_linked(text: str, base: Path) -> None:
    links = {link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("https://arxiv.org/abs/")}
    ready = [method for method in catalog.METHODS if method.status == "ready"]
    assert links == {f"{'book/' if base == ROOT else ''}{method.part}/{method.slug}.ipynb" for method in ready}
    assert all(method.title in text for method in catalog.METHODS)


def test_writing_replaces_only_what_stands_between_the_markers(tmp_path: Path) -> None:
    (tmp_path / "book").mkdir()
    page = tmp_path / "README.md"
    page.write_text(f"before\n{readme.START}\nSTALE\n{readme.STOP}\nafter\n", encoding="utf-8")
    assert readme.main(["--check"], tmp_path) == 1 and "STALE" in page.read_text("utf-8")
    assert readme.main([], tmp_path) == 0 and readme.main(["--check"], tmp_path) == 0
    text = page.read_text("utf-8")
    assert text.startswith("before\n") and text.endswith("after\n") and "STALE" not in text and "LAME" in text


def test_the_table_of_contents_has_the_ready_methods_in_order() -> None:
    text = catalog_pages.toc(ROOT)
    listed = re.findall(r"file: book/(?!api/)(\w+/(?!index)\w+)$", text, re.M)
    ready = [method for part in catalog.PARTS for method in catalog.METHODS if method.part == part.slug]
    pages = [(m.part, page) for m in ready if m.status == "ready" for page in (m.slug, *m.more)]
    assert listed == [f"{part}/{page}" for part, page in pages]


def test_further_pages_of_a_chapter_exist_and_belong_to_it_alone() -> None:
    pages = [(method.part, page) for method in catalog.METHODS for page in method.more]
    assert len(set(pages)) == len(pages)
    assert all((ROOT / f"book/{part}/{page}.ipynb").is_file() for part, page in pages)


def test_a_page_of_a_module_that_is_gone_is_found_and_deleted(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text(f"{readme.START}\n{readme.STOP}\n", encoding="utf-8")
    old = tmp_path / "book/api/tta/gone.md"
    old.parent.mkdir(parents=True)
    old.write_text("old", encoding="utf-8")
    assert readme.main([], tmp_path) == 0 and not old.exists()


def test_a_readme_without_markers_is_refused(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("nothing", encoding="utf-8")
    with pytest.raises(ValueError, match="catalog:start"):
        readme.main([], tmp_path)
