"""One case of a sweep: every contestant is checked, and those who are right are timed in turn."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any

import numpy as np

from . import peers
from .timing import Contestant, Stopwatch, compare

OURS, CEILING = "cuflash", "ceiling"
# Peers may round more often than we allow ourselves; far beyond, they compute something else.
LIMIT_OF_PEERS = 20.0


# Part of the right answer: its index, its values in float64, and the error allowed in each.
Piece = tuple[Any, np.ndarray, np.ndarray]

# Judges a result: its largest error in units of what is allowed. Strictly, of our own: where a
# peer may break a tie as it likes, cuflash says how.
Judge = Callable[[Any, bool], float]


@dataclass(frozen=True)
class Entry:
    """A case made real on the GPU."""

    contestants: list[Contestant]
    judge: Judge
    ceiling: tuple[Contestant, float] | str  # who sets it and its work, or a measured bandwidth
    unlike: tuple[Contestant, Judge] | None = None  # who is timed beside them for another answer
    notes: dict[str, Any] = field(default_factory=dict)  # what else the JSON file says of the case


def sweep(
    cases: Sequence[Any], stopwatch: Stopwatch, bandwidths: dict[str, float], *, seconds: float
) -> list[dict]:
    """Measure all cases; what time is left is shared among the cases that are left."""
    from tqdm import tqdm

    end = perf_counter() + seconds
    results = []
    for number, case in enumerate(tqdm(cases, unit="case", dynamic_ncols=True)):
        share = (end - perf_counter()) / (len(cases) - number)
        results.append(measure(case, stopwatch, bandwidths, seconds=share))
        peers.free_memory()
    return results


def measure(
    case: Any, stopwatch: Stopwatch, bandwidths: dict[str, float], *, seconds: float
) -> dict:
    """Check and time one case; return its part of the JSON file."""
    end = perf_counter() + seconds
    entry = case.build(stopwatch)
    errors, left_out, ready = check(entry.contestants, entry.judge, stopwatch)
    if entry.unlike:
        contestant, judge = entry.unlike
        found = check([contestant], judge, stopwatch)
        errors, left_out, ready = errors | found[0], left_out | found[1], ready + found[2]
    work = dict.fromkeys((c.name for c in ready), case.work)
    if not isinstance(entry.ceiling, str):
        product, work[CEILING] = entry.ceiling
        ready += check([replace(product, name=CEILING)], unjudged, stopwatch)[2]
    taken = compare(ready, stopwatch.sample, seconds=end - perf_counter())
    times = {name: _summary(samples, work[name]) for name, samples in taken.items()}
    measured = times.pop(CEILING, {}).get("rate")
    return {
        "case": case.labels(),
        **entry.notes,
        "ceiling": bandwidths[entry.ceiling] if isinstance(entry.ceiling, str) else measured,
        "times": times,
        "errors": errors,
        "left_out": left_out,
    }


def check(
    contestants: Sequence[Contestant], judge: Judge, stopwatch: Stopwatch
) -> tuple[dict[str, float], dict[str, str], list[Contestant]]:
    """Run everybody once: the errors, who is left out and why, and who is ready to be timed."""
    errors: dict[str, float] = {}
    left_out: dict[str, str] = {}
    ready = []
    for contestant in contestants:
        try:
            result = contestant.view(stopwatch.warm(contestant))
            error = judge(result, contestant.name == OURS)
        except Exception as problem:  # a peer that cannot do this, here: no driver, no memory ...
            if contestant.name == OURS:
                raise
            left_out[contestant.name] = f"{type(problem).__name__}: {problem}"[:160]
            peers.free_memory()
            continue
        finally:
            result = None  # the next contestant may need its memory
        errors[contestant.name] = error
        if error <= (1.0 if contestant.name.startswith(OURS) else LIMIT_OF_PEERS):
            ready.append(contestant)
        else:
            left_out[contestant.name] = f"wrong: {error:.3g} times the error allowed"
    return errors, left_out, ready


def error_of(result: Any, pieces: Sequence[Piece]) -> float:
    """Return the largest error in units of what is allowed; NaN counts as 1e9."""
    worst = [
        np.max(np.abs(peers.to_host(result[place]) - right) / allowed)
        for place, right, allowed in pieces
    ]
    return float(np.nan_to_num(max(worst, default=0.0), nan=1e9, posinf=1e9))


def by_pieces(pieces: Sequence[Piece]) -> Judge:
    """Judge by the errors in parts of the answer."""
    return lambda result, strictly: error_of(result, pieces)


def unjudged(result: Any, strictly: bool) -> float:
    return 0.0


def _summary(samples: list[float], work: float) -> dict[str, float | int]:
    """Return the median and the quartiles in seconds, and the rate at the median."""
    low, middle, high = np.quantile(samples, (0.25, 0.5, 0.75)).tolist()
    rate = work / middle
    return {"seconds": middle, "low": low, "high": high, "samples": len(samples), "rate": rate}


def host_times(contestants: Sequence[Contestant], stopwatch: Stopwatch) -> dict[str, float]:
    """Return the median host time in seconds of an eager call."""
    ready = check(contestants, unjudged, stopwatch)[2]
    return {contestant.name: stopwatch.host_time(contestant) for contestant in ready}
