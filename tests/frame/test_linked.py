"""Equation and code lead to each other in the pages, and a page of the reference shows everything public."""

from __future__ import annotations

from pathlib import Path

import pytest
from bs4 import BeautifulSoup

from tools import linked, reference

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("line", "linked_line"),
    [
        ("The step (eq-lame-update).", "The step :eq:`eq-lame-update`."),
        ("Both (eq-a_b-c, eq-d-e) hold.", "Both :eq:`eq-a_b-c`, :eq:`eq-d-e` hold."),
        ("Of eq-lame-update, twice.", "Of :eq:`eq-lame-update`, twice."),
        ("``eq-lame-update`` and :eq:`eq-lame-update`", "``eq-lame-update`` and :eq:`eq-lame-update`"),
        ("|u|^2, ``a | b``, :math:`|x|`", r"\|u\|^2, ``a | b``, :math:`|x|`"),
        ("of v_{i} and coef_, not ``coef_`` or v_i", r"of v\_{i} and coef\_, not ``coef_`` or v_i"),
        (">>> a | b", ">>> a | b"),
    ],
)
def test_a_line_of_a_docstring(line: str, linked_line: str) -> None:
    lines = [line, "", ".. math:: |x|", "", "    |y|", "", "|z|"]
    linked.link_equations(None, "function", "name", None, None, lines)
    assert lines == [linked_line, "", ".. math:: |x|", "", "    |y|", "", r"\|z\|"]


def test_constants_are_read_from_the_source(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        '__all__ = ["A", "B", "C", "f"]\n# Above,\n# twice.\nA = {\n    "x": 1,\n}\nB: float = 1 / 3  # beside\n'
        f"C = {list(range(100))}\nD = 4\n\n\ndef f():\n    pass\n"
    )
    assert reference.constants(path) == [("A", "{'x': 1}", "Above, twice."), ("B", "1 / 3", "beside"), ("C", "", "")]


def test_equations_know_their_functions() -> None:
    assert reference.computed_by()["eq-lora-update"] == ["peftref.adapters.baselines.lora.LoRA"]


def test_links_lead_both_ways(html: Path) -> None:
    chapter = BeautifulSoup((html / "book/tta/lame.html").read_text(encoding="utf-8"), "html.parser")
    page = BeautifulSoup((html / "book/api/tta/lame.html").read_text(encoding="utf-8"), "html.parser")
    to_code = {link["href"] for link in chapter.select("p.in-code a")}
    assert any(link.startswith("../api/tta/lame.html#peftref.tta.lame.") for link in to_code)
    to_equations = {link["href"] for link in page.select("article a.internal")}
    assert any(link.startswith("../../tta/lame.html#equation-eq-lame-") for link in to_equations)


def test_a_page_has_its_table_first_and_nothing_of_this_machine(html: Path) -> None:
    for path in (html / "book/api").rglob("*/*.html"):
        article = BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser").find("article")
        assert article
        defined = article.select("dt.sig")
        table = article.find("table")
        if table and defined:
            assert table.sourceline and table.sourceline < (defined[0].sourceline or 0), path
        text = article.get_text(" ")
        assert str(ROOT) not in text and "site-packages" not in text and " at 0x" not in text, path
        assert not [dt for dt in article.select("dl.field-list strong") if "," in dt.get_text().strip(", ")], path
