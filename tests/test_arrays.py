"""Arrays of every library go in without a copy and come back as the kind they came as."""

from __future__ import annotations

import contextlib
import gc
import re
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cuflash
from cuflash import arrays

Require = Callable[[str], ModuleType]

DTYPES = ["bool", "int8", "int64", "uint8", "uint32", "float16", "bfloat16", "float32", "float64"]


def take_one(value: object, **options: Any) -> tuple[arrays.Caller, Any]:
    caller, native = arrays.take({"x": value}, **options)
    return caller, native["x"]


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


class ThroughDLPack:
    """An array of some library that speaks DLPack and nothing else."""

    def __init__(self, array: Any) -> None:
        self._array = array

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._array.__dlpack_device__()

    def __dlpack__(self, **options: Any) -> object:
        return self._array.__dlpack__(**options)


class ThroughInterface:
    """An array of some library that speaks the CUDA array interface and nothing else."""

    def __init__(self, array: Any, **changes: Any) -> None:
        self._array = array  # held: the interface is only a pointer
        self.__cuda_array_interface__ = {**array.__cuda_array_interface__, **changes}


def test_importing_cuflash_imports_no_other_array_library() -> None:
    code = (
        "import sys, numpy, cuflash.arrays as arrays; arrays.take({'x': numpy.ones(3)});"
        "libraries = {'cupy', 'torch', 'jax', 'numba', 'ml_dtypes'} & set(sys.modules);"
        "sys.exit(str(libraries) if libraries else None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# NumPy


def test_numpy_arrays_pass_as_they_are() -> None:
    x = np.arange(24.0).reshape(4, 6)[::-1, ::2]
    caller, native = arrays.take({"x": x, "y": None, "out": x})
    assert native["x"] is x
    assert native["y"] is None
    assert (caller.kind, caller.on_gpu, caller.device) == ("numpy", False, -1)
    with caller as entered:
        fresh = caller.empty((2, 0, 3), np.float32)
    assert entered is caller
    assert (fresh.shape, fresh.dtype) == ((2, 0, 3), np.float32)
    assert caller.give(fresh) is fresh
    assert caller.give(native["out"]) is x


def test_numpy_subclasses_become_plain_arrays(tmp_path) -> None:
    mapped = np.memmap(tmp_path / "x", np.float32, "w+", shape=(3, 4))
    caller, native = take_one(mapped)
    assert type(native) is np.ndarray
    assert address(native) == address(mapped)
    caller, native = arrays.take({"x": np.ones(3), "out": mapped})
    assert caller.give(native["out"]) is mapped


def test_another_byte_order_is_converted() -> None:
    _, native = take_one(np.arange(3, dtype=">f4"))
    assert native.dtype == np.float32
    assert native.dtype.isnative
    np.testing.assert_array_equal(native, [0, 1, 2])


def test_read_only_inputs_are_welcome() -> None:
    x = np.broadcast_to(np.float32(1), (3, 4))
    assert take_one(x)[1] is x


@pytest.mark.parametrize(
    ("value", "shape", "dtype"),
    [
        ([[1, 2], [3, 4]], (2, 2), np.int64),
        ((1.0, 2.0), (2,), np.float64),
        ([], (0,), np.float64),
        (3, (), np.int64),
        (True, (), np.bool_),
        (np.float32(3), (), np.float32),
    ],
)
def test_sequences_and_numbers_are_taken_where_asked_for(value, shape, dtype) -> None:
    caller, native = take_one(value, sequences=True)
    assert caller.kind == "numpy"
    assert (type(native), native.shape, native.dtype) == (np.ndarray, shape, dtype)
    with pytest.raises(TypeError, match=rf"`x` is a {type(value).__name__}, not an array; pass"):
        take_one(value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("text", "`x` is a str, not an array; pass a NumPy, CuPy, PyTorch, JAX or Numba array"),
        (object(), "`x` is a object, not an array; pass"),
        (np.ma.zeros(3), r"`x` is a masked array; pass `x.filled\(...\)`"),
        (np.matrix([[1.0]]), r"`x` is a numpy.matrix; pass `numpy.asarray\(x\)`"),
        (np.ones(3, np.complex64), "`x` has dtype complex64; allowed are bool.* and float64"),
        (np.array([None]), "`x` has dtype object; allowed"),
        (np.array(["a"]), "`x` has dtype <U1; allowed"),
        (np.zeros(3, "datetime64[s]"), r"`x` has dtype datetime64\[s\]; allowed"),
        (np.zeros(3, ">c8"), "`x` has dtype >c8; allowed"),
        (np.zeros(3, "f4,f4"), "`x` has dtype .*; allowed"),
    ],
)
def test_what_cannot_be_used_is_named_with_what_to_do(value, message) -> None:
    with pytest.raises(TypeError, match=message):
        take_one(value)


