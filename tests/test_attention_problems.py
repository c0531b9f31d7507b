"""Attention against the oracle: drawn problems, awkward shapes, poisoned memory, repeats."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import unittest.mock
from collections.abc import Iterator

import numpy as np
import pytest
from calling import attend, host, judge
from hypothesis import given
from hypothesis import strategies as st
from poison import poison
from strategies import DTYPES, OUT_LAYOUTS, Call, Problem, frame, materialise, nan_filled, problems
from tolerance import ROUNDOFF

import cuflash
from cuflash._attention import plan

AWKWARD = [(1, 239), (239, 1), (799, 3), (257, 257), (3, 799)]
AWKWARD_DIMS = [8, 40, 72, 96, 128, 160, 192, 224, 256, 320, 512]
HALVES = ("float16", "bfloat16")
MARGIN = 64  # elements on both sides of a guarded output; they keep it aligned


@given(problem=problems())
def test_problem(xp, problem):
    call = materialise(problem)
    judge(call).check(*attend(call, xp))


@contextlib.contextmanager
def packed_whenever_possible() -> Iterator[None]:
    """Small problems fill no round of blocks, and are not packed to spare one."""

    def largest(problem, tile, places):
        return next(pack for pack in (16, 8, 4, 2, 1) if problem.group % pack == 0)

    with unittest.mock.patch.object(plan, "best_pack", largest):
        plan.choose.cache_clear()
        yield
    plan.choose.cache_clear()


@pytest.mark.parametrize("group", [2, 4, 6, 16])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@given(data=st.data())
def test_packed_heads(cp, dtype, group, data):
    call = materialise(data.draw(problems(dtype=dtype, group=group, two_axes=False)))
    with packed_whenever_possible():
        judge(call).check(*attend(call, cp))


@given(problem=problems())
def test_lse_is_optional(xp, problem):
    call = materialise(problem)
    (q, k, v), options = call.on(xp)
    poison(xp)
    out = cuflash.attention(q, k, v, **options)
    assert type(out) is xp.ndarray
    judge(call).check(host(out))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", AWKWARD, ids=str)
def test_awkward_shapes(xp, shape, dtype, causal):
    for seed, head_dim in enumerate(AWKWARD_DIMS):
        problem = Problem(
            seed=seed,
            dtype=dtype,
            group=2,
            len_q=shape[0],
            len_k=shape[1],
            head_dim=head_dim,
            head_dim_v=AWKWARD_DIMS[-1 - seed] if seed % 3 == 0 else head_dim,
            causal=causal,
            q_start=0 if seed % 2 else None,
        )
        call = materialise(problem)
        judge(call).check(*attend(call, xp))


TILES = (16, 32, 64, 96, 128)
EDGES = sorted({1, 257, *(tile + off for tile in TILES for off in (-1, 0, 1))})


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("len_q", EDGES)
def test_masks_at_the_edges_of_tiles(xp, len_q, dtype):
    """One row that sees one key too many, or too few, shows wherever the tiles' borders are."""
    for seed, len_k in enumerate(EDGES):
        edge = EDGES[seed - len(EDGES) // 2]
        for options in (
            {"causal": True},
            {"causal": True, "q_start": 0},
            {"window": (edge, 0)},
            {"window": (edge, edge), "kv_lengths": len_k - 1},
            {"window": (0, edge), "q_start": edge},
            {"window": (None, edge), "q_start": -edge},
            {"kv_lengths": len_k - 1},
        ):
            call = materialise(
                Problem(seed, dtype, len_q=len_q, len_k=len_k, head_dim=8, head_dim_v=8, **options)
            )
            judge(call).check(*attend(call, xp))


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_keys(xp, dtype):
    """Errors of one sign, in sums over thousands of keys, must not pile up."""
    call = materialise(Problem(dtype=dtype, group=2, len_q=20, len_k=4100))
    call = dataclasses.replace(call, v=np.abs(call.v))
    judge(call).check(*attend(call, xp))


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (70, 0)}], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_more_query_tiles_than_a_gpu_has_room_for(xp, head_dim, options):
    """Blocks that go through several, with one key tile or more each, and with none."""
    lengths = np.array([0, 1, 100, 299, 300] * 4, np.int32)
    call = materialise(
        Problem(
            dtype="bfloat16",
            batch=(20,),
            shared=((False,),) * 3,
            kv_heads=7,
            group=2,
            len_q=290,
            len_k=300,
            head_dim=head_dim,
            head_dim_v=head_dim,
            **options,
        )
    )
    call = dataclasses.replace(call, options={**call.options, "kv_lengths": lengths})
    judge(call).check(*attend(call, xp))


