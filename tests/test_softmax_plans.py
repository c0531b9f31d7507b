"""Layouts, plans and kernels of the softmax room, on machines without a GPU too."""

from __future__ import annotations

import math
import re
from importlib import resources

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.lib.stride_tricks import as_strided
from softmax_problems import LAYOUTS, place, shapes
from strategies import DTYPES

import cuflash
from cuflash._softmax import api, gpu, layout, plan
from cuflash._softmax.problem import Operands, Problem
from cuflash.jit import compile
from cuflash.jit.gpu import of_arch

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
REGISTERS = 65536  # a multiprocessor's
STATIC = 48 * 1024  # bytes of shared memory

layouts = st.sampled_from(LAYOUTS)


def make(
    function="softmax",
    dtype="float32",
    *,
    result=None,
    shape=(1,),
    axes=(0,),
    x="contiguous",
    out=None,
    weighted=False,
    signed=False,
):
    """A problem with operands whose elements are numbered through."""
    problem = Problem(function, dtype, result or dtype, shape, axes, weighted, signed)
    most = 2048 if dtype in ("float16", "bfloat16") else math.prod(shape) + 1
    numbers = (np.arange(math.prod(shape)) % most).reshape(shape).astype(DTYPES[dtype])
    reduced = tuple(1 if i in axes else n for i, n in enumerate(shape))
    answer = (np.zeros(reduced) if problem.reduces else numbers).astype(DTYPES[problem.result])
    operands = Operands(
        x=place(numbers, x, np)[0],
        out=place(answer, out or x, np)[0],
        weights=place(numbers, x, np)[0] if problem.weighted else None,
        sign=np.zeros(reduced, DTYPES[problem.result]) if problem.signed else None,
    )
    return problem, operands


def walk(array, placed, placement):
    """All elements as a kernel finds them, [rows, columns]."""
    strides = [stride * array.itemsize for stride in placement.outer + placement.reduced]
    return as_strided(array, placed.outer + placed.reduced, strides).reshape(
        placed.rows, placed.columns
    )


@st.composite
def small(draw):
    shape = draw(shapes().filter(lambda shape: 0 < math.prod(shape) < 2000))
    axes = draw(st.sets(st.integers(0, len(shape) - 1)))
    return shape, tuple(sorted(axes)), draw(layouts), draw(layouts)


@given(case=small())
def test_a_folded_layout_walks_each_row_of_each_array_alike(case):
    shape, axes, x, out = case
    problem, operands = make("softmax", "float64", shape=shape, axes=axes, x=x, out=out)
    placed = layout.of(problem, operands)
    assert (placed.rows, placed.columns) == (problem.rows, problem.columns)
    seen = walk(operands.x, placed, placed.x)
    np.testing.assert_array_equal(seen, walk(operands.out, placed, placed.out))
    rows = operands.x.transpose(problem.kept + axes).reshape(problem.rows, problem.columns)
    want = sorted(map(sorted, rows.tolist()))
    assert sorted(map(sorted, seen.tolist())) == want


def test_axes_fold_as_far_as_all_arrays_allow():
    problem, operands = make(shape=(2, 3, 4, 5), axes=(1, 2))
    placed = layout.of(problem, operands)
    assert (placed.outer, placed.reduced) == ((2, 5), (12,))
    problem, operands = make(shape=(2, 3, 4, 5), axes=(2, 3), out="gaps")
    placed = layout.of(problem, operands)
    assert (placed.outer, placed.reduced) == ((2, 3), (4, 5))
    problem, operands = make("logsumexp", shape=(2, 3, 4, 5), axes=(0, 1, 2, 3), signed=True)
    placed = layout.of(problem, operands)
    assert (placed.outer, placed.reduced) == ((1,), (120,))


def test_what_does_not_fold_is_copied_once():
    shape = (2, 3, 2, 3, 2, 3, 2, 3, 2, 3)
    problem, operands = make(shape=shape, axes=(0, 2, 4, 6, 8), dtype="float64")
    assert not layout.of(problem, operands).fits
    fitting, placed, copies = gpu.fit(problem, operands)
    assert copies == ("x", "out")
    assert (placed.outer, placed.reduced) == ((243,), (32,))
    np.testing.assert_array_equal(fitting.x, operands.x)
    problem, operands = make(shape=shape[:8], axes=(0, 2, 4, 6))
    assert gpu.fit(problem, operands)[0] is operands