def test_long_double_is_refused() -> None:
    if np.dtype(np.longdouble) == np.float64:
        pytest.skip("long double is float64 here")
    with pytest.raises(TypeError, match=r"`x` has dtype .*; allowed"):
        take_one(np.ones(3, np.longdouble))


@pytest.mark.parametrize("value", ["text", [None], [1j], 2**70])
def test_sequences_obey_the_rule_for_dtypes(value) -> None:
    with pytest.raises(TypeError, match="`x`"):
        take_one(value, sequences=True)


def test_nothing_but_none_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="no array was passed: `q`, `out`"):
        arrays.take({"q": None, "out": None})


def test_outputs_must_be_writable() -> None:
    frozen = np.ones(3)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="`out` is read-only; an output must be writable"):
        arrays.take({"x": np.ones(3), "out": frozen})
    with pytest.raises(ValueError, match=r"`out\[1\]` is read-only"):
        arrays.take({"x": np.ones(3), "out[1]": frozen}, outputs=("out[0]", "out[1]"))


def test_outputs_must_have_memory_for_every_element() -> None:
    for strides in ((0, 8), (8, 8), (-8, 16)):
        repeated = np.lib.stride_tricks.as_strided(np.ones(24)[12:], (4, 3), strides)
        wrong = rf"`out` must have memory of its own.*{re.escape(str(strides))}"
        with pytest.raises(ValueError, match=wrong):
            arrays.take({"x": np.ones(3), "out": repeated})
    arrays.take({"x": np.ones(3), "out": repeated[:1]})  # a stride that is never taken


def test_outputs_are_never_copies() -> None:
    with pytest.raises(TypeError, match="`out` has dtype >f4; an output must be float32"):
        arrays.take({"x": np.ones(3), "out": np.ones(3, ">f4")})
    with pytest.raises(TypeError, match="`out` is a list; an output must be an array"):
        arrays.take({"x": np.ones(3), "out": [1.0]}, sequences=True)


def test_other_dlpack_arrays_on_the_host_come_back_as_numpy() -> None:
    x = np.arange(6.0).reshape(2, 3).T
    caller, native = take_one(ThroughDLPack(x))
    assert caller.kind == "dlpack"
    assert (address(native), native.strides) == (address(x), x.strides)
    assert type(caller.give(native * 2)) is np.ndarray


def test_dlpack_on_another_device_is_refused() -> None:
    class OnVulkan(ThroughDLPack):
        def __dlpack_device__(self) -> tuple[int, int]:
            return 7, 0

    with pytest.raises(TypeError, match="`x` is on DLPack device 7; allowed are CPU and CUDA"):
        take_one(OnVulkan(np.ones(3)))


def test_a_failing_import_names_the_argument() -> None:
    class Broken(ThroughDLPack):
        def __dlpack__(self, **options: Any) -> object:
            raise BufferError("not today")

    with pytest.raises(TypeError, match="`x` cannot be imported through DLPack: not today"):
        take_one(Broken(np.ones(3)))


