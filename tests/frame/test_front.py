"""The front pages show the method succeeding: the snippet gives what it says, and the pictures are the chapters'."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import re
from pathlib import Path

import nbformat
import pytest

from peftref.catalog import METHODS
from peftref.results import finding
from tools import front, readme

ROOT = Path(__file__).resolve().parents[2]
DOT = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


def snippet(page: str) -> str:
    found = re.search(r"```(?:\{code-block\} )?python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.S)
    assert found, f"{page}: no snippet"
    return found[1]


def test_the_first_snippet_gives_what_it_says() -> None:
    code = snippet("README.md")
    assert code == snippet("book/intro.md") and max(map(len, code.splitlines())) <= 88
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        exec(compile(code, "README.md", "exec"), {})
    said = code.splitlines()[-1].removeprefix("# ")
    before, after = (float(number) for number in re.findall(r"[\d.]+(?= %)", shown.getvalue()))
    assert after < before / 2  # the method helps, whatever the last digit on this processor
    assert [before, after] == pytest.approx([float(n) for n in re.findall(r"[\d.]+(?= %)", said)], abs=0.2)


def test_nothing_is_promised_that_is_not_there() -> None:
    for page in ("README.md", "book/intro.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        assert "pip install peftref" not in text and "pip install ." in text, "there is no release yet"
        assert not re.search(r"not (been )?run|none has been run", text)


def chapter(root: Path, name: str = "fig-lame-stream", *, executed: bool = True) -> None:
    """A LAME chapter whose second figure is the one that is shown."""
    cells = []
    for figure in ("fig-lame-first", name):
        cell = nbformat.v4.new_code_cell("plots.dots(found)")
        caption = "As {numref}`fig-lame-first`, of\n{doc}`the stream <index>`."
        cell.metadata["mystnb"] = {"image": {"alt": "Two\nrows"}, "figure": {"name": figure, "caption": caption}}
        data = {"image/png": base64.b64encode(DOT).decode()}
        cell.outputs = [nbformat.v4.new_output("display_data", data)] if executed else []
        cells.append(cell)
    (root / "book/tta").mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells), root / "book/tta/lame.ipynb")


def record(root: Path) -> None:
    row = finding(front.CLAIM[1], [16.0, 17.0], where="ours", unit="points", level={"source": 68.04, "rbf": 51.5})
    machine = {"processor": "Some CPU", "threads": 1, "accelerator": "none"}
    run = {"hardware": machine, "versions": {"python": "3"}, "date": "", "seconds": 1, "peak_mb": 1, "code": ""}
    found = {"rows": [row], "arrays": {}, "protocol": {"domains": [["clean", 1], ["gaussian_noise", 2]]}, "run": run}
    (root / "peftref/recorded").mkdir(parents=True, exist_ok=True)
    content = {"schema": 2, "name": "tta/lame", "records": {"cpu": found}}
    (root / "peftref/recorded/lame.json").write_text(json.dumps(content), encoding="utf-8")


def lay(root: Path) -> Path:
    (root / "book").mkdir(exist_ok=True)
    marks = {name: f"<!-- {name}:start -->\nold\n<!-- {name}:end -->\n" for name in ("hero", "catalog", "gallery")}
    (root / "README.md").write_text("before\n" + marks["hero"] + marks["catalog"], encoding="utf-8")
    (root / "book/intro.md").write_text(marks["hero"] + marks["gallery"] + "after", encoding="utf-8")
    return root


def test_picture_caption_and_numbers_are_those_of_the_chapter(tmp_path: Path) -> None:
    chapter(lay(tmp_path))
    record(tmp_path)
    assert readme.main([], tmp_path) == 0 and readme.main(["--check"], tmp_path) == 0
    assert (tmp_path / "book/_static/readme.png").read_bytes() == DOT
    page = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "![Two rows](book/_static/readme.png)" in page and "*As fig-lame-first, of the stream.*" in page
    told = (
        "(clean, gaussian noise) LAME lowers the error from 68.0 to 51.5 % (16.5 points, 95 % interval 10.1 to 22.9, 2"
    )
    assert told in page and told in (tmp_path / "book/intro.md").read_text(encoding="utf-8")


def test_before_the_run_is_recorded_no_number_is_said(tmp_path: Path) -> None:
    chapter(lay(tmp_path))
    assert front.sentence(tmp_path) == "" and front.readme_hero(tmp_path).endswith("stream.*")


@pytest.mark.parametrize("executed", [True, False])
def test_without_its_figure_the_old_picture_stays(tmp_path: Path, executed: bool) -> None:
    chapter(lay(tmp_path), "fig-lame-other", executed=executed)
    assert readme.main([], tmp_path) == 0
    assert "old" in (tmp_path / "README.md").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="expected an executed cell with the figure 'fig-lame-stream'"):
        front.picture(tmp_path)


def test_a_card_for_each_ready_method(tmp_path: Path) -> None:
    chapter(lay(tmp_path))
    readme.main([], tmp_path)
    page = (tmp_path / "book/intro.md").read_text(encoding="utf-8")
    ready = [method for method in METHODS if method.status == "ready"]
    assert re.findall(r"^:link: (\S+)$", page, re.M) == [f"{method.part}/{method.slug}" for method in ready]
    card = page.split("{grid-item-card} LAME")[1].split("\n:::\n")[0]
    assert ":img-top: _static/thumbs/lame.png\n:img-alt: Two rows\n" in card
    assert (tmp_path / "book/_static/thumbs/lame.png").read_bytes() == DOT
    assert page.count(":img-top:") == 1, "a chapter that is not executed has no picture"
    assert all(method.title in page for method in METHODS) and page.endswith("after")


def test_every_chapter_has_a_picture_of_its_own() -> None:
    pictures = [path.read_bytes() for path in (ROOT / front.THUMBS).glob("*.png")]
    assert len(set(pictures)) == len(pictures) == sum(method.status == "ready" for method in METHODS)
