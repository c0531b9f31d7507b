"""Layouts, plans and kernels of the softmax room, on machines without a GPU too."""

from __future__ import annotations

import math
import re
from importlib import resources

import numpy as np
import pytest
from hypothesis import example, given, settings
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
STATIC = 48 * 1024  # bytes of shared memory a block declares at most
FUNCTIONS = tuple(plan.OPERATIONS)

layouts = st.sampled_from(LAYOUTS)


def make(
    function="softmax",
    dtype="float32",
    *,
    shape=(1,),
    axes=(0,),
    x="contiguous",
    out=None,
    weighted=False,
    signed=False,
):
    """A problem with operands whose elements are numbered through."""
    problem = Problem(function, dtype, dtype, shape, axes, weighted, signed)
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


# Plans look at shapes, strides and addresses alone.


def imagine(shape, dtype, placed="contiguous", still=()):
    """An array that has its size in its strides only; along the axes `still` it is broadcast."""
    dtype, axes = DTYPES[dtype], list(range(len(shape)))
    if placed == "permuted":
        axes = [*axes[1:], 0]
    strides = [0] * len(shape)
    stride = dtype.itemsize * {"steps": 2, "negative": -1}.get(placed, 1)
    for axis in reversed(axes):
        if axis not in still:
            strides[axis] = stride
            stride *= shape[axis] + (3 if placed == "gaps" else 0)
    memory = np.zeros(64, "uint8")
    begin = -memory.ctypes.data % 16 + (dtype.itemsize if placed == "unaligned" else 0)
    return as_strided(memory[begin : begin + dtype.itemsize].view(dtype), shape, strides)


def choose(
    function="softmax",
    dtype="float32",
    *,
    shape,
    axes,
    arch=90,
    x="contiguous",
    out=None,
    weights=None,
    still=(),
    signed=False,
    result=None,
):
    """A problem, its layout and its launches. Backward passes always have a second operand."""
    weighted = weights is not None or "backward" in function
    problem = Problem(function, dtype, result or dtype, shape, axes, weighted, signed)
    reduced = tuple(1 if i in axes else n for i, n in enumerate(shape))
    answer = reduced if problem.reduces else shape
    operands = Operands(
        x=imagine(shape, dtype, x),
        out=imagine(answer, problem.result, out or x),
        weights=imagine(shape, dtype, weights or x, still) if weighted else None,
        sign=imagine(reduced, problem.result) if signed else None,
    )
    placed = layout.of(problem, operands)
    assert placed.fits
    return problem, placed, plan.choose(problem, placed, of_arch(arch))


def constants(planned):
    return dict(planned.kernel.constants)


def state_bytes(problem):
    return plan.OPERATIONS[problem.function][1] * (8 if problem.dtype == "float64" else 4)


def name(planned):
    return planned.kernel.file.removeprefix("_softmax/").removesuffix(".cu")


def are_sound(problem, placed, launches, arch):
    """What the kernels take for granted."""
    first, *second = launches.plans
    assert (launches.splits - 1) * launches.slice < problem.columns
    assert problem.columns <= launches.splits * launches.slice
    if second:
        assert launches.splits > 1
        assert launches.workspace >= problem.rows * launches.splits * state_bytes(problem)
        assert constants(first)["kPartial"]
        assert not constants(first)["kFinish"]
        assert constants(second[0])["kFinish"]
        assert name(second[0]) == ("parts" if problem.reduces else name(first))
    else:
        assert launches.splits == 1
        assert not constants(first).get("kPartial", False)
        assert not constants(first).get("kFinish", False)
    for planned in launches.plans:
        c = constants(planned)
        assert planned.threads == c["kThreads"]
        assert planned.threads in (32, 64, 128, 256, 512, 1024)
        assert planned.threads * c["kBlocks"] <= 1024
        assert 0 < planned.grid[0] < 2**31
        assert planned.grid[1:] == (1, 1)
        assert planned.shared_memory == 0
        assert c["Index"] == "int64" or max(problem.rows, problem.columns) < 2**31
        if name(planned) == "parts":
            assert planned.grid[0] * planned.threads >= 32 * problem.rows
        else:
            vectors_are_sound(problem, placed, launches, c, across=name(planned) == "columns")
            KERNELS[name(planned)](problem, placed, launches, planned, arch)