def test_without_cupy_a_gpu_array_says_what_to_install(monkeypatch) -> None:
    class OnGpu(ThroughDLPack):
        def __dlpack_device__(self) -> tuple[int, int]:
            return 2, 0

    monkeypatch.delattr(cuflash, "gpu_arrays", raising=False)
    monkeypatch.setitem(sys.modules, "cuflash.gpu_arrays", None)
    arrays._gpu.cache_clear()
    with pytest.raises(ImportError, match=r"need CuPy: pip install 'cuflash\[cuda13\]'"):
        take_one(OnGpu(np.ones(3)))


# Helpers for the rooms


def test_dtypes_have_one_name() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    assert arrays.dtype_name(ml_dtypes.bfloat16) == "bfloat16"
    assert arrays.dtype_name(np.dtype(ml_dtypes.bfloat16)) == "bfloat16"
    for name in ("bool", "int8", "uint64", "float16", "float32", "float64"):
        assert arrays.dtype_name(np.dtype(name)) == name
        assert arrays.dtype_name(np.dtype(name).type) == name
    with pytest.raises(TypeError, match="float8_e4m3fn; allowed"):
        take_one(np.zeros(3, ml_dtypes.float8_e4m3fn))


@st.composite
def views(draw: st.DrawFn, buffer: np.ndarray) -> np.ndarray:
    for axis, length in enumerate(buffer.shape):
        start, stop = sorted(draw(st.tuples(st.integers(0, length), st.integers(0, length))))
        step = draw(st.sampled_from([-2, -1, 1, 3]))
        buffer = buffer.swapaxes(0, axis)[start:stop][::step].swapaxes(0, axis)
    return buffer


@given(st.data())
def test_shared_memory_is_judged_by_the_ranges(data: st.DataObject) -> None:
    buffer = np.zeros((5, 4, 3), np.float16)
    a, b = data.draw(views(buffer)), data.draw(views(buffer))
    assert arrays.may_share_memory(a, b) == np.may_share_memory(a, b)


# PyTorch on the CPU


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_shares_memory_both_ways(require: Require, dtype) -> None:
    torch = require("torch")
    x = torch.ones(4, 6).to(getattr(torch, dtype)).T[::2]
    caller, native = take_one(x)
    assert (caller.kind, caller.on_gpu, caller.device) == ("torch", False, -1)
    assert (arrays.dtype_name(native.dtype), address(native)) == (dtype, x.data_ptr())
    assert native.strides == tuple(stride * x.element_size() for stride in x.stride())
    for shape in ((3, 4), (), (0, 2)):
        answer = caller.empty(shape, native.dtype)
        answer[...] = 1
        back = caller.give(answer)
        assert (type(back), back.dtype, tuple(back.shape)) == (torch.Tensor, x.dtype, shape)
        assert back.data_ptr() == address(answer) or not answer.size
        assert (back == 1).all()


def test_torch_output_comes_back_itself(require: Require) -> None:
    torch = require("torch")
    x, out = torch.ones(3), torch.zeros(3)
    caller, native = arrays.take({"x": x, "out": out})
    native["out"][...] = 5
    assert caller.give(native["out"]) is out
    assert out.tolist() == [5, 5, 5]


def test_torch_that_wants_gradients_is_refused_while_grad_is_on(require: Require) -> None:
    torch = require("torch")
    x = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(TypeError, match=r"`x` requires grad.*pass `x.detach\(\)`.*no_grad"):
        take_one(x)
    with torch.no_grad():
        assert address(take_one(x)[1]) == x.data_ptr()
    take_one(x.detach())


