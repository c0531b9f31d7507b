"""A few small calls that touch every kernel's edges: what compute-sanitizer should watch."""

from __future__ import annotations

import calling
import numpy as np
import pytest
from strategies import Call

pytestmark = pytest.mark.sanitizer

CASES = {
    "partial tiles": ((3, 130, 72), (3, 101, 72), (3, 101, 40), {}),
    "masks": ((4, 65, 64), (2, 129, 64), (2, 129, 64), {"causal": True, "window": (40, 0)}),
    "copied rows": ((2, 17, 33), (2, 33, 33), (2, 33, 7), {"q_start": 3, "causal": True}),
    "slices": ((1, 20, 256), (1, 40, 256), (1, 40, 200), {"window": 9}),
    "parts": ((2, 70, 400), (1, 40, 400), (1, 40, 500), {"causal": True}),
    "no keys": ((2, 5, 128), (2, 0, 128), (2, 0, 128), {}),
}


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("case", CASES)
def test_small_calls(case: str, dtype: str, cp) -> None:
    rng = np.random.default_rng(len(case))
    *shapes, options = CASES[case]
    q, k, v = (rng.standard_normal(shape).astype(dtype) for shape in shapes)
    call = Call(q, k, v, options)
    calling.judge(call).check(*calling.attend(call, cp))


def test_lengths_from_the_device_are_clamped(cp) -> None:
    """Whatever the arrays hold, nothing outside k and v is read."""
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 4, 2, 50, 64)).astype(np.float16)
    wild = cp.array([-7, 2**62, 50, 51])
    starts = cp.array([2**62, -(2**62), 0, -3])
    found = calling.attend(
        Call(q, k, v, {"kv_lengths": wild, "q_start": starts, "causal": True}), cp
    )
    tame = np.array([0, 50, 50, 50]), np.array([100, -100, 0, -3])
    judged = calling.judge(
        Call(q, k, v, {"kv_lengths": tame[0], "q_start": tame[1], "causal": True})
    )
    judged.check(*found)
