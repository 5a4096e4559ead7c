"""The pages in a real browser: equations, live widgets, themes, a phone, the keyboard, the search, the copy button.

Offline, and with a clean console.
"""

from __future__ import annotations

import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from peftref.catalog import METHODS

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

    from peftref.catalog import Method

# Said by a schema validator in the widget bundle about its own schema, and by Sphinx's search about names with dots,
# for which it then shows the beginning of the page; nothing a page could do about either.
KNOWN = ("strict mode: use allowUnionTypes", "Anchored content block not found.")
READY = """async () => {
  if (window.MathJax?.startup) await MathJax.startup.promise;
  for (const image of document.images) { image.loading = 'eager'; await image.decode().catch(() => {}); }
}"""
# What a reader sees change: the visible pictures and texts, without the control itself.
SHOWN = """box => [...box.querySelectorAll('img, svg, .widget-html-content')]
  .filter(e => e.offsetParent !== null || e.getClientRects().length).map(e => e.outerHTML).join('')"""
LIGHT_ON_DARK = """() => [...document.querySelectorAll('article .cell_output img')]
  .filter(i => getComputedStyle(i).backgroundColor !== 'rgba(0, 0, 0, 0)').map(i => i.outerHTML.slice(0, 200))"""
TOO_WIDE = """() => document.documentElement.scrollWidth <= innerWidth ? [] :
  [...document.querySelectorAll('article *')].filter(e => {
    if (e.getBoundingClientRect().right <= innerWidth + 1) return false;
    for (let q = e.parentElement; q; q = q.parentElement)
      if (q.tagName === 'ARTICLE') return true; else if (getComputedStyle(q).overflowX !== 'visible') return false;
  }).map(e => e.outerHTML.slice(0, 120)).slice(0, 5).concat([`${document.documentElement.scrollWidth} px wide`])"""

# An equation inside a sentence that is wider than its column, and does not scroll by itself.
CUT_OFF = """() => [...document.querySelectorAll('article span.math')].filter(e =>
  getComputedStyle(e).overflowX !== 'auto' &&
  e.firstElementChild?.getBoundingClientRect().width > e.closest('p, li, dd, td, th, div').clientWidth
  ).map(e => e.textContent.slice(0, 80))"""
SHORTEST = 100  # pixels of a slider's track, to be moved by a finger


