"""The laws of attention and of merging: two calls that must agree, whatever the numbers."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import oracle
import tolerance
from calling import attend, host, judge
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import DTYPES, Call, materialise, problems

import cuflash

seeds = st.integers(0, 2**32 - 1)


def assert_same(xp, call: Call, other: Call, change=lambda out, lse: (out, lse), offset=0.0):
    """`other` gives call's answer, after `change`, with lse larger by `offset`."""
    out, lse = attend(call, xp)
    truth, other_truth = judge(call), judge(other)
    other_out, other_lse = change(*attend(other, xp))
    out_limit, lse_limit = change(
        np.broadcast_to(other_truth.out_limit, other_truth.out.shape), other_truth.lse_limit
    )
    exact = truth.out.dtype
    tolerance.assert_close("out", other_out, out.astype(exact), truth.out_limit + out_limit)
    tolerance.assert_close(
        "lse", other_lse - offset, lse.astype(exact), truth.lse_limit + lse_limit
    )


def changed(call: Call, **options) -> Call:
    """The call with other arrays (q, k, v, layouts) or options."""
    arrays = {name: options.pop(name) for name in ("q", "k", "v", "layouts") if name in options}
    return dataclasses.replace(call, **arrays, options={**call.options, **options})


def key_lengths(call: Call):
    """How many keys there are: an int, or an int64 array."""
    lengths = call.options.get("kv_lengths", call.k.shape[-2])
    return lengths if isinstance(lengths, int) else lengths.astype(np.int64)


def first_position(call: Call):
    """The key position of row 0: an int, or an int64 array."""
    start = call.options.get("q_start")
    if start is None:
        return key_lengths(call) - call.q.shape[-2]
    return start if isinstance(start, int) else start.astype(np.int64)


# Masks.


@given(problem=problems())
def test_with_q_zero_lse_counts_the_keys(xp, problem):
    call = materialise(problem)
    call = changed(call, q=np.zeros_like(call.q))
    truth = judge(call)
    out, lse = attend(call, xp)
    with np.errstate(divide="ignore"):
        count = np.log(truth.allowed.sum(axis=-1))
    count = np.broadcast_to(count[0] if problem.two_axes else count, truth.lse.shape)
    limit = tolerance.LSE[problem.dtype] * np.maximum(1, np.where(np.isinf(count), 1, count))
    tolerance.assert_close("lse", lse, count, limit)
    truth.check(out)


@given(problem=problems(causal=True, window=None, two_axes=False, len_q=37))
def test_causal_is_a_length_for_each_row(xp, problem):
    call = materialise(problem)
    assert_same(xp, call, rows_as_batch(call, right=0), back_from_batch)


@given(
    problem=problems(causal=False, window=None, two_axes=False, len_q=33), right=st.integers(0, 70)
)
def test_a_right_window_is_a_length_for_each_row(xp, problem, right):
    call = changed(materialise(problem), window=(None, right))
    assert_same(xp, call, rows_as_batch(call, right), back_from_batch)


def rows_as_batch(call: Call, right: int) -> Call:
    """Each row as a batch entry of its own, which sees the keys up to `right` past itself."""
    length = np.asarray(key_lengths(call))[..., None]
    last = np.asarray(first_position(call))[..., None] + np.arange(call.q.shape[-2]) + right
    options = {name: call.options[name] for name in ("scale", "precision") if name in call.options}
    return Call(
        q=call.q.swapaxes(-2, -3)[..., None, :],
        k=call.k[..., None, :, :, :],
        v=call.v[..., None, :, :, :],
        options={**options, "kv_lengths": np.clip(last + 1, 0, length)},
    )


def back_from_batch(out, lse):
    return out[..., 0, :].swapaxes(-2, -3), lse[..., 0].swapaxes(-1, -2)


