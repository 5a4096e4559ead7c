"""The page of speed: one chart of all benchmarks, then a folded table for each.

A number on the page stands in a file ``book/_results/speed_<slug>.json``, which a benchmark wrote; none is typed in.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from matplotlib.ticker import FuncFormatter, NullFormatter
from PIL import Image, PngImagePlugin

from peftref.catalog import METHODS, PARTS
from peftref.plots import GREY, PALETTE, Plot, png, style
from tools.markdown import machine, read_all, table

ROOT = Path(__file__).resolve().parents[1]
CHART = "book/_static/speed.png"
# Benchmarks that belong to no single method: slug -> part and title.
SHARED = {
    "adapters": ("adapters", "All adapters"),
    "checkpoints": ("merging", "Merging of checkpoints"),
    "rehearsal": ("continual", "Rehearsal"),
}
PACKAGES = r"\b(PEFT|peft|mergekit|DoubleML|scikit-learn|scipy|torch\.|nn\.)"  # of a peer that others have released
OURSELVES = r"\b(the small one|nothing else)"  # no peer at all: the same at another size, or a bare copy
SPEED = """\
# Speed

How many times faster than a peer: the peer's median time over ours, above 1 we are faster. A peer is **a released
package**, or **written by us**: the published code's order of work, or a plain loop, as it stands in the tests. The
second kind says what the way of computing gains, not how fast the authors' own program is.

```{{figure}} _static/speed.png
:alt: {alt}
:name: fig-speed
:class: dark-light

Every benchmark of every method on one logarithmic axis: the peer's time over ours.
```

Where a peer computes the same thing, a row first checks that both results are equal; rows against another method
compare the cost alone. The two are then timed in turn in one process. A target is the ratio that we aim at; where it is
missed, the row says so. Each table names its processor and threads, a row its own threads where it was told to use
fewer. Numbers of one table were measured together, those of different tables perhaps on different
machines. Memory is the peak of what was allocated beyond the inputs. Where a *floor* is given, it is the time that the
bytes or operations which no implementation can avoid take on this machine, at the speed of a plain copy or of one large
product of matrices in the same process, as a share of our time: at 100 % nothing is left to gain. `make bench` measures
everything anew; `make book` then writes this page.
"""


def speed_page(root: Path = ROOT) -> str:
    """All benchmarks: the chart, then a section for each part, a folded table for each file.

    Raises:
        ValueError: a benchmark that belongs to no method and is not in ``SHARED``.
    """
    titles, files = _benchmarks(root)
    ratios = [row["ratio"] for found in files.values() for row in found["rows"] if _kind(row["peer"])]
    alt = f"{len(ratios)} ratios from {min(ratios, default=1):.2g} to {max(ratios, default=1):.0f}, in a row for each "
    lines = [SPEED.format(alt=alt + "benchmark, with a line at 1")]
    for part in (part for part in PARTS if any(titles[name][0] == part.slug for name in files)):
        lines += [f"## {part.title}", ""]
        for name in (name for name in titles if name in files and titles[name][0] == part.slug):
            found = files[name]
            software = f"Python {found['python']}, torch {found['torch']}"
            # a file written before there were floors has none
            optional = {key for key in ("target", "floor", "threads") if any(row.get(key) for row in found["rows"])}
            lines += [
                f":::{{dropdown}} {titles[name][1]}",
                f"`{found['command']}`, {found['date']}: {machine(found)}; {software}.",
                "",
                *table(_speed(row, optional) for row in found["rows"]),
                ":::",
                "",
            ]
    return "\n".join(lines)


def chart(root: Path = ROOT) -> bytes:
    """The chart as PNG; the file that is there, if it was drawn from the same ratios.

    Another version of matplotlib draws other bytes, so the picture carries a hash of what it shows.
    """
    titles, files = _benchmarks(root)
    shown = {titles[name][1]: files[name]["rows"] for name in titles if name in files}
    points = {
        title: [(row["ratio"], _kind(row["peer"])) for row in rows if _kind(row["peer"])]
        for title, rows in shown.items()
    }
    digest = hashlib.sha256(json.dumps(points).encode()).hexdigest()
    file = root / CHART
    if file.is_file():
        with Image.open(file) as stored:
            if stored.info.get("inputs") == digest:
                return file.read_bytes()
    note = PngImagePlugin.PngInfo()
    note.add_text("inputs", digest)
    buffer = io.BytesIO()
    Image.open(io.BytesIO(png(_draw(points)))).save(buffer, "png", pnginfo=note, optimize=True)
    return buffer.getvalue()


def _draw(points: Mapping[str, list[tuple[float, str | None]]]) -> Plot:
    """A row for each benchmark, a mark for each ratio: a disc for a released package, a square for what we wrote."""
    looks = {"a released package": ("o", PALETTE[0]), "written by us": ("s", PALETTE[1])}
    with style():
        figure = Plot(height=1.2 + 0.27 * len(points))
        axes = figure.subplots()
        axes.axvline(1, color=GREY, linewidth=1)
        for kind, (marker, colour) in looks.items():
            found = [(ratio, row) for row, some in enumerate(points.values()) for ratio, k in some if k == kind]
            at = [ratio for ratio, _ in found]
            rows = [row for _, row in found]
            axes.plot(at, rows, marker, color=colour, markersize=6, alpha=0.75, markeredgewidth=0, label=kind)
        axes.set(xscale="log", xlabel="peer's time / ours (log scale)", ylim=(len(points) - 0.5, -0.5))
        axes.set(yticks=range(len(points)), yticklabels=list(points))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.text(1.1, -0.55, "we are faster \N{RIGHTWARDS ARROW}", va="bottom", size=9)
        figure.legend(loc="outside lower center", ncols=2)
    return figure


def _benchmarks(root: Path) -> tuple[dict[str, tuple[str, str]], dict[str, Any]]:
    """Slug -> part and title; slug -> what its file holds."""
    titles = {m.slug: (m.part, m.title) for m in METHODS} | SHARED
    names = read_all(root, "book/_results/speed_*.json")
    files = {name.removeprefix("speed_"): found for name, found in names.items()}
    unknown = sorted(set(files) - set(titles))
    if unknown:
        raise ValueError(f"SHARED: expected the part and title of each benchmark, got none for {unknown}")
    return titles, files


def _kind(peer: str) -> str | None:
    if re.search(OURSELVES, peer):
        return None
    released = re.search(PACKAGES, peer) and not re.search(r"_naive|one after the other|in a loop", peer)
    return "a released package" if released else "written by us"


def _speed(row: Mapping[str, Any], optional: Collection[str]) -> dict[str, str]:
    peer = row["peer"] + " (written by us)" * (_kind(row["peer"]) == "written by us")
    cells = {"What": row["claim"], "Peer": peer, "Ratio": f"{row['ratio']:.2f}"}
    if "target" in optional:
        missed = row["target"] is not None and row["ratio"] < row["target"]
        cells["Target"] = _number(row["target"]) + " (missed)" * missed
    if "threads" in optional:
        cells["Threads"] = _number(row.get("threads"))
    cells["Time, ours and peer's (ms)"] = f"{_milliseconds(row['ours_s'])}, {_milliseconds(row['peer_s'])}"
    cells["Memory (MB)"] = f"{row['ours_peak_mb']:.1f}, {row['peer_peak_mb']:.1f}"
    if "floor" in optional:
        floor = row.get("floor")
        cells["Floor"] = f"{100 * floor['seconds'] / row['ours_s']:.0f} % ({floor['what']})" if floor else ""
    return cells


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.1f}" if seconds >= 1e-3 else f"{1e3 * seconds:.3f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:g}"
