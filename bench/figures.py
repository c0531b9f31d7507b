"""One run's numbers as a plot."""

import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from statistics import median, mode
from typing import Any

from .contest import CEILING, OURS
from .environment import slug

Point = tuple[int, float]
SCALE = 1e-12  # operations and bytes a second are shown as TFLOP/s and TB/s


def draw(run: dict, folder: Path) -> list[str]:
    """Draw a run: rates of everybody, or for what memory bounds, shares of its speed.

    Returns
    -------
    list of str
        The names of the files.
    """
    room, gpu = run["room"], slug(run["environment"]["gpu"])
    if room == "paper":
        plots = {f"paper-{part}-{gpu}.svg": partial(paper, part=part) for part in PARTS}
    elif room == "varlen":
        plots = {}  # its table says it all
    else:
        own = {"variants": bars, "blocks": sparse, "flash": times}
        plot = own.get(room) or (shares if run["unit"] == "TB/s" else rates)
        plots = {f"{room}-{gpu}.svg": plot}
    for name, plot in plots.items():
        plot(run, folder / name)
    return list(plots)


def rates(run: dict, path: Path) -> None:
    """Draw everybody's rate over the length, one panel for what else differs."""
    panels = _rates(run)
    peers = dict.fromkeys(name for lines in panels.values() for name in lines)
    colors = {name: f"C{i}" for i, name in enumerate(sorted(peers))}
    colors |= {OURS: "black", CEILING: "gray"}
    drawn = [point for lines in panels.values() for points in lines.values() for point in points]
    lengths, highest = sorted({at for at, _ in drawn}), max(rate for _, rate in drawn)
    figure, axes = grid(len(panels), 6)
    for panel, (title, lines) in zip(axes, panels.items()):
        for name, points in lines.items():
            style = {"linestyle": "--"} if name == CEILING else {"marker": "."}
            style |= {"linewidth": "2"} if name == OURS else {}
            panel.plot(*zip(*sorted(points)), label=name, color=colors[name], **style)
        panel.set(title=title, ylim=(0, 1.05 * highest))
        panel.set_xscale("log", base=2)
        panel.set_xticks(lengths, [f"{n >> 10}k" if n % 1024 == 0 else f"{n}" for n in lengths])
        panel.minorticks_off()
    finish(figure, axes, path, run["over"], run["unit"])


def _rates(run: dict) -> dict[str, dict[str, list[Point]]]:
    """Group the cases: panel -> contestant -> (length, rate); lone samples are for the table."""
    panels: dict[str, dict[str, list[Point]]] = {}
    for case in run["cases"]:
        labels = dict(case["case"])
        length = labels.pop(run["over"])
        words = [v if k in ("call", "dtype") else f"{k} {v}" for k, v in labels.items()]
        lines = panels.setdefault(", ".join(words), {})
        for name, time in [*case["times"].items(), (CEILING, {"rate": case["ceiling"]})]:
            if time["rate"]:
                lines.setdefault(name, []).append((length, time["rate"] * SCALE))
    full = {t: p for t, p in panels.items() if max(map(len, p.values()), default=0) > 2}
    return full or panels


BESIDE = {OURS: "black", "FlexAttention": "C0", "cuDNN": "C1"}  # whose bars are drawn


def bars(run: dict, path: Path) -> None:
    """Draw the rates at each variant, one panel for what else differs."""
    panels: dict[str, list[dict]] = {}
    for case in run["cases"]:
        words = [v if k == "dtype" else f"{k} {v}" for k, v in case["case"].items()]
        panels.setdefault(", ".join(words[:-1]), []).append(case)
    figure, axes = grid(len(panels), 2, width=4.5)
    for panel, (title, cases) in zip(axes, panels.items()):
        for number, (name, color) in enumerate(BESIDE.items()):
            at = [place + 0.27 * (number - 1) for place in range(len(cases))]
            heights = [case["times"].get(name, {"rate": 0.0})["rate"] * SCALE for case in cases]
            panel.bar(at, heights, 0.25, color=color, label=name)
        ceilings = [case["ceiling"] * SCALE for case in cases if case["ceiling"]]
        if ceilings:
            panel.axhline(median(ceilings), color="gray", linestyle="--", label=CEILING)
        names = [case["case"]["variant"] for case in cases]
        panel.set_xticks(range(len(cases)), names, rotation=40, ha="right")
        panel.set(title=title)
    finish(figure, axes, path, "variant", run["unit"])