@pytest.mark.parametrize("dtype", HALVES)
def test_rounding_is_even(xp, dtype):
    """P and out are rounded, not cut off: errors of both signs, a row's limit or not."""
    call = materialise(Problem(dtype=dtype, group=2, len_q=200, len_k=200))
    truth = judge(call).out.astype(np.float64)
    error = attend(call, xp)[0].astype(np.float64) - truth
    assert abs((error * np.sign(truth)).sum()) < ROUNDOFF[dtype] / 8 * np.abs(truth).sum()


@pytest.mark.parametrize(
    "integer", ["int8", "uint8", "int16", "uint16", "int32", "int64", "uint64"]
)
def test_lengths_and_starts_of_any_integer_dtype(xp, integer):
    """Small and unsigned ones too, although len_k - len_q and what follows do not fit into them."""
    call = materialise(
        Problem(batch=(5,), shared=((False,),) * 3, len_q=90, len_k=120, causal=True)
    )
    lengths = np.array([0, 1, 80, 119, 120], integer)
    for options in ({"kv_lengths": lengths}, {"q_start": lengths[::-1], "kv_lengths": lengths}):
        some = dataclasses.replace(call, options={**call.options, **options})
        judge(some).check(*attend(some, xp))


def test_many_batch_axes(xp):
    """More axes than a kernel walks over, none of which joins its neighbour in one stride."""
    q, k = ((True, False) * 3, (False, True) * 3)
    batch = (2, 3, 2, 2, 2, 3)
    call = materialise(
        Problem(batch=batch, shared=(q, k, k), len_q=5, len_k=7, head_dim=16, causal=True)
    )
    judge(call).check(*attend(call, xp))


# Memory: what is not an output stays as it was, what is masked is never used.


@given(problem=problems(), data=st.data())
def test_margins_of_outputs_stay_untouched(xp, problem, data):
    call = materialise(problem)
    reference = judge(call)
    (q, k, v), options = call.on(xp)
    outputs = []
    lse_dtype = np.dtype(np.float64 if problem.dtype == "float64" else np.float32)
    for truth, dtype in ((reference.out, call.q.dtype), (reference.lse, lse_dtype)):
        layout = data.draw(st.sampled_from(OUT_LAYOUTS))
        outputs.append(guarded(truth.shape, dtype, layout, xp))
    (out_memory, out, out_written), (lse_memory, lse, lse_written) = outputs
    poison(xp)

    result = cuflash.attention(q, k, v, **options, return_lse=True, out=(out, lse))

    assert result[0] is out
    assert result[1] is lse
    reference.check(host(out), host(lse))
    assert_untouched(out_memory, out_written)
    assert_untouched(lse_memory, lse_written)
    for array, before in zip((q, k, v), (call.q, call.k, call.v), strict=True):
        assert host(array).tobytes() == before.tobytes(), "an input was written to"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("len_q", "head_dim_v"), [(1, 1), (3, 7), (200, 33), (129, 127)])
def test_padding_behind_rows_stays_untouched(xp, dtype, len_q, head_dim_v):
    """Hopper's copy engine writes 16 bytes at a time, whatever an array's columns are."""
    problem = Problem(dtype=dtype, len_q=len_q, len_k=40, head_dim_v=head_dim_v)
    call = materialise(problem)
    (q, k, v), options = call.on(xp)
    memory, out, written = guarded((1, len_q, head_dim_v), call.q.dtype, "gaps", xp)
    result, lse = cuflash.attention(q, k, v, **options, return_lse=True, out=(out, None))
    judge(call).check(host(result), host(lse))
    assert_untouched(memory, written)


def guarded(shape, dtype, layout, xp):
    """(memory full of NaN, an output cut out of it, where in the memory the output lies)."""
    if len(shape) == 1:
        layout = "unaligned"
    buffer, view = frame(shape, layout)
    size = math.prod(buffer) + 2 * MARGIN
    memory = xp.asarray(nan_filled((size,), dtype))
    written = np.zeros(size, bool)
    view(written[MARGIN:-MARGIN].reshape(buffer))[...] = True
    return memory, view(memory[MARGIN:-MARGIN].reshape(buffer)), written


