"""Variants of a user's own: against Python functions, against keywords, and one call after
another."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from calling import attend, host, judge
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import (
    DTYPES,
    SOFTCAPS,
    VARIANT_LAYOUTS,
    Problem,
    Spec,
    lay_out,
    materialise,
    problems,
)
from test_variants import changed, everywhere

import cuflash
from cuflash import Variant
from cuflash._attention import api
from cuflash.jit import compile, repeat

few = settings(max_examples=max(4, settings().max_examples // 16))


def at(array: np.ndarray, *indices: Any) -> np.ndarray:
    """An element, of an array with ends that indices outside it are moved to."""
    return array[tuple(np.clip(i, 0, n - 1) for i, n in zip(indices, array.shape, strict=True))]


@dataclasses.dataclass(frozen=True)
class Own:
    """A Variant, its values by a random generator and (entries, heads, len_q, len_k), and what
    its expressions mean: of coordinates, and of the values by their names."""

    variant: Variant
    values: Callable[..., dict[str, Any]] = lambda random, *sizes: {}
    score: Callable[..., Any] | None = None
    visible: Callable[..., Any] | None = None

    def meaning(self, values: dict[str, Any]) -> dict[str, Any]:
        given = {"score": self.score, "visible": self.visible}
        return {n: functools.partial(f, **values) for n, f in given.items() if f is not None}


def normal(random, dtype: str, *shape: int) -> np.ndarray:
    return random.standard_normal(tuple(max(1, n) for n in shape)).astype(DTYPES[dtype])


def ints(random, dtype: str, high: int, *shape: int) -> np.ndarray:
    return random.integers(0, high, tuple(max(1, n) for n in shape)).astype(dtype)


OWN = {
    "documents": Own(
        Variant(mask="document[b, row] == document[b, j]"),
        lambda random, b, h, q, k: {"document": ints(random, "int64", 3, b, max(q, k))},
        visible=lambda b, row, j, document, **_: at(document, b, row) == at(document, b, j),
    ),
    "slopes": Own(
        Variant("score - slope[h] * abs(i - j)"),
        lambda random, b, h, q, k: {"slope": normal(random, "float16", h)},
        lambda score, h, i, j, slope, **_: score - at(slope, h).astype(float) * abs(i - j),
    ),
    "relative": Own(
        Variant("score + table[h, i - j + 8]"),
        lambda random, b, h, q, k: {"table": normal(random, "float32", h, 17)},
        lambda score, h, i, j, table, **_: score + at(table, h, i - j + 8),
    ),
    "by entry": Own(
        Variant("score * warmth[b] if hot[h, j] else score / 2", "count[b] + row > j // 2"),
        lambda random, b, h, q, k: {
            "warmth": normal(random, "float64", b),
            "hot": random.random((max(1, h), max(1, k))) < 0.5,
            "count": ints(random, "int32", 90, b),
        },
        lambda score, b, h, j, warmth, hot, count, **_: np.where(
            at(hot, h, j), score * at(warmth, b), score / 2
        ),
        lambda b, row, j, warmth, hot, count, **_: at(count, b) + row > j // 2,
    ),
    "numbers": Own(
        Variant("score * by if soft else -score", "(i - j) % step == 0 or j < step"),
        lambda random, *sizes: {
            "by": 0.5,
            "soft": bool(random.integers(2)),
            "step": np.int64(random.integers(1, 5)),
        },
        lambda score, by, soft, step, **_: score * by if soft else -score,
        lambda i, j, by, soft, step, **_: ((i - j) % step == 0) | (j < step),
    ),
    "places": Own(
        Variant("maximum(score, j / (len_k + 1.0)) - (row + b + h) / (len_q + 1.0)"),
        score=lambda score, b, h, j, row, len_q, len_k, **_: (
            np.maximum(score, j / (len_k + 1.0)) - (row + b + h) / (len_q + 1.0)
        ),
    ),
}


def sizes_of(call) -> tuple[int, int, int, int]:
    """Entries, heads, len_q and len_k."""
    *batch, heads, len_q, len_k = everywhere(call, np.zeros(()), 3).shape
    return math.prod(batch), heads, len_q, len_k


def on(xp, values: dict[str, Any], layout: str) -> dict[str, Any]:
    return {n: lay_out(x, layout, xp) if np.ndim(x) else x for n, x in values.items()}


def check(xp, name: str, problem: Problem, layout: str = "contiguous") -> None:
    own, call = OWN[name], materialise(problem)
    values = own.values(np.random.default_rng(problem.seed), *sizes_of(call))
    variant = own.variant(**on(xp, values, layout)) if values else own.variant
    judge(call, **own.meaning(values)).check(*attend(call, xp, variant=variant))


NO_KEYWORDS = dict.fromkeys(("softcap", "alibi", "bias", "mask", "sinks"), None)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("name", OWN)
@few
@given(data=st.data(), layout=st.sampled_from(VARIANT_LAYOUTS))
def test_own(xp, name, dtype, data, layout):
    check(xp, name, data.draw(problems(variants=True, dtype=dtype, **NO_KEYWORDS)), layout)


@pytest.mark.parametrize("name", OWN)
@few
@given(data=st.data())
def test_own_after_keywords(xp, name, data):
    check(xp, name, data.draw(problems(variants=True, dtype="float32", head_dim=64)))


FIVE = Problem(
    batch=(2, 3, 2, 2, 3),
    shared=((True, False, True, False, True), *((False, True, False, True, False),) * 2),
    group=2,
    len_q=5,
    len_k=7,
    causal=True,
)


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_batch_axes(xp, name, dtype):
    """b counts through axes that a kernel cannot walk along together."""
    for layout in ("contiguous", "swapped", "inside_out"):
        check(xp, name, dataclasses.replace(FIVE, dtype=dtype, layouts=(layout,) * 3))


@pytest.mark.parametrize("dtype", DTYPES)
def test_variants_follow_one_another(xp, dtype):
    """The second's score is made of the first's, and places must please both masks."""
    problem = Problem(batch=(3,), shared=((False,),) * 3, group=2, len_q=40, len_k=90)
    call = materialise(dataclasses.replace(problem, dtype=dtype))
    x = np.linspace(-1, 1, 90)
    first = Variant("score * 2 + x[j]", "j % 3 != 0")(x=xp.asarray(x))
    second = Variant("score * x - row / 8")(x=0.5)
    third = Variant(mask="j != row")
    unbound = Variant("score * 2 + y[j]", "j % 3 != 0") & Variant("score * z - row / 8")
    truth = judge(
        call,
        score=lambda score, j, row, **_: (score * 2 + x[j]) * 0.5 - row / 8,
        visible=lambda j, row, **_: (j % 3 != 0) & (j != row),
    )
    answers = [
        attend(call, xp, variant=variant)
        for variant in (
            first & second & third,
            first & (second & third),
            first & third & second,
            unbound(y=xp.asarray(x), z=0.5) & third,
        )
    ]
    for answer in answers:
        truth.check(*answer)
        assert_equal(answer, answers[0])


# Variants that are keywords.


@few
@given(problem=problems(variants=True, **NO_KEYWORDS), cap=st.sampled_from(SOFTCAPS))
def test_softcap(xp, problem, cap):
    """One and the same expression: bit for bit."""
    call = materialise(problem)
    own = Variant("softcap * tanh(score / softcap)")(softcap=cap)
    assert_equal(attend(changed(call, softcap=cap), xp), attend(call, xp, variant=own))


@few
@given(problem=problems(variants=True, **NO_KEYWORDS))
def test_alibi(xp, problem):
    call = materialise(problem)
    slopes = np.linspace(-1, 1, sizes_of(call)[1]).astype(np.float32)
    own = Variant("score - alibi[h] * abs(i - j)")(alibi=xp.asarray(slopes))
    assert_equal(attend(changed(call, alibi=slopes), xp), attend(call, xp, variant=own))


@few
@given(problem=problems(variants=True, **NO_KEYWORDS))
def test_mask(xp, problem):
    call = materialise(problem)
    _, _, len_q, len_k = sizes_of(call)
    mask = np.random.default_rng(problem.seed).random((len_q, len_k)) < 0.7
    own = Variant(mask="mask[row, j]")(mask=xp.asarray(mask))
    truth = judge(changed(call, mask=mask))
    truth.check(*attend(call, xp, variant=own))
    assert_equal(attend(changed(call, mask=mask), xp), attend(call, xp, variant=own))


@few
@given(problem=problems(variants=True, causal=True, window=None))
def test_causal(xp, problem):
    call = materialise(problem)
    own = Variant(mask="j <= i")
    judge(call).check(*attend(changed(call, causal=False), xp, variant=own))


@few
@given(problem=problems(variants=True, causal=False, window=7))
def test_window(xp, problem):
    call = materialise(problem)
    own = Variant(mask="i - width <= j <= i + width")(width=7)
    judge(call).check(*attend(changed(call, window=None), xp, variant=own))


def assert_equal(one, other) -> None:
    for a, b in zip(one, other, strict=True):
        assert a.tobytes() == b.tobytes()


# One call after another.


def numbered(xp, width, cap, slope) -> Variant:
    variant = Variant("score / cap - slope[h] * abs(i - j)", "abs(i - j) <= width")
    return variant(width=width, cap=cap, slope=xp.asarray(np.float32(slope)))


def expected(call, width, cap, slope):
    return judge(
        call,
        score=lambda score, h, i, j, **_: score / cap - np.float32(slope)[h] * abs(i - j),
        visible=lambda i, j, **_: abs(i - j) <= width,
    )


VALUES = [(5, 2.0, [0.5, 1.0]), (5, 3.0, [0.5, 1.0]), (7, 2.0, [0.5, 1.0]), (5, 2.0, [2.0, 0.1])]
REPEATED = Problem(group=2, len_q=40, len_k=90)


@pytest.mark.parametrize("dtype", DTYPES)
def test_new_values_give_new_answers(xp, dtype, monkeypatch):
    """The first calls, then calls made again, which a GPU's short way answers."""
    monkeypatch.setattr(repeat, "_known", {})
    call = materialise(dataclasses.replace(REPEATED, dtype=dtype))
    compiled = None
    for values in VALUES * 3:
        out, lse = attend(call, xp, variant=numbered(xp, *values))
        expected(call, *values).check(out, lse)
        compiled = compiled or dict(compile._kernels)
        assert compile._kernels == compiled
        (q, k, v), options = call.on(xp)
        variant = numbered(xp, *values)
        for _ in range(2):
            again = cuflash.attention(q, k, v, **options, variant=variant)
            assert host(again).tobytes() == out.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_new_values_of_keywords_give_new_answers(xp, dtype, monkeypatch):
    monkeypatch.setattr(repeat, "_known", {})
    specs = {"alibi": Spec(), "bias": Spec(), "mask": Spec("bool", "random"), "sinks": Spec()}
    compiled = None
    for seed in (1, 2, 1):
        changes = {"dtype": dtype, "seed": seed, "softcap": 1.0 + seed, **specs}
        call = materialise(dataclasses.replace(REPEATED, **changes))
        for _ in range(3):
            judge(call).check(*attend(call, xp))
        compiled = compiled or dict(compile._kernels)
        assert compile._kernels == compiled