def test_strides_that_are_no_whole_elements_are_copied():
    record = np.zeros((4, 4), [("x", "f4"), ("y", "i2")])
    out = np.zeros((4, 4), "f4")
    problem = Problem("softmax", "float32", "float32", (4, 4), (1,))
    assert gpu.fit(problem, Operands(record["x"], out))[2] == ("x", "out")


def test_params_are_those_of_the_kernels():
    source = resources.files("cuflash").joinpath("_softmax/layout.cuh").read_text()
    struct = re.search(r"struct Params \{(.*?)\n\};", source, re.DOTALL)[1]
    declarations = re.sub(r"//.*", "", struct)
    names = re.findall(r"(\w+)(?:\[\w+\])?\s*[,;]", declarations)
    assert tuple(names) == gpu.PARAMS.names
    assert f"sizeof(Params) == {gpu.PARAMS.itemsize}" in source
    assert f"kMaxAxes = {layout.MAX_AXES}" in source


def constants(chosen):
    return dict(chosen.kernel.constants)


def choose(arch=90, **case):
    problem, operands = make(**case)
    placed = layout.of(problem, operands)
    return problem, placed, plan.choose(problem, placed, of_arch(arch))


@given(
    case=small(),
    function=st.sampled_from(["softmax", "logsumexp"]),
    dtype=st.sampled_from(list(DTYPES)),
    wide=st.booleans(),
    arch=st.sampled_from(ARCHITECTURES),
)
def test_plans_cover_all_rows_and_columns(case, function, dtype, wide, arch):
    shape, axes, x, out = case
    result = "float32" if wide and dtype in ("float16", "bfloat16") else dtype
    problem, operands = make(
        function=function, dtype=dtype, result=result, shape=shape, axes=axes, x=x, out=out
    )
    _, placed, copies = gpu.fit(problem, operands)
    chosen = plan.choose(problem, placed, of_arch(arch), copies)
    is_sound(problem, placed, chosen)


