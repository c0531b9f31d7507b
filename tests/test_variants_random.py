"""Random expressions in attention's kernels, against their values in NumPy.

Each one is a kernel of its own, so few are used, always the same, of seeds. Those whose values jump
where a rounding differs are left out.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import re
from typing import Any

import numpy as np
import pytest
from calling import attend, judge
from expressions import EXACT, PARAMETERS, ROUGH, expressions
from hypothesis import Phase, given, seed, settings
from strategies import DTYPES, Call, Problem, materialise

from cuflash import Variant
from cuflash._attention import api
from cuflash._attention import plan as attention_plan
from cuflash._attention.variants.expression import evaluate, parse, subscripts
from cuflash.jit import compile, gpu

COUNT = 300 if os.environ.get("HYPOTHESIS_PROFILE") == "fuzz" else 8
PROBLEM = Problem(batch=(2,), shared=((False,),) * 3, group=2, len_q=70, len_k=150, q_start=100)
# Scores must stay small: an expression's value may be anything, NaN included.
BOUNDED = "where(({0}) == ({0}), 8 * tanh(0.01 * ({0})), 0.0)"
CLIPPED = "where(({0}) == ({0}), maximum(minimum({0}, 8.0), -8.0), 0.0)"  # without functions
# What else a score may be off by: compilers fuse products and sums.
SLACK = {"float16": 1e-2, "bfloat16": 3e-2, "float32": 1e-4, "float64": 1e-10}
VALUES = {
    "width": 37,
    "cap": 3.5,
    "local": True,
    "document": np.random.default_rng(0).integers(-3, 9, (90, 160)).astype(np.int32),
    "slope": np.random.default_rng(1).standard_normal(150).astype(np.float32),
    "seen": np.random.default_rng(2).random(200) < 0.6,
}


@functools.cache
def texts(wanted: str, functions: tuple[str, ...], form: str, count: int) -> tuple[str, ...]:
    """So many different expressions that have j in them, and do not jump; most have scores."""
    found: dict[str, None] = {}
    for number in itertools.count():
        # Of one seed, Hypothesis draws variations of a few expressions: take the last.
        drawn = reversed(of_seed(number, wanted, functions))
        named = r"\bscore\b" if wanted == "float" and number % 4 else r"\bj\b"
        long = (each for each in drawn if len(each) > 12 and re.search(named, each))
        good = (form.format(each) for each in long)
        found |= dict.fromkeys(itertools.islice((x for x in good if usable(x, wanted)), 1))
        if len(found) == count:
            return tuple(found)
    raise AssertionError


def of_seed(number: int, wanted: str, functions: tuple[str, ...]) -> list[str]:
    sources = []

    @seed(number)
    @settings(max_examples=15, database=None, phases=[Phase.generate], deadline=None)
    @given(source=expressions(wanted, functions=functions))
    def collect(source: str) -> None:
        sources.append(source)

    collect()
    return sources


def usable(source: str, wanted: str) -> bool:
    """Whether an expression is none too large, not constant, and its value not one of roundings."""
    try:
        tree = parse(source, PARAMETERS, wanted)
    except ValueError:  # too large
        return False
    score = np.random.default_rng(3).standard_normal((2, 2, 70, 150))
    places = {**coordinates(), **VALUES}
    one, other, third = (
        evaluate(tree, {**places, "score": score * factor}, number)
        for factor, number in ((1, np.float64), (1, np.float32), (1 + 1e-6, np.float64))
    )
    if wanted == "bool":
        return np.array_equal(one, other) and 0 < np.mean(one) < 1
    close = np.allclose(one, other, rtol=0, atol=1e-4) and np.allclose(
        one, third, rtol=0, atol=1e-4
    )
    return close and np.ptp(one) > 0.01


def coordinates() -> dict[str, np.ndarray]:
    """Of PROBLEM."""
    row = np.arange(70)[:, None]
    return {
        "b": np.arange(2)[:, None, None, None],
        "h": np.arange(2)[:, None, None],
        "row": row,
        "i": row + 100,
        "j": np.arange(150),
        "len_q": np.asarray(70),
        "len_k": np.asarray(150),
    }


def in_numpy(source: str, wanted: str):
    """The expression as the oracle takes it."""
    tree = parse(source, PARAMETERS, wanted)

    def call(score=None, **places: Any):
        number = np.float64 if score is None else score.dtype
        return evaluate(tree, {**places, **VALUES, "score": score}, number)

    return call


def bound(xp, **sources: str) -> Variant:
    names = {name for source in sources.values() for name in subscripts(source)}
    values = {n: xp.asarray(VALUES[n]) if np.ndim(VALUES[n]) else VALUES[n] for n in names}
    return Variant(**sources)(**values) if values else Variant(**sources)


def check_scores(xp, source: str, dtype: str) -> None:
    call = materialise(dataclasses.replace(PROBLEM, dtype=dtype))
    truth = judge(call, score=in_numpy(source, "float"))
    truth = dataclasses.replace(
        truth,
        out_limit=truth.out_limit + SLACK[dtype] * truth.mass,
        lse_limit=truth.lse_limit + SLACK[dtype],
    )
    truth.check(*attend(call, xp, variant=bound(xp, score=source)))


def check_mask(xp, source: str, dtype: str) -> None:
    """With q = 0, lse is the logarithm of the number of keys."""
    call = materialise(dataclasses.replace(PROBLEM, dtype=dtype))
    call = dataclasses.replace(call, q=np.zeros_like(call.q))
    seen = np.broadcast_to(in_numpy(source, "bool")(**coordinates()), (2, 2, 70, 150))
    _, lse = attend(call, xp, variant=bound(xp, mask=source))
    np.testing.assert_array_equal(np.exp(lse).round(2), seen.sum(axis=-1))


@pytest.mark.parametrize("number", range(COUNT))
def test_scores(xp, number):
    check_scores(xp, texts("float", ROUGH + EXACT, BOUNDED, COUNT)[number], "float32")


@pytest.mark.parametrize("number", range(COUNT // 2))
def test_scores_in_float64(xp, number):
    check_scores(xp, texts("float", ROUGH + EXACT, BOUNDED, COUNT)[number], "float64")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("number", range(COUNT // 2))
def test_scores_of_halves(xp, number, dtype):
    """Without the functions that are approximate there."""
    check_scores(xp, texts("float", EXACT, CLIPPED, COUNT)[number], dtype)


@pytest.mark.parametrize("number", range(COUNT))
def test_masks(xp, number):
    dtype = list(DTYPES)[number % len(DTYPES)]
    check_mask(xp, texts("bool", EXACT, "{}", COUNT)[number], dtype)


def kernel(call: Call, variant: Variant, arch: int):
    problem = api.prepare(call.q, call.k, call.v, **call.options, variant=variant)[1]
    return attention_plan.choose(problem, gpu.of_arch(arch), problem.dtype).kernel


@pytest.mark.parametrize(
    ("arch", "dtype", "d"), [(86, "float64", 192), (86, "float32", 512), (75, "bfloat16", 384)]
)
def test_a_long_mask_compiles_where_a_thread_has_one_score_a_row(arch, dtype, d):
    pytest.importorskip("cupy", reason="needs CuPy and NVRTC, but no GPU")
    call = materialise(dataclasses.replace(PROBLEM, dtype=dtype, head_dim=d, head_dim_v=d))
    variant = Variant(mask="(i - j) % stride < 3")(stride=7)
    assert dict(kernel(call, variant, arch).constants)["kMaskInLoop"]
    compile.cubin(kernel(call, variant, arch), arch)


@pytest.mark.parametrize(("arch", "dtype"), [(80, "float32"), (80, "float16"), (90, "float16")])
def test_they_compile(arch, dtype):
    pytest.importorskip("cupy", reason="needs CuPy and NVRTC, but no GPU")
    call = materialise(dataclasses.replace(PROBLEM, dtype=dtype))
    scores = texts("float", ROUGH + EXACT, BOUNDED, COUNT)
    masks = texts("bool", EXACT, "{}", COUNT)
    count = 1 if arch == 90 else 2  # a Hopper kernel takes six seconds
    longest = [sorted(each, key=len)[-count:] for each in (scores, masks)]
    for score, mask in zip(*longest):
        variant = bound(np, score=score, mask=mask)
        compile.cubin(kernel(call, variant, arch), arch)
