"""Bad input to the softmax family: the error names the argument, what came and what is allowed, and
nothing has run."""

from __future__ import annotations

import re

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided

from cuflash import log_softmax, logsumexp, softmax
from cuflash._softmax import api

FUNCTIONS = [softmax, log_softmax, logsumexp]


@pytest.fixture(autouse=True)
def nothing_runs(monkeypatch):
    """Fail as soon as a backend is asked for, which comes after all checks."""

    def ran(caller):
        raise AssertionError("the work began")

    monkeypatch.setattr(api, "_backend", ran)


def rejects(error, name, *words, call, **options):
    """The call raises this error, whose message names the argument and has each of the words."""
    with pytest.raises(error) as caught:
        call(**options)
    assert f"`{name}`" in str(caught.value)
    for word in words:
        assert re.search(re.escape(str(word)), str(caught.value)), (word, str(caught.value))


def first(call):
    return "a" if call is logsumexp else "x"


@pytest.mark.parametrize("call", FUNCTIONS)
@pytest.mark.parametrize(
    "dtype", ["complex64", "complex128", "object", "U3", "datetime64[s]", "longdouble"]
)
def test_dtype(call, dtype):
    name = first(call)
    rejects(TypeError, name, call=call, **{name: np.zeros(3, dtype)})


@pytest.mark.parametrize("call", FUNCTIONS)
@pytest.mark.parametrize(
    "value",
    ["text", {1: 2}, object(), np.ma.masked_array([1.0], [True]), 1j, [1j], None],
    ids=lambda value: type(value).__name__,
)
def test_not_an_array(call, value):
    name = first(call)
    rejects(TypeError, name, call=call, **{name: value})


@pytest.mark.filterwarnings("ignore:the matrix subclass")
@pytest.mark.parametrize("call", FUNCTIONS)
def test_matrix(call):
    rejects(TypeError, first(call), call=call, **{first(call): np.matrix([[1.0, 2.0]])})


@pytest.mark.parametrize("call", FUNCTIONS)
@pytest.mark.parametrize(("axis", "shape"), [(2, (3, 4)), (-3, (3, 4)), ((0, 2), (3, 4)), (1, ())])
def test_axis_out_of_range(xp, call, axis, shape):
    for error in (np.exceptions.AxisError, ValueError, IndexError):  # as in NumPy
        rejects(error, "axis", axis, call=call, axis=axis, **{first(call): xp.zeros(shape)})


@pytest.mark.parametrize("call", FUNCTIONS)
def test_axis_twice(xp, call):
    for axis in ((0, 0), (1, -1)):
        rejects(ValueError, "axis", axis, call=call, axis=axis, **{first(call): xp.zeros((3, 4))})


@pytest.mark.parametrize("call", FUNCTIONS)
@pytest.mark.parametrize("axis", [1.0, "0", True, (0, 1.0), [0, 1], (None,)], ids=str)
def test_axis_is_no_integer(xp, call, axis):
    rejects(TypeError, "axis", axis, call=call, axis=axis, **{first(call): xp.zeros((3, 4))})


def test_integers_of_numpy_are_fine_as_axes(monkeypatch):
    monkeypatch.undo()
    assert softmax(np.zeros((3, 4)), axis=np.int8(1)).shape == (3, 4)


def test_shapes_that_do_not_broadcast(xp):
    rejects(ValueError, "b", (3,), (4,), call=logsumexp, a=xp.zeros(3), b=xp.zeros(4))


def test_axis_of_b_alone(xp):
    """The axes are those of a and b together."""
    rejects(ValueError, "axis", 3, call=logsumexp, a=xp.zeros(3), b=xp.zeros((2, 4, 3)), axis=3)


def test_host_and_device_are_not_mixed(cp):
    rejects(TypeError, "out", call=softmax, x=cp.zeros(3), out=np.zeros(3))
    rejects(TypeError, "b", call=logsumexp, a=cp.zeros(3), b=np.zeros(3))
    rejects(TypeError, "b", call=logsumexp, a=cp.zeros(3), b=[1, 2, 3])


# out.


@pytest.mark.parametrize("call", [softmax, log_softmax])
def test_out_of_another_shape_or_dtype(xp, call):
    x = xp.zeros((3, 4), "float32")
    rejects(ValueError, "out", (3, 4), (4, 3), call=call, x=x, out=xp.zeros((4, 3), "float32"))
    for dtype in ("float64", "float16", "int32"):
        rejects(TypeError, "out", "float32", dtype, call=call, x=x, out=xp.zeros((3, 4), dtype))
    x = xp.zeros((3, 4), "float16")
    rejects(TypeError, "out", "float32", call=call, x=x, out=xp.zeros((3, 4), "float64"))
    rejects(TypeError, "out", call=call, x=x, out=(x, None))
    x = xp.zeros((3, 4), "int32")
    rejects(TypeError, "out", "float64", call=call, x=x, out=x)


def test_out_of_logsumexp(xp):
    a = xp.zeros((3, 4))
    rejects(ValueError, "out", (3,), call=logsumexp, a=a, axis=1, out=xp.zeros((3, 1)))
    rejects(ValueError, "out", (3, 1), call=logsumexp, a=a, axis=1, keepdims=True, out=xp.zeros(3))
    pair = (xp.zeros(3), xp.zeros(3))
    rejects(TypeError, "out", "return_sign", call=logsumexp, a=a, axis=1, out=pair)
    signed = {"call": logsumexp, "a": a, "axis": 1, "return_sign": True}
    rejects(ValueError, "out", 3, out=(*pair, None), **signed)
    rejects(ValueError, "out[1]", (4,), out=(pair[0], xp.zeros(4)), **signed)
    rejects(ValueError, "out[0]", "out[1]", out=(pair[0], pair[0]), **signed)
    half = {**signed, "a": a.astype("float16")}
    rejects(TypeError, "out[1]", out=(xp.zeros(3, "float16"), xp.zeros(3, "float32")), **half)


@pytest.mark.parametrize("call", [softmax, log_softmax])
def test_out_overlaps_x(xp, call):
    memory = xp.zeros(16)
    rejects(ValueError, "out", "`x`", call=call, x=memory[:12], out=memory[4:])
    rejects(ValueError, "out", "`x`", call=call, x=memory, out=memory[::-1])
    square = memory.reshape(4, 4)
    rejects(ValueError, "out", "`x`", call=call, x=square, out=square.T)


def test_out_of_logsumexp_overlaps(xp):
    a = xp.zeros(4)
    rejects(ValueError, "out", "`a`", call=logsumexp, a=a, axis=(), out=a)
    rejects(ValueError, "out", "`b`", call=logsumexp, a=xp.zeros((2, 4)), b=a, axis=0, out=a)


def test_out_is_read_only_or_shares_its_own_memory():
    x = np.zeros((3, 4))
    out = np.zeros((3, 4))
    out.flags.writeable = False
    rejects(ValueError, "out", call=softmax, x=x, out=out)
    for strides in ((0, 8), (8, 8)):
        out = as_strided(np.zeros(12), (3, 4), strides)
        rejects(ValueError, "out", call=softmax, x=x, out=out)


@pytest.mark.parametrize("out", [[1.0, 2.0], 3.0, "text"], ids=str)
def test_out_is_no_array(out):
    rejects(TypeError, "out", call=softmax, x=np.zeros(2), out=out)
