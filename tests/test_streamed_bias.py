"""Biases that Hopper's copy engine brings by tiles, beside those that lanes read by themselves."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from calling import attend, judge
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import DTYPES, Problem, Spec, lay_out, materialise, problems
from test_compile import check, problem
from test_variants import changed, everywhere

import cuflash
from cuflash import Variant
from cuflash._attention import api, plan
from cuflash._attention.problem import Operands
from cuflash._attention.variants import registry
from cuflash._attention.variants.kinds import Kind
from cuflash._attention.variants.program import Step, program
from cuflash.jit import compile, gpu

HALVES = ("float16", "bfloat16")
some = settings(max_examples=max(8, settings().max_examples // 8))
SIDES = {"len_q": 200, "len_k": 300, "group": 2, "batch": (2,), "shared": ((False,),) * 3}


# Against the oracle.


@some
@given(data=st.data())
def test_problem(xp, data):
    """With other variants too: a mask's tiles are visited in an order of their own."""
    own = st.sampled_from(HALVES)
    ones = st.tuples(*[st.integers(0, 3).map(lambda n: n == 3)] * 5)
    values = st.sampled_from(["normal", "large", "holes"])
    layout = st.sampled_from(["padded", "padded", "offset"])
    bias = st.builds(Spec, dtype=own, values=values, ones=ones, layout=layout)
    drawn = problems(variants=True, dtype=data.draw(own), bias=data.draw(bias))
    call = materialise(data.draw(drawn))
    judge(call).check(*attend(call, xp))


PLACES = {
    "all": {},
    "causal": {"causal": True},
    "window": {"window": (70, 3)},
    "lengths": {"kv_lengths": "int32", "causal": True},
    "start": {"q_start": "int32", "window": (40, 40)},
}
BROADCAST = {  # axes of length 1, the last one first
    "whole": (),
    "heads": (False, False, True),
    "batch": (False, False, False, True),
    "rows": (False, True),
    "keys": (True,),
}


