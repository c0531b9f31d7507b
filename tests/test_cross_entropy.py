"""cross_entropy and its backward pass against their formulas, finite differences and PyTorch."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from poison import poison
from softmax_problems import HALVES, LAYOUTS, exact, host, place
from strategies import DTYPES, nan_filled
from tolerance import ABSOLUTE, ROUNDOFF

import cuflash

INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
REDUCTIONS = ("mean", "sum", "none")
VALUES = ("normal", "wide", "huge", "constant", "some -inf", "rows of -inf", "inf", "nan")
MOST = 1 << 15  # logits
CLASSES = (1, 2, 3, 8, 31, 32, 63, 64, 65, 127, 255, 256, 1000, 1001, 1024, 1025, 4100, 9000)


@dataclass(frozen=True)
class Problem:
    """One call and its backward pass, small enough to print."""

    seed: int = 0
    dtype: str = "float32"
    target: str = "int64"
    rows: tuple[int, ...] = (1,)  # their shape
    classes: int = 3
    axis: int = -1
    values: str = "normal"
    ignored: float = 0  # share of the rows
    label_smoothing: float = 0.0
    reduction: str = "mean"
    layouts: tuple[str, str, str] = ("contiguous",) * 3  # of logits, targets, and lse and dloss
    out: str | None = None  # the layout of a given out, or "logits" for out=logits
    out_dtype: str | None = None  # float32 for half logits

    @property
    def shape(self):
        at = self.axis % (len(self.rows) + 1)
        return (*self.rows[:at], self.classes, *self.rows[at:])

    @property
    def ignore_index(self):
        return None if not self.ignored else 255 if self.target == "uint8" else 100

    @property
    def options(self):
        return {
            "axis": self.axis,
            "ignore_index": self.ignore_index,
            "label_smoothing": self.label_smoothing,
            "reduction": self.reduction,
        }

    @property
    def accumulator(self):
        return "float64" if self.dtype == "float64" else "float32"


@st.composite
def problems(draw):
    classes = draw(st.integers(1, 300) | st.sampled_from(CLASSES))
    room, rows = MOST // classes, []
    for _ in range(draw(st.sampled_from([0, 1, 1, 2, 2, 3, 5]))):
        least = 0 if draw(st.integers(0, 15)) == 0 else 1
        most = max(1, room)
        rows.append(draw(st.integers(least, min(9, most)) | st.integers(1, min(300, most))))
        room //= max(1, rows[-1])
    dtype = draw(st.sampled_from(list(DTYPES)))
    layouts = st.just("contiguous") | st.sampled_from(LAYOUTS)
    out = draw(st.none() | st.just("logits") | st.sampled_from(LAYOUTS))
    wide = dtype in HALVES and out in LAYOUTS
    return Problem(
        seed=draw(st.integers(0, 2**32 - 1)),
        dtype=dtype,
        target=draw(st.just("int64") | st.sampled_from(INTEGERS)),
        rows=tuple(draw(st.permutations(rows))),
        classes=classes,
        axis=draw(st.integers(-len(rows) - 1, len(rows))),
        values=draw(st.just("normal") | st.sampled_from(VALUES)),
        ignored=draw(st.sampled_from([0, 0.3, 1])),
        label_smoothing=draw(st.sampled_from([0.0, 0.1, 1.0])),
        reduction=draw(st.sampled_from(REDUCTIONS)),
        layouts=draw(st.tuples(layouts, layouts, layouts)),
        out=out,
        out_dtype=draw(st.sampled_from([None, "float32"] if wide else [None])),
    )


def materialise(problem):
    """(logits, targets, dloss) in C order."""
    random = np.random.default_rng(problem.seed)
    x = random.standard_normal(problem.shape)
    if problem.values == "wide":
        x *= 30
    elif problem.values == "huge":
        x *= {"float16": 1e4, "float64": 1e290}.get(problem.dtype, 1e30)
    elif problem.values == "constant":
        x[...] = 7.5
    elif problem.values == "rows of -inf":
        x = np.moveaxis(x, problem.axis, -1)
        x[random.random(problem.rows) < 0.5] = -np.inf
        x = np.moveaxis(x, -1, problem.axis)
    elif problem.values in ("some -inf", "inf", "nan"):
        special = {"some -inf": -np.inf, "inf": np.inf, "nan": np.nan}[problem.values]
        x[random.random(x.shape) < 0.05] = special
    most = min(problem.classes, np.iinfo(problem.target).max)
    targets = random.integers(0, most, problem.rows).astype(problem.target)
    if problem.ignored:
        chosen = random.random(problem.rows) < problem.ignored
        targets = np.where(chosen, problem.ignore_index, targets).astype(problem.target)
    dloss = random.standard_normal(problem.rows if problem.reduction == "none" else ())
    return x.astype(DTYPES[problem.dtype]), targets, np.asarray(dloss, problem.accumulator)


def on(xp, array, layout):
    """Integers too: `place` fills gaps with NaN, which they do not have."""
    if array.dtype.kind == "f" or array.dtype.name == "bfloat16":
        return place(array, layout, xp)[0]
    if layout == "contiguous" or not array.ndim:
        return xp.asarray(array)
    steps = xp.full(tuple(2 * n for n in array.shape), 127, array.dtype)
    view = steps[(slice(None, None, 2),) * array.ndim]
    view[...] = xp.asarray(array)
    return view


@dataclass(frozen=True)
class Truth:
    lse: np.ndarray
    lse_limit: np.ndarray
    loss: np.ndarray
    loss_limit: np.ndarray


def counted(problem, targets):
    if problem.ignore_index is None:
        return np.ones(targets.shape, bool)
    return targets != problem.ignore_index


def truth(problem, x, targets):
    """lse and loss, and how far from them one may be."""
    x, u = exact(np.moveaxis(x, problem.axis, -1)), ROUNDOFF[problem.accumulator]
    eps = x.dtype.type(problem.label_smoothing)
    roundings = 12 + math.sqrt(problem.classes)
    m = x.max(axis=-1)
    shift = np.where(np.isfinite(m), m, 0)[..., None]
    terms = np.exp(x - shift)
    lse = shift[..., 0] + np.log(terms.sum(axis=-1))
    # Exponents are rounded where they are subtracted, sums at each addition, lse itself once.
    moved = np.where(terms > 0, terms * np.abs(x - shift), 0).sum(axis=-1) / terms.sum(axis=-1)
    lse_limit = u * (roundings + finite(moved) + 2 * np.abs(lse))
    counts = counted(problem, targets)
    index = np.where(counts, targets, 0).astype(np.int64)[..., None]
    at_target = np.take_along_axis(x, index, axis=-1)[..., 0]
    losses = lse - (1 - eps) * at_target
    limit = lse_limit + u * (np.abs(lse) + 3 * np.abs(at_target))
    if eps:
        losses = losses - eps / problem.classes * x.sum(axis=-1)
        limit = limit + u * roundings * eps * np.abs(x).mean(axis=-1)
    limit = np.where(counts, limit + u * 2 * np.abs(losses) + 1e-37, 0)
    losses = np.where(counts, losses, 0)
    if problem.reduction != "none":
        mass = np.abs(losses).sum()
        losses, limit = losses.sum(), limit.sum() + u * (12 + math.sqrt(losses.size)) * mass
    if problem.reduction == "mean":
        losses = losses / counts.sum()
        limit = limit / counts.sum() + 2 * u * np.abs(losses)
    return Truth(lse, lse_limit, losses, limit)


def truth_backward(problem, x, targets, dloss, lse):
    """dlogits, and how far from it one may be, from an lse as it was given."""
    x = exact(np.moveaxis(x, problem.axis, -1))
    u, u_out = ROUNDOFF[problem.accumulator], ROUNDOFF[problem.out_dtype or problem.dtype]
    counts = counted(problem, targets)[..., None]
    scale = exact(dloss)[..., None] if problem.reduction == "none" else exact(dloss)
    if problem.reduction == "mean":
        scale = scale / counts.sum()
    shifted = x - exact(lse)[..., None]
    p = np.exp(shifted)
    eps = x.dtype.type(problem.label_smoothing)
    is_target = np.arange(problem.classes) == targets.astype(np.int64)[..., None]
    wanted = np.where(is_target, 1 - eps, 0) + eps / problem.classes
    want = scale * (p - wanted)
    # The exponent is rounded where it is subtracted, and where it is scaled for a power of two.
    error = np.where(p > 0, p * (12 + 3 * np.abs(shifted)), 0) + 4 * (p + wanted)
    limit = u * np.abs(scale) * error + u_out * np.abs(want)
    absolute = 2 * ABSOLUTE[problem.out_dtype or problem.dtype] + 1e-37 * (1 + np.abs(scale))
    want, limit = np.where(counts, want, 0), np.where(counts, limit + absolute, 0)
    return np.moveaxis(want, -1, problem.axis), np.moveaxis(limit, -1, problem.axis)


def finite(x):
    return np.where(np.isfinite(x), x, 0)


def close(problem, got, want, limit):
    """The same infinities and NaNs, and all else within limits."""
    with np.errstate(all="ignore"):
        want = np.where(np.isinf(want.astype(got.dtype)), np.sign(want) * np.inf, want)
        got = np.asarray(got).astype(want.dtype)
        special = ~np.isfinite(want)
        np.testing.assert_array_equal(got[special], want[special], str(problem))
        wrong = ~special & ~(np.abs(got - want) <= limit)
    assert not wrong.any(), (problem, got[wrong][0], want[wrong][0], limit[wrong][0])


def check_forward(problem, xp, x, targets):
    logits, before = place(x, problem.layouts[0], xp)
    on_device = on(xp, targets, problem.layouts[1])
    untouched = host(before).copy()
    poison(xp)
    loss, lse = cuflash.cross_entropy(logits, on_device, **problem.options, return_lse=True)
    for answer, shape in (
        (loss, targets.shape if problem.reduction == "none" else ()),
        (lse, targets.shape),
    ):
        assert isinstance(answer, np.generic if xp is np and shape == () else xp.ndarray)
        assert (answer.shape, answer.dtype) == (shape, np.dtype(problem.accumulator))
    poison(xp)
    alone = cuflash.cross_entropy(logits, on_device, **problem.options)
    np.testing.assert_array_equal(host(alone), host(loss))
    assert host(before).tobytes() == untouched.tobytes()
    with np.errstate(all="ignore"):
        want = truth(problem, x, targets)
    close(problem, host(lse), want.lse, want.lse_limit)
    close(problem, host(loss), want.loss, want.loss_limit)
    return host(lse)


def check_backward(problem, xp, x, targets, dloss, lse):
    logits, before = place(x, problem.layouts[0], xp)
    untouched = host(before).copy()
    dtype = DTYPES[problem.out_dtype or problem.dtype]
    out = frame = None
    if problem.out == "logits":
        out = logits
    elif problem.out is not None:
        out, frame = place(nan_filled(x.shape, dtype), problem.out, xp)
    arguments = (
        on(xp, dloss, problem.layouts[2]),
        logits,
        on(xp, targets, problem.layouts[1]),
        on(xp, lse, problem.layouts[2]),
    )
    poison(xp)
    got = cuflash.cross_entropy_backward(*arguments, **problem.options, out=out)
    assert type(got) is xp.ndarray
    assert out is None or got is out
    assert (got.shape, got.dtype) == (x.shape, dtype)
    if frame is not None:
        assert np.isnan(host(frame).astype(float)).sum() >= frame.size - got.size
    if out is not logits:
        assert host(before).tobytes() == untouched.tobytes()
    with np.errstate(all="ignore"):
        want, limit = truth_backward(problem, x, targets, dloss, lse)
    close(problem, host(got), want, limit)


def check(problem, xp):
    x, targets, dloss = materialise(problem)
    lse = check_forward(problem, xp, x, targets)
    check_backward(problem, xp, x, targets, dloss, np.asarray(lse))


@given(problem=problems())
def test_problem(xp, problem):
    check(problem, xp)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("axis", [0, 1])
def test_lengths(xp, axis, classes, dtype):
    for rows in (3, 40):
        problem = Problem(classes, dtype, "int64", (rows,), classes, axis, label_smoothing=0.1)
        for layout in ("contiguous", "unaligned"):
            check(dataclasses.replace(problem, layouts=(layout, "contiguous", "contiguous")), xp)


@pytest.mark.parametrize("rows", [255, 4096, 4097, 70001, (300, 257)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_many_rows(xp, reduction, rows):
    """Sums by one block, and by several and a last one."""
    shape = rows if isinstance(rows, tuple) else (rows,)
    for ignored in (0, 0.3):
        check(Problem(1, "float32", "int32", shape, 5, 1, ignored=ignored, reduction=reduction), xp)


@pytest.mark.parametrize("shape", [(4, 6, 7, 9), (2, 16, 8, 8), (3, 5, 33), (2, 300, 1024)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_classes_in_the_middle(xp, dtype, shape):
    """As images have them: neighbouring rows lie beside each other."""
    rows = (shape[0], *shape[2:])
    check(Problem(2, dtype, "int64", rows, shape[1], 1, ignored=0.3, out="permuted"), xp)
    check(Problem(2, dtype, "int64", rows, shape[1], 1, out="logits"), xp)


def test_more_axes_than_strides_are_copied(xp):
    rows = (2, 3, 2, 2, 3, 2)
    layouts = ("gaps", "steps", "steps")
    for out in (None, "gaps", "logits"):
        problem = Problem(3, "float64", "int32", rows, 5, 2, layouts=layouts, out=out)
        check(dataclasses.replace(problem, reduction="none"), xp)


# What is special.


@pytest.mark.parametrize("target", INTEGERS)
def test_every_integer_dtype(xp, target):
    random = np.random.default_rng(0)
    x, targets = random.standard_normal((20, 100)), random.integers(0, 100, 20)
    want = cuflash.cross_entropy(x, targets)
    got = cuflash.cross_entropy(xp.asarray(x), xp.asarray(targets.astype(target)))
    np.testing.assert_allclose(host(got), want, rtol=1e-14)


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint64"])
def test_integer_logits_become_float64(xp, dtype):
    x, targets = np.array([[3, 1, 0], [0, 1, 2]], dtype), np.array([0, 1])
    loss, lse = cuflash.cross_entropy(xp.asarray(x), xp.asarray(targets), return_lse=True)
    assert loss.dtype == lse.dtype == np.float64
    got = cuflash.cross_entropy_backward(1.0, xp.asarray(x), xp.asarray(targets), lse)
    want = cuflash.softmax(x.astype(float), 1)
    want[[0, 1], targets] -= 1
    np.testing.assert_allclose(host(got), want / 2, rtol=1e-13)


def test_all_rows_ignored(xp):
    x = xp.full((4, 5), np.nan, "float32")
    targets = xp.full(4, -100, "int64")
    lse = xp.zeros(4, "float32")
    for reduction, want in (("mean", np.nan), ("sum", 0), ("none", [0, 0, 0, 0])):
        options = {"ignore_index": -100, "reduction": reduction, "label_smoothing": 0.1}
        np.testing.assert_array_equal(host(cuflash.cross_entropy(x, targets, **options)), want)
        dloss = xp.ones(4, "float32") if reduction == "none" else 1
        got = cuflash.cross_entropy_backward(dloss, x, targets, lse, **options)
        assert not host(got).any()


def test_no_rows(xp):
    x, targets, lse = xp.zeros((0, 5)), xp.zeros(0, "int64"), xp.zeros(0)
    assert np.isnan(host(cuflash.cross_entropy(x, targets)))
    assert cuflash.cross_entropy(x, targets, reduction="sum") == 0
    assert cuflash.cross_entropy(x, targets, reduction="none").shape == (0,)
    assert cuflash.cross_entropy_backward(1, x, targets, lse).shape == (0, 5)


def test_one_row_without_an_axis(xp):
    x, target = xp.asarray([0.0, np.log(3)]), xp.asarray(1)
    loss, lse = cuflash.cross_entropy(x, target, return_lse=True)
    np.testing.assert_allclose([host(loss), host(lse)], [np.log(4 / 3), np.log(4)])
    for reduction in REDUCTIONS:
        got = cuflash.cross_entropy_backward(2, x, target, lse, reduction=reduction)
        np.testing.assert_allclose(host(got), [0.5, -0.5])


def test_an_index_that_the_dtype_cannot_hold_ignores_nothing(xp):
    x, targets = xp.zeros((2, 200)), xp.asarray([156, 3], "uint8")  # 156 has the bits of int8 -100
    want = np.log(200)
    np.testing.assert_allclose(host(cuflash.cross_entropy(x, targets, ignore_index=-100)), want)
    largest = xp.asarray([2**64 - 1, 3], "uint64")
    np.testing.assert_allclose(
        host(cuflash.cross_entropy(x, largest, ignore_index=2**64 - 1)), want
    )


def test_infinite_logits(xp):
    inf = np.inf
    x = xp.asarray([[-inf, 0, 0], [0, -inf, 0], [-inf, -inf, -inf], [inf, 0, 0], [0, inf, 0]])
    targets = xp.asarray([1, 1, 1, 1, 1])
    got = host(cuflash.cross_entropy(x, targets, reduction="none"))
    np.testing.assert_allclose(got, [np.log(2), inf, np.nan, inf, np.nan])
    got = host(cuflash.cross_entropy(x[:2], targets[:2], reduction="none", label_smoothing=0.1))
    np.testing.assert_array_equal(got, [inf, inf])


@pytest.mark.parametrize("wrong", [5, 127, -1, -128])
def test_targets_out_of_range_are_nan_on_a_gpu(cp, wrong):
    x = cp.asarray(np.random.default_rng(0).standard_normal((3, 5)))
    right, targets = cp.asarray([1, 2, 3], "int8"), cp.asarray([1, wrong, 3], "int8")
    losses, lse = cuflash.cross_entropy(x, right, reduction="none", return_lse=True)
    want = losses.get()
    want[1] = np.nan
    got = cuflash.cross_entropy(x, targets, reduction="none")
    np.testing.assert_array_equal(got.get(), want)
    for reduction in ("mean", "sum"):
        assert np.isnan(cuflash.cross_entropy(x, targets, reduction=reduction).get())
    got = cuflash.cross_entropy_backward(1, x, targets, lse, reduction="sum")
    want = cuflash.cross_entropy_backward(1, x, right, lse, reduction="sum").get()
    want[1] = np.nan
    np.testing.assert_array_equal(got.get(), want)


@pytest.mark.parametrize("wrong", [5, 127, -1])
def test_targets_out_of_range_raise(xp, monkeypatch, wrong):
    monkeypatch.setenv("CUFLASH_CHECK", "1")
    x, targets = xp.zeros((3, 5)), xp.asarray([1, wrong, 100], "int8")
    for call in (
        lambda: cuflash.cross_entropy(x, targets, ignore_index=100),
        lambda: cuflash.cross_entropy_backward(1, x, targets, xp.zeros(3), ignore_index=100),
    ):
        with pytest.raises(ValueError, match=rf"`targets` .* 0 to 4 .*100, but has {wrong}$"):
            call()
    cuflash.cross_entropy(x, xp.asarray([1, 4, 100]), ignore_index=100)


def test_numbers_and_arrays_for_dloss(xp):
    x, targets = xp.asarray([[1.0, 2.0], [3.0, 1.0]], "float32"), xp.asarray([0, 1])
    _, lse = cuflash.cross_entropy(x, targets, return_lse=True)
    want = host(cuflash.cross_entropy_backward(xp.asarray(3, "float32"), x, targets, lse))
    for dloss in (3, 3.0, np.float32(3), np.int8(3), xp.asarray(3), xp.asarray(3, "float16")):
        np.testing.assert_array_equal(
            host(cuflash.cross_entropy_backward(dloss, x, targets, lse)), want
        )
    one = host(cuflash.cross_entropy_backward(1, x, targets, lse))
    np.testing.assert_allclose(want, 3 * one, rtol=1e-6)


def test_lists_are_taken():
    assert cuflash.cross_entropy([[0.0, 0.0]], [1]) == np.log(2)
    got = cuflash.cross_entropy_backward([2.0], [[0, 0]], [1], [np.log(2)], reduction="none")
    np.testing.assert_allclose(got, [[1, -1]])


# Against others.


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_finite_differences(xp, reduction, label_smoothing, axis):
    """In float64, by central differences of the sum of weighted losses."""
    problem = Problem(
        4, "float64", "int64", (3, 4), 5, axis, "normal", 0.3, label_smoothing, reduction
    )
    x, targets, dloss = materialise(problem)
    want = np.empty_like(x)
    step = 1e-5
    for index in np.ndindex(x.shape):
        above, below = x.copy(), x.copy()
        above[index] += step
        below[index] -= step
        both = [cuflash.cross_entropy(each, targets, **problem.options) for each in (above, below)]
        want[index] = (dloss * (both[0] - both[1])).sum() / (2 * step)
    logits, on_device = xp.asarray(x), xp.asarray(targets)
    _, lse = cuflash.cross_entropy(logits, on_device, **problem.options, return_lse=True)
    got = cuflash.cross_entropy_backward(
        xp.asarray(dloss), logits, on_device, lse, **problem.options
    )
    # Truncation of order step ** 2, cancellation of order 2 ** -53 / step.
    np.testing.assert_allclose(host(got), want, atol=1e-9)


@pytest.mark.parametrize("shape", [(5, 7), (2, 7, 3), (2, 9, 3, 4), (6,)])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("ignore", [None, 2])
def test_agrees_with_pytorch(require, shape, label_smoothing, reduction, ignore):
    torch = require("torch")
    torch.manual_seed(0)
    axis = min(1, len(shape) - 1)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(shape[axis], shape[:axis] + shape[axis + 1 :])
    options = {"reduction": reduction, "label_smoothing": label_smoothing}
    index = -100 if ignore is None else ignore
    want = torch.nn.functional.cross_entropy(x, targets, ignore_index=index, **options)
    dloss = torch.randn(want.shape, dtype=torch.float64)
    want.backward(dloss)
    options |= {"axis": axis, "ignore_index": ignore}
    logits = x.detach()
    loss, lse = cuflash.cross_entropy(logits, targets, return_lse=True, **options)
    assert isinstance(loss, torch.Tensor)
    torch.testing.assert_close(loss, want.detach(), rtol=1e-12, atol=1e-13)
    got = cuflash.cross_entropy_backward(dloss, logits, targets, lse, **options)
    assert isinstance(got, torch.Tensor)
    torch.testing.assert_close(got, x.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("tile", [1, 7, 300])
def test_tiles_of_the_twin_change_nothing(monkeypatch, tile):
    from cuflash._softmax import cpu

    monkeypatch.setattr(cpu, "TILE", tile)
    for values in ("wide", "some -inf"):
        check(Problem(5, "float32", "int64", (7,), 300, 1, values, 0.3, 0.1), np)


@pytest.mark.sanitizer
@pytest.mark.parametrize("shape", [(9000, 50), (50, 9000), (4, 100000)])
def test_repeats_are_bitwise_equal(cp, shape):
    random = np.random.default_rng(0)
    for axis in (0, 1):
        x = cp.asarray(random.standard_normal(shape), "float32")
        targets = cp.asarray(random.integers(0, shape[axis], shape[1 - axis]))
        options = {"axis": axis, "ignore_index": 3, "label_smoothing": 0.1}
        first, lse = cuflash.cross_entropy(x, targets, **options, return_lse=True)
        gradient = cuflash.cross_entropy_backward(1, x, targets, lse, **options)
        for _ in range(50):
            assert bool(cuflash.cross_entropy(x, targets, **options) == first)
            again = cuflash.cross_entropy_backward(1, x, targets, lse, **options)
            assert bool((again == gradient).all())
