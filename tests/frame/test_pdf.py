"""A page prints: text and equations, light, on several sheets; what is not built is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tools import pdf

if TYPE_CHECKING:
    from playwright.sync_api import Browser


def test_a_page_is_printed(browser: Browser, html: Path, tmp_path: Path) -> None:
    with browser.new_context(color_scheme="light") as context:
        page = context.new_page()
        pdf.save(page, html / "book/beyond.html", tmp_path / "new/beyond.pdf")
        assert page.locator("article mjx-container").count() > 0, "the equations are not set"
        assert page.locator("article details:not([open])").count() == 0
    made = (tmp_path / "new/beyond.pdf").read_bytes()
    assert made.startswith(b"%PDF-") and made.rstrip().endswith(b"%%EOF")
    assert len(re.findall(rb"/Type /Page\b", made)) >= 2
    assert b"/StructTreeRoot" in made and b"/Outlines" in made  # headings can be heard, and jumped to
    assert len(re.findall(rb"/FontFile", made)) >= 3  # text, code and equations are text, not pictures


def test_a_page_that_is_not_built_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"names: expected pages that are built.*nowhere\.html"):
        pdf.main(["book/nowhere"], html=tmp_path, out=tmp_path / "pdf")
    with pytest.raises(ValueError, match=r"names: .*got \[\]"):
        pdf.main(html=tmp_path, out=tmp_path / "pdf")
    assert not (tmp_path / "pdf").exists()