def test_torch_that_is_not_plain_memory_is_refused(require: Require) -> None:
    torch = require("torch")
    lazy = torch.ones(3, dtype=torch.complex64).conj().imag
    for x in (torch.eye(3).to_sparse(), lazy, torch.nested.nested_tensor([torch.ones(2)])):
        with pytest.raises(TypeError, match="`x` is sparse, nested or a lazy negative; pass"):
            take_one(x)
    with pytest.raises(TypeError, match="`x` is on meta; allowed are the CPU and CUDA"):
        take_one(torch.ones(3, device="meta"))
    with pytest.raises(TypeError, match=r"`x` has dtype torch\.complex64; allowed"):
        take_one(torch.ones(3, dtype=torch.complex64))
    with pytest.raises(TypeError, match=r"`x` has dtype torch\.float8_e4m3fn; allowed"):
        take_one(torch.ones(3).to(torch.float8_e4m3fn))
    with pytest.raises(TypeError, match=r"`x` has no memory of its own.*torch\.func"):
        torch.func.vmap(lambda x: take_one(x) and x)(torch.ones(3, 2))


# JAX on the CPU


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint32", "float16", "bfloat16", "float32"])
def test_jax_shares_memory_on_the_way_in(require: Require, dtype) -> None:
    jax = require("jax")
    cpu = jax.devices("cpu")[0]
    x = jax.device_put(jax.numpy.ones((4, 6)).astype(dtype), cpu)
    caller, native = take_one(x)
    assert (caller.kind, caller.on_gpu, caller.device) == ("jax", False, -1)
    assert (arrays.dtype_name(native.dtype), native.shape) == (dtype, x.shape)
    assert address(native) == x.unsafe_buffer_pointer()
    back = caller.give(native + native)
    assert isinstance(back, jax.Array)
    assert (back.dtype, back.shape, back.devices()) == (x.dtype, x.shape, {cpu})


def test_jax_64_bit_answers_follow_jax_s_own_mode(require: Require) -> None:
    jax = require("jax")
    caller, _ = take_one(jax.device_put(np.arange(3, dtype=np.int32), jax.devices("cpu")[0]))
    wide = jax.config.jax_enable_x64
    assert caller.give(np.ones(3)).dtype == (np.float64 if wide else np.float32)


def test_jax_tracers_outputs_and_keys_are_refused(require: Require) -> None:
    jax = require("jax")
    x = jax.numpy.ones(3)
    with pytest.raises(TypeError, match=r"`x` is a JAX tracer; call outside jax\.jit"):
        jax.jit(lambda x: take_one(x) and x)(x)
    with pytest.raises(TypeError, match="`out` is a JAX array, which is immutable; leave"):
        arrays.take({"x": x, "out": x})
    with pytest.raises(TypeError, match=r"`x` has dtype key<.*>; allowed"):
        take_one(jax.random.key(0))


# Mixing


def test_kinds_are_never_mixed(require: Require) -> None:
    torch, jax = require("torch"), require("jax")
    x = np.ones(3)
    others = {
        "torch": torch.ones(3),
        "jax": jax.device_put(x, jax.devices("cpu")[0]),
        "dlpack": ThroughDLPack(x),
    }
    for kind, other in others.items():
        message = (
            f"`k` is a {kind} array on the host, but `q` is a numpy array on the host; all arrays "
            "of a call must be of one kind and on one device: convert one of them"
        )
        with pytest.raises(TypeError, match=message):
            arrays.take({"q": x, "mask": None, "k": other})


@pytest.fixture
def gpu_array_without_gpu() -> Callable[[int], Any]:
    """CuPy arrays over addresses that are never read: recognising them needs no GPU."""
    cupy = pytest.importorskip("cupy")

    def make(device: int) -> Any:
        memory = cupy.cuda.UnownedMemory(4096, 4096, None, device)
        return cupy.ndarray((2, 3), np.float32, cupy.cuda.MemoryPointer(memory, 0))

    return make


def test_cupy_arrays_pass_as_they_are(gpu_array_without_gpu) -> None:
    x = gpu_array_without_gpu(1)
    caller, native = arrays.take({"x": x, "out": x})
    assert native["x"] is x
    assert (caller.kind, caller.on_gpu, caller.device) == ("cupy", True, 1)
    assert caller.give(x) is x
    assert arrays.may_share_memory(x, x[1:])
    assert not arrays.may_share_memory(x[:1], x[1:])
    assert not arrays.may_share_memory(x, np.ones(3))