def program(**options):
    x = np.ones((2, 5, 8), np.float32)
    return api.prepare(x, x, x, **options)[1].variant


def test_what_a_kernel_is_made_for():
    """Kernels depend on the kinds of values, not on the values nor on sizes."""
    one = program(variant=numbered(np, 5, 2.0, [1.0, 2.0]), softcap=3.0)
    assert one is program(variant=numbered(np, 6, 2.5, [3.0, 2.0]), softcap=30.0)
    others = [
        program(variant=numbered(np, 5, 2, [1.0, 2.0]), softcap=3.0),
        program(variant=numbered(np, 5.0, 2.0, [1.0, 2.0]), softcap=3.0),
        program(variant=numbered(np, 5, 2.0, [1.0, 2.0])),
    ]
    assert len({each.text for each in (one, *others)}) == 4


@pytest.mark.parametrize(
    ("a", "b"), [(1, 1.0), (1, True), (0, False), (1.0, True), (1.0, 2.0), (1, 2)]
)
def test_numbers_are_known_apart(a, b):
    variant = Variant("score * x")
    assert variant(x=a).key != variant(x=b).key
    assert variant(x=a).key == variant(x=a).key


def test_zeros_are_known_apart():
    variant = Variant("where(1 / x > 0, score, -score)")
    assert variant(x=0.0).key != variant(x=-0.0).key


