"""Plans and kernels of topk and softmax_topk, on machines without a GPU too."""

from __future__ import annotations

import re
from importlib import resources

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import DTYPES

import cuflash
from cuflash._softmax.selection import topk_api, topk_gpu, topk_plan
from cuflash._softmax.selection.topk_api import Operands, Problem
from cuflash.jit import compile
from cuflash.jit.gpu import of_arch

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
STATIC = 48 * 1024  # bytes of shared memory
CALLS = (cuflash.topk, cuflash.softmax_topk)
FUNCTIONS = ("topk", "softmax_topk")


def make(rows, columns, k, function="softmax_topk", dtype="float32", result=None):
    return Problem(function, dtype, result or dtype, (rows,), columns, k)


@st.composite
def made(draw):
    columns = draw(st.integers(1, 3000) | st.integers(1, 2**32 - 1))
    rows = draw(st.integers(1, 70_000))
    k = draw(st.integers(1, min(1024, columns)))
    return make(
        rows, columns, k, draw(st.sampled_from(FUNCTIONS)), draw(st.sampled_from([*DTYPES]))
    )


@given(problem=made(), arch=st.sampled_from(ARCHITECTURES))
def test_plans_are_sound(problem, arch):
    launches = topk_plan.choose(problem, 1, of_arch(arch))
    assert len(launches.plans) == 1 + (launches.slices > 1)
    if launches.second is None:
        is_sound(problem, launches.first, problem.rows)
        return
    vector = 16 // DTYPES[problem.dtype].itemsize
    parts = problem.rows * launches.slices
    # What the kernel gives a part: whole vectors, at least k elements, the rest to the last one.
    width = problem.columns // launches.slices // vector * vector
    assert width - vector >= problem.k
    longest = problem.columns + vector - 1 - (launches.slices - 1) * width
    assert topk_plan.longest(problem, launches.slices) == longest
    is_sound(problem, launches.first, parts)
    is_sound(problem, launches.second, problem.rows)