def assert_untouched(memory, written):
    memory = host(memory)
    bits = memory.view(np.uint8).reshape(memory.size, memory.itemsize)
    assert (bits[~written] == 0xFF).all(), "memory around the output was written to"


@given(problem=problems(), data=st.data())
def test_keys_that_nobody_may_see_never_leak(xp, problem, data):
    call = without_equal_rows(materialise(problem))
    truth = judge(call)
    bad = data.draw(st.sampled_from([np.nan, np.inf, -np.inf]))
    k, v = call.k.copy(), call.v.copy()
    for array in (k, v):
        array[unseen(truth.allowed, array)] = bad
    truth.check(*attend(dataclasses.replace(call, k=k, v=v), xp))


def without_equal_rows(call: Call) -> Call:
    """The call in layouts in which every element of k and v has its own place."""
    layouts = tuple("gaps" if "same" in layout else layout for layout in call.layouts)
    return dataclasses.replace(call, layouts=layouts)


def unseen(allowed, array):
    """Where in k or v, of any broadcastable batch, no query of any batch entry may look."""
    seen = allowed.any(axis=-2)  # [*batch, 1, len_k]
    front = max(array.ndim, 3) - 3
    seen = seen.any(axis=tuple(range(seen.ndim - 2 - front)))
    for axis, size in enumerate(array.shape[:front]):
        if size == 1:
            seen = seen.any(axis=axis, keepdims=True)
    seen = seen if array.ndim > 2 else seen[0]
    return np.broadcast_to(~seen[..., None], array.shape)


@given(problem=problems(causal=True, values="normal"), data=st.data())
def test_a_bad_key_reaches_only_the_rows_that_see_it(xp, problem, data):
    call = without_equal_rows(materialise(problem))
    if problem.len_k == 0:
        return
    bad = data.draw(st.integers(0, problem.len_k - 1))
    k = call.k.copy()
    k[..., bad, :] = np.nan
    call = dataclasses.replace(call, k=k)
    judge(call).check(*attend(call, xp))


