"""Calls of cuflash.attention by tests: made in NumPy or CuPy, answered in NumPy."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import tolerance
from poison import poison
from strategies import Call

import cuflash


def host(array: Any) -> np.ndarray:
    return array if isinstance(array, np.ndarray) else array.get()


def attend(call: Call, xp: ModuleType, **more: Any) -> tuple[np.ndarray, np.ndarray]:
    """(out, lse) of one call, with fresh GPU memory full of NaN."""
    (q, k, v), options = call.on(xp)
    poison(xp)
    out, lse = cuflash.attention(q, k, v, **options, return_lse=True, **more)
    assert type(out) is type(lse) is xp.ndarray
    if "out" not in more:
        assert out.dtype == call.q.dtype
    assert lse.dtype == (np.float64 if call.q.dtype == np.float64 else np.float32)
    return host(out), host(lse)


def judge(call: Call, **more: Any) -> tolerance.Reference:
    """The truth about one call."""
    return tolerance.reference(call.q, call.k, call.v, **call.options, **more)
