"""One run's numbers as a table on the terminal, JSON, a table for the docs and a plot."""

import json
from collections import Counter
from pathlib import Path

from . import figures
from .contest import OURS
from .environment import CHECKOUT, slug

RESULTS, TABLES, FIGURES = (CHECKOUT / p for p in ("bench/results", "docs/tables", "docs/figures"))
SCALE = 1e-12  # operations and bytes a second are shown as TFLOP/s and TB/s


def table(run: dict) -> list[list[str]]:
    """Return the header and one row a case; a peer's cell is its time over ours, and its rate."""
    if run["unit"] == "ms":
        return _times(run)
    names = list(dict.fromkeys(name for c in run["cases"] for name in c["errors"] if name != OURS))
    targets = [case["target"] for case in run["cases"] if case.get("target")]
    bound = ["ideal", "of ideal"] if any("most" in target for target in targets) else []
    last = [*bound, "target"] if targets else []
    rows = [[*run["cases"][0]["case"], "time", run["unit"], "of ceiling", *names, *last]]
    for case in run["cases"]:
        mine, cells = case["times"].get(OURS), ["WRONG", "", "", *("" for _ in [*names, *last])]
        if mine:
            share = f"{mine['rate'] / case['ceiling']:.2f}" if case["ceiling"] else ""
            cells = [_time(mine["seconds"]), _rate(mine["rate"]), share]
            cells += [_beside(mine, case["times"].get(name)) for name in names]
            cells += _beside_ideal(case) if bound else []
            cells += [_verdict(case)] if targets else []
        rows.append([*map(str, case["case"].values()), *cells])
    return rows


def _times(run: dict) -> list[list[str]]:
    """Return a table as papers have them: a row for each contestant, a column for each length.

    Our own calls come last. What the cases note as `density` is the last row of each table.
    """
    columns = list(dict.fromkeys(case["case"][run["over"]] for case in run["cases"]))
    rows = [["call", "time in ms", *map(str, columns)]]
    for call in dict.fromkeys(case["case"]["call"] for case in run["cases"]):
        cases = {c["case"][run["over"]]: c for c in run["cases"] if c["case"]["call"] == call}
        names = {name: None for case in cases.values() for name in case["errors"]}
        for name in sorted(names, key=lambda name: name.startswith(OURS)):
            rows.append([call, name, *(_milliseconds(cases.get(n), name) for n in columns)])
        if densities := {n: case["density"] for n, case in cases.items() if "density" in case}:
            shares = (f"{densities[n]:.3g}" if n in densities else "" for n in columns)
            rows.append([call, "density", *shares])
    return rows


def _milliseconds(case: dict | None, name: str) -> str:
    if case is None:
        return ""
    if name in case["times"]:
        time = case["times"][name]["seconds"] * 1e3
        return f"{time:.3g}" if time < 999.5 else f"{time:.0f}"
    return "WRONG" if name in case["errors"] else "-"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 0.5 else f"{seconds * 1e6:.1f} us"


def _beside(mine: dict, peer: dict | None) -> str:
    return f"{peer['seconds'] / mine['seconds']:.2f} x ({_rate(peer['rate'])})" if peer else "-"


def _ideal(case: dict) -> float | None:
    """Return the seconds that a target compares us with: a part of a peer's, or all."""
    target = case.get("target", {})
    peer = case["times"].get(target["peer"]) if "most" in target else None
    return peer["seconds"] * target.get("share", 1.0) if peer else None


def _beside_ideal(case: dict) -> list[str]:
    ideal = _ideal(case)
    return [_time(ideal), f"{case['times'][OURS]['seconds'] / ideal:.2f}"] if ideal else ["-", "-"]


def _verdict(case: dict) -> str:
    """Say what the project wants of a ratio to peers, or to the ideal, and whether it is so."""
    if not (target := case.get("target")):
        return ""
    mine, times = case["times"][OURS]["seconds"], case["times"]
    if "most" in target:
        wanted, ideal = f"at most {target['most']:g}", _ideal(case)
        reached = None if ideal is None else mine <= target["most"] * ideal
    else:
        wanted, peers = f"{target['least']:g} x {target['peer']}", target["peer"].split(", ")
        measured = all(name in times for name in peers)
        enough = target["least"] * mine
        reached = all(times[name]["seconds"] >= enough for name in peers) if measured else None
    return f"{wanted}: {'not measured' if reached is None else 'met' if reached else 'missed'}"


