"""Dropout against the oracle, and what must be true of which weights it drops."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

import numpy as np
import oracle
import pytest
import tolerance
from calling import attend, host, judge
from hypothesis import given
from hypothesis import strategies as st
from strategies import DROPOUT_SEEDS, DTYPES, Problem, materialise, problems
from test_attention_problems import packed_whenever_possible

import cuflash
from cuflash._attention import cpu
from cuflash._attention.api import allocate, prepare
from cuflash._attention.dropout import Dropout

seeds = st.integers(0, 2**64 - 1) | st.sampled_from(DROPOUT_SEEDS)


@given(problem=problems(drops=True))
def test_problem(xp, problem):
    call = materialise(problem)
    judge(call).check(*attend(call, xp))


@given(problem=problems(drops=True, variants=True))
def test_problem_with_variants(xp, problem):
    call = materialise(problem)
    judge(call).check(*attend(call, xp))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@given(data=st.data())
def test_packing_is_left_out(cp, dtype, data):
    call = materialise(data.draw(problems(drops=True, dtype=dtype, group=4, two_axes=False)))
    with packed_whenever_possible():
        judge(call).check(*attend(call, cp))


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_tiles(xp, dtype):
    """Of queries and of keys, for several heads and entries, with keys that come in any order."""
    for options in ({}, {"causal": True}, {"window": (90, 30)}):
        problem = Problem(
            dtype=dtype,
            batch=(2,),
            shared=((False,),) * 3,
            group=2,
            len_q=300,
            len_k=410,
            dropout=0.2,
            dropout_seed=5,
            **options,
        )
        call = materialise(problem)
        judge(call).check(*attend(call, xp))


# Which weights: with q = 0 all are alike, and v = 1 shows them.


def shown(xp, dtype, heads, len_q, len_k, dropout, seed, batch=(), **options):
    """Whether each weight is kept, [*batch, heads, len_q, len_k], as the output has it."""
    q = xp.zeros((*batch, heads, len_q, 8), DTYPES[dtype])
    k = xp.zeros((1, len_k, 8), DTYPES[dtype])
    columns = []
    for first in range(0, len_k, 256):
        v = np.eye(len_k, dtype=np.float32)[:, first : first + 256].astype(DTYPES[dtype])
        given = dict(dropout=dropout, seed=seed, **options)
        columns.append(host(cuflash.attention(q, k, xp.asarray(v[None]), **given)))
    return np.concatenate(columns, axis=-1).astype(np.float32) != 0


def expected(heads, len_q, len_k, dropout, seed, batch=()):
    entries = np.arange(math.prod(batch)).reshape(*batch, 1, 1, 1)
    at = {"b": entries, "h": np.arange(heads)[:, None, None]}
    at |= {"row": np.arange(len_q)[:, None], "j": np.arange(len_k)}
    return oracle.kept_weights(at, dropout, seed)[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 70, 300), (2, 33, 47), (1, 200, 130)], ids=str)
def test_every_dtype_and_engine_drops_the_same(xp, dtype, sizes):
    for dropout, seed in ((0.5, 0), (0.1, 2**64 - 1), (1e-9, 3), (0.9999999, 4)):
        found = shown(xp, dtype, *sizes, dropout, seed)
        np.testing.assert_array_equal(found, expected(*sizes, dropout, seed))


@given(seed=seeds, dropout=st.floats(1e-5, 1, exclude_max=True))
def test_seeds_and_probabilities(xp, seed, dropout):
    found = shown(xp, "float32", 2, 40, 50, dropout, seed)
    np.testing.assert_array_equal(found, expected(2, 40, 50, dropout, seed))


@pytest.mark.parametrize("batch", [(3,), (2, 3), (2, 1, 2), (2, 3, 2, 1, 2)], ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_batch_entries_count_through_all_axes(xp, dtype, batch):
    found = shown(xp, dtype, 2, 20, 30, 0.5, 9, batch)
    np.testing.assert_array_equal(found, expected(2, 20, 30, 0.5, 9, batch))


def test_shared_queries_are_dropped_for_each_entry(xp):
    q, k = xp.zeros((1, 20, 8), "float32"), xp.zeros((3, 1, 30, 8), "float32")
    v = xp.broadcast_to(xp.eye(30, dtype="float32"), (3, 1, 30, 30))
    found = host(cuflash.attention(q, k, v, dropout=0.5, seed=1)) != 0
    np.testing.assert_array_equal(found, expected(1, 20, 30, 0.5, 1, (3,)))


def test_q_start_does_not_count(xp):
    found = shown(xp, "float16", 1, 20, 60, 0.5, 1, q_start=13, window=200)
    np.testing.assert_array_equal(found, expected(1, 20, 60, 0.5, 1))


@pytest.mark.parametrize("dropout", [0.5, 0.1, 0.03])
def test_as_many_are_dropped_as_was_asked(dropout):
    """Within five standard deviations, over all, in each head, row and column, and of pairs."""
    kept = expected(8, 256, 256, dropout, 17)
    for axes in ((0, 1, 2), (1, 2), (0, 2), (0, 1)):
        count = math.prod(kept.shape[axis] for axis in axes)
        off = np.abs((~kept).mean(axis=axes) - dropout)
        assert (off <= 5 * math.sqrt(dropout * (1 - dropout) / count) + 2**-17).all()
    for axis, step in itertools.product(range(3), (1, 2, 4, 7)):
        along = np.moveaxis(kept, axis, 0)
        one, other = along[step:], along[:-step]
        both, chance = (~one & ~other).mean(), dropout**2
        assert abs(both - chance) <= 5 * math.sqrt(chance * (1 - chance) / one.size) + 2**-16


def test_the_seed_the_entry_and_the_head_each_decide():
    one = expected(2, 128, 128, 0.5, 0, (2,))
    others = [one[0, 1], one[1, 0], *(expected(1, 128, 128, 0.5, s)[0] for s in (1, 2**32, 2**63))]
    for mask in others:
        assert abs((mask == one[0, 0]).mean() - 0.5) < 5 * 0.5 / 128


places = st.tuples(*(st.integers(0, most) for most in (2**32 - 1, 2**31 - 1, 2**30 - 1, 2**30 - 1)))


@given(first=places, second=places)
def test_no_two_places_share_a_number(first, second):
    """Nor do neighbours; the counter and the number within its call have room for all places."""

    def number(b, h, row, j):
        counter = oracle.dropout_call(b, h, row, j)
        assert all(0 <= word < 2**32 for word in counter)
        return (*counter, row // 8 % 2, j // 8 % 2, j % 2)

    near = [(*first[:2], first[2] ^ x, first[3] ^ y) for x in range(16) for y in range(16)]
    each = {*near, second}
    assert len({number(*place) for place in each}) == len(each)


@given(place=places, seed=seeds)
def test_the_twin_decides_as_the_oracle_at_the_far_end(place, seed):
    b, h, row, j = place
    rows = np.arange(row, min(row + 21, 2**30))
    keys = np.arange(j, min(j + 35, 2**30))
    numbers = oracle.dropout_numbers(b, h, rows[:, None], keys, seed)
    for threshold in (1, 30000, 65535):
        found = Dropout(threshold, seed).kept(b, np.array([h]), rows, keys)
        np.testing.assert_array_equal(found[0], numbers >= threshold)


# Laws.


@given(problem=problems(drops=True), tile_q=st.integers(1, 70), tile_k=st.integers(1, 70))
def test_tiles_do_not_matter(problem, tile_q, tile_k):
    call = materialise(problem)
    (q, k, v), options = call.on(np)
    caller, asked, operands = prepare(q, k, v, **options, return_lse=True)
    out, lse = allocate(caller, asked, operands)
    cpu.forward(asked, operands, tile_q=tile_q, tile_k=tile_k)
    judge(call).check(out, lse)


@given(problem=problems(drops=True))
def test_lse_knows_nothing_of_it(xp, problem):
    call = materialise(problem)
    options = {name: x for name, x in call.options.items() if name not in ("dropout", "seed")}
    truth = judge(dataclasses.replace(call, options=options))
    lse = attend(call, xp)[1]
    tolerance.assert_close("lse", lse, truth.lse, truth.lse_limit)


@given(problem=problems(drops=True))
def test_equal_seeds_give_equal_bits(xp, problem):
    call = materialise(problem)
    once, again = (attend(call, xp) for _ in range(2))
    for one, other in zip(once, again):
        assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("dropout", [None, 0, 0.0])
def test_no_dropout_is_none(xp, dropout):
    q, k, v = (xp.asarray(x) for x in np.random.default_rng(0).standard_normal((3, 2, 40, 16)))
    plain = host(cuflash.attention(q, k, v))
    for options in ({}, {"seed": 3}):
        out = host(cuflash.attention(q, k, v, dropout=dropout, **options))
        assert out.tobytes() == plain.tobytes()


def test_the_mean_over_seeds_is_without_dropout():
    q, k, v = np.random.default_rng(0).standard_normal((3, 1, 8, 16))
    call = functools.partial(cuflash.attention, q, k, v)
    outs = np.stack([call(dropout=0.3, seed=seed) for seed in range(400)])
    off = outs.mean(axis=0) - call()
    assert (np.abs(off) <= 5 * outs.std(axis=0) / 20).all()


def test_infinity_reaches_a_row_under_a_dropped_weight(xp):
    """0 times infinity is NaN, as in ``p @ v``; where no query looks it is not.

    Not in float32, whose infinities have no two TF32 parts.
    """
    q = k = xp.zeros((1, 64, 8), "float16")
    v = np.ones((1, 64, 8), np.float16)
    v[0, 40] = np.inf
    out = host(cuflash.attention(q, k, xp.asarray(v), dropout=0.5, seed=1, kv_lengths=41))
    kept = expected(1, 64, 41, 0.5, 1)[0, :, 40]
    assert np.isnan(out[0, ~kept]).all()
    assert np.isposinf(out[0, kept]).all()
    out = host(cuflash.attention(q, k, xp.asarray(v), dropout=0.5, seed=1, kv_lengths=40))
    assert np.isfinite(out).all()