def test_devices_are_never_mixed(gpu_array_without_gpu) -> None:
    x = gpu_array_without_gpu(0)
    with pytest.raises(TypeError, match="`k` is a cupy array on GPU 1, but `q` is a cupy array on"):
        arrays.take({"q": x, "k": gpu_array_without_gpu(1)})
    with pytest.raises(
        TypeError, match="`k` is a numpy array on the host, but `q` is a cupy array"
    ):
        arrays.take({"q": x, "k": np.ones(3)})
    with pytest.raises(TypeError, match="`b` is a numpy array on the host, but"):
        arrays.take({"a": x, "b": [1.0, 2.0]}, sequences=True)


# On a GPU. The kernel below waits before it reads: whatever frees or fills its memory too early,
# or fails to wait for it, changes the answer.

WAIT_AND_DOUBLE = r"""
extern "C" __global__ void wait_and_double(const float* x, float* out, int n, long long clocks) {
    long long start = clock64();
    while (clock64() - start < clocks) {}
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
        out[i] = 2 * x[i];
}
"""
CLOCKS = 500_000  # some 0.3 ms
LENGTH = 1 << 18


@pytest.fixture(scope="module")
def doubled(cp: ModuleType) -> Callable[..., Any]:
    """Run the slow kernel as a room would, on arrays of any kind."""
    kernel = cp.RawKernel(WAIT_AND_DOUBLE, "wait_and_double")

    def run(x: object, out: object = None) -> Any:
        caller, native = arrays.take({"x": x, "out": out})
        with caller:
            result = native["out"]
            if result is None:
                result = caller.empty(native["x"].shape, np.float32)
            arguments = native["x"], result, np.int32(result.size), np.int64(CLOCKS)
            kernel((64,), (256,), arguments)
        return caller.give(result)

    return run


class Library:
    """What the tests below need of an array library."""

    def __init__(self, name: str, require: Require) -> None:
        self.cp = require("cuda")
        self.name, self.module = name, require(name)

    def make(self, values: np.ndarray) -> Any:
        if self.name == "torch-cuda":
            return self.module.from_numpy(values).to("cuda")
        if self.name == "jax-cuda":
            return self.module.device_put(values, self.module.devices("gpu")[0])
        if self.name == "numba-cuda":
            return self.module.to_device(values)
        return self.cp.asarray(values)

    def read(self, array: Any) -> np.ndarray:
        if self.name == "torch-cuda":
            return array.cpu().numpy()
        if self.name == "numba-cuda":
            return array.copy_to_host()
        return np.asarray(array) if self.name == "jax-cuda" else array.get()

    def fill_what_is_free(self, like: np.ndarray) -> None:
        """Take memory of that size from the library, spoil it, and let go of it."""
        if self.name == "jax-cuda":  # its transfers and kernels run on streams of its own
            self.module.numpy.full(like.shape, np.nan, like.dtype).block_until_ready()
        else:
            self.make(np.full_like(like, np.nan))

    @contextlib.contextmanager
    def side_stream(self) -> Iterator[None]:
        if self.name == "torch-cuda":
            with self.module.cuda.stream(self.module.cuda.Stream()):
                yield
        else:
            with self.cp.cuda.Stream(non_blocking=True):
                yield


@pytest.fixture(params=["cuda", "torch-cuda", "jax-cuda", "numba-cuda"])
def library(request: pytest.FixtureRequest, require: Require) -> Library:
    return Library(request.param, require)


def test_gpu_arrays_share_memory_and_come_back_as_they_came(library, doubled) -> None:
    values = np.arange(LENGTH, dtype=np.float32)
    x = library.make(values)
    caller, native = take_one(x)
    kind = {"cuda": "cupy"}.get(library.name, library.name.removesuffix("-cuda"))
    assert (caller.kind, caller.on_gpu, caller.device) == (kind, True, 0)
    pointer = x.unsafe_buffer_pointer() if kind == "jax" else x.__cuda_array_interface__["data"][0]
    assert native.data.ptr == pointer
    result = doubled(x)
    assert type(result) is type(x)
    np.testing.assert_array_equal(library.read(result), 2 * values)