def is_sound(problem, placed, chosen):
    c = constants(chosen)
    threads, vector = c["kThreads"], c["kVector"]
    assert chosen.threads == threads
    assert threads % 32 == 0
    assert 32 <= threads <= 1024
    if "kThreadsPerRow" in c:
        rows = threads // c["kThreadsPerRow"]
        assert chosen.grid[0] == -(-problem.rows // rows)
        held = c["kThreadsPerRow"] * c["kVectors"] * vector
        assert placed.reduced[-1] % vector == 0
    else:
        tiles = -(-placed.outer[-1] // (c["kLanes"] * vector))
        assert chosen.grid[0] == problem.rows // placed.outer[-1] * tiles
        held = threads // c["kLanes"] * c["kVectors"]
        assert placed.outer[-1] % vector == 0
    assert c["kHeld"] == (not problem.reduces and problem.columns <= held)
    for placement in placed.placements[: 1 if problem.reduces else 2]:
        assert vector * placement.itemsize <= 16
        assert placement.alignment % (vector * placement.itemsize) == 0


@pytest.mark.parametrize(
    ("shape", "axes", "file", "held"),
    [
        ((4000, 1000), (1,), "rows", True),
        ((65536, 63), (1,), "rows", True),
        ((10, 16000), (1,), "rows", True),
        ((10, 128000), (1,), "rows", False),
        ((1000, 4000), (0,), "columns", True),
        ((100000, 64), (0,), "columns", False),
        ((4000, 2), (0,), "columns", True),
        ((4, 2), (0,), "rows", True),
    ],
)
def test_which_kernel_and_how_often_it_reads(shape, axes, file, held):
    problem, placed, chosen = choose(shape=shape, axes=axes)
    is_sound(problem, placed, chosen)
    assert chosen.kernel.file == f"_softmax/{file}.cu"
    assert constants(chosen)["kHeld"] == held
    assert chosen.bytes == math.prod(shape) * 4 * (2 if held else 3)


def test_loads_are_as_wide_as_alignment_allows():
    for dtype, vector in [("float16", 8), ("bfloat16", 8), ("float32", 4), ("float64", 2)]:
        for shape, axes in [((3, 64), (1,)), ((640, 64), (0,))]:
            case = {"dtype": dtype, "shape": shape, "axes": axes}
            assert constants(choose(**case)[2])["kVector"] == vector
            assert constants(choose(**case, x="unaligned")[2])["kVector"] == 1
    assert constants(choose(shape=(3, 62), axes=(1,))[2])["kVector"] == 2
    # 16 bytes of the wider of the two.
    case = {"dtype": "float16", "result": "float32", "shape": (3, 64), "axes": (1,)}
    assert constants(choose(**case)[2])["kVector"] == 4


# One of each form that a kernel can take, with what makes it largest: function, shape, axes.
FORMS = {
    "part of a warp": ("softmax", (50, 40), (1,)),
    "a warp": ("log_softmax", (9, 1024), (1,)),
    "a warp, single elements": ("log_softmax", (9, 1023), (1,)),
    "a block": ("log_softmax", (2, 16384), (1,)),
    "a block, single elements": ("softmax", (2, 8191), (1,)),
    "two reads": ("softmax", (2, 40000), (1,)),
    "two reads, single elements": ("log_softmax", (2, 40001), (1,)),
    "many strides": ("softmax", (3, 8, 3, 8), (1, 3)),
    "sums": ("logsumexp", (2, 40000), (1,)),
    "sums of short rows": ("logsumexp", (9, 100), (1,)),
    "columns": ("log_softmax", (2000, 64), (0,)),
    "columns, single elements": ("log_softmax", (500, 63), (0,)),
    "columns, two reads": ("log_softmax", (9000, 64), (0,)),
    "columns, two reads, single elements": ("softmax", (9000, 63), (0,)),
    "short columns": ("softmax", (8, 65536), (0,)),
    "sums of columns": ("logsumexp", (64, 65536), (0,)),
    "sums of columns, single elements": ("logsumexp", (2000, 63), (0,)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_kernels_compile_without_spills(form, dtype):
    pytest.importorskip("cupy")
    function, shape, axes = FORMS[form]
    logs = function == "logsumexp"
    problem, placed, chosen = choose(
        function=function, dtype=dtype, shape=shape, axes=axes, weighted=logs, signed=logs
    )
    is_sound(problem, placed, chosen)
    # bfloat16 differs from float16 in its conversions alone, and they from sm_80 on.
    for arch in (75, 80) if dtype == "bfloat16" else ARCHITECTURES:
        cubin = compile.cubin(chosen.kernel, arch)
        assert cubin.spills == 0, (arch, cubin.log)
        assert cubin.registers * chosen.threads <= REGISTERS, (arch, cubin.log)
        assert cubin.static_shared_memory <= STATIC, (arch, cubin.log)


def test_explain_and_warmup_know_the_functions():
    for function in (cuflash.softmax, cuflash.log_softmax, cuflash.logsumexp):
        assert "NumPy" in cuflash.explain(function, np.zeros((3, 4)), axis=1)
        assert cuflash.warmup(function, np.zeros((3, 4))) == 0
        with pytest.raises(np.exceptions.AxisError):
            cuflash.explain(function, np.zeros((3, 4)), axis=2)


def test_explain_tells_the_plan(cp):
    x = cp.zeros((4000, 1000), "float32")
    text = cuflash.explain(cuflash.softmax, x, axis=1)
    assert "32 threads a row, held in registers" in text
    assert cuflash.warmup(cuflash.softmax, x, axis=1) == 1
    _, (planned,) = api._logsumexp_plans(x.astype("int32"), axis=1, b=x)
    assert planned.copies == ("a", "b")  # both become float64
    assert "softmax: 0 launches" in cuflash.explain(cuflash.softmax, cp.zeros((0, 3)))