def vectors_are_sound(problem, placed, launches, c, across):
    """Every whole vector lies at a multiple of its size, in every array that is walked."""
    vector = c["kVector"]
    walked = [placed.x, placed.weights, None if problem.reduces else placed.out]
    walked = [placement for placement in walked if placement]
    assert launches.splits == 1 or launches.slice % vector == 0
    assert all(vector * placement.itemsize <= 16 for placement in walked)
    dense = len(placed.reduced) == 1 and all(one.reduced == (1,) for one in walked)
    assert dense or not c["kDense"]
    if c["kRagged"]:
        assert c["kDense"]
        assert problem.reduces
        assert not across
        # Columns count from the same place before each row, which is the row's own in each array.
        rows = np.arange(min(problem.rows, 64))
        firsts = np.array(np.unravel_index(rows, placed.outer))
        leads = [
            (one.phase // one.itemsize + np.array(one.outer) @ firsts) % vector for one in walked
        ]
        assert all((lead == leads[0]).all() for lead in leads)
        return
    assert (placed.outer if across else placed.reduced)[-1] % vector == 0
    for one in walked:
        along, others = (one.outer, one.reduced) if across else (one.reduced, one.outer)
        assert vector == 1 or along[-1] == 1
        assert all(stride % vector == 0 for stride in (*along[:-1], *others))
        assert one.alignment % (vector * one.itemsize) == 0


def rows_are_sound(problem, placed, launches, planned, arch):
    c = constants(planned)
    per_row = c["kThreadsPerRow"]
    assert per_row in (1, 2, 4, 8, 16, 32, planned.threads)
    blocks = -(-problem.rows * launches.splits // (planned.threads // per_row))
    assert planned.grid[0] == blocks
    assert not (c["kHeld"] and problem.reduces)
    holds(problem, c, per_row, held=c["kHeld"])


def holds(problem, c, threads, held):
    """Whether a held row, wherever it begins, is one tile of its threads."""
    tile = c["kVectors"] * c["kVector"]
    # A held tile of halves stays two to a register; others are told by the bits of a word.
    packed = held and problem.dtype in plan.HALVES and c["kVector"] > 1 and not problem.weighted
    assert 0 < tile <= (64 if packed else 32)
    lead = c["kVector"] - 1 if c["kRagged"] else 0
    assert not held or problem.columns + lead <= threads * tile


def clusters_are_sound(problem, placed, launches, planned, arch):
    c = constants(planned)
    cluster = c["kCluster"]
    assert arch >= 90
    assert cluster in (2, 4, 8)
    assert planned.grid[0] == problem.rows * cluster
    assert launches.splits == 1
    holds(problem, c, planned.threads * cluster, held=not problem.reduces)


def exchange_bytes(problem, c):
    """Of exchange.cuh: the states of a cluster's warps and a mailbox."""
    states = c["kCluster"] * c["kThreads"] // 32 * state_bytes(problem)
    return -(-states // 8) * 8 + 8


def columns_are_sound(problem, placed, launches, planned, arch):
    c = constants(planned)
    lanes, vector, width = c["kLanes"], c["kVector"], placed.outer[-1]
    assert lanes in (1, 2, 4, 8, 16, 32)
    assert planned.threads % lanes == 0
    tiles = problem.rows // width * -(-width // (lanes * vector))
    assert planned.grid[0] == tiles * launches.splits
    assert c["kVectors"] <= 32
    assert not c["kHeld"] or problem.columns <= planned.threads // lanes * c["kVectors"]
    assert not (c["kHeld"] and problem.reduces)
    states = (planned.threads // 32 + 1) * lanes * vector
    assert states * state_bytes(problem) <= STATIC


KERNELS = {
    "rows": rows_are_sound,
    "cluster_rows": clusters_are_sound,
    "columns": columns_are_sound,
}


@st.composite
def large(draw):
    """Shapes of up to 2**34 elements, around the lengths at which a plan changes."""
    edges = [n + off for n in (1 << i for i in range(5, 21)) for off in (-1, 0, 1)]
    thousands = [1000, 4000, 16000, 32000, 50257, 128_000, 200_000, 300_000, 1_000_000]
    lengths = st.integers(1, 9) | st.sampled_from(edges) | st.sampled_from(thousands)
    shape, room = [], 1 << 34
    for _ in range(draw(st.sampled_from([1, 2, 2, 2, 3, 4]))):
        shape.append(min(room, draw(lengths | st.integers(1, 200_000))))
        room //= shape[-1]
    shape = tuple(draw(st.permutations(shape)))
    axes = draw(st.sampled_from([(i,) for i in range(len(shape))]) | sets_of(len(shape)))
    return shape, axes


def sets_of(ndim):
    return st.sets(st.integers(0, ndim - 1)).map(lambda axes: tuple(sorted(axes)))


@st.composite
def cases(draw):
    function = draw(st.sampled_from(FUNCTIONS))
    shape, axes = draw(large() | small().map(lambda case: (case[0][:4], ())))
    axes = tuple(axis for axis in axes if axis < len(shape))
    dtype = draw(st.sampled_from(list(DTYPES)))
    halves = dtype in ("float16", "bfloat16")
    mostly = st.just("contiguous") | layouts
    return {
        "function": function,
        "dtype": dtype,
        "result": draw(st.sampled_from([dtype, "float32"])) if halves else dtype,
        "shape": shape,
        "axes": axes,
        "x": draw(mostly),
        "out": draw(st.none() | mostly),
        "weights": draw(st.none() | mostly) if function == "logsumexp" else None,
        "still": draw(st.just(()) | sets_of(len(shape))),
        "signed": draw(st.booleans()) if function in ("logsumexp", "cross_entropy") else False,
    }


# The most states that a block of columns has in shared memory.
WIDEST = {"function": "cross_entropy", "dtype": "float16", "shape": (64, 131_072), "axes": (0,)}


@settings(max_examples=10 * settings().max_examples)  # none of them allocates or compiles anything
@given(case=cases(), arch=st.sampled_from(ARCHITECTURES))
@example(case=WIDEST, arch=75)
def test_plans_are_sound(case, arch):
    problem, placed, launches = choose(**case, arch=arch)
    are_sound(problem, placed, launches, arch)


def test_loads_are_as_wide_as_alignment_allows():
    def load(**case):
        c = constants(choose(**case)[2].plans[0])
        return c["kVector"], c["kRagged"]

    for dtype, vector in [("float16", 8), ("bfloat16", 8), ("float32", 4), ("float64", 2)]:
        for shape, axes in [((3, 64), (1,)), ((640, 64), (0,))]:
            case = {"dtype": dtype, "shape": shape, "axes": axes}
            assert load(**case) == (vector, False)
            assert load(**case, x="unaligned") == (1, False)
        # Long rows that are only read have whole vectors wherever they begin.
        case = {"dtype": dtype, "shape": (3, 2001), "axes": (1,)}
        assert load(**case) == (1, False)
        sums = case | {"function": "logsumexp"}
        assert load(**sums) == (vector, True)
        assert load(**sums, x="unaligned") == (vector, True)
        assert load(**sums, weights="contiguous") == (vector, True)
        assert load(**sums, weights="unaligned") == (1, False)
        assert load(**sums, x="negative") == (1, False)
    assert load(shape=(3, 62), axes=(1,)) == (2, False)
    # 16 bytes of the wider of the two.
    case = {"dtype": "float16", "result": "float32", "shape": (3, 64), "axes": (1,)}
    assert load(**case) == (4, False)


def form(planned):
    """What sets a kernel apart from the others of its file, but for numbers."""
    c = constants(planned)
    words = ("kHeld", "held"), ("kPartial", "partial"), ("kFinish", "finish"), ("kRagged", "ragged")
    flags = [word for constant, word in words if c.get(constant)]
    return " ".join([name(planned), *(flags if name(planned) != "parts" else [])])


SIGNED = {"weights": "contiguous", "signed": True}

# One of each form that a kernel can take, with what makes it largest: function, shape, axes and
# more; the kernels for float32 on sm_90; and the elements that are moved for each one of x.
FORMS = [
    ("softmax", (65536, 63), (1,), {}, "rows held", 2),
    ("softmax", (4, 2), (0,), {}, "rows held", 2),
    ("softmax", (4000, 1000), (1,), {}, "rows held", 2),
    ("softmax", (4000, 1001), (1,), {}, "rows held", 2),
    ("softmax", (4000, 2001), (1,), {}, "rows held", 2),
    ("softmax", (4000, 16000), (1,), {}, "rows held", 2),
    ("softmax", (4000, 16001), (1,), {}, "rows held", 2),
    ("softmax", (10, 16000), (1,), {}, "cluster_rows", 2),
    ("softmax", (4000, 128_000), (1,), {}, "cluster_rows", 2),
    ("softmax", (4000, 128_001), (1,), {}, "cluster_rows", 2),
    ("softmax", (4000, 200_000), (1,), {}, "rows", 3),
    ("softmax", (4000, 200_001), (1,), {}, "rows", 3),
    ("softmax", (1, 1_000_000), (1,), {}, "rows partial + rows finish", 3),
    ("softmax", (1, 1_000_001), (1,), {}, "rows partial + rows finish", 3),
    ("softmax", (50, 800, 50, 800), (1, 3), {}, "rows", 3),
    ("softmax", (1000, 4000), (0,), {}, "columns held", 2),
    ("softmax", (3, 8, 3, 8), (1, 3), {}, "rows held", 2),
    ("softmax", (10, 9, 10, 64), (0, 2), {}, "columns held", 2),
    ("softmax", (500, 63), (0,), {}, "columns held", 2),
    ("softmax", (8, 65536), (0,), {}, "columns held", 2),
    ("softmax", (128_000, 63), (0,), {}, "columns partial + columns finish", 3),
    ("softmax", (32_000, 65536), (0,), {}, "columns", 3),
    ("log_softmax", (9, 1024), (1,), {}, "rows held", 2),
    ("log_softmax", (4000, 16001), (1,), {}, "rows held", 2),
    ("log_softmax", (4000, 128_001), (1,), {}, "cluster_rows", 2),
    ("log_softmax", (4000, 200_001), (1,), {}, "rows", 3),
    ("log_softmax", (1, 1_000_001), (1,), {}, "rows partial + rows finish", 3),
    ("log_softmax", (1000, 64), (0,), {}, "columns held", 2),
    ("log_softmax", (32_000, 65536), (0,), {}, "columns", 3),
    ("logsumexp", (9, 100), (1,), SIGNED, "rows", 2),
    ("logsumexp", (65536, 4000), (1,), {}, "rows", 1),
    ("logsumexp", (65536, 4001), (1,), SIGNED, "rows ragged", 2),
    ("logsumexp", (4000, 32001), (1,), {}, "rows ragged", 1),
    ("logsumexp", (10, 128_000), (1,), {}, "cluster_rows", 1),
    ("logsumexp", (10, 128_001), (1,), SIGNED, "cluster_rows ragged", 2),
    ("logsumexp", (1, 1_000_000), (1,), {}, "rows partial + parts", 1),
    ("logsumexp", (1, 1_000_001), (1,), SIGNED, "rows partial ragged + parts", 2),
    ("logsumexp", (1000, 6301), (0,), SIGNED, "columns", 2),
    ("logsumexp", (1000, 131_072), (0,), {}, "columns", 1),
    ("logsumexp", (128_000, 64), (0,), SIGNED, "columns partial + parts", 2),
    ("cross_entropy", (65536, 1000), (1,), {}, "rows", 1),
    ("cross_entropy", (4000, 32_000), (1,), {"signed": True}, "rows", 1),
    ("cross_entropy", (4000, 50257), (1,), {}, "rows ragged", 1),
    ("cross_entropy", (4000, 50257), (1,), {"signed": True}, "rows ragged", 1),
    ("cross_entropy", (10, 128_001), (1,), {}, "cluster_rows ragged", 1),
    ("cross_entropy", (10, 128_001), (1,), {"signed": True}, "cluster_rows ragged", 1),
    ("cross_entropy", (1, 1_000_001), (1,), {"signed": True}, "rows partial ragged + parts", 1),
    ("cross_entropy", (1000, 131_072), (0,), {"signed": True}, "columns", 1),
    ("cross_entropy", (128_000, 64), (0,), {}, "columns partial + parts", 1),
    ("softmax_backward", (4000, 2001), (1,), {}, "rows held", 3),
    ("softmax_backward", (4000, 8000), (1,), {}, "rows held", 3),
    ("softmax_backward", (4000, 64_001), (1,), {}, "cluster_rows", 3),
    ("softmax_backward", (4000, 100_000), (1,), {}, "rows", 5),
    ("softmax_backward", (4000, 200_001), (1,), {}, "rows", 5),
    ("softmax_backward", (1, 1_000_001), (1,), {}, "rows partial + rows finish", 5),
    ("softmax_backward", (500, 64), (0,), {}, "columns held", 3),
    ("softmax_backward", (32_000, 65536), (0,), {}, "columns", 5),
    ("softmax_backward", (128_000, 64), (0,), {}, "columns partial + columns finish", 5),
    ("log_softmax_backward", (4000, 8001), (1,), {}, "rows held", 3),
    ("log_softmax_backward", (4000, 64_001), (1,), {}, "cluster_rows", 3),
    ("log_softmax_backward", (4000, 200_001), (1,), {}, "rows", 5),
    ("log_softmax_backward", (1, 1_000_001), (1,), {}, "rows partial + rows finish", 5),
    ("log_softmax_backward", (500, 64), (0,), {}, "columns held", 3),
    ("log_softmax_backward", (32_000, 65536), (0,), {}, "columns", 5),
]


@pytest.mark.parametrize(("function", "shape", "axes", "options", "kernels", "moved"), FORMS)
def test_which_kernels_and_what_they_move(function, shape, axes, options, kernels, moved):
    problem, placed, launches = choose(function, shape=shape, axes=axes, **options)
    are_sound(problem, placed, launches, 90)
    assert " + ".join(map(form, launches.plans)) == kernels
    elements = sum(planned.bytes for planned in launches.plans) / 4 / math.prod(shape)
    assert elements == pytest.approx(moved, abs=0.05)


# Of each family one, but for float32. bfloat16 has its own conversions up to sm_75.
COMPILED = {
    "float32": ARCHITECTURES,
    "float16": (75, 80, 90, 120),
    "bfloat16": (75, 80),
    "float64": (90,),
}
TARGETS = [(dtype, arch) for dtype, architectures in COMPILED.items() for arch in architectures]


@pytest.mark.parametrize(("dtype", "arch"), TARGETS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_kernels_compile_without_spills(function, dtype, arch):
    pytest.importorskip("cupy")
    different = {}
    for _, shape, axes, options, _, _ in (each for each in FORMS if each[0] == function):
        problem, placed, launches = choose(
            function, dtype, shape=shape, axes=axes, arch=arch, **options
        )
        are_sound(problem, placed, launches, arch)
        different |= {planned.kernel: (problem, planned) for planned in launches.plans}
    faults = [fault for each in different.values() for fault in faults_of(*each, arch)]
    assert not faults, "\n".join(faults)


def faults_of(problem, planned, arch):
    cubin = compile.cubin(planned.kernel, arch, also=sizes(problem, planned))
    blocks = constants(planned)["kBlocks"] if name(planned) != "parts" else 1
    if cubin.spills:
        yield f"{cubin.spills} bytes spilled by {planned.kernel}"
    if cubin.registers * planned.threads * blocks > REGISTERS:
        yield f"{cubin.registers} registers in {planned.kernel}"
    if cubin.static_shared_memory > STATIC:
        yield f"{cubin.static_shared_memory} bytes of shared memory in {planned.kernel}"


def sizes(problem, planned):
    """What the host reckons with, for the compiler to compare."""
    c = constants(planned)
    same = {"Params": gpu.PARAMS.itemsize, "State": state_bytes(problem)}
    if "kCluster" in c:
        same["Exchange"] = exchange_bytes(problem, c)
    if name(planned) == "columns":
        rows = c["kLanes"] * c["kVector"]
        same["State[kWarps + 1][kWidth]"] = (
            (planned.threads // 32 + 1) * rows * state_bytes(problem)
        )
    return "".join(f"static_assert(sizeof({what}) == {n});\n" for what, n in same.items())


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