def test_gpu_output_comes_back_itself(library, doubled) -> None:
    values = np.arange(LENGTH, dtype=np.float32)
    x, out = library.make(values), library.make(values)
    if library.name == "jax-cuda":
        with pytest.raises(TypeError, match="`out` is a JAX array"):
            doubled(x, out)
        return
    assert doubled(x, out) is out
    np.testing.assert_array_equal(library.read(out), 2 * values)


def test_work_waits_for_the_producer_and_the_consumer_for_the_work(library, doubled) -> None:
    """A chain of slow kernels, with no synchronisation in between, on a side stream."""
    values = np.arange(LENGTH, dtype=np.float32)
    with library.side_stream():
        x = library.make(values)
        for _ in range(4):
            x = doubled(x)
        np.testing.assert_array_equal(library.read(x), 16 * values)


def test_nothing_is_freed_under_a_running_kernel(library, doubled) -> None:
    """Inputs and most outputs are dropped at once; what they held is taken and spoiled."""
    values = np.arange(LENGTH, dtype=np.float32)
    kept = []
    with library.side_stream():
        for i in range(100):
            result = doubled(library.make(values + i))
            if i % 5 == 0:
                kept.append((i, result))
            del result
            library.fill_what_is_free(values)
        for i, result in kept:
            np.testing.assert_array_equal(library.read(result), 2 * (values + i))


def test_bfloat16_on_a_gpu(library) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    if library.name == "numba-cuda":
        pytest.skip("Numba has no bfloat16 dtype")
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    if library.name == "torch-cuda":
        x = library.make(values).bfloat16()
    else:
        x = library.make(values.astype(ml_dtypes.bfloat16))
    caller, native = take_one(x)
    assert arrays.dtype_name(native.dtype) == "bfloat16"
    with caller:
        result = caller.empty((2, 3), native.dtype)
        result[...] = native * 2
    back = caller.give(result)
    assert back.dtype == x.dtype
    back = back.float() if library.name == "torch-cuda" else back.astype("float32")
    np.testing.assert_array_equal(library.read(back), 2 * values)


def test_views_of_torch_outputs_stay_with_torch_s_allocator(require: Require) -> None:
    torch = require("torch-cuda")
    require("cuda")
    caller, _ = take_one(torch.ones(3, device="cuda"))
    with caller:
        result = caller.empty((2, 3, 4), np.float32)
        result[...] = 0
        result[1, :, 2] = 5
    view = caller.give(result.transpose(2, 0, 1)[2, 1:])
    assert (view.tolist(), view.is_contiguous()) == ([[5, 5, 5]], False)
    assert view.untyped_storage().data_ptr() == caller.give(result).untyped_storage().data_ptr()
    with caller:
        foreign = caller.give(result + 1)  # memory of CuPy's pool
    assert foreign[1, 0, 2].item() == 6


def test_strided_torch_tensors_are_viewed(require: Require) -> None:
    torch = require("torch-cuda")
    require("cuda")
    x = (
        torch.arange(24.0, device="cuda")
        .reshape(2, 3, 4)
        .transpose(0, 2)[1:, ::2]
        .expand(5, 3, 2, 2)
    )
    caller, native = take_one(x)
    with caller:
        copy = native.get()
    np.testing.assert_array_equal(copy, x.cpu().numpy())


@pytest.mark.parametrize("wrap", [ThroughDLPack, ThroughInterface])
def test_other_gpu_arrays_come_back_as_cupy(cp, doubled, wrap) -> None:
    values = np.arange(LENGTH, dtype=np.float32)
    with cp.cuda.Stream(non_blocking=True):
        result = doubled(wrap(cp.asarray(values)))
        assert type(result) is cp.ndarray
        np.testing.assert_array_equal(result.get(), 2 * values)