NOTHING_TO_SEE = {
    "no keys": Problem(len_q=5, len_k=0),
    "no keys, causal": Problem(len_q=5, len_k=0, causal=True),
    "length 0": Problem(len_q=70, len_k=70, kv_lengths=0),
    "lengths, some 0": Problem(batch=(9,), shared=((False,),) * 3, len_k=2, kv_lengths="int32"),
    "more rows than keys": Problem(len_q=150, len_k=20, causal=True),
    "rows before the keys": Problem(len_q=140, len_k=140, causal=True, q_start=-100),
    "window before the keys": Problem(len_q=130, len_k=64, window=(None, 3), q_start=-90),
    "window after the keys": Problem(len_q=130, len_k=64, window=(3, None), q_start=20),
    "no rows": Problem(len_q=0, len_k=7, causal=True),
    "no batch": Problem(batch=(0,), shared=((False,),) * 3, len_q=3, len_k=3),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", NOTHING_TO_SEE)
def test_a_row_without_keys_is_zero(xp, case, dtype):
    call = materialise(dataclasses.replace(NOTHING_TO_SEE[case], dtype=dtype))
    truth = judge(call)
    out, lse = attend(call, xp)
    truth.check(out, lse)
    empty = ~truth.allowed.any(axis=-1)
    empty = np.broadcast_to(empty, truth.lse.shape)
    assert empty.any() == (truth.lse.size > 0)
    assert (out[empty] == 0).all()
    assert np.isneginf(lse[empty]).all()
    assert np.isfinite(lse[~empty]).all()


# The other things a caller may rely on.


@given(problem=problems(dtype="float16") | problems(dtype="bfloat16"))
def test_half_inputs_may_have_a_float32_output(xp, problem):
    call = materialise(problem)
    truth = judge(call, out_dtype=np.float32)
    out = xp.asarray(nan_filled(truth.out.shape, np.dtype(np.float32)))
    got, lse = attend(call, xp, out=(out, None))
    assert got.dtype == np.float32
    truth.check(got, lse)


@pytest.mark.parametrize("dtype", HALVES)
def test_largest_halves(xp, dtype):
    """Products of the largest numbers a dtype's kernel meets stay finite where the answer is."""
    call = materialise(Problem(dtype=dtype, len_q=40, len_k=150, head_dim=32, head_dim_v=32))
    large = call.v.dtype.type(65504)
    call = dataclasses.replace(call, v=np.where(call.v > 0, large, -large))
    call = dataclasses.replace(call, q=call.q * call.q.dtype.type(200))
    judge(call).check(*attend(call, xp))


REPEATED = {
    "plain": Problem(group=2, len_q=300, len_k=300),
    "causal": Problem(kv_heads=2, len_q=257, len_k=257, head_dim=128, head_dim_v=128, causal=True),
    "decoding": Problem(group=8, len_q=1, len_k=1500, head_dim=128, head_dim_v=128),
    "lengths": Problem(
        batch=(3,),
        shared=((False,),) * 3,
        len_q=130,
        len_k=200,
        head_dim=72,
        head_dim_v=40,
        window=(100, 20),
        kv_lengths="int32",
    ),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", REPEATED)
def test_repeats_are_bitwise_equal(xp, case, dtype):
    """Races show as answers that differ now and then."""
    call = materialise(dataclasses.replace(REPEATED[case], dtype=dtype))
    (q, k, v), options = call.on(xp)
    first = None
    for repeat in range(300 if xp.__name__ == "cupy" else 3):
        if repeat % 2 == 0:  # fresh memory holds NaN in one run and old results in the next
            poison(xp)
        out, lse = cuflash.attention(q, k, v, **options, return_lse=True)
        bits = host(out).tobytes() + host(lse).tobytes()
        first = first or bits
        assert bits == first, f"repeat {repeat} differs"


# On the GPU only.


@pytest.mark.parametrize("option", ["kv_lengths", "q_start"])
def test_values_on_the_gpu_are_clamped(cp, option):
    """They cannot be checked without waiting for the GPU, and must not lead out of bounds."""
    problem = Problem(batch=(6,), shared=((False,),) * 3, len_q=70, len_k=130, causal=True)
    call = materialise(problem)
    wild = np.array([-(2**62), -(2**31), -1, 131, 2**31, 2**62])
    tame = np.clip(wild, 0, 130) if option == "kv_lengths" else np.clip(wild, -1000, 1000)
    out, lse = attend(dataclasses.replace(call, options={**call.options, option: wild}), cp)
    judge(dataclasses.replace(call, options={**call.options, option: tame})).check(out, lse)


FAR = [("float16", "batch"), ("float16", "heads"), ("float16", "rows"), ("float32", "rows")]


@pytest.mark.parametrize(("dtype", "axis"), FAR)
def test_offsets_past_two_to_the_31(cp, dtype, axis):
    """Elements 2**31 and more apart along one axis, in memory otherwise full of NaN."""
    sizes = {"batch": 2, "heads": 2, "rows": 130}
    call = materialise(
        Problem(
            dtype=dtype,
            batch=(sizes["batch"],),
            shared=((False,),) * 3,
            kv_heads=sizes["heads"],
            len_q=sizes["rows"],
            len_k=sizes["rows"],
        )
    )
    itemsize = call.q.itemsize
    # Rows of 64 columns; those of q, k and v lie beside one another, out has memory of its own.
    strides = {"batch": 2**17, "heads": 2**16, "rows": 256}
    strides[axis] = 2**31 // (sizes[axis] - 1) + 256
    nbytes = (sizes[axis] * strides[axis] + 2**18) * itemsize
    free, _ = cp.cuda.runtime.memGetInfo()
    if free < 3 * nbytes:
        pytest.skip(f"needs {3 * nbytes >> 30} GiB of free GPU memory")
    memories = [cp.cuda.MemoryPointer(cp.cuda.Memory(nbytes), 0) for _ in range(2)]
    for memory in memories:
        memory.memset_async(0xFF, nbytes)
    places = [memories[0] + 64 * n * itemsize for n in range(3)] + [memories[1]]
    spread = (*(stride * itemsize for stride in strides.values()), itemsize)
    q, k, v, out = (cp.ndarray(call.q.shape, call.q.dtype, at, spread) for at in places)
    for view, array in zip((q, k, v), (call.q, call.k, call.v), strict=True):
        view[...] = cp.asarray(array)
    result, lse = cuflash.attention(q, k, v, return_lse=True, out=(out, None))
    assert result is out
    judge(call).check(host(out), host(lse))