def test_a_parameter_may_have_any_name():
    assert not Variant("score * self")(self=2.0).missing


@pytest.mark.parametrize(
    "value", [2, 2.0, True, np.int8(2), np.uint64(2), np.float16(2), np.bool(1), np.float64(2)]
)
def test_numbers_of_every_type(xp, value):
    call = materialise(REPEATED)
    if isinstance(value, (bool, np.bool)):
        out, lse = attend(call, xp, variant=Variant("score * 2 if x else score")(x=value))
    else:
        out, lse = attend(call, xp, variant=Variant("score * x")(x=value))
    judge(call, score=lambda score, **_: score * 2).check(out, lse)


ELEMENTS = ["bool", "int32", "int64", *DTYPES]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("element", ELEMENTS)
def test_arrays_of_every_dtype_and_layout(xp, element, dtype):
    call = materialise(dataclasses.replace(REPEATED, dtype=dtype))
    x = (np.arange(2 * 90) % 7 - 3).reshape(2, 90)
    x = x.astype(DTYPES.get(element, element))
    source = "score + 1 if x[h, j] else score" if element == "bool" else "score + x[h, j]"
    truth = judge(call, score=lambda score, h, j, **_: score + x[h, j].astype(float))
    for layout in VARIANT_LAYOUTS:
        variant = Variant(source)(x=lay_out(x, layout, xp))
        truth.check(*attend(call, xp, variant=variant))


@pytest.mark.parametrize("shape", [(1, 1), (1, 90), (2, 1), (2, 30), (1, 300)])
def test_indices_outside_are_moved_to_the_nearest_end(xp, shape):
    """Arrays with fewer elements than there are keys too, which are read in another way."""
    call = materialise(dataclasses.replace(REPEATED, q_start=-5))
    x = np.random.default_rng(0).standard_normal(shape)
    for source, places in (
        ("score + x[h, j]", lambda h, i, j: (h, j)),
        ("score + x[h - 1, i]", lambda h, i, j: (h - 1, i)),
        ("score + x[i, j - 20]", lambda h, i, j: (i, j - 20)),
    ):
        truth = judge(call, score=lambda score, h, i, j, p=places, **_: score + at(x, *p(h, i, j)))
        truth.check(*attend(call, xp, variant=Variant(source)(x=xp.asarray(x))))
