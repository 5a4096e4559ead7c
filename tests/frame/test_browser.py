"""The pages in a real browser: equations, live widgets, both themes, a phone; offline, and with a clean console."""

from __future__ import annotations

import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

# Said by a schema validator inside the widget bundle about its own schema; nothing a page could do about it.
KNOWN = "strict mode: use allowUnionTypes"
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
        for name in names:
            page = visit.open(name)
            assert page.evaluate("document.documentElement.dataset.theme") == "dark"
            assert page.evaluate(LIGHT_ON_DARK) == [], f"{name}: a light card behind a transparent figure"
        assert not visit.problems


def test_phone(browser: Browser, site: str, names: list[str]) -> None:
    with Visit(browser, site, width=375) as visit:
        for name in names:
            assert visit.open(name).evaluate(TOO_WIDE) == [], f"{name}: scrolls sideways"


def controls(box: Locator) -> Iterator[Locator]:
    """The sliders and menus of a widget."""
    for found in (box.locator(".noUi-handle"), box.locator("select")):
        for i in range(found.count()):
            yield found.nth(i)


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
                for control in controls(box):
                    before = box.evaluate(SHOWN)
                    if control.evaluate("e => e.tagName") == "SELECT":
                        at, size = control.evaluate("e => [e.selectedIndex, e.options.length]")
                        control.select_option(index=(at + 1) % size)
                    else:
                        low = control.evaluate("e => e.ariaValueNow === e.ariaValueMax")
                        control.focus()
                        page.keyboard.press("ArrowLeft" if low else "ArrowRight")
                    page.wait_for_timeout(150)
                    assert box.evaluate(SHOWN) != before, f"{name}: widget {i} does not react"
                    moved += 1
        assert not visit.problems
    assert moved, "no page has a live widget"
