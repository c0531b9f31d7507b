"""The host's arithmetic behind a launch: counts, folded batch axes, divisions without dividing."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_compile import problem

from cuflash._attention import plan, plan_around
from cuflash._attention.problem import Operands
from cuflash._attention.variants.program import Step, program
from cuflash.jit import gpu, repeat


@pytest.fixture(scope="module")
def host():
    pytest.importorskip("cupy", reason="the host side of the kernels imports CuPy")
    from cuflash._attention import gpu as host

    return host


@given(
    len_q=st.integers(0, 40),
    len_k=st.integers(0, 40),
    q_start=st.none() | st.integers(-60, 60),
    left=st.none() | st.integers(0, 50),
    right=st.none() | st.integers(0, 50),
)
def test_visible_scores_are_counted(len_q, len_k, q_start, left, right) -> None:
    asked = replaced(len_q=len_q, len_k=len_k, q_start=q_start, left=left, right=right)
    start = len_k - len_q if q_start is None else q_start
    seen = 0
    for i, j in itertools.product(range(len_q), range(len_k)):
        after = left is None or j >= i + start - left
        before = right is None or j <= i + start + right
        seen += after and before
    assert plan.visible(asked) == seen


def replaced(**fields):
    return dataclasses.replace(problem("float16", 64, 64), **fields)


@given(st.data())
def test_divisor_divides(host, data) -> None:
    length = data.draw(st.integers(1, 2**31 - 1) | st.integers(1, 300))
    near = data.draw(st.integers(0, (2**31 - 1) // length)) * length + data.draw(st.integers(-1, 1))
    number = min(max(near, 0), 2**31 - 1)
    same, magic, shift = host.divisor(length)
    assert same == length
    assert magic < 2**32
    assert number * magic < 2**64
    assert number * magic >> shift == number // length


@given(st.data())
def test_folded_batch_axes_reach_every_entry(host, data) -> None:
    """What the kernel does with the folded strides finds each entry of the batch once."""
    batch = tuple(data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=6)))
    size = math.prod(batch)
    entries = np.arange(size, dtype=np.int64).reshape(batch)
    order = data.draw(st.permutations(range(len(batch))))
    entries = np.transpose(np.ascontiguousarray(np.transpose(entries, order)), np.argsort(order))
    q = np.broadcast_to(entries[..., None, None, None], (*batch, 1, 1, 8))
    sides = [data.draw(st.booleans()) for _ in batch]
    shared = entries[tuple(slice(None) if keep else slice(0, 1) for keep in sides)]
    k = np.broadcast_to(np.broadcast_to(shared, batch)[..., None, None, None], (*batch, 1, 1, 8))
    shape, strides = host.collapse(Operands(q=q, k=k, v=k, out=q))
    assert math.prod(shape) == size
    found = []
    for index in np.ndindex(shape):
        places = [sum(i * s for i, s in zip(index, strides[name])) for name in ("q", "k")]
        found.append(tuple(walk(x, place) for x, place in zip((q, k), places)))
    expected = zip(q[..., 0, 0, 0].flat, k[..., 0, 0, 0].flat)
    assert sorted(found) == sorted((int(a), int(b)) for a, b in expected)


def walk(array: np.ndarray, place: int) -> int:
    """The element `place` elements behind the first."""
    first = array[(slice(0, 1),) * array.ndim]
    return int(np.lib.stride_tricks.as_strided(first, (place + 1,), (array.itemsize,))[-1])


def test_batches_that_lie_together_fold_into_one_axis(host) -> None:
    x = np.zeros((2, 3, 5, 4, 7, 8))
    shape, strides = host.collapse(Operands(q=x, k=x, v=x, out=x))
    assert shape == (1, 1, 1, 30)
    assert set(strides.values()) == {(0, 0, 0, 4 * 7 * 8)}


def test_merging_many_parts_is_planned_as_it_runs(host) -> None:
    part = np.zeros((2, 3, 8), np.float16)
    for parts, launches in ((1, 1), (64, 1), (65, 2), (127, 2), (128, 3), (190, 3), (191, 4)):
        plans = host.merge_plans([part] * parts, part)
        assert len(plans) == launches
        constants = [dict(each.kernel.constants) for each in plans]
        assert constants[0]["Element"] == "float16"
        assert constants[-1]["Output"] == "float16"
        assert all(a["Output"] == b["Element"] for a, b in itertools.pairwise(constants))


def test_merging_refuses_every_copy_in_a_capture(host, monkeypatch) -> None:
    """Before anything is allocated, which is why no GPU is needed to see it."""
    monkeypatch.setattr(host, "capturing", lambda: True)
    parts, lses = [np.zeros((2, 3, 8), np.float32)] * 65, [np.zeros((2, 3), np.float32)] * 65
    out, lse = parts[0].copy(), lses[0].copy()
    gaps = np.zeros((2, 3, 16), np.float32)[..., ::2]
    with pytest.raises(RuntimeError, match="merge 64 parts at most"):
        host.merge(parts, lses, out, lse)
    for some_parts, some_out in (([gaps], out), (parts[:1], gaps)):
        with pytest.raises(RuntimeError, match="pass contiguous ones"):
            host.merge(some_parts, lses[:1], some_out, lse)


def test_scales_that_float32_cannot_hold(host) -> None:
    single, double = np.dtype("f4"), np.dtype("f8")
    assert host.folded(0.5, single) == (0.5 * math.log2(math.e), 1)
    assert host.folded(-0.5, double) == (0.5 * math.log2(math.e), -1)
    assert host.folded(0.0, single) == host.folded(1e-40, single) == (1, 0)
    assert host.folded(1e-40, double)[1] == 1
    assert host.folded(-3e38, single) == (float(np.finfo("f4").max), -1)


def test_more_blocks_than_a_grid_holds_is_an_error() -> None:
    asked = replaced(batch=(2**20,), heads=2**11, kv_heads=2**11, len_q=1)
    with pytest.raises(ValueError, match=r"`q` has 1 rows .* 2147483648 heads.* 2\*\*31"):
        plan.choose(asked, gpu.of_arch(90), "float16")


NO_OPTIONS = (None, False, None, None, None, None, False)  # as api.attention hands them on


def test_known_calls_differ_in_pointers_alone(monkeypatch) -> None:
    """What may change the plan is in the key; the arrays' memory is never read, so no GPU is."""
    cupy = pytest.importorskip("cupy")
    monkeypatch.setattr(cupy.cuda.runtime, "getDevice", lambda: 0)

    def key(options=NO_OPTIONS, **changes):
        x = {"at": 4096, "device": 0, "shape": (4, 8), "strides": None, "dtype": "f2"} | changes
        memory = cupy.cuda.UnownedMemory(x["at"], 4096, None, x["device"])
        pointer = cupy.cuda.MemoryPointer(memory, 0)
        array = cupy.ndarray(x["shape"], x["dtype"], pointer, x["strides"])
        return repeat.again("attention", (array, array, array), options)[0]

    assert key() == key(at=8192)
    assert key() == key(at=4096 + 16)
    for changes in (
        {"at": 4096 + 2},
        {"device": 1},
        {"shape": (8, 4)},
        {"strides": (32, 2)},
        {"dtype": "f4"},
    ):
        assert key() != key(**changes), changes
    for place, value in enumerate((1.0, True, 7, 3, 5, "tf32", True)):
        options = list(NO_OPTIONS)
        options[place] = value
        assert key() != key(tuple(options))
    windows = [(1, 2), (True, 2), (1.0, 2), (1, np.int64(2)), 1, True]
    keys = [key((*NO_OPTIONS[:2], window, *NO_OPTIONS[3:])) for window in windows]
    assert len(set(keys)) == len(windows)  # what a check refuses never stands for what it takes
    assert key((1, *NO_OPTIONS[1:])) != key((True, *NO_OPTIONS[1:]))  # True is no scale
    before = key()
    monkeypatch.setenv("CUFLASH_ARCH", "80")
    assert key() != before