@given(
    problem=problems(causal=False, kv_lengths=None, values="normal"),
    left=st.none() | st.integers(0, 40),
    right=st.none() | st.integers(0, 40),
)
def test_reversed_time_swaps_the_sides_of_a_window(xp, problem, left, right):
    call = changed(materialise(problem), window=(left, right))
    start = call.k.shape[-2] - call.q.shape[-2] - first_position(call)
    backwards = changed(
        call,
        q=call.q[..., ::-1, :],
        k=call.k[..., ::-1, :],
        v=call.v[..., ::-1, :],
        window=(right, left),
        q_start=start,
    )
    assert_same(xp, call, backwards, lambda out, lse: (out[..., ::-1, :], lse[..., ::-1]))


@given(problem=problems(window=None), width=st.integers(0, 40))
def test_windows_that_are_the_same(xp, problem, width):
    call = materialise(problem)
    right = 0 if problem.causal else width
    assert_same(xp, changed(call, window=width), changed(call, window=(width, right)))
    far = 1000
    assert_same(xp, call, changed(call, window=(None, far)))
    assert_same(xp, call, changed(call, window=far))
    if problem.causal:
        assert_same(xp, call, changed(call, causal=False, window=(None, 0)))


@given(problem=problems(kv_lengths=None), data=st.data())
def test_a_length_is_a_slice(xp, problem, data):
    length = data.draw(st.integers(0, problem.len_k))
    call = changed(materialise(problem), kv_lengths=length)
    shorter = changed(
        call, k=call.k[..., :length, :], v=call.v[..., :length, :], q_start=first_position(call)
    )
    del shorter.options["kv_lengths"]
    assert_same(xp, call, shorter)


# Scores.


@given(problem=problems(causal=False, window=None, kv_lengths=None), seed=seeds)
def test_the_order_of_keys_does_not_matter(xp, problem, seed):
    call = materialise(problem)
    order = np.random.default_rng(seed).permutation(problem.len_k)
    assert_same(xp, call, changed(call, k=call.k[..., order, :], v=call.v[..., order, :]))


@given(problem=problems(), constant=st.sampled_from([1.0, -3.0, 20.0]))
def test_a_constant_on_all_scores_changes_lse_alone(xp, problem, constant):
    assume(problem.head_dim < 512)
    call = materialise(problem)
    scale = problem.scale if problem.scale is not None else 1 / math.sqrt(problem.head_dim)
    call = changed(call, scale=scale)
    shifted = changed(
        call, q=with_column(call.q, constant), k=with_column(call.k, 1.0), layouts=problem.layouts
    )
    assert_same(xp, call, shifted, offset=scale * constant)


def with_column(array: np.ndarray, value: float) -> np.ndarray:
    column = np.full((*array.shape[:-1], 1), value, array.dtype)
    return np.concatenate([array, column], axis=-1)


@given(problem=problems(scale=None), factor=st.sampled_from([2.0, 0.25, -1.0, -0.5]))
def test_scale_multiplies_queries(xp, problem, factor):
    call = materialise(problem)
    scale = 1 / math.sqrt(problem.head_dim)
    scaled = changed(call, q=call.q * call.q.dtype.type(factor), scale=scale)
    assert_same(xp, changed(call, scale=factor * scale), scaled)


# Axes.


@given(problem=problems(group=3))
def test_grouped_heads_are_repeated_heads(xp, problem):
    assume(not problem.two_axes)
    call = materialise(problem)
    assert_same(
        xp, call, changed(call, k=np.repeat(call.k, 3, axis=-3), v=np.repeat(call.v, 3, axis=-3))
    )


@given(problem=problems())
def test_layout_does_not_matter(xp, problem):
    call = materialise(problem)
    assert_same(xp, call, changed(call, layouts=("contiguous",) * 3))


@given(problem=problems(two_axes=True))
def test_two_axes_are_one_head(xp, problem):
    call = materialise(problem)
    one_head = changed(call, q=call.q[None], k=call.k[None], v=call.v[None])
    assert_same(xp, call, one_head, lambda out, lse: (out[0], lse[0]))


