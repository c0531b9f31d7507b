"""``python -m bench attention``, or another room: check, time, report."""

import argparse
import sys
from pathlib import Path

from . import attention, blocks, flash, loss, paper, report, selection, softmax, variants, varlen
from .contest import OURS, sweep
from .environment import environment
from .timing import Stopwatch

ROOMS = {"attention": attention, "softmax": softmax, "selection": selection, "loss": loss}
ROOMS |= {"paper": paper, "variants": variants, "blocks": blocks, "varlen": varlen}
ROOMS |= {"flash": flash}
SECONDS_A_CASE = 2.0  # at most, of a part of a sweep; a room may have its own


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m bench", description=__doc__)
    rooms = parser.add_subparsers(dest="room", required=True)
    for room, module in ROOMS.items():
        add = rooms.add_parser(room, help=module.__doc__).add_argument
        module.arguments(add)
        add("--quick", action="store_true", help="a few cases of the sweep")
        add("--out", type=Path, metavar="DIR", help="write JSON, table and plot there")
        add("--plot-only", action="store_true", help="redraw table and plot from JSON")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> int:
    """Return 0 if all our answers were right, 1 if not, 2 if nothing could be run."""
    if options.plot_only:
        print(f"{report.redraw(options.room, options.out)} result files drawn")
        return 0
    try:
        stopwatch = Stopwatch()
    except Exception as problem:
        print(f"the bench needs CuPy and a CUDA GPU: {problem}", file=sys.stderr)
        return 2
    module = ROOMS[options.room]
    chosen = module.cases(options)
    whole = chosen == module.cases(parse([options.room]))
    free = stopwatch.free_memory()
    for case in (case for case in chosen if case.memory > free):
        print(f"left out: {case.labels()} wants {case.memory >> 20} MiB of {free >> 20} MiB")
    chosen = [case for case in chosen if case.memory <= free]
    bandwidths = stopwatch.bandwidths()
    each = getattr(module, "SECONDS_A_CASE", SECONDS_A_CASE)
    seconds = module.SECONDS if whole else min(module.SECONDS, each * len(chosen))
    measured = {
        "room": options.room,
        "unit": module.UNIT,
        "over": module.OVER,
        "environment": environment(),
        "bandwidths": bandwidths,
        "host": module.host(stopwatch),
        "cases": sweep(chosen, stopwatch, bandwidths, seconds=seconds),
    }
    report.show(measured)
    # Part of a sweep goes where it is told to, and never replaces the results of a whole one.
    if whole or options.out:
        report.save(measured, options.out)
    return 0 if all(OURS in case["times"] for case in measured["cases"]) else 1


if __name__ == "__main__":
    sys.exit(run(parse(sys.argv[1:])))