def test_arrays_among_the_options_take_the_long_way(monkeypatch) -> None:
    cupy = pytest.importorskip("cupy")
    monkeypatch.setattr(cupy.cuda.runtime, "getDevice", lambda: 0)
    memory = cupy.cuda.UnownedMemory(4096, 4096, None, 0)
    x = cupy.ndarray((4, 8), "f2", cupy.cuda.MemoryPointer(memory, 0))
    lengths = cupy.ndarray((2,), "i4", cupy.cuda.MemoryPointer(memory, 0))
    options = (*NO_OPTIONS[:4], lengths, *NO_OPTIONS[5:])
    assert repeat.again("attention", (x, x, x), options) == (None, None)
    host_array = np.zeros((4, 8))
    assert repeat.again("attention", (host_array,) * 3, NO_OPTIONS) == (None, None)
    assert repeat.again("attention", (x, x, host_array), NO_OPTIONS) == (None, None)


ARCHITECTURES = [75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121]
PRECISIONS = [*((dtype, None) for dtype in plan.BYTES), ("float32", "tf32")]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_head_dim_has_a_tile(arch: int) -> None:
    dims = [*range(1, 513, 15), 256, 257, 384, 385, 512]
    for kind, d, d_v in itertools.product(PRECISIONS, dims, (1, 64, 200, 256, 257, 400, 512)):
        dtype, precision = kind
        chosen = plan.choose(problem(dtype, d, d_v, precision), gpu.of_arch(arch), dtype)
        constants = dict(chosen.kernel.constants)
        assert constants["kHeadDim"] >= max(d, min(d_v, constants["kHeadDimV"]))
        assert constants["kHeadDimV"] * constants["kSlices"] >= d_v
        assert chosen.shared_memory <= gpu.of_arch(arch).shared_memory_per_block


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_warps_share_out_the_tile(arch: int) -> None:
    """Rows first, then columns, of which a thread's registers hold its share."""
    for kind, d, d_v in itertools.product(PRECISIONS, plan.BUCKETS, plan.BUCKETS):
        dtype, precision = kind
        chosen = plan.choose(problem(dtype, d, d_v, precision), gpu.of_arch(arch), dtype)
        constants = dict(chosen.kernel.constants)
        rows = 16 * constants.get("kRowTiles", 0) + 4 * constants.get("kThreadRows", 0)
        warps, warps_of_rows = constants["kThreads"] // 32, constants["kBlockM"] // rows
        parts, rest = divmod(warps, warps_of_rows)
        assert (warps_of_rows * rows, rest) == (constants["kBlockM"], 0)
        columns, rest = divmod(constants["kHeadDimV"], parts)
        assert rest == 0
        number = plan.BYTES[dtype] // 4 or 1  # registers
        assert rows * columns // 32 * number <= 128, chosen
        if max(d, d_v) <= 256:
            assert parts == 1


