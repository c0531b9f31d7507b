"""Bad input to cross_entropy and its backward pass: the error names the argument, what came and
what is allowed, and nothing has run."""

from __future__ import annotations

import re

import numpy as np
import pytest

import cuflash
from cuflash._softmax import loss


@pytest.fixture(autouse=True)
def nothing_runs(monkeypatch):
    """Fail as soon as a backend is asked for, which comes after all checks."""

    def ran(caller):
        raise AssertionError("the work began")

    monkeypatch.setattr(loss, "_backend", ran)


def forward(dloss=None, lse=None, out=None, **arguments):
    return cuflash.cross_entropy(**arguments)


CALLS = [forward, cuflash.cross_entropy_backward]


def given(xp, **other):
    """Good arguments of both calls, but for some."""
    good = {
        "dloss": 1.0,
        "logits": xp.zeros((3, 4), "float32"),
        "targets": xp.zeros(3, "int64"),
        "lse": xp.zeros(3, "float32"),
    }
    return good | other


def rejects(error, name, *words, call, **options):
    with pytest.raises(error) as caught:
        call(**options)
    for word in (f"`{name}`", *words):
        assert re.search(re.escape(str(word)), str(caught.value)), (word, str(caught.value))


@pytest.mark.parametrize("call", CALLS)
class TestBoth:
    @pytest.mark.parametrize("dtype", ["complex64", "object", "U3", "longdouble"])
    def test_dtype_of_logits(self, call, dtype):
        rejects(TypeError, "logits", call=call, **given(np, logits=np.zeros((3, 4), dtype)))

    @pytest.mark.parametrize("name", ["logits", "targets"])
    @pytest.mark.parametrize(
        "value", [None, "text", {1: 2}, np.ma.masked_array([1], [True])], ids=str
    )
    def test_not_an_array(self, call, name, value):
        rejects(TypeError, name, call=call, **given(np, **{name: value}))

    @pytest.mark.parametrize("dtype", ["bool", "float32", "float64", "float16"])
    def test_targets_that_are_no_integers(self, xp, call, dtype):
        rejects(TypeError, "targets", dtype, call=call, **given(xp, targets=xp.zeros(3, dtype)))

    @pytest.mark.parametrize("shape", [(4,), (3, 1), (), (3, 4)])
    def test_shape_of_targets(self, xp, call, shape):
        targets = xp.zeros(shape, "int64")
        rejects(ValueError, "targets", (3,), shape, call=call, **given(xp, targets=targets))

    def test_axis(self, xp, call):
        for axis in (2, -3):
            rejects(np.exceptions.AxisError, "axis", axis, call=call, axis=axis, **given(xp))
        for axis in (1.0, "1", True, None, (1,), [1]):
            rejects(TypeError, "axis", axis, call=call, axis=axis, **given(xp))

    def test_no_classes(self, xp, call):
        rejects(ValueError, "logits", (3, 0), call=call, **given(xp, logits=xp.zeros((3, 0))))
        alone = given(xp, logits=xp.zeros(()), targets=xp.zeros((), "int64"), lse=xp.zeros(()))
        rejects(ValueError, "logits", "axis", call=call, **alone)

    def test_options(self, xp, call):
        for index in (1.0, "1", True, (1,)):
            rejects(TypeError, "ignore_index", index, call=call, ignore_index=index, **given(xp))
        for eps in (-0.1, 1.5, float("nan")):
            rejects(ValueError, "label_smoothing", eps, call=call, label_smoothing=eps, **given(xp))
        for eps in ("0.1", None, True, 0.1j):
            rejects(TypeError, "label_smoothing", eps, call=call, label_smoothing=eps, **given(xp))
        for reduction in ("max", None, 3, ("mean",)):
            rejects(
                ValueError,
                "reduction",
                reduction,
                "none",
                call=call,
                reduction=reduction,
                **given(xp),
            )

    def test_targets_out_of_range(self, call):
        for wrong in (4, -1):
            targets = np.array([0, wrong, 3])
            rejects(ValueError, "targets", 3, wrong, call=call, **given(np, targets=targets))

    def test_host_and_device_are_not_mixed(self, cp, call):
        rejects(TypeError, "targets", call=call, **given(cp, targets=np.zeros(3, int)))
        rejects(TypeError, "targets", call=call, **given(cp, targets=[0, 0, 0]))


class TestBackward:
    call = staticmethod(cuflash.cross_entropy_backward)

    def test_lse(self, xp):
        for shape in ((4,), (3, 1), ()):
            lse = xp.zeros(shape, "float32")
            rejects(ValueError, "lse", (3,), shape, call=self.call, **given(xp, lse=lse))
        for dtype in ("float64", "float16", "int32"):
            lse = xp.zeros(3, dtype)
            rejects(TypeError, "lse", "float32", dtype, call=self.call, **given(xp, lse=lse))
        rejects(TypeError, "lse", call=self.call, **given(xp, lse=None))

    def test_dloss(self, xp):
        for reduction in ("mean", "sum"):
            options = given(xp, dloss=xp.zeros(3), reduction=reduction)
            rejects(ValueError, "dloss", (), (3,), call=self.call, **options)
        options = given(xp, dloss=1.0, reduction="none")
        rejects(TypeError, "dloss", (3,), 1.0, call=self.call, **options)
        options = given(xp, dloss=xp.zeros(4), reduction="none")
        rejects(ValueError, "dloss", (3,), (4,), call=self.call, **options)
        for dloss in (None, "1", 1j):
            rejects(TypeError, "dloss", call=self.call, **given(np, dloss=dloss))

    def test_out(self, xp):
        def refuses(error, *words, **options):
            rejects(error, "out", *words, call=self.call, **given(xp, **options))

        refuses(ValueError, (3, 4), (4, 3), out=xp.zeros((4, 3), "float32"))
        refuses(TypeError, "float32", "float64", out=xp.zeros((3, 4), "float64"))
        refuses(TypeError, "tuple", out=(None,))
        memory = xp.zeros(16, "float32")
        logits, part = memory[:12].reshape(3, 4), memory[4:].reshape(3, 4)
        refuses(ValueError, "`logits`", "unless", logits=logits, out=part)
        refuses(ValueError, "`lse`", lse=memory[:3], out=logits)
        refuses(ValueError, "`dloss`", dloss=memory[:3], reduction="none", out=logits)

    def test_out_is_read_only(self):
        out = np.zeros((3, 4), "float32")
        out.flags.writeable = False
        rejects(ValueError, "out", call=self.call, **given(np, out=out))
