"""The judge itself: a good answer passes, and each of the usual mistakes is seen."""

from __future__ import annotations

import dataclasses

import numpy as np
import oracle
import pytest
from strategies import DTYPES, Call, Problem, materialise
from tolerance import Reference, reference

PROBLEM = Problem(kv_heads=2, group=2, len_q=50, len_k=90, window=(20, 3), kv_lengths=80)


def answer(call: Call, **options) -> tuple[np.ndarray, np.ndarray]:
    """An honest answer in the inputs' precision."""
    out, lse = oracle.baselines(call.q, call.k, call.v, **{**call.options, **options})[1]
    return out.astype(call.q.dtype), lse


def other_heads(call: Call):
    """Query head h with key head h % kv_heads."""
    q = call.q[[0, 2, 1, 3]]
    out, lse = answer(dataclasses.replace(call, q=q))
    return out[[0, 2, 1, 3]], lse[[0, 2, 1, 3]]


def one_element(call: Call):
    out, lse = answer(call)
    out[3, 17, 63] += out.dtype.type(0.05)
    return out, lse


def not_written(call: Call):
    out, lse = answer(call)
    out[1, 49] = np.nan
    return out, lse


def lse_in_base_2(call: Call):
    out, lse = answer(call)
    return out, lse * lse.dtype.type(np.log2(np.e))


MISTAKES = {
    "one key more on the left": lambda call: answer(call, window=(21, 3)),
    "one key fewer on the right": lambda call: answer(call, window=(20, 2)),
    "one key past the length": lambda call: answer(call, kv_lengths=81, q_start=30),
    "start from len_k": lambda call: answer(call, q_start=40),
    "scale forgotten": lambda call: answer(call, scale=1.0),
    "other heads": other_heads,
    "one element": one_element,
    "a row not written": not_written,
    "lse in base 2": lse_in_base_2,
}


def judged(dtype: str) -> tuple[Call, Reference]:
    call = materialise(dataclasses.replace(PROBLEM, dtype=dtype))
    return call, reference(call.q, call.k, call.v, **call.options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_good_answer_passes(dtype):
    call, truth = judged(dtype)
    truth.check(*answer(call))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_seen(mistake, dtype):
    call, truth = judged(dtype)
    with pytest.raises(AssertionError, match=r"^(out|lse): "):
        truth.check(*MISTAKES[mistake](call))