@pytest.mark.parametrize("broadcast", BROADCAST)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_broadcast_biases(xp, dim, broadcast):
    """Of both dtypes, beside inputs of both, with rows that begin anywhere once."""
    for seed, places in enumerate(PLACES.values()):
        layout = "offset" if seed == 3 else "padded"
        bias = Spec(HALVES[seed // 2 % 2], ones=BROADCAST[broadcast], layout=layout)
        sides = {**SIDES, "head_dim": dim, "head_dim_v": dim, **places}
        call = materialise(Problem(seed, HALVES[seed % 2], bias=bias, **sides))
        judge(call).check(*attend(call, xp))


@pytest.mark.parametrize("len_q", [1, 64, 65, 193, 257])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_lengths_at_the_edges_of_tiles(xp, dim, len_q):
    for seed, len_k in enumerate((1, 63, 64, 65, 127, 128, 129, 192, 257)):
        sides = {"len_q": len_q, "len_k": len_k, "head_dim": dim, "head_dim_v": dim}
        for causal in (False, True):
            bias = Spec("bfloat16", layout="padded")
            call = materialise(Problem(seed, "bfloat16", causal=causal, bias=bias, **sides))
            judge(call).check(*attend(call, xp))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("places", PLACES)
def test_hidden_places_never_leak(xp, places, bad):
    for seed, mask in enumerate((None, Spec("bool", "tiles"))):
        spec = Spec("float16", layout="padded")
        sides = {**SIDES, **PLACES[places], "mask": mask}
        call = materialise(Problem(seed, "float16", bias=spec, **sides))
        bias = everywhere(call, call.options["bias"], 3)
        truth = judge(changed(call, bias=bias))
        bias = np.where(np.broadcast_to(truth.allowed, bias.shape), bias, np.float16(bad))
        truth.check(*attend(changed(call, bias=bias), xp))


@pytest.mark.parametrize("start", [None, 7])
@pytest.mark.parametrize("own", HALVES)
def test_arrays_of_variants(xp, own, start):
    """Larger than need be, and with NaN where nobody looks."""
    call = materialise(Problem(dtype="bfloat16", q_start=start, **SIDES))
    array = np.full((5, 210, 310), np.nan, DTYPES[own])
    array[:2, :200, :300] = np.random.default_rng(0).standard_normal((2, 200, 300))
    pair = array[:2, :200, :300].astype(np.float64)
    for source, values, added in (
        ("score + pair[h, row, j]", array, pair),
        ("score + pair[row, j]", array[1], pair[1]),
        ("score + 0.5 * pair[row, j] * pair[row, j]", array[0], 0.5 * pair[0] ** 2),
    ):
        truth = judge(call, score=lambda score, added=added, **_: score + added)
        on_device = lay_out(values, "padded", xp)
        truth.check(*attend(call, xp, variant=Variant(source)(pair=on_device)))


def test_repeats_are_bitwise_equal(xp):
    """Each with arrays of its own: a repeated call finds the new bias."""
    bias = Spec("bfloat16", layout="padded")
    call = materialise(Problem(dtype="bfloat16", causal=True, bias=bias, **SIDES))
    bits = set()
    for _ in range(50 if xp.__name__ == "cupy" else 2):
        out, lse = attend(call, xp)
        bits.add((out.tobytes(), lse.tobytes()))
    assert len(bits) == 1


# What is brought by tiles.


def test_plans_say_so(cp):
    if cp.cuda.Device().compute_capability != "90" or not compile.takes_exact():
        pytest.skip("needs Hopper's kernel")
    q = cp.zeros((2, 4, 200, 64), "float16")
    room = cp.zeros((4, 200, 208), "float16")
    for bias, streamed in (
        (room[..., :200], 0),
        (room[..., 1:201], None),  # rows begin anywhere
        (room[:, :1, :200], None),  # broadcast along rows
        (room.astype("float32")[..., :200], None),
    ):
        _, (chosen,) = api._plans(q, q, q, bias=bias)
        assert chosen.streamed == streamed
        assert ("bias by tiles" in chosen.why) == (streamed is not None)
        assert cuflash.attention(q, q, q, bias=bias).shape == q.shape


@pytest.fixture(scope="module")
def host():
    pytest.importorskip("cupy", reason="the host side of the kernels imports CuPy")
    from cuflash._attention import gpu as host

    return host


def biased(own: str, axes: int = 3):
    """The program of a bias, of as many axes."""
    score = registry.BEFORE[-1].score if axes == 3 else "score + bias[row, j]"
    kind = Kind(own, axes, unit=True, keys=True, aligned=True)
    return program((Step("bias", score, kinds=(("bias", kind),)),))


def asked(dtype: str, d: int, own: str = "float16", axes: int = 3, **fields):
    fields = {"variant": biased(own, axes), **fields}
    return dataclasses.replace(problem(dtype, d, d), **fields)


def array_with_stride(stride: int, *shape: int) -> np.ndarray:
    """Rows that many elements apart, the first at a multiple of 16 bytes."""
    memory = np.zeros(int(np.prod(shape[:-1])) * stride + 8, np.float16)
    first = -memory.ctypes.data % 16 // 2
    strides = [2]
    for length in (1, *shape[:0:-1]):
        strides.append(2 * stride if len(strides) == 1 else strides[-1] * length)
    strides = strides[: len(shape)][::-1]
    return np.lib.stride_tricks.as_strided(memory[first:], shape, strides)


def arrays():
    whole = array_with_stride(24, 3, 5, 20)
    return {
        "as it is": (whole, True),
        "of more rows": (array_with_stride(24, 3, 9, 20), True),
        "of fewer rows": (whole[:, :4], False),
        "of fewer keys": (whole[..., :19], False),
        "of fewer heads": (whole[:2], False),
        "anywhere": (array_with_stride(24, 3, 5, 21)[..., 1:], False),
        "rows anywhere": (array_with_stride(21, 3, 5, 20), False),
        "one head": (np.broadcast_to(whole[:1], whole.shape), True),
        "one row": (np.broadcast_to(whole[:, :1], whole.shape), False),
        "backwards": (whole[:, ::-1], False),
        "turned": (np.zeros((3, 20, 5), np.float16).swapaxes(1, 2), False),
        "without heads": (whole[0], True),
    }


@pytest.mark.parametrize("name", arrays())
def test_what_the_copy_engine_can_bring(host, name: str) -> None:
    array, brings = arrays()[name]
    sizes = {"batch": (1, 1, 1, 1), "heads": 3, "kv_heads": 3, "len_q": 5, "len_k": 20}
    call = asked("float16", 64, axes=array.ndim, **sizes)
    operands = Operands(q=None, k=None, v=None, values=(array,))
    assert host.has_tiles(call, operands, {}, 0) == brings


@given(data=st.data())
def test_maps_reach_every_element(host, data) -> None:
    """From what kernels say of a tile's corner: along axes of stride 0 they stay at 0."""
    batch = tuple(data.draw(st.lists(st.integers(1, 3), max_size=2)))
    shape = (*batch, 2, 3, 16)
    sides = [data.draw(st.booleans()) for _ in shape[:-2]]
    small = tuple(1 if one else length for one, length in zip(sides, shape))
    size = int(np.prod(small)) * 48
    array = np.arange(size, dtype=np.float16).reshape(*small, 3, 16)
    bias = np.broadcast_to(array, shape)
    q = np.zeros((*batch, 2, 3, 8), np.float16)
    values = Operands(q=q, k=q, v=q, out=q, values=(bias,))
    variant = biased("float16")
    folded, strides = host.collapse(values, variant)
    call = asked("float16", 64, batch=folded, heads=2, kv_heads=2, len_q=3, len_k=16)
    assert host.has_tiles(call, values, strides, 0)
    sizes, steps = host.streamed_axes(call, values, strides, 0)
    assert sizes[:2] == [16, 3]
    of_batch = strides.get("p0", (0,) * 4)
    entries = np.arange(int(np.prod(batch, dtype=int))).reshape(batch)
    place = {int(entries[i]): bias[i] for i in np.ndindex(batch)}
    order = host.collapse(Operands(q=q, k=q, v=q, out=q, values=(bias,)), variant)[1]["q"]
    for index in np.ndindex(folded[-2:]):
        entry = sum(i * step for i, step in zip(index, order[-2:])) // (2 * 3 * 8)
        for head in range(2):
            at = [head if bias.strides[-3] else 0]
            at += [i if step else 0 for i, step in zip(index[::-1], of_batch[:-3:-1])]
            assert all(i < size for i, size in zip(at, sizes[2:]))
            offset = sum(i * step for i, step in zip(at, steps[1:])) // 2
            assert array.flat[offset] == place[entry][head, 0, 0]


def test_packed_heads_come_first() -> None:
    """Few queries: a tile has rows of several heads, whose biases are not rows of one tile."""
    hopper = gpu.of_arch(90)
    call = asked("float16", 128, batch=(64,), heads=32, kv_heads=4, len_q=1)
    assert plan.choose(call, hopper, "float16", streams=0).streamed is None
    assert plan.choose(call, hopper, "float16", packs=False, streams=0).streamed == 0
    for other in (gpu.of_arch(80), gpu.of_arch(100)):
        assert plan.choose(call, other, "float16", packs=False, streams=0).streamed is None
    behind = plan.choose(call, hopper, "float16", packs=False, streams=0)
    while behind.narrower is not None:  # in case that a kernel spills
        behind = behind.narrower
    assert behind.streamed is None


@pytest.mark.parametrize(("dtype", "own"), [("bfloat16", "bfloat16"), ("float16", "bfloat16")])
@pytest.mark.parametrize("d", [64, 96, 128, 192, 256])
def test_kernels_compile_without_spills(d: int, dtype: str, own: str) -> None:
    pytest.importorskip("cupy", reason="needs CuPy and NVRTC, but no GPU")
    call = asked(dtype, d, own)
    for output, stored in ((dtype, True), ("float32", False)):
        chosen = plan.choose(call, gpu.of_arch(90), output, stored_by_tma=stored, streams=0)
        assert chosen.streamed == 0
        assert chosen.shared_memory <= gpu.of_arch(90).shared_memory_per_block
        check(chosen, 90)


@pytest.mark.parametrize("d", [64, 128, 256])
def test_the_host_knows_the_shared_memory_and_params(host, d: int) -> None:
    call = asked("bfloat16", d)
    chosen = plan.choose(call, gpu.of_arch(90), "bfloat16", streams=0)
    checks = (
        f"static_assert(SharedMemory::kBytes == {chosen.shared_memory});"
        f"static_assert(sizeof(HopperParams) == {host.hopper_dtype(call.variant).itemsize});"
        "static_assert(SharedMemory::kStreamed % 1024 == 0);"
    )
    compile.cubin(chosen.kernel, 90, also=checks)


def test_what_a_given_length_leaves_of_the_keys_is_not_streamed():
    """An array of fewer keys than k has is read with its end in mind."""
    q = np.zeros((1, 4, 70, 64), np.float16)
    k = np.zeros((1, 4, 256, 64), np.float16)
    table = np.zeros((70, 128), np.float16)
    variant = cuflash.Variant("score + t[row, j]")
    for length, streamable in ((100, ()), (None, ())):
        _, asked, _ = api.prepare(q, k, k, kv_lengths=length, variant=variant(t=table))
        assert asked.variant.streamable == streamable
    whole = np.zeros((70, 256), np.float16)
    _, asked, _ = api.prepare(q, k, k, kv_lengths=100, variant=variant(t=whole))
    assert asked.variant.streamable == (0,)