class Quiet(http.server.SimpleHTTPRequestHandler):
    """A file server that logs nothing."""

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def site(html: Path) -> Iterator[str]:
    """The book, served on this machine."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(html)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="module")
def names(html: Path) -> list[str]:
    """Every page that is read, not generated."""
    return [p.relative_to(html).as_posix() for p in sorted((html / "book").rglob("*.html"))]


class Visit:
    """Pages opened in one window; collects what they say in the console and whatever they ask of other hosts."""

    def __init__(self, browser: Browser, site: str, *, theme: str = "light", width: int = 1200) -> None:
        self.problems: list[str] = []
        self.site = site
        self.context = browser.new_context(color_scheme=theme, viewport={"width": width, "height": 900})
        self.context.route(lambda url: not url.startswith((site, "data:", "blob:")), self._refuse)
        self.page: Page = self.context.new_page()
        self.page.on("console", lambda m: self._hear(m.type, m.text))
        self.page.on("pageerror", lambda error: self._hear("error", str(error)))

    def _refuse(self, route) -> None:  # noqa: ANN001
        self.problems.append(f"{self.page.url}: asks for {route.request.url}")
        route.abort()

    def _hear(self, kind: str, text: str) -> None:
        if kind in ("error", "warning") and not text.startswith(KNOWN):
            self.problems.append(f"{self.page.url}: console {kind}: {text}")

    def open(self, name: str) -> Page:
        self.page.goto(self.site + name, wait_until="load")
        self.page.evaluate(READY)
        views = self.page.locator("script[type='application/vnd.jupyter.widget-view+json']").count()
        if views:
            self.page.wait_for_function(f"document.querySelectorAll('.widget-subarea').length >= {views}")
        return self.page

    def __enter__(self) -> Visit:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()


def test_equations_are_rendered_and_the_console_is_clean(browser: Browser, site: str, names: list[str]) -> None:
    rendered = 0
    with Visit(browser, site) as visit:
        for name in names:
            page = visit.open(name)
            wanted, found = page.locator("article .math").count(), page.locator("article mjx-container").count()
            assert found >= wanted, f"{name}: {wanted} equations, {found} rendered"
            assert page.locator("mjx-merror, [data-mjx-error]").count() == 0, f"{name}: TeX error"
            rendered += found
        assert not visit.problems
    assert rendered, "no page has an equation"


def test_dark_theme(browser: Browser, site: str, names: list[str]) -> None:
    with Visit(browser, site, theme="dark") as visit:
        for name in (name for name in names if not name.startswith("book/api/")):  # the reference has no figures
            page = visit.open(name)
            assert page.evaluate("document.documentElement.dataset.theme") == "dark"
            assert page.evaluate(LIGHT_ON_DARK) == [], f"{name}: a light card behind a transparent figure"
        assert not visit.problems


def test_phone(browser: Browser, site: str, names: list[str]) -> None:
    with Visit(browser, site, width=375) as visit:
        for name in [*names, "search.html?q=lame", "genindex.html"]:
            page = visit.open(name)
            assert page.evaluate(TOO_WIDE) == [], f"{name}: scrolls sideways"
            assert page.evaluate(CUT_OFF) == [], f"{name}: an equation is cut"
            tracks = page.locator(".noUi-base").evaluate_all("all => all.map(e => e.getBoundingClientRect().width)")
            assert min(tracks, default=SHORTEST) >= SHORTEST, f"{name}: sliders of {tracks} pixels"


def controls(box: Locator) -> Iterator[Locator]:
    """The sliders and menus of a widget."""
    for found in (box.locator(".noUi-handle"), box.locator("select")):
        for i in range(found.count()):
            yield found.nth(i)


def reach(page: Page, control: Locator) -> bool:
    """Press Tab, from just before the widget on, until the control has the focus."""
    for _ in range(20):
        page.keyboard.press("Tab")
        if control.evaluate("e => e === document.activeElement"):
            return True
    return False


def test_moving_a_control_changes_the_picture(browser: Browser, site: str, names: list[str]) -> None:
    moved = 0
    with Visit(browser, site) as visit:
        for name in names:
            page = visit.open(name)
            boxes = page.locator(".widget-subarea")
            for i in range(boxes.count()):
                box = boxes.nth(i)
                if box.locator(".noUi-handle, select").count() == 0:
                    continue
                box.evaluate("b => { b.before(document.createElement('a')); b.previousSibling.href = '#'; }")
                for control in controls(box):
                    box.evaluate("b => b.previousSibling.focus()")
                    assert reach(page, control), f"{name}: widget {i} has a control that Tab does not reach"
                    before = box.evaluate(SHOWN)
                    if control.evaluate("e => e.tagName") == "SELECT":
                        at, size = control.evaluate("e => [e.selectedIndex, e.options.length]")
                        control.select_option(index=(at + 1) % size)
                    else:
                        low = control.evaluate("e => e.ariaValueNow === e.ariaValueMax")
                        page.keyboard.press("ArrowLeft" if low else "ArrowRight")
                    page.wait_for_timeout(150)
                    assert box.evaluate(SHOWN) != before, f"{name}: widget {i} does not react"
                    moved += 1
        assert not visit.problems
    assert moved, "no page has a live widget"


READY_METHODS = [m for m in METHODS if m.status == "ready"]


@pytest.mark.parametrize("method", READY_METHODS[:: max(1, len(READY_METHODS) - 1)], ids=lambda m: m.slug)
def test_the_citation_is_copied(browser: Browser, site: str, method: Method) -> None:
    """By the keyboard alone: open the box, reach the button, which shows itself, and press it."""
    bib = (Path(__file__).resolve().parents[2] / "book/references.bib").read_text(encoding="utf-8")
    with Visit(browser, site) as visit:
        visit.context.grant_permissions(["clipboard-read", "clipboard-write"])
        page = visit.open(f"book/{method.part}/{method.slug}.html")
        page.locator("article summary", has_text="Cite").focus()
        page.keyboard.press("Enter")
        button = page.locator("article details[open] button.copybtn")
        assert reach(page, button)
        page.wait_for_timeout(400)  # it fades in
        assert button.evaluate("e => getComputedStyle(e).opacity") == "1"
        page.keyboard.press("Enter")
        copied = page.evaluate("navigator.clipboard.readText()")
        assert copied.startswith("@") and f"{{{method.slug},\n" in copied and f"\n{copied.strip()}\n" in f"\n{bib}"
        assert not visit.problems


@pytest.mark.parametrize(
    ("query", "page"),
    [
        ("peftref.tta.lame", "book/api/tta/lame.html"),
        ("peftref.panel.experiments.study.monte_carlo", "book/api/panel/experiments/study.html"),
        ("laplacian_assign", "book/api/tta/lame.html"),
        ("laplacian", "book/tta/lame.html"),
    ],
)
def test_search(browser: Browser, site: str, query: str, page: str) -> None:
    """A name typed into the search page finds where it is documented; a word, the chapter."""
    with Visit(browser, site) as visit:
        found = visit.open("search.html")
        box = found.locator("input[name=q]:visible").first
        box.fill(query)
        box.press("Enter")
        found.wait_for_function("document.querySelector('.search-summary')?.textContent.includes('found')")
        links = found.locator("#search-results ul.search a").evaluate_all("all => all.map(a => a.href)")
        assert any(link.split("?")[0].split("#")[0] == site + page for link in links[:10]), links
        assert not visit.problems
