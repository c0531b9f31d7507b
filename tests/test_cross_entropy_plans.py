"""Plans and kernels of cross-entropy, on machines without a GPU too."""

from __future__ import annotations

import math
import re
from importlib import resources

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.lib.stride_tricks import as_strided
from softmax_problems import LAYOUTS, place
from strategies import DTYPES

import cuflash
from cuflash._softmax import loss_gpu, loss_plan
from cuflash._softmax.layout import Layout
from cuflash._softmax.loss_problem import Problem
from cuflash.jit import compile
from cuflash.jit.gpu import of_arch

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
REGISTERS = 65536  # a multiprocessor's
STATIC = 48 * 1024  # bytes of shared memory

layouts = st.sampled_from(LAYOUTS)


def make(
    dtype="float32",
    rows=(3,),
    classes=5,
    *,
    axis=-1,
    result=None,
    target="int64",
    ignore_index=None,
    label_smoothing=0.1,
    reduction="mean",
    logits="contiguous",
    out="contiguous",
):
    """A problem with its logits, targets and out as `loss_gpu` has them: classes last."""
    problem = Problem(
        dtype, result or dtype, target, rows, classes, ignore_index, label_smoothing, reduction
    )
    at = axis % (len(rows) + 1)
    shape = (*rows[:at], classes, *rows[at:])
    most = 2048 if dtype in ("float16", "bfloat16") else math.prod(shape)
    numbers = (np.arange(math.prod(shape)) % most).reshape(shape)
    arrays = {
        "logits": place(numbers.astype(DTYPES[dtype]), logits, np)[0],
        "targets": np.zeros(rows, target),
        "out": place(numbers.astype(DTYPES[problem.result]), out, np)[0],
    }
    for name in ("logits", "out"):
        arrays[name] = np.moveaxis(arrays[name], at, -1)
    return problem, arrays


def choose(arch=90, **case):
    problem, arrays = make(**case)
    folded = loss_gpu.fit(problem, arrays, tuple(arrays))
    placements = (loss_gpu._placement(name, folded) for name in ("logits", "out"))
    layout = Layout(folded.outer, (problem.classes,), *placements)
    return problem, folded, layout, loss_plan.gradient(problem, layout, of_arch(arch))


@st.composite
def cases(draw):
    rows = tuple(draw(st.lists(st.integers(1, 9), max_size=5)))
    return {
        "dtype": draw(st.sampled_from(list(DTYPES))),
        "rows": rows,
        "classes": draw(st.integers(1, 600)),
        "axis": draw(st.integers(-1, len(rows))),
        "logits": draw(layouts),
        "out": draw(layouts),
    }