def is_sound(problem, chosen, streams):
    c = dict(chosen.kernel.constants)
    vector = 16 // DTYPES[problem.dtype].itemsize
    items = c["kVectors"] * vector
    maxima = c["kThreadsPerRow"] * c["kMaxima"]
    assert chosen.threads == c["kThreads"]
    assert chosen.threads * c["kBlocks"] <= 1024
    assert c["kBlocks"] >= 1
    assert chosen.grid[0] * (c["kThreads"] // c["kThreadsPerRow"]) >= streams
    assert items <= 32
    assert items % c["kMaxima"] == 0
    # k maxima tell a bound. The buffer has room for more than what is kept of it when it is full.
    assert maxima >= min(problem.k, c["kThreadsPerRow"] * items)
    assert 2 * c["kCapacity"] >= 3 * topk_plan.most(problem.k)
    assert topk_plan.most(problem.k) >= problem.k
    key = 16 if problem.dtype == "float64" else 8
    rows = c["kThreads"] // c["kThreadsPerRow"]
    assert rows * (c["kCapacity"] + maxima) * key <= STATIC - 1024


@pytest.mark.parametrize(
    ("rows", "columns", "k", "threads", "launches"),
    [
        (65536, 63, 5, 32, 1),
        (65536, 1000, 50, 32, 1),
        (65536, 4000, 5, 32, 1),
        (4000, 32000, 50, 256, 1),
        (4000, 128_000, 50, 256, 1),
        (128, 128_000, 50, 512, 1),
        (10, 1000, 50, 128, 1),
        (10, 32000, 50, 512, 1),
        (10, 128_000, 50, 256, 2),
        (1, 10**7, 50, 256, 2),
        (4000, 128_000, 1024, 512, 1),
    ],
)
def test_how_rows_are_shared(rows, columns, k, threads, launches):
    chosen = topk_plan.choose(make(rows, columns, k), 1, of_arch(90))
    assert dict(chosen.first.kernel.constants)["kThreadsPerRow"] == threads
    assert len(chosen.plans) == launches


def test_params_are_those_of_the_kernel():
    source = resources.files("cuflash").joinpath("_softmax/selection/topk.cu").read_text()
    struct = re.search(r"struct Params \{(.*?)\n\};", source, re.DOTALL)[1]
    names = re.findall(r"(\w+)(?:\[[^\]]+\])?\s*[,;]", re.sub(r"//.*", "", struct))
    assert tuple(names) == topk_gpu.PARAMS.names
    assert f"sizeof(Params) == {topk_gpu.PARAMS.itemsize}" in source
    assert f"kMaxAxes = {topk_gpu.MAX_AXES}" in source


def operands(x, k):
    answer = (*x.shape[:-1], k)
    return Operands(x, np.zeros(answer, x.dtype), np.zeros(answer, np.int64))


def test_what_is_copied():
    x = np.zeros((4, 6, 8), "float32")
    for used in (x, x[::2, ::2], x[::-1, ::-1], np.broadcast_to(x[:1], (4, 6, 8)), x[..., :1]):
        assert topk_gpu.fit(operands(used, 1))[1] == ()
    for used in (x[..., ::-1], x[..., ::2], x.transpose(0, 2, 1)):
        fitting, copies = topk_gpu.fit(operands(used, 1))
        assert copies == ("x",)
        assert fitting.x.flags.c_contiguous
    x = np.zeros((3,) * 5 + (8,), "float32")[::2, ::2, ::2, ::2, ::2]
    assert topk_gpu.fit(operands(x, 1))[1] == ("x", "out")
    record = np.zeros((4, 4), [("x", "f4"), ("y", "i2")])
    assert topk_gpu.fit(operands(record["x"], 1))[1] == ("x",)


# One of each form, with what makes it largest: rows, columns, k.
FORMS = {
    "a warp": (65536, 1000, 50),
    "a warp, chunk by chunk": (65536, 4000, 50),
    "a block": (4000, 32000, 50),
    "a block for many": (4000, 128_000, 1024),
    "parts": (10, 128_000, 50),
    "parts for many": (1, 10**7, 1024),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_kernels_compile_without_spills(form, dtype):
    pytest.importorskip("cupy")
    # bfloat16 differs from float16 in its conversions alone, and they from sm_80 on.
    for arch in (75, 80) if dtype == "bfloat16" else (75, 90):
        gpu = of_arch(arch)
        for chosen in topk_plan.choose(make(*FORMS[form], dtype=dtype), 2, gpu).plans:
            cubin = compile.cubin(chosen.kernel, arch)
            assert cubin.spills == 0, (arch, chosen.kernel, cubin.log)
            assert cubin.registers * chosen.threads <= 65536, (arch, cubin.log)
            assert cubin.static_shared_memory <= STATIC, (arch, cubin.log)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_topk_alone_compiles_without_spills(arch):
    pytest.importorskip("cupy")
    for form in ("a warp, chunk by chunk", "a block"):
        chosen = topk_plan.choose(make(*FORMS[form], function="topk"), 1, of_arch(arch)).first
        cubin = compile.cubin(chosen.kernel, arch)
        assert cubin.spills == 0, (arch, chosen.kernel, cubin.log)


def test_explain_and_warmup_know_the_functions():
    for function in CALLS:
        assert "NumPy" in cuflash.explain(function, np.zeros((3, 4)), 2)
        assert cuflash.warmup(function, np.zeros((3, 4)), 2, axis=0) == 0
        with pytest.raises(ValueError, match="`k`"):
            cuflash.explain(function, np.zeros((3, 4)), 5)


def test_explain_tells_the_plan(cp):
    x = cp.zeros((10, 128_000), "float32")
    text = cuflash.explain(cuflash.softmax_topk, x, 50)
    assert "softmax_topk: 2 launches" in text
    assert "parts of a row, in one read" in text
    assert cuflash.warmup(cuflash.softmax_topk, x, 50) == 2
    _, (planned, *_) = topk_api._topk_plans(x, 3, axis=0)
    assert planned.copies == ("x",)
    assert "topk: 0 launches" in cuflash.explain(cuflash.topk, cp.zeros((0, 3)), 2)