@given(problem=problems(batch=(2, 3), two_axes=False, len_q=19), data=st.data())
def test_a_batch_entry_is_a_call_of_its_own(xp, problem, data):
    call = materialise(problem)
    batch = np.broadcast_shapes(*(x.shape[:-3] for x in (call.q, call.k, call.v)))
    assume(batch)
    entry = tuple(data.draw(st.integers(0, size - 1)) for size in batch)

    def member(array, axes):
        return np.broadcast_to(array, (*batch, *array.shape[array.ndim - axes :]))[entry]

    options = {
        name: int(member(option, 0)) if isinstance(option, np.ndarray) else option
        for name, option in call.options.items()
    }
    alone = Call(*(member(array, 3) for array in (call.q, call.k, call.v)), options=options)
    out, lse = attend(call, xp)
    whole, part = judge(call), judge(alone)
    out_alone, lse_alone = attend(alone, xp)
    exact = whole.out.dtype
    tolerance.assert_close(
        "out", out_alone, out[entry].astype(exact), whole.out_limit[entry] + part.out_limit
    )
    tolerance.assert_close(
        "lse", lse_alone, lse[entry].astype(exact), whole.lse_limit[entry] + part.lse_limit
    )


@given(problem=problems(), data=st.data())
def test_rows_are_independent(xp, problem, data):
    first = data.draw(st.integers(0, problem.len_q))
    last = data.draw(st.integers(first, problem.len_q))
    call = materialise(problem)
    some = changed(call, q=call.q[..., first:last, :], q_start=first_position(call) + first)
    out, lse = attend(call, xp)
    whole, part = judge(call), judge(some)
    some_out, some_lse = attend(some, xp)
    rows = slice(first, last)
    exact = whole.out.dtype
    tolerance.assert_close(
        "out",
        some_out,
        out[..., rows, :].astype(exact),
        whole.out_limit[..., rows, :] + part.out_limit,
    )
    tolerance.assert_close(
        "lse", some_lse, lse[..., rows].astype(exact), whole.lse_limit[..., rows] + part.lse_limit
    )


# Merging.


@given(problem=problems(), cuts=st.lists(st.floats(0, 1), min_size=1, max_size=3))
def test_merged_parts_are_the_whole(xp, problem, cuts):
    call = materialise(problem)
    ends = [0, *sorted(round(cut * problem.len_k) for cut in cuts), problem.len_k]
    outs, lses, limits = [], [], []
    for first, last in itertools.pairwise(ends):
        part = changed(
            call,
            k=call.k[..., first:last, :],
            v=call.v[..., first:last, :],
            q_start=first_position(call) - first,
            kv_lengths=np.clip(key_lengths(call) - first, 0, last - first),
        )
        out, lse = attend(part, xp)
        outs.append(out)
        lses.append(lse)
        limits.append(judge(part).out_limit)
    truth = judge(call)
    if problem.two_axes:
        outs, lses = [out[None] for out in outs], [lse[None] for lse in lses]
    merged = cuflash.merge_attention([xp.asarray(x) for x in outs], [xp.asarray(x) for x in lses])
    out, lse = (host(x)[0] if problem.two_axes else host(x) for x in merged)
    # A part's error counts by the part's weight, and merging rounds once more.
    parts, lses = np.stack(limits), np.stack(lses).reshape(len(limits), *truth.lse.shape)
    weights = np.exp(lses - np.where(np.isneginf(truth.lse), 0, truth.lse))[..., None]
    limit = truth.out_limit + (weights * parts).sum(axis=0)
    limit = limit + merging_limit(problem.dtype, truth.mass, truth.lse)
    tolerance.assert_close("out", out, truth.out, limit)
    tolerance.assert_close("lse", lse, truth.lse, 2 * truth.lse_limit)


def merging_limit(dtype: str, mass: np.ndarray, lse: np.ndarray) -> np.ndarray:
    """What rounding out once, and weights from a rounded lse, may change."""
    unit = tolerance.ROUNDOFF["float64" if dtype == "float64" else "float32"]
    size = 2 + np.where(np.isfinite(lse), np.abs(lse), 0)[..., None]
    return mass * (tolerance.ROUNDOFF[dtype] + 4 * unit * size) + tolerance.ABSOLUTE[dtype]


