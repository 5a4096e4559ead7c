"""The built pages: nothing unresolved, every image described, no other host needed."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from urllib.parse import unquote

import ipywidgets
import pytest
from bs4 import BeautifulSoup

from peftref.catalog import METHODS
from tools import vendor

ROOT = Path(__file__).resolve().parents[2]
SHORT = {m.slug for m in METHODS}  # at the root: redirects, without the theme
LOADS = {
    "script": "src",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "audio": "src",
    "embed": "src",
}


@pytest.fixture(scope="session")
def pages(html: Path) -> dict[str, BeautifulSoup]:
    """Every page of the book, parsed."""
    paths = [p for p in sorted(html.rglob("*.html")) if "_static" not in p.parts]
    paths = [p for p in paths if p.parent != html or p.stem not in SHORT]
    return {p.relative_to(html).as_posix(): BeautifulSoup(p.read_text(encoding="utf-8"), "html.parser") for p in paths}


def test_the_pages_are_there(pages: dict[str, BeautifulSoup]) -> None:
    assert {"index.html", "book/intro.html", "book/map.html", "book/bibliography.html", "search.html"} <= set(pages)


def test_nothing_unresolved(pages: dict[str, BeautifulSoup]) -> None:
    """No empty citation, no reference that Sphinx gave up on, no markup left as text."""
    bad = []
    for name, page in pages.items():
        article = copy.copy(page.find("article") or page)
        bad += [f"{name}: {span}" for span in article.find_all(class_=["problematic", "system-message"])]
        for code in article.select("pre, code, script, style, dt.sig"):  # a signature may hold Callable[[], ...]
            code.decompose()
        # ... and so may the type of an argument: brackets right after a bracket are one.
        text = re.sub(r"\s+", " ", article.get_text(" "))
        bad += [f"{name}: {found}" for found in re.findall(r"\[\?\]|(?<!\[)(?<!\[ )\[ ?\]|\{\w+\}`|:\w+:`|\?\?", text)]
    assert not bad


def test_every_image_has_alternative_text(pages: dict[str, BeautifulSoup]) -> None:
    bad = []
    for name, page in pages.items():
        for image in page.find_all("img") if name.startswith("book/") else []:  # not Sphinx's own module index
            alt = str(image.get("alt", "")).strip()
            if len(alt) < 10 or re.search(r"[0-9a-f]{16}|/|\.(png|svg|jpe?g)$|^(image|figure|output)$", alt, re.I):
                bad.append(f"{name}: {str(image)[:80]}: alt={alt[:60]!r}")
    assert not bad, "describe the picture (in a notebook: cell metadata `mystnb: {image: {alt: ...}}`)"


def test_no_page_loads_from_another_host(html: Path, pages: dict[str, BeautifulSoup]) -> None:
    remote = re.compile(r"^(https?:)?//")
    bad = []
    for name, page in pages.items():
        bad += [f"{name}: {t}" for tag, key in LOADS.items() for t in page.find_all(tag, attrs={key: remote})]
        bad += [f"{name}: {link}" for link in page.find_all("link", href=remote) if "canonical" not in link["rel"]]
    for sheet in html.rglob("*.css"):
        found = re.findall(r"(?:url\(|@import)\s*['\"]?((?:https?:)?//[^'\")]+)", sheet.read_text(encoding="utf-8"))
        bad += [f"{sheet.name}: {url}" for url in found]
    assert not bad


def test_every_local_file_exists(html: Path, pages: dict[str, BeautifulSoup]) -> None:
    bad = []
    for name, page in pages.items():
        wanted = [t[key] for tag, key in (*LOADS.items(), ("link", "href"), ("a", "href")) for t in page.find_all(tag)
                  if t.get(key)]  # fmt: skip
        for url in wanted:
            path = re.split(r"[?#]", str(url))[0]
            if path and not re.match(r"^([a-z]+:|//)", path) and not (html / name).parent.joinpath(path).exists():
                bad.append(f"{name}: {url}")
    assert not bad


def test_chapters_offer_colab_and_download(pages: dict[str, BeautifulSoup]) -> None:
    chapters = [name for name in pages if re.fullmatch(r"book/(?!api/)\w+/\w+\.html", name)]
    assert chapters
    for name in chapters:
        links = [str(a["href"]) for a in pages[name].find_all("a", href=True)]
        notebook = name.removesuffix(".html") + ".ipynb"
        assert any("colab.research.google.com/github/" in link and link.endswith(notebook) for link in links), name
        assert any(link.endswith(notebook) and "_sources" in link for link in links), name


def test_widget_scripts_only_where_there_are_widgets(pages: dict[str, BeautifulSoup]) -> None:
    for name, page in pages.items():
        views = page.find_all("script", type="application/vnd.jupyter.widget-view+json")
        states = page.find_all("script", type="application/vnd.jupyter.widget-state+json")
        known = {model for state in states for model in json.loads(str(state.string))["state"]}
        assert {json.loads(str(view.string))["model_id"] for view in views} <= known, f"{name}: a widget lost its state"
        assert len(page.find_all("script", src=re.compile("embed-amd"))) == bool(views), name


def test_vendored_widget_manager_speaks_the_protocol_of_ipywidgets() -> None:
    version = next(p.version for p in vendor.PACKAGES if p.name == "@jupyter-widgets/html-manager")
    low = ipywidgets._version.__html_manager_version__.removeprefix("^")
    have, want = (tuple(map(int, v.split("."))) for v in (version, low))
    assert have[0] == want[0] and have >= want


def test_short_addresses_lead_to_the_chapters(html: Path) -> None:
    for method in (m for m in METHODS if m.status == "ready"):
        page = BeautifulSoup((html / f"{method.slug}.html").read_text(encoding="utf-8"), "html.parser")
        target = f"book/{method.part}/{method.slug}.html"
        assert page.find("meta", attrs={"http-equiv": "refresh"})["content"] == f"0; url={target}"
        assert (html / target).is_file()


def test_the_citation_of_a_chapter_is_the_entry_of_the_bibliography(pages: dict[str, BeautifulSoup]) -> None:
    bib = (ROOT / "book/references.bib").read_text(encoding="utf-8")
    for method in (m for m in METHODS if m.status == "ready"):
        name = f"book/{method.part}/{method.slug}.html"
        found = re.search(rf"^@\w+{{{method.slug},\n.*?^}}$", bib, re.M | re.S)
        assert found, f"references.bib: no entry {method.slug}"
        boxes = [s.parent for s in pages[name].select("article details > summary") if s.get_text().strip() == "Cite"]
        assert len(boxes) == 1, f"{name}: expected one box 'Cite', got {len(boxes)}"
        blocks = boxes[0].select("div.highlight pre")  # the copy button stands on these
        assert [block.get_text().strip() for block in blocks] == [found[0]], name


def test_every_page_can_be_reported(pages: dict[str, BeautifulSoup]) -> None:
    """The link to a new issue names the page."""
    for name, page in pages.items():
        if name.startswith("book/"):
            links = [unquote(str(a["href"])) for a in page.find_all("a", href=True)]
            assert any("/issues/new?" in link and name in link for link in links), name