def test_heads_too_wide_for_hoppers_own_instructions_are_portable() -> None:
    hopper, ampere = gpu.of_arch(90), gpu.of_arch(80)
    for d, d_v in ((257, 64), (64, 257), (512, 512)):
        for dtype in ("float16", "bfloat16"):
            asked = problem(dtype, d, d_v)
            chosen = plan.choose(asked, hopper, dtype)
            assert chosen.kernel.file == plan.choose(asked, ampere, dtype).kernel.file
            assert f"head dim {max(d, d_v)} is beyond 256" in chosen.why
            assert not plan.uses_hopper(asked, hopper)
    assert plan.choose(problem("float16", 256, 256), hopper, "float16").kernel.exact


def test_tf32_that_does_not_fit_is_float32() -> None:
    """Where there is room for it, TF32 it is; where there is none, it would not be faster."""
    for arch, d, file in ((86, 384, "fp32"), (86, 385, "simt"), (80, 512, "fp32")):
        asked = problem("float32", d, d, "tf32")
        chosen = plan.choose(asked, gpu.of_arch(arch), "float32")
        assert chosen.kernel.file == f"_attention/forward_{file}.cu"


# Hopper's own instructions


def test_an_obstacle_is_named_and_the_portable_kernel_serves() -> None:
    hopper, ampere = gpu.of_arch(90), gpu.of_arch(80)
    asked = replaced()
    assert plan.choose(asked, hopper, "float16").kernel.exact
    fallback = plan.choose(asked, hopper, "float16", obstacle="`k` has gaps")
    assert fallback.kernel.file == plan.choose(asked, ampere, "float16").kernel.file
    assert "`k` has gaps" in fallback.why
    assert not fallback.kernel.exact
    forced = dataclasses.replace(hopper, forced=True)  # PTX of sm_90 has none of it
    for other in (forced, ampere, gpu.of_arch(100), gpu.of_arch(120)):
        assert not plan.choose(asked, other, "float16").kernel.exact
    assert not plan.choose(problem("float32", 64, 64), hopper, "float32").kernel.exact