@dataclasses.dataclass(frozen=True)
class Parts:
    """Partial results, drawn by a seed; some rows of some parts are empty."""

    seed: int
    dtype: str
    count: int
    shape: tuple[int, ...]  # [*batch, heads, len_q, d_v]
    spread: float

    def materialise(self) -> tuple[list[np.ndarray], list[np.ndarray]]:
        random = np.random.default_rng(self.seed)
        wide = np.float64 if self.dtype == "float64" else np.float32
        outs = random.standard_normal((self.count, *self.shape)).astype(DTYPES[self.dtype])
        lses = (self.spread * random.standard_normal((self.count, *self.shape[:-1]))).astype(wide)
        empty = random.random(lses.shape) < 0.2
        return list(np.where(empty[..., None], np.zeros_like(outs), outs)), list(
            np.where(empty, wide(-np.inf), lses)
        )


dims = st.sampled_from([1, 5, 64, 256, 512]) | st.integers(1, 512)
parts = st.builds(
    Parts,
    seed=seeds,
    dtype=st.sampled_from(list(DTYPES)),
    count=st.integers(1, 5),
    shape=st.tuples(st.integers(0, 3), st.integers(1, 3), st.integers(0, 40), dims)
    | st.tuples(st.integers(1, 3), st.integers(0, 140), dims),
    spread=st.sampled_from([1.0, 0.0, 20.0, 300.0]),
)


def merge(xp, outs, lses):
    result = cuflash.merge_attention([xp.asarray(x) for x in outs], [xp.asarray(x) for x in lses])
    assert type(result.out) is type(result.lse) is xp.ndarray
    assert result.out.dtype == outs[0].dtype
    assert result.lse.dtype == lses[0].dtype
    return host(result.out), host(result.lse)


def check_merged(drawn: Parts, merged, times: int = 1) -> None:
    """`merged`, after so many roundings of out, is what the formula says."""
    outs, lses = drawn.materialise()
    out, lse = oracle.merge(outs, lses)
    mass, _ = oracle.merge([np.abs(out) for out in outs], lses)
    mass = mass.max(axis=-1, keepdims=True).astype(np.float64)
    limit = times * merging_limit(drawn.dtype, mass, np.abs(np.stack(lses)).max(axis=0))
    tolerance.assert_close("out", merged[0], out, limit)
    size = np.maximum(1, np.where(np.isneginf(lse), 1, np.abs(lse)))
    tolerance.assert_close("lse", merged[1], lse, times * tolerance.LSE[drawn.dtype] / 10 * size)


@given(drawn=parts)
def test_merge_is_the_formula(xp, drawn):
    check_merged(drawn, merge(xp, *drawn.materialise()))


def test_merge_of_many(xp):
    """More parts than one launch takes."""
    for count in (63, 64, 65, 200):
        for dtype in DTYPES:
            drawn = Parts(count, dtype, count, (2, 3, 5), 20.0)
            check_merged(drawn, merge(xp, *drawn.materialise()))


@given(drawn=parts, data=st.data())
def test_merge_is_commutative(xp, drawn, data):
    outs, lses = drawn.materialise()
    order = data.draw(st.permutations(range(drawn.count)))
    check_merged(drawn, merge(xp, [outs[i] for i in order], [lses[i] for i in order]))


@given(drawn=parts, data=st.data())
def test_merge_is_associative(xp, drawn, data):
    outs, lses = drawn.materialise()
    first = data.draw(st.integers(0, drawn.count - 1))
    last = data.draw(st.integers(first + 1, drawn.count))
    out, lse = merge(xp, outs[first:last], lses[first:last])
    outs[first:last], lses[first:last] = [out], [lse]
    check_merged(drawn, merge(xp, outs, lses), times=2)


@given(drawn=parts, data=st.data(), rubbish=st.sampled_from([0.0, np.nan, np.inf]))
def test_an_empty_part_is_the_identity(xp, drawn, data, rubbish):
    """Bit for bit, and whatever the empty part's out holds."""
    outs, lses = drawn.materialise()
    out, lse = merge(xp, outs, lses)
    at = data.draw(st.integers(0, drawn.count))
    outs.insert(at, np.full_like(outs[0], rubbish))
    lses.insert(at, np.full_like(lses[0], -np.inf))
    more_out, more_lse = merge(xp, outs, lses)
    assert more_out.tobytes() == out.tobytes()
    assert more_lse.tobytes() == lse.tobytes()
