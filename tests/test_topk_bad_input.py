"""Bad input to topk and softmax_topk: the error names the argument, what came and what is allowed,
and nothing has run."""

from __future__ import annotations

import re

import numpy as np
import pytest

from cuflash import softmax_topk, topk
from cuflash._softmax.selection import topk_api

CALLS = [topk, softmax_topk]
pytestmark = pytest.mark.parametrize("call", CALLS)


@pytest.fixture(autouse=True)
def nothing_runs(monkeypatch):
    """Fail as soon as a backend is asked for, which comes after all checks."""

    def ran(caller):
        raise AssertionError("the work began")

    monkeypatch.setattr(topk_api, "_backend", ran)


def rejects(error, name, *words, call, x, k=1, **options):
    """The call raises this error, whose message names the argument and has each of the words."""
    with pytest.raises(error) as caught:
        call(x, k, **options)
    assert f"`{name}`" in str(caught.value)
    for word in words:
        assert re.search(re.escape(str(word)), str(caught.value)), (word, str(caught.value))


@pytest.mark.parametrize("dtype", ["complex64", "object", "U3", "datetime64[s]", "longdouble"])
def test_dtype(call, dtype):
    rejects(TypeError, "x", call=call, x=np.zeros(3, dtype))


@pytest.mark.parametrize(
    "x",
    ["text", {1: 2}, object(), np.ma.masked_array([1.0], [True]), 1j, None],
    ids=["text", "dict", "object", "masked", "complex", "none"],
)
def test_not_an_array(call, x):
    rejects(TypeError, "x", call=call, x=x)


@pytest.mark.parametrize("k", [0, -1, 5, 2**40])
def test_k_out_of_range(xp, call, k):
    rejects(ValueError, "k", k, "from 1 to 4", call=call, x=xp.zeros((3, 4)), k=k)
    rejects(ValueError, "k", "axis 0", "from 1 to 3", call=call, x=xp.zeros((3, 4)), k=k, axis=0)


def test_an_empty_axis_has_no_largest(xp, call):
    rejects(ValueError, "k", 1, call=call, x=xp.zeros((3, 0)))


@pytest.mark.parametrize("k", [1.0, "1", True, None, [1], np.float32(1), np.True_], ids=repr)
def test_k_is_no_integer(xp, call, k):
    rejects(TypeError, "k", repr(k), call=call, x=xp.zeros((3, 4)), k=k)


def test_k_beyond_what_a_gpu_keeps(cp, call):
    rejects(ValueError, "k", 1024, 1025, call=call, x=cp.zeros(5000), k=1025)


@pytest.mark.parametrize("axis", [2, -3])
def test_axis_out_of_range(xp, call, axis):
    for error in (np.exceptions.AxisError, ValueError, IndexError):
        rejects(error, "axis", axis, call=call, x=xp.zeros((3, 4)), axis=axis)


@pytest.mark.parametrize("axis", [1.0, "0", True, None, (0,), [0]], ids=str)
def test_axis_is_no_integer(xp, call, axis):
    rejects(TypeError, "axis", axis, call=call, x=xp.zeros((3, 4)), axis=axis)


def test_host_and_device_are_not_mixed(cp, call):
    rejects(TypeError, "out[0]", call=call, x=cp.zeros(3), out=(np.zeros(1), None))


def test_out_is_no_pair(xp, call):
    x = xp.zeros((3, 4))
    rejects(TypeError, "out", "(values, indices)", call=call, x=x, out=xp.zeros((3, 1)))
    rejects(TypeError, "out", "list", call=call, x=x, out=[None, None])
    rejects(ValueError, "out", 3, call=call, x=x, out=(None, None, None))


def test_out_of_another_shape_or_dtype(xp, call):
    x, indices = xp.zeros((3, 4), "float32"), xp.zeros((3, 1), "int64")
    rejects(ValueError, "out[0]", (3, 1), (3, 2), call=call, x=x, out=(x[:, :2] + 0, None))
    rejects(ValueError, "out[1]", (3, 2), (3, 1), call=call, x=x, k=2, out=(None, indices))
    for dtype in ("float64", "float16", "int32"):
        out = (xp.zeros((3, 1), dtype), None)
        rejects(TypeError, "out[0]", "float32", dtype, call=call, x=x, out=out)
    for dtype in ("int32", "uint64", "float64"):
        out = (None, xp.zeros((3, 1), dtype))
        rejects(TypeError, "out[1]", "int64", dtype, call=call, x=x, out=out)
    half = x.astype("float16")
    rejects(TypeError, "out[0]", call=call, x=half, out=(xp.zeros((3, 1)), None))
    if call is topk:  # its values are x's own
        out = (xp.zeros((3, 1), "float32"), None)
        rejects(TypeError, "out[0]", "float16", "float32", call=call, x=half, out=out)


def test_out_overlaps(xp, call):
    x = xp.zeros((4, 4))
    rejects(ValueError, "out[0]", "`x`", call=call, x=x, out=(x[:, :1], None))
    rejects(ValueError, "out[0]", "`x`", call=call, x=x, k=4, out=(x, None))
    shared = xp.zeros((4, 1))
    rejects(ValueError, "out[0]", call=call, x=x, out=(shared, shared.view("int64")))


def test_out_is_read_only(call):
    out = np.zeros((3, 1))
    out.flags.writeable = False
    rejects(ValueError, "out[0]", call=call, x=np.zeros((3, 4)), out=(out, None))
