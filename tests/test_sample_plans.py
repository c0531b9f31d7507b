"""Plans, parameters and kernels of cuflash.sample, on machines without a GPU too."""

from __future__ import annotations

import re
from importlib import resources

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import DTYPES

import cuflash
from cuflash._softmax.selection import sample_cpu, sample_plan
from cuflash._softmax.selection.sample_problem import Problem
from cuflash.jit import compile
from cuflash.jit.gpu import of_arch

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
REGISTERS = 65536  # a multiprocessor's
STATIC = 48 * 1024  # bytes of shared memory
ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


def choose(dtype, columns, *, rows=100, aligned=False, filtered=False, arch=90):
    return sample_plan.choose(dtype, rows, columns, aligned, filtered, of_arch(arch))


@given(
    dtype=st.sampled_from(list(DTYPES)),
    rows=st.integers(1, 10**6),
    columns=st.integers(1, 20_000) | st.integers(1, 10**8),
    aligned=st.booleans(),
    filtered=st.booleans(),
)
def test_plans_cover_all_rows_and_columns(dtype, rows, columns, aligned, filtered):
    plans = choose(dtype, columns, rows=rows, aligned=aligned, filtered=filtered)
    vector = 16 // ITEMSIZE[dtype]
    span = columns + (0 if aligned else vector - 1)
    for plan in plans:
        c = dict(plan.kernel.constants)
        assert plan.threads == c["kThreads"]
        assert plan.threads <= 512
        assert plan.threads % (c["kLanes"] * c.get("kWarps", 1)) == 0
        if c.get("kWarps", 1) > 1:
            assert (c["kLanes"], c["kThreads"]) == (32, 32 * c["kWarps"])
    last = dict(plans[-1].kernel.constants)
    rows_of_block = last["kThreads"] // (last["kLanes"] * last["kWarps"])
    assert plans[-1].grid == (-(-rows // rows_of_block), 1, 1)
    slice_ = last["kLanes"] * last["kVectors"] * vector
    if len(plans) == 1:
        assert plans[0].kernel.entry == "sample_rows"
        assert last["kWarps"] * slice_ >= span
        return
    slices = sample_plan.slices_of(dtype, columns, aligned)
    assert (slices - 1) * slice_ < span <= slices * slice_
    sums = dict(plans[0].kernel.constants)
    assert [plan.kernel.entry for plan in plans] == ["sample_sums", "sample_draw"]
    assert (sums["kLanes"], sums["kVectors"]) == (last["kLanes"], last["kVectors"])
    assert plans[0].grid[0] * (sums["kThreads"] // 32) >= rows * slices
    largest = plans[0].grid[0] * (sums["kThreads"] // 32)
    assert sums["Index"] == "int64" or largest < 2**32


def test_the_twin_has_the_kernels_slices():
    for dtype in DTYPES:
        plan = choose(dtype, 10**6)[0]
        c = dict(plan.kernel.constants)
        accumulator = 8 if dtype == "float64" else 4
        elements = c["kLanes"] * c["kVectors"] * 16 // ITEMSIZE[dtype]
        assert elements * accumulator == sample_cpu.SLICE_BYTES


@pytest.mark.parametrize(
    ("columns", "filtered", "kernels", "read"),
    [
        (63, False, 1, 1),
        (1000, True, 1, 1),
        (4096, False, 1, 1),
        (8000, True, 1, 1),
        (8000, False, 2, 1),
        (32000, False, 2, 1),
        (32000, True, 2, 2),
    ],
)
def test_how_often_the_logits_are_read(columns, filtered, kernels, read):
    plans = choose("float32", columns, rows=4000, aligned=True, filtered=filtered)
    assert len(plans) == kernels
    total = sum(plan.bytes for plan in plans)
    assert 0 <= total / (4000 * columns * 4) - read < 0.2


def test_params_are_those_of_the_kernels():
    sample_gpu = pytest.importorskip("cuflash._softmax.selection.sample_gpu")
    folder = resources.files("cuflash").joinpath("_softmax/selection")
    source = folder.joinpath("sample.cuh").read_text()
    struct = re.search(r"struct Params \{(.*?)\n\};", source, re.DOTALL)[1]
    declarations = re.sub(r"//.*", "", struct)
    names = re.findall(r"(\w+)\s*[,;]", declarations)
    assert tuple(names) == sample_gpu.PARAMS.names
    assert f"sizeof(Params) == {sample_gpu.PARAMS.itemsize}" in source


def problem(shape, axis=-1, **options):
    given = {"seed": 0, "offset": 0, "temperature": 1.0, "dtype": "float32", **options}
    return Problem(shape=shape, axis=axis % len(shape), **given)


def test_scale_and_least_are_finite_or_mean_nothing():
    for dtype in ("float32", "float64"):
        limits = np.finfo(dtype)
        for temperature in (5e-324, 1e-300, 1e-30, 1.0, 1e30, 1e300):
            scale = problem((1,), temperature=temperature, dtype=dtype).scale
            assert limits.tiny <= scale <= limits.max
    assert problem((1,), temperature=2.0).scale == pytest.approx(0.5 / np.log(2))
    assert problem((1,), min_p=0.25).least == -2
    assert problem((1,)).least == -np.inf


def test_which_layouts_are_used_in_place(cp):
    from cuflash._softmax.selection import sample_gpu

    def copied(x, axis=-1):
        return not sample_gpu.in_place(problem(x.shape, axis), x)

    x = cp.zeros((4, 6, 8), "float32")
    assert not copied(x)
    assert not copied(x[:, :, 1:7])
    assert not copied(x[:, 2])
    assert not copied(x[::-1, 0])
    assert not copied(cp.broadcast_to(x[0, 0], (5, 7, 8)))
    assert not copied(x.reshape(24, 8)[::3])
    assert copied(x[:, 1:3])
    assert copied(x.swapaxes(0, 1))
    assert copied(x, 0)
    assert copied(x, 1)
    assert copied(x[:, :, ::2])
    seen = sample_gpu.matrix(problem((4, 8)), x[:, 2])
    assert (seen.shape, seen.strides) == ((4, 8), (192, 4))
    assert seen.data.ptr == x[:, 2].data.ptr


def forms():
    """Of each form that the kernels can take one, or two where loads are few or many."""
    kernels = {}
    for columns in (3, 7, 20, 63, 250, 1000, 2000, 4000, 8000, 100_000):
        for dtype in ("float16", "float32", "float64"):
            for filtered in (False, True):
                for plan in choose(dtype, columns, filtered=filtered):
                    values = (str(value) for _, value in plan.kernel.constants)
                    kernels.setdefault(" ".join([plan.kernel.entry, *values]), plan)
    return kernels


@pytest.mark.parametrize("form", forms())
def test_kernels_compile_without_spills(form):
    pytest.importorskip("cupy")
    compiles(forms()[form], (75, 90, 120))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_largest_kernels_compile_for_every_architecture(arch):
    pytest.importorskip("cupy")
    # bfloat16 differs from float16 in its conversion alone.
    for dtype, columns in [("bfloat16", 8000), ("bfloat16", 1000), ("float64", 4000)]:
        for plan in choose(dtype, columns, filtered=True):
            compiles(plan, (arch,))
    for plan in choose("bfloat16", 100_000):
        compiles(plan, (arch,))


def compiles(plan, architectures):
    for arch in architectures:
        cubin = compile.cubin(plan.kernel, arch)
        assert cubin.spills == 0, (arch, cubin.log)
        assert cubin.registers * plan.threads <= REGISTERS, (arch, cubin.log)
        assert cubin.static_shared_memory <= STATIC, (arch, cubin.log)


def test_rows_too_many_for_32_bits_compile():
    pytest.importorskip("cupy")
    plan = choose("float16", 10**6, rows=10**7)[0]
    assert dict(plan.kernel.constants)["Index"] == "int64"
    compiles(plan, (90,))


def test_explain_and_warmup_know_the_function():
    assert "NumPy" in cuflash.explain(cuflash.sample, np.zeros((3, 4)), seed=0)
    assert cuflash.warmup(cuflash.sample, np.zeros((3, 4)), seed=0, top_p=0.5) == 0
    with pytest.raises(ValueError, match="`top_p`"):
        cuflash.explain(cuflash.sample, np.zeros((3, 4)), seed=0, top_p=2)


def test_explain_tells_the_plan(cp):
    text = cuflash.explain(cuflash.sample, cp.zeros((4000, 1000), "float32"), seed=0)
    assert "1 launch" in text
    assert "32 threads a row, held in registers" in text
    x = cp.zeros((10, 128_000), "float32")
    assert "2 launches" in cuflash.explain(cuflash.sample, x, seed=0, top_p=0.9)
    assert "copies         logits" in cuflash.explain(cuflash.sample, x, seed=0, axis=0)
    assert "copies         logits" in cuflash.explain(cuflash.sample, x.astype(int), seed=0)
    assert cuflash.warmup(cuflash.sample, x, seed=0, top_k=50) >= 2
