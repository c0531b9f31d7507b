"""Bad input to cuflash.sample: the error names the argument, what came and what is allowed."""

from __future__ import annotations

import re

import numpy as np
import pytest

from cuflash import sample
from cuflash._softmax.selection import sample_api


@pytest.fixture(autouse=True)
def nothing_runs(monkeypatch):
    """Fail as soon as a backend is asked for, which comes after all checks."""

    def ran(caller):
        raise AssertionError("the work began")

    monkeypatch.setattr(sample_api, "_backend", ran)


def rejects(error, name, *words, logits=None, **options):
    """The call raises this error, whose message names the argument and has each of the words."""
    logits = np.zeros((3, 4)) if logits is None else logits
    with pytest.raises(error) as caught:
        sample(logits, **{"seed": 0, **options})
    assert f"`{name}`" in str(caught.value)
    for word in words:
        assert re.search(re.escape(str(word)), str(caught.value)), (word, str(caught.value))


@pytest.mark.parametrize("name", ["seed", "offset", "top_k"])
@pytest.mark.parametrize("value", [1.0, "1", True, np.True_, [1], 1j, np.float32(1)], ids=repr)
def test_not_an_integer(xp, name, value):
    rejects(TypeError, name, "int", repr(value), logits=xp.zeros((3, 4)), **{name: value})


@pytest.mark.parametrize("name", ["seed", "offset"])
@pytest.mark.parametrize("value", [-1, 2**64, 10**30])
def test_seed_and_offset_out_of_range(xp, name, value):
    rejects(ValueError, name, 2**64 - 1, value, logits=xp.zeros((3, 4)), **{name: value})


@pytest.mark.parametrize("value", [None, ()])
def test_seed_is_none(value):
    rejects(TypeError, "seed", value, seed=value)


def test_seed_is_required():
    with pytest.raises(TypeError, match="seed"):
        sample(np.zeros(3))


@pytest.mark.parametrize("value", [0, -1, 5])
def test_top_k_out_of_range(xp, value):
    rejects(ValueError, "top_k", "from 1 to 4", value, logits=xp.zeros((3, 4)), top_k=value)


def test_top_k_beyond_what_a_gpu_selects(cp):
    rejects(ValueError, "top_k", "1024", 1025, 2000, logits=cp.zeros((3, 2000)), top_k=1025)


@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p"])
@pytest.mark.parametrize("value", ["1", True, [1.0], 1j, np.ones(2)], ids=repr)
def test_not_a_number(xp, name, value):
    rejects(TypeError, name, "number", repr(value), logits=xp.zeros((3, 4)), **{name: value})


@pytest.mark.parametrize(
    ("name", "values"),
    {
        "temperature": [-1.0, -1e-300, np.nan, np.inf, -np.inf],
        "top_p": [0, 0.0, -0.1, 1.0001, np.nan, np.inf, 2],
        "min_p": [-0.1, 1.0001, np.nan, np.inf, -1],
    }.items(),
)
def test_number_out_of_range(xp, name, values):
    for value in values:
        rejects(ValueError, name, repr(value), logits=xp.zeros((3, 4)), **{name: value})


def test_temperature_is_none():
    rejects(TypeError, "temperature", "None", temperature=None)


@pytest.mark.parametrize("axis", [1.0, "0", True, None, (0,)], ids=str)
def test_axis_is_no_integer(xp, axis):
    rejects(TypeError, "axis", axis, logits=xp.zeros((3, 4)), axis=axis)


@pytest.mark.parametrize("axis", [2, -3])
def test_axis_out_of_range(xp, axis):
    rejects(np.exceptions.AxisError, "axis", axis, logits=xp.zeros((3, 4)), axis=axis)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 0)], ids=str)
def test_empty_axis(xp, shape):
    rejects(ValueError, "logits", "axis", shape, logits=xp.zeros(shape))


@pytest.mark.parametrize("value", ["text", {1: 2}, object(), 1j, np.zeros(3, complex)], ids=type)
def test_not_an_array(value):
    rejects(TypeError, "logits", logits=value)


def test_logits_are_none():
    with pytest.raises(TypeError, match="`logits`"):
        sample(None, seed=0)