def sparse(run: dict, path: Path) -> None:
    """Draw the time of block-sparse calls over the density, as a share of the dense time."""
    from matplotlib import ticker

    panels = _sparse(run)
    figure, axes = grid(len(panels), 4)
    for panel, (title, lines) in zip(axes, panels.items()):
        drawn = [at for points in lines.values() for at, _ in points]
        ends = min(drawn), max(drawn)
        panel.plot(ends, ends, color="gray", linestyle="--", label="density x dense time")
        for number, (name, points) in enumerate(lines.items()):
            style = {"color": "black" if name == OURS else f"C{number}", "marker": "."}
            panel.plot(*zip(*sorted(points)), label=name, **style)
        panel.set(title=title, xscale="log", yscale="log")
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(ticker.PercentFormatter(1, decimals=None))
            axis.set_minor_locator(ticker.NullLocator())
    finish(figure, axes, path, "blocks that are there", "of the dense time")


def _sparse(run: dict) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Group the cases: panel -> contestant -> (density, time over that of our dense call)."""
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for case in run["cases"]:
        labels, seconds = case["case"], {n: t["seconds"] for n, t in case["times"].items()}
        dense = seconds.pop(case["target"]["peer"], None)
        words = [labels["dtype"], *(f"{k} {labels[k]}" for k in ("d", "N"))]
        lines = panels.setdefault(", ".join(words), {})
        for name, time in seconds.items() if dense else ():
            lines.setdefault(name, []).append((labels[run["over"]], time / dense))
    return {title: lines for title, lines in panels.items() if lines}


def times(run: dict, path: Path) -> None:
    """Draw everybody's time in ms over the length, one panel a call."""
    calls = list(dict.fromkeys(case["case"]["call"] for case in run["cases"]))
    names = list(dict.fromkeys(name for case in run["cases"] for name in case["times"]))
    lengths = sorted({case["case"][run["over"]] for case in run["cases"]})
    figure, axes = grid(len(calls), 2, width=3.2)
    for panel, call in zip(axes, calls):
        for number, name in enumerate(names):
            points = [
                (case["case"][run["over"]], case["times"][name]["seconds"] * 1e3)
                for case in run["cases"]
                if case["case"]["call"] == call and name in case["times"]
            ]
            style = {"color": "black" if name.startswith(OURS) else f"C{number}", "marker": "."}
            style |= {"linestyle": ":"} if name.startswith(f"{OURS} ") else {}
            if points:
                panel.plot(*zip(*sorted(points)), label=name, **style)
        panel.set(title=call, yscale="log")
        panel.set_xscale("log", base=2)
        panel.set_xticks(lengths, [f"{n >> 10}k" if n % 1024 == 0 else f"{n}" for n in lengths])
        panel.minorticks_off()
    finish(figure, axes, path, run["over"], run["unit"])


def shares(run: dict, path: Path) -> None:
    """Draw the share of the ceiling over the columns: a panel a call, a line a number of rows."""
    panels = _shares(run)
    counts = sorted({count for lines in panels.values() for count, _ in lines})
    colors = {count: f"C{i}" for i, count in enumerate(counts)}
    figure, axes = grid(len(panels), 3 if len(panels) == 3 else 4)
    for panel, (title, lines) in zip(axes, panels.items()):
        # Ours first, so that the legend names the peers last.
        for (count, name), points in sorted(lines.items(), key=lambda line: line[0][::-1]):
            style = {"marker": ".", "label": f"{count:,} row{'s' * (count > 1)}"}
            if name != OURS:
                style = {"linestyle": ":", "label": "the fastest peer"}
            panel.plot(*zip(*sorted(points)), color=colors[count], **style)
        panel.axhline(1, color="gray", linewidth=0.5)
        panel.set(title=title, xscale="log", ylim=(0, 1.1))
    finish(figure, axes, path, run["over"], "share of the ceiling")


