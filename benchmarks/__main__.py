"""``python -m benchmarks [slug ...]``: run every ``bench_<slug>.py``, or those named; print a table, store the rows."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

from peftref._replacing import replace_text

from ._timing import Row, environment

HERE = Path(__file__).parent
RESULTS = HERE.parent / "book" / "_results"


def main(slugs: list[str]) -> int:
    found = {path.stem.removeprefix("bench_"): path for path in sorted(HERE.glob("*/bench_*.py"))}
    if unknown := set(slugs) - set(found):
        print(f"slug: expected some of {sorted(found)}, got {sorted(unknown)}", file=sys.stderr)
        return 2
    missed = 0
    for slug in slugs or found:
        module = importlib.import_module(f"benchmarks.{found[slug].parent.name}.{found[slug].stem}")
        rows: list[Row] = module.rows()
        stored = {"slug": slug, "command": f"python -m benchmarks {slug}", **environment(), "rows": rows}
        replace_text(RESULTS / f"speed_{slug}.json", json.dumps(stored, indent=2) + "\n")
        print(f"\n{slug:<60}{'ours':>10}{'peer':>10}{'ratio':>8}{'target':>8}{'peak MB, ours / peer':>24}")
        for row in rows:
            target = "" if row["target"] is None else f"{row['target']:g}x"
            missed += row["target"] is not None and row["ratio"] < row["target"]
            print(
                f"{row['claim']:<60}{row['ours_s'] * 1e3:>7.1f} ms{row['peer_s'] * 1e3:>7.0f} ms{row['ratio']:>7.1f}x"
                f"{target:>8}{row['ours_peak_mb']:>15.1f} / {row['peer_peak_mb']:.1f}"
            )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