def _rate(rate: float) -> str:
    return f"{rate * SCALE:.3g}"


def summary(run: dict) -> list[str]:
    """Return where it was measured, the ceilings and the host's times, one line each."""
    where = run["environment"]
    commit = (where["commit"] or "unknown")[:12]
    ceilings = [f"{name} {_rate(rate)} TB/s" for name, rate in run["bandwidths"].items()]
    if run["unit"] == "TFLOP/s":
        rates: dict[str, list[float]] = {}
        for case in run["cases"]:
            rates.setdefault(case["case"]["dtype"], []).append(case["ceiling"] or 0.0)
        for dtype, r in rates.items():
            ceilings.append(f"{dtype} matmul {_rate(min(r))} to {_rate(max(r))} TFLOP/s")
    lines = [
        f"{where['gpu']}, driver {where['driver']}, commit {commit}, {where['date'][:10]}",
        ", ".join(f"{name} {version}" for name, version in where["versions"].items()),
        f"Ceilings measured in this run: {', '.join(ceilings)}",
    ]
    if kernels := Counter(case["kernel"] for case in run["cases"] if "kernel" in case):
        ran = ", ".join(f"{kernel} in {count} cases" for kernel, count in kernels.items())
        lines.append(f"Kernels of cuflash that ran: {ran}")
    for call, times in run["host"].items():
        each = ", ".join(f"{name} {_time(seconds)}" for name, seconds in times.items())
        lines.append(f"Host time of an eager call, {call}: {each}")
    return lines


def show(run: dict) -> None:
    """Print the table, what was left out, and the summary."""
    rows = table(run)
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths)))
    reasons = {(name, why) for c in run["cases"] for name, why in c["left_out"].items()}
    for name, why in sorted(reasons):
        print(f"left out: {name}: {why}")
    print(*summary(run), sep="\n")


def save(run: dict, folder: Path | None) -> None:
    """Write a run into a folder; without one into the checkout: results, tables and figures."""
    home = folder or RESULTS / slug(run["environment"]["gpu"])
    home.mkdir(parents=True, exist_ok=True)
    (home / f"{run['room']}.json").write_text(json.dumps(run, indent=1) + "\n")
    redraw(run["room"], folder)


def redraw(room: str, folder: Path | None) -> int:
    """Draw the tables and the plots of a room from its JSON files; return how many there are."""
    tables, plots = folder or TABLES, folder or FIGURES
    found = sorted(folder.glob(f"{room}.json") if folder else RESULTS.glob(f"*/{room}.json"))
    runs = [json.loads(path.read_text()) for path in found]
    parts = []
    for run in runs:
        plots.mkdir(parents=True, exist_ok=True)
        parts.append(rst(run, figures.draw(run, plots)))
    if runs:
        tables.mkdir(parents=True, exist_ok=True)
        (tables / f"{room}.rst").write_text("\n".join(parts))
    return len(runs)


def rst(run: dict, plots: list[str]) -> str:
    """Return one run for docs/benchmarks.rst: plots, a table a call, and where it was measured."""
    title = f"{run['room'].capitalize()} on {run['environment']['gpu']}"
    lines = []
    for plot in plots:
        lines += [f".. image:: figures/{plot}", f"   :alt: {title}", ""]
    for call in dict.fromkeys(case["case"].get("call") for case in run["cases"]):
        cases = [case for case in run["cases"] if case["case"].get("call") == call]
        header, *rows = (
            ", ".join(f'"{cell}"' for cell in row) for row in table({**run, "cases": cases})
        )
        lines += [f".. csv-table:: {title}{f': {call}' if call else ''}", f"   :header: {header}"]
        lines += ["", *(f"   {row}" for row in rows), ""]
    lines += [*(f"- {line}" for line in summary(run)), ""]
    return "\n".join(lines)
