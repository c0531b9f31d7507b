"""The first call with an expression that nobody has compiled, in a process of its own.

What CuPy keeps on disk is not there: its cache begins empty.
"""

import os
import subprocess
import sys
import tempfile
from time import perf_counter
from typing import Any

from .environment import CHECKOUT

WHEN = {"import": "right after import", "plain": "after a plain call"}


def seconds() -> dict[str, float]:
    """Return how long it takes right after import, and after one plain call."""
    return {words: _in_a_process(when) for when, words in WHEN.items()}


def _in_a_process(when: str) -> float:
    with tempfile.TemporaryDirectory() as empty:
        environment = os.environ | {"CUPY_CACHE_DIR": empty}
        command = [sys.executable, "-m", "bench.first_call", when]
        told = subprocess.run(
            command, cwd=CHECKOUT, env=environment, capture_output=True, text=True, check=False
        )
    if told.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{told.stderr}")
    return float(told.stdout)


def timed(library: Any, when: str) -> float:
    """Make the call, whose kernel is one for the score and whose mask is classified by another."""
    import cuflash

    q, k, v = (library.zeros((2, 256, 128), "float16") for _ in range(3))
    wait = library.cuda.runtime.deviceSynchronize if hasattr(library, "cuda") else int
    if when == "plain":
        cuflash.attention(q, k, v)
    wait()
    begin = perf_counter()
    mine = cuflash.Variant(score="score - slope * abs(i - j)", mask="(i - j) % stride < width")
    cuflash.attention(q, k, v, variant=mine(slope=0.5, stride=64, width=16))
    wait()
    return perf_counter() - begin


if __name__ == "__main__":
    import cupy

    print(timed(cupy, sys.argv[1]))