def _shares(run: dict) -> dict[str, dict[tuple[int, str], list[Point]]]:
    """Group the cases: panel -> (rows, ours or a peer's) -> (columns, share of the ceiling).

    Only what is swept is drawn: samples of dtypes, of axis 0 and of options are for the table.
    """
    panels: dict[str, dict[tuple[int, str], list[Point]]] = {}
    for case in run["cases"]:
        labels = case["case"]
        if labels["dtype"] != run["cases"][0]["case"]["dtype"] or labels["axis"] != 1:
            continue
        lines = panels.setdefault(" ".join((labels["call"], labels.get("options", ""))), {})
        rates = {name: time["rate"] for name, time in case["times"].items()}
        peers = [rate for name, rate in rates.items() if name != OURS]
        for name, rate in (OURS, rates.get(OURS)), ("peer", max(peers, default=None)):
            if rate:
                points = lines.setdefault((labels["rows"], name), [])
                points.append((labels[run["over"]], rate / case["ceiling"]))
    full = {t: p for t, p in panels.items() if max(map(len, p.values()), default=0) > 2} or panels
    calls = list(dict.fromkeys(title.split()[0] for title in full))

    def place(title: str) -> tuple[int, list[int]]:  # k=5 comes before k=10
        return calls.index(title.split()[0]), [int(n) for n in re.findall(r"\d+", title)]

    return {title: full[title] for title in sorted(full, key=place)}


# The figures of the paper: what is the same in a figure's panels, what tells them apart, what they
# are drawn over, and what is 1.
PARTS = {
    "softmax": ("softmax", "batch", "V", "safe"),
    "topk": ("softmax + top-k", "batch", "V", "safe unfused"),
    "k": ("softmax + top-k", "V", "K", "safe unfused"),
}


def paper(run: dict, path: Path, *, part: str) -> None:
    """Draw the speed of each algorithm over that of safe softmax."""
    from matplotlib import ticker

    panels = _relative(run, *PARTS[part])
    figure, axes = grid(len(panels), 2)
    for panel, (title, lines) in zip(axes, panels.items()):
        for number, (name, points) in enumerate(lines.items()):
            color = {"color": "black" if name == OURS else f"C{number}", "marker": "."}
            panel.plot(*zip(*sorted(points)), label=name, **color)
        panel.axhline(1, color="gray", linewidth=0.5)
        panel.set(title=title, xscale="linear" if part == "k" else "log", yscale="log")
        panel.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_locator(ticker.NullLocator())
    finish(figure, axes, path, PARTS[part][2], f"times the speed of {PARTS[part][3]}")


def _relative(
    run: dict, call: str, apart: str, over: str, one: str
) -> dict[str, dict[str, list[Point]]]:
    """Group the points of one figure: panel -> algorithm -> (where, speed relative to `one`)."""
    cases = [c for c in run["cases"] if c["case"]["call"] == call and one in c["times"]]
    if over == "K":  # at the one length that has many of them
        length = mode(case["case"]["V"] for case in cases)
        batch = max(case["case"]["batch"] for case in cases)
        cases = [c for c in cases if (c["case"]["V"], c["case"]["batch"]) == (length, batch)]
    else:
        k = mode(case["case"]["K"] for case in cases)
        cases = [case for case in cases if case["case"]["K"] == k]
    panels: dict[str, dict[str, list[Point]]] = {}
    for case in cases:
        labels, times = case["case"], case["times"]
        lines = panels.setdefault(f"{call}, {apart} {labels[apart]}", {})
        for name, time in times.items():
            if name != one:
                speed = times[one]["seconds"] / time["seconds"]
                lines.setdefault(name, []).append((labels[over], speed))
    return panels


def grid(panels: int, most: int, width: float = 2.4) -> tuple[Any, list[Any]]:
    """Return a figure and that many panels, at most so many side by side."""
    import matplotlib

    matplotlib.use("svg")
    # A fixed salt: the same numbers give the same file.
    matplotlib.rcParams.update({"svg.hashsalt": "cuflash", "font.size": 8, "axes.titlesize": 7})
    from matplotlib import pyplot

    wide = min(panels, most)
    high = -(-panels // wide)
    size = (1 + width * wide, 1 + 2 * high)
    figure, axes = pyplot.subplots(high, wide, squeeze=False, sharey=True, figsize=size)
    for panel in axes.flat[panels:]:
        panel.axis("off")
    return figure, list(axes.flat[:panels])


def finish(figure: Any, axes: Iterable[Any], path: Path, below: str, beside: str) -> None:
    """Add the axes' names and one legend for all panels, and write the file."""
    from matplotlib import pyplot

    figure.supylabel(beside)
    figure.supxlabel(below)
    labels = {k: h for p in axes for h, k in zip(*p.get_legend_handles_labels())}
    place = {"loc": "outside upper center", "ncols": min(6, round(figure.get_figwidth() / 1.4))}
    figure.legend(labels.values(), labels, frameon=False, **place)
    figure.set_layout_engine("constrained")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