def test_query_tiles_have_an_order_where_some_may_be_waited_for() -> None:
    """More of them than blocks, with a mask, on Hopper; but not so many that one matters little."""
    variant = program((Step("variant", mask="(i - j) % 7 < 3"),))
    shape = {"heads": 8, "kv_heads": 8, "head_dim": 128, "head_dim_v": 128, "variant": variant}
    for len_q, arch, ordered in ((128, 90, False), (4096, 90, True), (4096, 80, False)):
        asked = replaced(**shape, len_q=len_q, len_k=4096)
        chosen = plan.choose(asked, gpu.of_arch(arch), "float16")
        assert (plan_around.order(asked, chosen) is not None) == ordered
    many = replaced(**shape, batch=(400,), len_q=4096, len_k=4096)
    chosen = plan.choose(many, gpu.of_arch(90), "float16")
    assert plan_around.order(many, chosen) is None


def test_blocks_are_no_more_than_fit_at_a_time() -> None:
    hopper = gpu.of_arch(90)
    for len_q, blocks in ((1, 8), (129, 16), (128 * 40, hopper.multiprocessors)):
        asked = replaced(len_q=len_q, heads=4, kv_heads=4, head_dim=128, head_dim_v=128)
        assert plan.choose(asked, hopper, "float16").grid == (blocks, 1, 1)


@pytest.mark.parametrize(
    ("batch", "len_q", "heads", "pack", "tiles"),
    [
        (1, 1, 32, 1, 32),  # one round as it is
        (8, 1, 32, 2, 128),
        (64, 1, 32, 8, 132),
        (16, 16, 32, 4, 128),
        (16, 130, 32, 4, 132),  # 5 tiles of 128 for 4 heads, not 8
        (16, 128, 32, 1, 132),
        (99, 9, 24, 2, 132),
    ],
)
def test_heads_that_share_keys_are_packed(
    batch: int, len_q: int, heads: int, pack: int, tiles: int
) -> None:
    """As few as leave no more rounds of 132 blocks than any other number of them."""
    hopper = gpu.of_arch(90)
    shape = {"batch": (batch,), "len_q": len_q, "heads": heads, "kv_heads": 4}
    asked = replaced(**shape, head_dim=128, head_dim_v=128)
    chosen = plan.choose(asked, hopper, "float16")
    assert (chosen.pack, chosen.grid[0]) == (pack, tiles)
    assert plan.choose(asked, hopper, "float16", packs=False).pack == 1
    assert plan.choose(dataclasses.replace(asked, dropout=True), hopper, "float16").pack == 1
    long = dataclasses.replace(asked, len_q=plan.FEW_QUERIES + 1)
    assert plan.choose(long, hopper, "float16").pack == 1


@given(
    len_q=st.integers(1, 9000),
    pairs=st.integers(1, 300),
    window=st.sampled_from([(None, None), (None, 0), (512, 0), (100, 100)]),
)
def test_groups_of_heads_give_blocks_as_much_to_do(
    len_q: int, pairs: int, window: tuple[int | None, int]
) -> None:
    hopper, (left, right) = gpu.of_arch(90), window
    asked = replaced(
        batch=(pairs,), heads=1, kv_heads=1, len_q=len_q, len_k=len_q, left=left, right=right
    )
    chosen = plan.choose(asked, hopper, "float16")
    heads = plan.sweep(asked, hopper, chosen)
    assert 1 <= heads <= pairs
    costs = plan.tile_costs(asked, chosen)
    work = [plan.imbalance(costs, pairs, each, chosen.grid[0]) for each in range(1, heads + 1)]
    assert work[-1] <= work[0] + 0.01
    assert all(each > plan.EVEN for each in work[:-1]), "a smaller group would have done"