@given(case=cases())
def test_folded_rows_are_walked_alike(case):
    problem, arrays = make(**{**case, "dtype": "float64"})
    folded = loss_gpu.fit(problem, arrays, tuple(arrays))

    def walk(name):
        array = folded.arrays[name]
        strides = [8 * stride for stride in (*folded.strides[name], array.strides[-1] // 8)]
        seen = as_strided(array, (*folded.outer, problem.classes), strides)
        return seen.reshape(problem.rows, problem.classes)

    np.testing.assert_array_equal(walk("logits"), walk("out"))
    want = arrays["logits"].reshape(problem.rows, problem.classes)
    np.testing.assert_array_equal(np.sort(walk("logits")[:, 0]), np.sort(want[:, 0]))


@given(case=cases(), arch=st.sampled_from(ARCHITECTURES))
def test_plans_cover_all_rows_and_classes(case, arch):
    problem, _, layout, chosen = choose(arch, **case)
    is_sound(problem, layout, chosen)


def is_sound(problem, layout, chosen):
    """Every row and class has a thread, every load is aligned and within a run."""
    c = dict(chosen.plan.kernel.constants)
    lanes, vector, slices = c["kLanes"], c["kVector"], c["kThreads"] // c["kLanes"]
    tile = lanes * vector if c["kAcross"] else slices
    tiles = -(-problem.rows // tile)
    assert chosen.plan.grid == (tiles * chosen.chunks, 1, 1)
    assert chosen.plan.threads == c["kThreads"] == lanes * slices
    pitch = slices if c["kAcross"] else lanes * vector
    assert chosen.chunk % (pitch * c["kLoads"]) == 0
    span = problem.classes + (vector - 1) * c["kRagged"]
    assert (chosen.chunks - 1) * chosen.chunk < span <= chosen.chunks * chosen.chunk
    for placement in (layout.x, layout.out):
        assert vector * placement.itemsize <= 16
        if not c["kRagged"]:
            assert placement.alignment % (vector * placement.itemsize) == 0
        if c["kAcross"] and vector > 1:
            assert placement.outer[-1] == 1
        elif vector > 1:
            assert placement.reduced == (1,)
    if c["kRagged"]:
        assert layout.x.phase // layout.x.itemsize % vector == (
            layout.out.phase // layout.out.itemsize % vector
        )
    else:
        assert (layout.outer[-1] if c["kAcross"] else problem.classes) % vector == 0


@pytest.mark.parametrize("rows", [1, 4096, 4097, 10**6, 10**9])
def test_sums_take_one_launch_or_two(rows):
    for reduction in ("mean", "sum"):
        problem, _ = make()
        problem = Problem("float32", "float32", "int64", (rows,), 5, 0, 0.0, reduction)
        for plans in (
            loss_plan.losses(problem, 1, of_arch(90)),
            loss_plan.counts(problem, 1, of_arch(90)),
        ):
            flags = [dict(plan.kernel.constants) for plan in plans]
            assert len(plans) == (1 if rows <= loss_plan.ONE_BLOCK else 2)
            assert [plan.grid[0] for plan in plans][-1] == 1
            assert [c["kWhole"] for c in flags] == [False, True][-len(plans) :]
            assert [c["kJoins"] for c in flags] == [False, True][: len(plans)]


@pytest.mark.parametrize("accumulator", ["float32", "float64"])
def test_params_are_those_of_the_kernels(accumulator):
    numbers = np.dtype(accumulator).itemsize
    for file, struct, of in (
        ("loss.cu", "LossParams", loss_gpu.loss_params),
        ("loss_backward.cu", "GradientParams", loss_gpu.gradient_params),
    ):
        source = resources.files("cuflash").joinpath(f"_softmax/{file}").read_text()
        body = re.search(rf"struct {struct} \{{(.*?)\n\}};", source, re.DOTALL)[1]
        names = re.findall(r"(\w+)(?:\[\w+\])?\s*[,;]", re.sub(r"//.*", "", body))
        assert tuple(names) == of(accumulator).names
        size = re.search(rf"sizeof\({struct}\) == (\d+) \+ (\d) \* sizeof\(Score\)", source)
        assert int(size[1]) + int(size[2]) * numbers == of(accumulator).itemsize


# One of each form that the gradient's kernel can take, with what makes it largest.
FORMS = {
    "many short rows": {"rows": (5000,), "classes": 63},
    "short rows of vectors": {"rows": (5000,), "classes": 64},
    "long rows": {"rows": (40,), "classes": 32000},
    "long rows, ragged": {"rows": (40,), "classes": 32001},
    "single elements": {"rows": (40,), "classes": 4001, "logits": "unaligned"},
    "many strides": {"rows": (3, 4, 5), "classes": 300, "axis": 1, "logits": "gaps"},
    "across": {"rows": (4096,), "classes": 1000, "axis": 0},
    "across, single elements": {"rows": (4097,), "classes": 1000, "axis": 0},
    "across images": {"rows": (4, 32, 32), "classes": 20, "axis": 1},
    "few rows across": {"rows": (8,), "classes": 10000, "axis": 0},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_gradients_compile_without_spills(form, dtype):
    pytest.importorskip("cupy")
    problem, _, layout, chosen = choose(dtype=dtype, ignore_index=-100, **FORMS[form])
    is_sound(problem, layout, chosen)
    compiles(chosen.plan, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [100, 10**6])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_sums_compile_without_spills(dtype, rows, reduction):
    pytest.importorskip("cupy")
    problem = Problem(dtype, dtype, "uint8", (rows,), 200, 255, 0.1, reduction)
    planned = loss_plan.losses(problem, 4, of_arch(90))
    if dtype == "float32":
        planned += loss_plan.counts(problem, 4, of_arch(90))
    for plan in planned:
        compiles(plan, dtype)


def compiles(plan, dtype):
    # bfloat16 differs from float16 in its conversions alone, and they from sm_80 on.
    for arch in (75, 80) if dtype == "bfloat16" else ARCHITECTURES:
        cubin = compile.cubin(plan.kernel, arch)
        assert cubin.spills == 0, (arch, cubin.log)
        assert cubin.registers * plan.threads <= REGISTERS, (arch, cubin.log)
        assert cubin.static_shared_memory <= STATIC, (arch, cubin.log)


def test_explain_and_warmup_know_the_functions():
    x, targets, lse = np.zeros((3, 4)), np.zeros(3, int), np.zeros(3)
    for function, arguments in (
        (cuflash.cross_entropy, (x, targets)),
        (cuflash.cross_entropy_backward, (1, x, targets, lse)),
    ):
        assert "NumPy" in cuflash.explain(function, *arguments, reduction="sum")
        assert cuflash.warmup(function, *arguments) == 0
        with pytest.raises(np.exceptions.AxisError):
            cuflash.explain(function, *arguments, axis=2)


def test_explain_tells_the_launches(cp):
    x, targets = cp.zeros((4000, 1000), "float32"), cp.zeros(4000, "int64")
    lse = cp.zeros(4000, "float32")
    assert "cross_entropy: 2 launches" in cuflash.explain(cuflash.cross_entropy, x, targets)
    backward = cuflash.cross_entropy_backward
    assert "1 launch " in cuflash.explain(backward, 1, x, targets, lse)
    assert "2 launches" in cuflash.explain(backward, 1, x, targets, lse, ignore_index=3)
    text = cuflash.explain(cuflash.cross_entropy, x.astype("int32"), targets)
    assert re.search(r"copies +logits", text)
    assert cuflash.warmup(backward, 1, x, targets, lse) == 1
