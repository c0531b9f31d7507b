"""The judge itself: a good answer passes, and each of the usual mistakes is seen."""

from __future__ import annotations

import dataclasses

import numpy as np
import oracle
import pytest
from strategies import DTYPES, Call, Problem, Spec, materialise
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


VARIED = dataclasses.replace(
    PROBLEM,
    softcap=8.0,
    alibi=Spec(values="powers"),
    bias=Spec(),
    mask=Spec("bool", "random"),
    sinks=Spec(values="large"),
)


def moved(name: str, by: int, axis: int):
    return lambda call: answer(call, **{name: np.roll(call.options[name], by, axis)})


VARIANT_MISTAKES = {
    "no soft cap": lambda call: answer(call, softcap=None),
    "another soft cap": lambda call: answer(call, softcap=7.0),
    "alibi of other heads": moved("alibi", 1, 0),
    "alibi of other rows": lambda call: answer(call, q_start=31, window=(21, 2)),
    "bias of other rows": moved("bias", 1, -2),
    "bias of other keys": moved("bias", 1, -1),
    "bias of other heads": moved("bias", 1, 0),
    "mask of other keys": moved("mask", 1, -1),
    "no sinks": lambda call: answer(call, sinks=None),
    "sinks of other heads": moved("sinks", 1, 0),
    "a bias is scaled": lambda call: answer(call, bias=call.options["bias"] / 8),
    "bias before the cap": lambda call: answer(
        call,
        softcap=None,
        alibi=None,
        bias=None,
        score=lambda score, h, i, j, row, **_: (
            8 * np.tanh((score + call.options["bias"]) / 8)
            - call.options["alibi"][:, None, None] * abs(i - j)
        ),
    ),
}


def judged_variants(dtype: str, **changes) -> tuple[Call, Reference]:
    call = materialise(dataclasses.replace(VARIED, dtype=dtype, **changes))
    return call, reference(call.q, call.k, call.v, **call.options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_good_answer_with_variants_passes(dtype):
    for seed in range(5):
        call, truth = judged_variants(dtype, seed=seed)
        truth.check(*answer(call))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mistake", VARIANT_MISTAKES)
def test_a_mistake_about_variants_is_seen(mistake, dtype):
    call, truth = judged_variants(dtype)
    with pytest.raises(AssertionError, match=r"^(out|lse): "):
        truth.check(*VARIANT_MISTAKES[mistake](call))


@pytest.mark.parametrize("softcap", [0.5, 8.0, 50.0])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_an_approximate_tanh_passes_beside_16_bits(dtype, softcap, monkeypatch):
    """Errors as large as PTX allows: all of one sign, of both signs, and of what helps most."""
    exact, random = np.tanh, np.random.default_rng(0)
    size = 2.0**-10.987
    errors = {
        "one sign": lambda x: size,
        "both signs": lambda x: size * random.choice([-1, 1], x.shape),
        "by size": lambda x: size * np.sign(np.abs(x) - np.median(np.abs(x))),
        "rounded": lambda x: (exact(x).astype(np.float16) - exact(x)) / exact(x),
    }
    for values in ("normal", "rising", "offset"):
        call, truth = judged_variants(dtype, softcap=softcap, values=values)
        for error in errors.values():
            with monkeypatch.context() as patch:
                patch.setattr(
                    oracle.np, "tanh", lambda x, e=error: (exact(x) * (1 + e(x))).astype(x.dtype)
                )
                found = answer(call)
            truth.check(*found)


def test_an_approximate_tanh_is_seen_beside_float32(monkeypatch):
    call, truth = judged_variants("float32")
    exact = np.tanh
    with monkeypatch.context() as patch:
        patch.setattr(oracle.np, "tanh", lambda x: exact(x) * np.float32(1 + 2.0**-11))
        found = answer(call)
    with pytest.raises(AssertionError, match=r"^(out|lse): "):
        truth.check(*found)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("below", "passes"), [(88.0, True), (86.0, False)])
def test_only_weights_below_the_smallest_normal_number_may_be_lost(dtype, below, passes):
    # One key with the score 0 beside a sink of 86 or 88: a weight of 4.5e-38 or 6.1e-39.
    q, k, v = np.zeros((1, 1, 8)), np.zeros((1, 1, 8)), np.full((1, 1, 8), 1e3)
    q, k, v = (x.astype(DTYPES[dtype]) for x in (q, k, v))
    truth = reference(q, k, v, sinks=np.array([below], np.float32))
    lse = np.full((1, 1), below, np.float32)
    if passes:
        truth.check(np.zeros_like(v), lse)
    else:
        with pytest.raises(AssertionError, match=r"^out: "):
            truth.check(np.zeros_like(v), lse)