@pytest.mark.parametrize("right", [None, 0])
@pytest.mark.parametrize("d", [64, 128, 256])
def test_blocks_have_as_much_to_do(d: int, right: int | None) -> None:
    """Lengths of the bench, at 16,384 tokens in all."""
    hopper, heads = gpu.of_arch(90), 2048 // d
    for length in (512, 1024, 2048, 4096, 8192, 16384):
        shape = {"batch": (16384 // length,), "len_q": length, "len_k": length}
        asked = replaced(**shape, heads=heads, kv_heads=heads, head_dim=d, head_dim_v=d)
        asked = dataclasses.replace(asked, left=None, right=right)
        chosen = plan.choose(asked, hopper, "float16")
        costs, pairs = plan.tile_costs(asked, chosen), plan.pairs_of_heads(asked)
        together = plan.sweep(asked, hopper, chosen)
        # What cannot be shared out evenly is the last round, of the smallest tiles.
        assert plan.imbalance(costs, pairs, together, chosen.grid[0]) < 1.04, length


def test_query_tiles_with_fewer_rows_cost_less() -> None:
    """Of a tile of two key tiles, 0.3 does not depend on how many warpgroups are at work."""
    for rows, cost in ((1, 2.3), (64, 2.3), (65, 3.0), (128, 3.0)):
        asked = replaced(len_q=rows, len_k=256, head_dim=128, head_dim_v=128)
        asked = dataclasses.replace(asked, left=None, right=None)
        chosen = plan.choose(asked, gpu.of_arch(90), "float16", packs=False)
        np.testing.assert_allclose(plan.tile_costs(asked, chosen), [cost])


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        ("contiguous", None),
        ("gaps", None),
        ("one row", None),
        ("same heads", None),
        ("same rows", "`k` is broadcast along its rows"),
        ("negative", "negative or very long strides"),
        ("three batch axes", "more than two strides"),
        ("old NVRTC", "NVRTC is older than 12.9"),
    ],
)
def test_what_the_copy_engine_cannot_read(host, monkeypatch, layout: str, reason) -> None:
    monkeypatch.setattr(host.compile, "takes_exact", lambda: layout != "old NVRTC")
    q = np.zeros((2, 3, 5, 64), np.float16)
    k = {
        "gaps": np.zeros((4, 3, 10, 128), np.float16)[::2, :, ::2, :64],
        "one row": np.zeros((2, 3, 1, 64), np.float16),
        "same heads": np.broadcast_to(np.zeros((2, 1, 5, 64), np.float16), q.shape),
        "same rows": np.broadcast_to(np.zeros((2, 3, 1, 64), np.float16), q.shape),
        "negative": np.zeros_like(q)[::-1],
    }.get(layout, q)
    if layout == "three batch axes":
        q = np.zeros((4, 4, 4, 3, 5, 64), np.float16)[::2, ::2, ::2]
        k = q
    operands = Operands(q=q, k=k, v=k, out=q)
    shape, strides = host.collapse(operands)
    monkeypatch.setattr(host, "copied", lambda operands: ())
    asked = replaced(batch=shape, heads=3, kv_heads=3, len_q=5, len_k=k.shape[-2])
    found = host.obstacle(asked, operands, strides)
    assert (found is None) == (reason is None)
    assert reason is None or reason in found


@pytest.mark.parametrize(
    ("columns", "first", "passed", "staged"),
    [(64, 0, False, True), (20, 0, False, False), (64, 0, True, True), (64, 4, True, False)],
)
def test_plans_know_where_the_output_lies(
    host, monkeypatch, columns: int, first: int, passed: bool, staged: bool
) -> None:
    """Ahead of a call as well: warmup would compile another kernel otherwise."""
    monkeypatch.setattr(host.gpus, "current", lambda: gpu.of_arch(90))
    monkeypatch.setattr(host.compile, "takes_exact", lambda: True)
    monkeypatch.setattr(host, "copied", lambda operands: ())
    monkeypatch.setattr(host, "readable", lambda array: array.ctypes.data % 16 == 0)
    q = np.zeros((2, 3, 5, 64), np.float16)
    room = np.zeros((2, 3, 5, 72), np.float16)
    out = room[..., first : first + columns] if passed else None
    asked = replaced(batch=(2,), heads=3, kv_heads=3, len_q=5, len_k=5, head_dim_v=columns)
    operands = Operands(q=q, k=q, v=q[..., :columns], given=(out, None))
    (chosen,) = host.plans(asked, operands)
    assert dict(chosen.kernel.constants)["kStaged"] == staged