def test_the_cuda_array_interface_orders_streams_by_itself(cp, doubled) -> None:
    values = np.arange(LENGTH, dtype=np.float32)
    producer, consumer = (cp.cuda.Stream(non_blocking=True) for _ in range(2))
    with producer:
        x = ThroughInterface(doubled(cp.asarray(values)))  # still running, on the stream it names
    with consumer:
        np.testing.assert_array_equal(doubled(x).get(), 4 * values)


def test_the_cuda_array_interface_is_read_with_care(cp) -> None:
    x = cp.ones(3, np.float32)
    pointer = x.data.ptr
    with pytest.raises(ValueError, match="`out` is read-only"):
        arrays.take({"x": ThroughInterface(x), "out": ThroughInterface(x, data=(pointer, True))})
    with pytest.raises(TypeError, match="`x` has a mask"):
        take_one(ThroughInterface(x, mask=ThroughInterface(x)))
    with pytest.raises(TypeError, match=r"`x` has dtype .*; allowed"):
        take_one(ThroughInterface(x, typestr="<V4"))
    _, native = take_one(ThroughInterface(x[:0]))
    assert native.shape == (0,)


def test_imports_are_let_go_of_once_the_work_is_done(cp, doubled) -> None:
    x = ThroughInterface(cp.ones(LENGTH, np.float32))
    gone = weakref.ref(x)
    doubled(x)
    del x
    gc.collect()
    assert gone() is not None  # the kernel waits 0.3 ms before it reads
    cp.cuda.get_current_stream().synchronize()
    for _ in range(100):  # each call looks at a few
        doubled(cp.ones(3, np.float32))
    assert gone() is None


def test_capture_neither_asks_nor_records_events(cp, doubled) -> None:
    values = cp.arange(LENGTH, dtype=np.float32)
    x, out = ThroughInterface(values), cp.zeros_like(values)
    doubled(x, ThroughInterface(out))  # loads the kernel, and leaves an event behind
    stream = cp.cuda.Stream(non_blocking=True)
    cp.cuda.Device().synchronize()
    out.fill(0)
    cp.cuda.Device().synchronize()
    with stream:
        stream.begin_capture()
        doubled(x, ThroughInterface(out))
        graph = stream.end_capture()
        values += 1
        graph.launch()
        np.testing.assert_array_equal(out.get(), 2 * values.get())


def test_torch_graphs_capture_the_work(require: Require, doubled) -> None:
    torch = require("torch-cuda")
    x = torch.arange(LENGTH, dtype=torch.float32, device="cuda")
    out = torch.zeros_like(x)
    doubled(x, out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        doubled(x, out)
    x += 1
    graph.replay()
    assert torch.equal(out, 2 * x)


def test_the_device_of_the_arrays_becomes_current_and_goes_back(require: Require, doubled) -> None:
    cp = require("two-gpus")
    with cp.cuda.Device(1):
        x = cp.arange(LENGTH, dtype=np.float32)
    with cp.cuda.Device(0):
        result = doubled(x)
        assert cp.cuda.runtime.getDevice() == 0
    assert result.device.id == 1
    np.testing.assert_array_equal(result.get(), 2 * np.arange(LENGTH, dtype=np.float32))


def test_arrays_on_two_gpus_are_refused(require: Require) -> None:
    cp, torch = require("two-gpus"), require("torch-cuda")
    with cp.cuda.Device(1):
        other = cp.ones(3)
    message = "`k` is a {0} array on GPU 1, but `q` is a {0} array on GPU 0"
    with pytest.raises(TypeError, match=message.format("cupy")):
        arrays.take({"q": cp.ones(3), "k": other})
    with pytest.raises(TypeError, match=message.format("torch")):
        arrays.take({"q": torch.ones(3, device="cuda:0"), "k": torch.ones(3, device="cuda:1")})
