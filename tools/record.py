"""Run an experiment and keep what it found, in ``peftref/recorded``::

    python -m tools.record tta/lame                        # the evidence, up to an hour and a half
    python -m tools.record tta/lame smoke                  # what the tests compare with
    python -m tools.record tta/lame cpu --data ~/datasets  # where the data sets lie

It says first how long it takes. A run that was interrupted goes on where it was.
"""

from __future__ import annotations

import argparse
import sys

from peftref.recording import experiments, record


def main(arguments: list[str]) -> int:
    """Record one experiment; 2 if it cannot run, 130 if it was interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.record", description="Run an experiment and keep the result."
    )
    parser.add_argument("name", help=f"one of {', '.join(experiments())}")
    parser.add_argument("preset", nargs="?", default="cpu", help="smoke, cpu, t4 or gpu")
    parser.add_argument("--data", help="folder of the data sets")
    parser.add_argument("--anew", action="store_true", help="do not go on where an interrupted run was")
    given = parser.parse_args(arguments)
    try:
        done = record(given.name, given.preset, data=given.data, resume=not given.anew, write=True)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(done.table().to_string(index=False))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
