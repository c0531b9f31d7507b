"""Kernels of the attention tests, compiled side by side before the first test.

Drawn problems use more than a hundred kernels, some of them often: these are here. Compiled one by
one as they come, and by every worker of pytest-xdist for itself, they would take many times as
long; after this CuPy's disk cache has them.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

from strategies import DTYPES

HEAD_DIMS = (32, 64, 96, 128, 192, 256, 384, 512)  # one of each size that kernels are compiled for
# The default head dim is 64, which others are drawn beside.
PAIRS = [(d, d_v) for d in HEAD_DIMS for d_v in HEAD_DIMS if d == d_v or 64 in (d, d_v)]


def compile_first() -> None:
    """Compile attention for all dtypes, on the current GPU."""
    os.environ["TQDM_DISABLE"] = "1"  # hundreds of progress bars of one step each
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        calls = [(dtype, *pair) for dtype in DTYPES for pair in PAIRS]
        for done in [pool.submit(compile_one, *call) for call in calls]:
            done.result()
    del os.environ["TQDM_DISABLE"]


def compile_one(dtype: str, head_dim: int, head_dim_v: int) -> None:
    import cupy as cp

    import cuflash

    q, k = (cp.zeros((1, 16, head_dim), DTYPES[dtype]) for _ in range(2))
    v = cp.zeros((1, 16, head_dim_v), DTYPES[dtype])
    cuflash.warmup(cuflash.attention, q, k, v)
    if head_dim != head_dim_v:
        return
    cuflash.warmup(cuflash.attention, q, k, v, dropout=0.5, seed=0)
    if dtype == "float32":
        cuflash.warmup(cuflash.attention, q, k, v, precision="tf32")
    if dtype in ("float16", "bfloat16"):
        out = cp.zeros((1, 16, head_dim_v), cp.float32)
        cuflash.warmup(cuflash.attention, q, k, v, out=out)
