"""Calls made again: the short way must launch what the long way would, and know when it may not."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import cuflash
from cuflash._softmax import gpu as engine
from cuflash._softmax import loss_gpu
from cuflash.jit import gpu, repeat
from cuflash.jit.launch import Plan

Call = Callable[..., Any]


# Without a GPU: addresses that nobody reads, and kernels that note what they are given.


class Machine:
    """A GPU that allocates addresses in turn and notes launches, in place of a real one."""

    def __init__(self, cupy: Any) -> None:
        self.cupy, self.top, self.launches, self.device = cupy, 1 << 20, [], 0

    def allocate(self, nbytes: int) -> Any:
        memory = self.memory(self.top, nbytes)
        self.top += -(-nbytes // 512) * 512
        return memory

    def memory(self, address: int, nbytes: int = 1 << 40) -> Any:
        memory = self.cupy.cuda.UnownedMemory(address, nbytes, None, self.device)
        return self.cupy.cuda.MemoryPointer(memory, 0)

    def array(self, shape: Any, dtype: Any = "f4", at: int = 1 << 30, strides: Any = None) -> Any:
        return self.cupy.ndarray(shape, dtype, self.memory(at), strides)

    def load(self, plan: Plan) -> Any:
        def launch(grid: Any, block: Any, arguments: Any, shared_mem: int = 0) -> None:
            given = ctypes.string_at(arguments[0], size_of_params(plan))
            launched = (plan.kernel, grid, block[0], shared_mem, given)
            self.launches.append(launched)

        launch.kernel = launch  # type: ignore[attr-defined]
        return launch

    def run(self, call: Call, *arrays: Any) -> list[Any]:
        """What a call launches, from a pool in which nothing is in use, and what it returns."""
        self.top, self.launches = 1 << 20, []
        answer = call(*arrays)
        answers = answer if isinstance(answer, tuple) else (answer,)
        return [*self.launches, *((x.shape, x.strides, x.dtype, x.data.ptr) for x in answers)]


def attention_gpu() -> Any:
    from cuflash._attention import gpu as host

    return host


def size_of_params(plan: Plan) -> int:
    from cuflash._softmax.selection import sample_gpu, topk_gpu

    if plan.kernel.file.startswith("_attention/"):
        return attention_gpu().params_dtype("float32").itemsize
    accumulator = "float64" if ("Element", "float64") in plan.kernel.constants else "float32"
    name = plan.kernel.file.removeprefix("_softmax/").removeprefix("selection/")
    if name.startswith("loss_backward"):
        return loss_gpu.gradient_params(accumulator).itemsize
    if name.startswith("loss"):
        return loss_gpu.loss_params(accumulator).itemsize
    if name.startswith("sample"):
        return sample_gpu.PARAMS.itemsize
    return (topk_gpu if name == "topk.cu" else engine).PARAMS.itemsize


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    cupy = pytest.importorskip("cupy")
    made = Machine(cupy)
    monkeypatch.setattr(cupy.cuda.runtime, "getDevice", lambda: made.device)
    monkeypatch.setattr(cupy.cuda.function, "CPointer", int)
    monkeypatch.setattr(gpu, "_of_device", lambda device, forced: gpu.of_arch(90))
    monkeypatch.setattr(Plan, "load", lambda plan: made.load(plan))
    monkeypatch.setattr("cuflash.gpu_arrays.capturing", lambda: False)
    monkeypatch.setattr(repeat, "_known", {})
    before = cupy.cuda.get_allocator()
    cupy.cuda.set_allocator(made.allocate)
    yield made
    cupy.cuda.set_allocator(before)


CALLS: dict[str, tuple[Call, list[Any]]] = {
    "softmax": (lambda x: cuflash.softmax(x, -1), [(64, 1000)]),
    "softmax across": (lambda x: cuflash.softmax(x, 0), [(64, 1000)]),
    "softmax of all": (cuflash.softmax, [(64, 1000)]),
    "softmax in two launches": (lambda x: cuflash.softmax(x, -1), [(2, 10_000_000)]),
    "log_softmax": (lambda x: cuflash.log_softmax(x, axis=1), [(4, 10, 6)]),
    "logsumexp": (lambda x: cuflash.logsumexp(x, -1), [(10, 1_000_000)]),
    "logsumexp of b": (
        lambda x, b: cuflash.logsumexp(x, (0, 1), b, True, True),
        [(64, 10, 6), (10, 6)],
    ),
    "softmax_backward": (lambda dy, y: cuflash.softmax_backward(dy, y, -1), [(8, 1000)] * 2),
    "log_softmax_backward": (
        lambda dy, y: cuflash.log_softmax_backward(dy, y, -1),
        [(8, 1_000_000)] * 2,
    ),
    "topk": (lambda x: cuflash.topk(x, 5, axis=1), [(4, 1_000_000)]),
    "softmax_topk": (lambda x: cuflash.softmax_topk(x, 5), [(64, 3, 1000)]),
    "sample": (lambda x: cuflash.sample(x, seed=3), [(64, 1000)]),
    "sample of long rows": (lambda x: cuflash.sample(x, seed=0, top_p=0.5), [(10, 128_000)]),
    "sample greedily": (lambda x: cuflash.sample(x, seed=3, temperature=0), [(64, 1000)]),
    "sample of top_k": (lambda x: cuflash.sample(x, seed=3, offset=9, top_k=50), [(2, 1_000_000)]),
    "cross_entropy": (
        lambda x, t: cuflash.cross_entropy(x, t, return_lse=True),
        [(512, 1000), ((512,), "i8")],
    ),
    "cross_entropy of few rows": (
        lambda x, t: cuflash.cross_entropy(x, t, reduction="none", label_smoothing=0.1),
        [(2, 1_000_000), ((2,), "i4")],
    ),
    "cross_entropy_backward": (
        lambda x, t, lse: cuflash.cross_entropy_backward(1.0, x, t, lse, ignore_index=-1),
        [(65536, 100), ((65536,), "i8"), (65536,)],
    ),
    "cross_entropy_backward of each": (
        lambda x, t, lse, d: cuflash.cross_entropy_backward(d, x, t, lse, reduction="none"),
        [(512, 1000), ((512,), "i8"), (512,), (512,)],
    ),
}


def arrays_of(machine: Machine, shapes: list[Any], first: int) -> list[Any]:
    """Arrays, each a gigabyte or more behind the last."""
    given = [(*each,) if isinstance(each[0], tuple) else (each, "f4") for each in shapes]
    return [machine.array(*each, at=first + (n << 33)) for n, each in enumerate(given)]


@pytest.mark.parametrize("name", CALLS)
def test_the_short_way_launches_what_the_long_way_does(machine: Machine, name: str) -> None:
    call, shapes = CALLS[name]
    machine.run(call, *arrays_of(machine, shapes, 1 << 40))
    assert len(repeat._known) == 1
    (known,) = repeat._known.values()
    others = arrays_of(machine, shapes, 1 << 41)
    repeated = machine.run(call, *others)
    assert list(repeat._known.values()) == [known]
    assert len(known.spare) == 1  # it was used
    repeat._known.clear()
    assert repeated == machine.run(call, *others)


def test_operands_that_are_one_array_are_another_call(machine: Machine) -> None:
    def call(dy: Any, y: Any) -> Any:
        return cuflash.softmax_backward(dy, y, -1)

    x, y = machine.array((8, 64), at=1 << 40), machine.array((8, 64), at=1 << 41)
    machine.run(call, x, x)
    twice = machine.run(call, x, y)
    assert len(repeat._known) == 2
    assert machine.run(call, x, y) == twice != machine.run(call, x, x)


def test_seeds_and_offsets_come_anew(machine: Machine) -> None:
    x = machine.array((64, 1000))
    for seed, offset in ((0, 0), (0, 1), (2**64 - 1, 0), (7, 2**63)):
        launched, _ = machine.run(functools.partial(cuflash.sample, seed=seed, offset=offset), x)
        given = np.frombuffer(launched[-1], np.uint64)
        assert {seed, offset} <= set(given.tolist())
    assert len(repeat._known) == 1
    for refused in (-1, 2**64):
        with pytest.raises(ValueError, match="`seed` must be from 0"):
            cuflash.sample(x, seed=refused)
    with pytest.raises(TypeError, match="`seed` must be an int"):
        cuflash.sample(x, seed=True)


def test_seeds_of_dropout_come_anew(machine: Machine) -> None:
    """With one kernel, which takes the threshold as a number, too."""
    q = machine.array((4, 100, 64))
    kernels = set()
    for dropout in (0.1, 0.5):
        for seed in (0, 1, 2**64 - 1):
            call = functools.partial(cuflash.attention, dropout=dropout, seed=seed)
            launched, _ = machine.run(call, q, q, q)
            given = np.frombuffer(launched[-1], attention_gpu().params_dtype("float32"))[0]
            assert given["dropout"]["seed"] == seed
            assert given["dropout"]["threshold"] == round(dropout * 65536)
            kernels.add(launched[0])
    assert len(kernels) == 1
    assert len(repeat._known) == 2
    with pytest.raises(ValueError, match="`seed` must be from 0"):
        cuflash.attention(q, q, q, dropout=0.1, seed=2**64)
    with pytest.raises(TypeError, match="`seed` must be an int"):
        cuflash.attention(q, q, q, dropout=0.1)
    with pytest.raises(TypeError, match="`seed` must be an int"):
        cuflash.attention(q, q, q, seed=True)


def test_without_dropout_a_seed_changes_nothing(machine: Machine) -> None:
    q = machine.array((4, 100, 64))
    plain = machine.run(cuflash.attention, q, q, q)[0]
    for dropout in (None, 0, 0.0):
        for _ in range(2):
            call = functools.partial(cuflash.attention, dropout=dropout, seed=3)
            assert machine.run(call, q, q, q)[0][0] == plain[0]


def test_what_decides_about_a_call_is_in_its_key(machine: Machine, monkeypatch: Any) -> None:
    def key(options: tuple[Any, ...] = (1,), name: str = "softmax", **changes: Any) -> Any:
        given = {"shape": (4, 8), "dtype": "f4"} | changes
        return repeat.again(name, (machine.array(**given),), options)[0]

    assert key() == key(at=1 << 31) == key(at=(1 << 30) + 16)
    keys = [
        key(),
        key(name="log_softmax"),
        key(at=(1 << 30) + 4),
        key(shape=(8, 4)),
        key(strides=(64, 4)),
        key(dtype="f8"),
        *(key((axis,)) for axis in (-1, None, True, 1.0, (1,), (True,), (1.0,), np.int64(1))),
    ]
    machine.device = 1
    keys.append(key())
    elsewhere = machine.array((4, 8))
    machine.device = 0
    assert repeat.again("softmax", (elsewhere,), (1,)) == (None, None)
    monkeypatch.setenv("CUFLASH_ARCH", "80")
    keys.append(key())
    assert len(set(keys)) == len(keys)
    for other in ([1.0], np.zeros(3), machine.array((3,))):
        assert repeat.again("softmax", (other,), ([1],)) == (None, None)
    assert repeat.again("softmax", (machine.array((3,)),), ([1],)) == (None, None)


def test_what_must_go_the_long_way_is_not_remembered(machine: Machine, monkeypatch: Any) -> None:
    x = machine.array((64, 1000))
    cuflash.softmax(x, 1, out=machine.array((64, 1000), at=1 << 40))
    cuflash.softmax(machine.array((0, 1000)), 1)
    monkeypatch.setenv("CUFLASH_CHECK", "1")
    monkeypatch.setattr("cuflash._softmax.selection.sample_api._all_drawn", lambda *_: None)
    cuflash.sample(x, seed=3)
    monkeypatch.delenv("CUFLASH_CHECK")
    with pytest.raises(TypeError, match="`axis`"):
        cuflash.softmax(x, True)
    machine.device = 1
    elsewhere = machine.array((64, 1000))
    machine.device = 0
    monkeypatch.setattr(machine.cupy.cuda.runtime, "setDevice", lambda device: None)
    cuflash.softmax(elsewhere, 1)
    assert not repeat._known


def test_a_launch_that_mentions_another_address_is_not_remembered(machine: Machine) -> None:
    params = np.zeros(1, np.dtype([("x", "u8", 2), ("rows", "i8"), ("out", [("data", "u8")])]))
    x, out = machine.array((4,), at=4096), machine.array((4,), at=8192)
    workspace = machine.array((600,), "u1", at=12288)
    plan = SimpleNamespace(grid=(1, 1, 1), threads=32, shared_memory=0)
    plan.load = lambda: machine.load(plan)

    def remembered(*addresses: int, workspaces: int = 1) -> Any:
        params["x"], params["rows"], params["out"]["data"] = addresses[:2], 5, addresses[2]
        launch = SimpleNamespace(plan=plan, params=params.copy(), workspaces=workspaces)
        repeat._known.clear()
        made = SimpleNamespace(launches=[launch], workspaces=[workspace])
        repeat.remember(("f", 0), made, (x,), (out,))  # type: ignore[arg-type]
        return repeat._known.get(("f", 0))

    known = remembered(4096, 12288 + 8, 8192)
    assert known.launches[0].target[-1] == ((0, 0, 0), (1, 2, 8), (3, 1, 0))
    assert known.workspace == 1024
    assert remembered(4096, 0, 8192).launches[0].target[-1] == ((0, 0, 0), (3, 1, 0))
    assert remembered(4096, 12288 + 600, 8192) is None
    assert remembered(4100, 0, 8192) is None
    assert remembered(4096, 12288, 8192, workspaces=0) is None  # something that lay there before


def test_what_is_remembered_is_bounded(machine: Machine, monkeypatch: Any) -> None:
    monkeypatch.setattr(repeat, "_MOST", 3)
    for rows in range(1, 9):
        cuflash.softmax(machine.array((rows, 8)), 1)
        assert 1 <= len(repeat._known) <= 3


# On a GPU.

ON_A_GPU: dict[str, tuple[Call, list[Any]]] = {
    **CALLS,
    "attention": (
        lambda q, k, v: cuflash.attention(q, k, v, causal=True, return_lse=True),
        [(2, 4, 70, 64), (2, 2, 133, 64), (2, 2, 133, 40)],
    ),
    "attention_varlen": (
        lambda q, k, v, offsets: cuflash.attention_varlen(q, k, v, offsets, causal=True),
        [(4, 200, 64), (2, 200, 64), (2, 200, 64), ((5,), "i4")],
    ),
    "attention with a mask": (
        lambda q, k, v: cuflash.attention(q, k, v, variant=SPREAD),
        [(2, 9, 2000, 64)] * 3,
    ),
}
SPREAD = cuflash.Variant(mask="(i - j) % 3 == 0 and i != 700")


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> dict[Any, Any]:
    """What is remembered: nothing at first."""
    calls: dict[Any, Any] = {}
    monkeypatch.setattr(repeat, "_known", calls)
    return calls


def random_arrays(cp: Any, shapes: list[Any], seed: int) -> list[Any]:
    rng = cp.random.default_rng(seed)
    arrays = []
    for each in shapes:
        shape, dtype = each if isinstance(each[0], tuple) else (each, "f4")
        if np.dtype(dtype).kind == "i":
            arrays.append(rng.integers(0, 100, shape).astype(dtype))
        else:
            arrays.append(rng.standard_normal(shape, dtype))
    return arrays


def same(a: Any, b: Any) -> bool:
    pairs = zip(*(each if isinstance(each, tuple) else (each,) for each in (a, b)))
    return all(x.get().tobytes() == y.get().tobytes() and x.shape == y.shape for x, y in pairs)


@pytest.mark.parametrize("name", ON_A_GPU)
def test_a_second_call_gives_what_a_first_one_would(
    cp: Any, known: dict[Any, Any], name: str
) -> None:
    call, shapes = ON_A_GPU[name]
    call(*random_arrays(cp, shapes, 1))
    others = random_arrays(cp, shapes, 2)
    answer = call(*others)
    assert len(known) == 1
    (made,) = known.values()
    assert len(made.spare) == 1  # it was the short way
    known.clear()
    assert same(answer, call(*others))


@pytest.mark.parametrize("axis", [1, -1, (1,), (-1,)])
def test_axes_in_any_form(cp: Any, known: dict[Any, Any], axis: Any) -> None:
    x = cp.random.default_rng(0).standard_normal((64, 100), "f4")
    first, second = (cuflash.softmax(x, axis) for _ in range(2))
    known.clear()
    assert same(first, second)
    assert same(first, cuflash.softmax(x, 1))


def test_arrays_that_lie_otherwise(cp: Any, known: dict[Any, Any]) -> None:
    room = cp.random.default_rng(0).standard_normal((65, 128, 3), "f4")
    views = [room[1:, :, 0], room[:64, :, 1], room[:64, ::-1, 2], room[:64, :64, 0].T]
    views += [room[:, :, 0].ravel()[start : start + 6400].reshape(64, 100) for start in (0, 1, 4)]
    for x in (*views, *views):
        expected = cuflash.softmax(cp.ascontiguousarray(x), -1)
        got = cuflash.softmax(x, -1)
        assert cp.allclose(got, expected, rtol=1e-5, atol=0)
        assert got.strides == cuflash.softmax(x, -1).strides


def test_seeds_and_offsets_change_the_answer(cp: Any, known: dict[Any, Any]) -> None:
    x = cp.zeros((1000, 1000), "f4")
    drawn = {
        (seed, offset): cuflash.sample(x, seed=seed, offset=offset)
        for seed in (0, 1, 2**64 - 1)
        for offset in (0, 1)
    }
    assert len(known) == 1
    for place, tokens in drawn.items():
        known.clear()
        assert same(tokens, cuflash.sample(x, seed=place[0], offset=place[1]))
    assert len({tokens.get().tobytes() for tokens in drawn.values()}) == len(drawn)


@pytest.mark.parametrize("name", ["softmax", "logsumexp", "sample of top_k"])
def test_threads_at_once(cp: Any, known: dict[Any, Any], name: str) -> None:
    call, shapes = CALLS[name]
    inputs = [random_arrays(cp, shapes, seed) for seed in range(4)]
    expected = [call(*arrays) for arrays in inputs]
    cp.cuda.Device().synchronize()

    def work(arrays: list[Any]) -> list[Any]:
        with cp.cuda.Stream(non_blocking=True) as stream:
            answers = [call(*arrays) for _ in range(20)]
            stream.synchronize()
        return answers

    with ThreadPoolExecutor(len(inputs)) as pool:
        for answers, right in zip(pool.map(work, inputs), expected):
            assert all(same(answer, right) for answer in answers)
    assert len(known) == 1


@pytest.mark.parametrize("name", ["softmax", "logsumexp", "topk"])
def test_the_short_way_in_a_captured_graph(cp: Any, known: dict[Any, Any], name: str) -> None:
    call, shapes = CALLS[name]
    (x,), (other,) = (random_arrays(cp, shapes, seed) for seed in (1, 2))
    call(x)
    expected = call(other)
    cp.cuda.Device().synchronize()
    with cp.cuda.Stream(non_blocking=True) as stream:
        stream.begin_capture()
        answer = call(x)
        graph = stream.end_capture()
        x[...] = other
        call(x)  # its workspace is not the graph's
        graph.launch(stream)
        stream.synchronize()
    assert same(answer, expected)


def test_memory_is_not_kept(cp: Any, known: dict[Any, Any]) -> None:
    call, shapes = CALLS["logsumexp"]
    pool = cp.get_default_memory_pool()
    arrays = random_arrays(cp, shapes, 1)
    del arrays
    before = pool.used_bytes()
    for seed in range(3):
        call(*random_arrays(cp, shapes, seed))
    assert len(known) == 1
    assert pool.used_bytes() == before
