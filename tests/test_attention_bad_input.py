"""Bad input to attention and merge_attention: the error names the argument, what came and what is
allowed, and nothing has run."""

from __future__ import annotations

import re

import ml_dtypes
import numpy as np
import pytest

import cuflash
from cuflash._attention import api

SHAPES = {"q": (2, 4, 5, 16), "k": (2, 2, 7, 16), "v": (2, 2, 7, 8)}
OUT = (2, 4, 5, 8)
LSE = (2, 4, 5)


@pytest.fixture
def nothing_runs(monkeypatch):
    """Fail as soon as a backend is asked for, which comes after all checks."""

    def ran(caller):
        raise AssertionError("the work began")

    monkeypatch.setattr(api, "_backend", ran)


def good(xp, **changes):
    """Good arguments; a tuple in `changes` is the shape of another array."""
    arguments = {name: xp.ones(shape, "float32") for name, shape in SHAPES.items()}
    for name, change in changes.items():
        is_shape = name in SHAPES and isinstance(change, tuple)
        arguments[name] = xp.ones(change, "float32") if is_shape else change
    return arguments


def rejects(error, name, *words, call=cuflash.attention, **arguments):
    """The call raises this error, whose message names the argument and has each of the words."""
    with pytest.raises(error) as caught:
        call(**arguments)
    assert f"`{name}`" in str(caught.value)
    for word in words:
        assert re.search(re.escape(str(word)), str(caught.value)), (word, str(caught.value))


pytestmark = pytest.mark.usefixtures("nothing_runs")


# Shapes.


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("q", ()),
        ("q", (16,)),
        ("k", (7, 16)),
        ("v", (7, 8)),
        ("k", (16,)),
    ],
)
def test_wrong_rank(xp, name, shape):
    named = "k" if name == "q" and len(shape) == 2 else name
    rejects(ValueError, named, shape, "(..., heads, length, head_dim)", **good(xp, **{name: shape}))


def test_two_axes_are_for_all_or_none(xp):
    rejects(ValueError, "k", (5, 16), "(length, head_dim)", **good(xp, q=(5, 16)))


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("k", (2, 2, 7, 17), ("head_dim", 16, 17)),
        ("v", (2, 2, 6, 8), ("length", 7, 6)),
        ("v", (2, 4, 7, 8), ("heads", 2, 4)),
        ("q", (2, 3, 5, 16), ("multiple", 2, 3)),
        ("q", (2, 1, 5, 16), ("multiple", 2, 1)),
        ("q", (3, 4, 5, 16), ("batch", "broadcast", (3, 4, 5, 16))),
        ("k", (3, 2, 2, 7, 16), ()),
    ],
)
def test_mismatched_shapes(xp, name, shape, words):
    arguments = good(xp, **{name: shape})
    if name == "k" and len(shape) == 5:
        arguments["v"] = xp.ones((4, 2, 2, 7, 8), "float32")
    rejects(ValueError, name, shape, *words, **arguments)


def test_queries_without_any_key_heads(xp):
    rejects(ValueError, "q", "multiple", 0, **good(xp, k=(2, 0, 7, 16), v=(2, 0, 7, 8)))


@pytest.mark.parametrize("head_dim", [0, 513])
def test_head_dim_out_of_range(xp, head_dim):
    shapes = {"q": (2, 4, 5, head_dim), "k": (2, 2, 7, head_dim)}
    rejects(ValueError, "q", head_dim, "1 to 512", **good(xp, **shapes))
    rejects(ValueError, "v", head_dim, "1 to 512", **good(xp, v=(2, 2, 7, head_dim)))


def test_length_too_large():
    long = np.broadcast_to(np.float32(0), (1, 2**30, 4))
    one = np.zeros((1, 1, 4), np.float32)
    rejects(ValueError, "q", 2**30, "below 2**30", q=long, k=one, v=one)
    rejects(ValueError, "k", 2**30, "below 2**30", q=one, k=long, v=long)


# Dtypes and kinds.


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint8", "bool"])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_unsupported_dtype(xp, name, dtype):
    array = xp.ones(SHAPES[name], dtype)
    rejects(TypeError, name, dtype, "float16 or bfloat16", **good(xp, **{name: array}))


def test_complex(xp):
    rejects(TypeError, "k", "complex64", **good(xp, k=xp.ones(SHAPES["k"], "complex64")))


@pytest.mark.parametrize("name", ["k", "v"])
@pytest.mark.parametrize("dtype", ["float16", "float64", ml_dtypes.bfloat16])
def test_mixed_dtypes(xp, name, dtype):
    array = xp.ones(SHAPES[name], "float32").astype(dtype)
    rejects(TypeError, name, "`q`", "float32", np.dtype(dtype).name, **good(xp, **{name: array}))


@pytest.mark.parametrize("value", [[[1.0]], 1.0, "q", object()])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_not_an_array(xp, name, value):
    rejects(TypeError, name, type(value).__name__, "array", **good(xp, **{name: value}))


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_none_for_an_array(xp, name):
    rejects(TypeError, name, "None", **good(xp, **{name: None}))


@pytest.mark.parametrize("name", ["k", "v", "q_start", "kv_lengths", "out"])
def test_host_and_device_mixed(cp, name):
    strangers = {
        "q_start": np.zeros(2, np.int32),
        "kv_lengths": np.zeros(2, np.int32),
        "out": np.zeros(OUT, np.float32),
    }
    stranger = strangers.get(name, np.zeros(SHAPES.get(name, ()), np.float32))
    rejects(TypeError, name, "`q`", **good(cp, **{name: stranger}))


def test_kinds_mixed(require):
    torch = require("torch")
    rejects(TypeError, "k", "`q`", **good(np, k=torch.ones(SHAPES["k"])))


# Options.


@pytest.mark.parametrize("name", ["causal", "return_lse"])
@pytest.mark.parametrize("value", [1, None, "yes", np.ones(2, bool)])
def test_flag_is_a_bool(xp, name, value):
    rejects(TypeError, name, "True or False", **good(xp, **{name: value}))


@pytest.mark.parametrize("value", ["1", True, 1j, [1.0], np.ones(())])
def test_scale_is_a_real_number(xp, value):
    rejects(TypeError, "scale", "real number", **good(xp, scale=value))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scale_is_finite(xp, value):
    rejects(ValueError, "scale", value, "finite", **good(xp, scale=value))


@pytest.mark.parametrize("window", [-1, (-1, 0), (0, -1), (None, -3)])
def test_negative_window(xp, window):
    rejects(ValueError, "window", window, ">= 0", **good(xp, window=window))


@pytest.mark.parametrize("window", [(), (1,), (1, 2, 3)])
def test_window_is_a_pair(xp, window):
    rejects(ValueError, "window", window, "pair (left, right)", **good(xp, window=window))


@pytest.mark.parametrize("window", [1.5, (1.0, 2), True, (False, 1), "ab", np.ones(2, int)])
def test_window_is_made_of_ints(xp, window):
    rejects(TypeError, "window", repr(window), "int", **good(xp, window=window))


@pytest.mark.parametrize("value", ["fp32", "TF32", 32, True])
def test_unknown_precision(xp, value):
    rejects(ValueError, "precision", repr(value), '"tf32"', **good(xp, precision=value))


@pytest.mark.parametrize("dtype", ["float16", "float64", ml_dtypes.bfloat16])
def test_tf32_is_for_float32(xp, dtype):
    arguments = {name: array.astype(dtype) for name, array in good(xp).items()}
    rejects(ValueError, "precision", np.dtype(dtype).name, precision="tf32", **arguments)


@pytest.mark.parametrize("name", ["q_start", "kv_lengths"])
class TestIntegers:
    @pytest.mark.parametrize("value", [1.0, True, "3", [1, 2], (1, 2), np.float32(1), np.bool(0)])
    def test_neither_int_nor_array(self, xp, name, value):
        rejects(TypeError, name, repr(value), "int", **good(xp, **{name: value}))

    @pytest.mark.parametrize("dtype", ["float32", "bool"])
    def test_dtype(self, xp, name, dtype):
        rejects(TypeError, name, dtype, "integers", **good(xp, **{name: xp.ones(2, dtype)}))

    @pytest.mark.parametrize("shape", [(3,), (2, 1), (1, 2), (0,)])
    def test_shape(self, xp, name, shape):
        array = xp.ones(shape, "int32")
        rejects(ValueError, name, shape, "batch axes, (2,)", **good(xp, **{name: array}))

    def test_two_axes_take_no_array_with_axes(self, xp, name):
        arguments = {n: xp.ones(s[-2:], "float32") for n, s in SHAPES.items()}
        rejects(ValueError, name, (1,), "()", **arguments, **{name: xp.ones(1, "int32")})


@pytest.mark.parametrize("value", [-1, 8, 2**40])
def test_kv_lengths_int_out_of_range(xp, value):
    rejects(ValueError, "kv_lengths", value, "0 to 7", **good(xp, kv_lengths=value))


@pytest.mark.parametrize("value", [-(2**30), 2**30 - 4])
def test_q_start_int_out_of_range(xp, value):
    rejects(ValueError, "q_start", value, **good(xp, q_start=value))


@pytest.mark.parametrize("value", [-1, 8])
def test_kv_lengths_values(xp, monkeypatch, value):
    monkeypatch.setenv("CUFLASH_CHECK", "1")
    rejects(
        ValueError, "kv_lengths", value, "0 to 7", **good(xp, kv_lengths=xp.asarray([3, value]))
    )


@pytest.mark.parametrize("value", [-(2**30), 2**30])
def test_q_start_values(xp, monkeypatch, value):
    monkeypatch.setenv("CUFLASH_CHECK", "1")
    rejects(ValueError, "q_start", value, **good(xp, q_start=xp.asarray([3, value])))


# Outputs.


@pytest.mark.parametrize("shape", [(), OUT[1:], (1, *OUT), (2, 4, 5, 16), (2, 4, 7, 8)])
def test_out_shape(xp, shape):
    rejects(ValueError, "out", shape, OUT, **good(xp, out=xp.empty(shape, "float32")))


@pytest.mark.parametrize("dtype", ["float16", "float64", "int32"])
def test_out_dtype(xp, dtype):
    rejects(TypeError, "out", dtype, "float32", **good(xp, out=xp.empty(OUT, dtype)))


@pytest.mark.parametrize("dtype", ["float64", ml_dtypes.bfloat16])
def test_out_dtype_of_halves(xp, dtype):
    arguments = {name: array.astype("float16") for name, array in good(xp).items()}
    out = xp.empty(OUT, dtype)
    rejects(TypeError, "out", np.dtype(dtype).name, "float16 or float32", **arguments, out=out)


def test_lse_of_wrong_shape_or_dtype(xp):
    for lse in (xp.empty((2, 4, 6), "float32"), xp.empty((*LSE, 1), "float32")):
        arguments = good(xp, out=(None, lse), return_lse=True)
        rejects(ValueError, "out[1]", lse.shape, LSE, **arguments)
    lse = xp.empty(LSE, "float64")
    arguments = good(xp, out=(None, lse), return_lse=True)
    rejects(TypeError, "out[1]", "float64", "float32", **arguments)


def test_pair_of_outputs(xp):
    out, lse = xp.empty(OUT, "float32"), xp.empty(LSE, "float32")
    with pytest.raises(TypeError, match="`out` must be one array"):
        cuflash.attention(**good(xp, out=(out, lse)))
    for pair in ((), (out,), (out, lse, lse)):
        with pytest.raises(ValueError, match=rf"`out` .*pair.*tuple of {len(pair)}"):
            cuflash.attention(**good(xp, out=pair, return_lse=True))


def test_out_overlaps_an_input(xp):
    memory = xp.ones(2 * 4 * 5 * 16 + 16, "float32")
    arguments = good(xp, v=(2, 2, 7, 16), q=memory[16:].reshape(2, 4, 5, 16))
    rejects(ValueError, "out", "overlap `q`", **arguments, out=arguments["q"])
    rejects(ValueError, "out", "overlap `q`", **arguments, out=memory[:-16].reshape(2, 4, 5, 16))


def test_out_overlaps_lse(xp):
    memory = xp.ones(2 * 4 * 5 * 8, "float32")
    pair = memory.reshape(OUT), memory[:40].reshape(LSE)
    rejects(ValueError, "out[0]", "overlap `out[1]`", **good(xp, out=pair, return_lse=True))


def test_out_overlaps_integers(xp):
    memory = xp.zeros(2 * 4 * 5 * 8, "float32")
    lengths = memory.view("int32")[:2]
    rejects(
        ValueError,
        "out",
        "overlap `kv_lengths`",
        **good(xp, kv_lengths=lengths, out=memory.reshape(OUT)),
    )


def test_out_overlaps_itself(xp):
    memory = xp.ones(2 * 4 * 5 * 8, "float32")
    for row in (0, 4):  # bytes from each row to the next
        strides = (4 * 5 * 8 * 4, 5 * 8 * 4, row, 4)
        out = xp.lib.stride_tricks.as_strided(memory, OUT, strides)
        rejects(ValueError, "out", "memory of its own", **good(xp, out=out))


def test_out_with_gaps_in_its_last_axis(xp):
    out = xp.empty((2, 4, 5, 16), "float32")[..., ::2]
    rejects(ValueError, "out", "contiguous last axis", out.strides, **good(xp, out=out))
    out = xp.empty((2, 4, 8, 5), "float32").swapaxes(-1, -2)
    rejects(ValueError, "out", "contiguous last axis", out.strides, **good(xp, out=out))


def test_read_only_out():
    out = np.empty(OUT, np.float32)
    out.flags.writeable = False
    rejects(ValueError, "out", **good(np, out=out))


@pytest.mark.parametrize("value", [[1.0], "out", 3])
def test_out_is_not_an_array(xp, value):
    rejects(TypeError, "out", **good(xp, out=value))


def test_jax_takes_no_out(require):
    jnp = require("jax").numpy
    arguments = {name: jnp.ones(shape) for name, shape in SHAPES.items()}
    rejects(TypeError, "out", **arguments, out=jnp.ones(OUT))


# Parts to merge.


def parts(xp, count=2, **changes):
    arguments = {
        "outs": [xp.ones(OUT, "float32") for _ in range(count)],
        "lses": [xp.ones(LSE, "float32") for _ in range(count)],
    }
    return {**arguments, **changes, "call": cuflash.merge_attention}


def test_parts_are_sequences(xp):
    rejects(TypeError, "outs", "list or tuple", **parts(xp, outs=xp.ones((2, *OUT), "float32")))
    rejects(TypeError, "lses", "list or tuple", **parts(xp, lses=None))


def test_number_of_parts(xp):
    rejects(ValueError, "outs", "at least one", 0, **parts(xp, 0))
    rejects(ValueError, "lses", 2, 1, **parts(xp, lses=[xp.ones(LSE, "float32")]))


@pytest.mark.parametrize("shape", [(8,), (2, 4, 5, 513), (2, 4, 5, 0)])
def test_shape_of_parts(xp, shape):
    rejects(ValueError, "outs[0]", shape, **parts(xp, outs=[xp.ones(shape, "float32")] * 2))


def test_parts_that_differ(xp):
    out, lse = xp.ones(OUT, "float32"), xp.ones(LSE, "float32")
    rejects(ValueError, "outs[1]", OUT, **parts(xp, outs=[out, out[:1]]))
    rejects(TypeError, "outs[1]", "float16", **parts(xp, outs=[out, out.astype("float16")]))
    rejects(ValueError, "lses[0]", LSE, **parts(xp, lses=[lse[..., None], lse]))
    rejects(TypeError, "lses[1]", "float64", **parts(xp, lses=[lse, lse.astype("float64")]))
    rejects(TypeError, "outs[0]", "int32", **parts(xp, outs=[out.astype("int32")] * 2))
    rejects(TypeError, "outs[1]", **parts(xp, outs=[out, None]))
    rejects(TypeError, "lses[1]", **parts(xp, lses=[lse, None]))
    rejects(TypeError, "lses[0]", "list", **parts(xp, lses=[[1.0], lse]))


def test_merged_out(xp):
    arguments = parts(xp)
    rejects(ValueError, "out", "overlap `outs[1]`", **arguments, out=arguments["outs"][1])
    rejects(ValueError, "out", OUT, **arguments, out=xp.ones(LSE, "float32"))
    rejects(TypeError, "out[1]", "float32", **arguments, out=(None, xp.ones(LSE, "float64")))
    with pytest.raises(ValueError, match=r"`out` .*pair"):
        cuflash.merge_attention(arguments["outs"], arguments["lses"], out=(None,))


# Dropout.


@pytest.mark.parametrize("dropout", [True, "0.1", [0.1], np.zeros(()), 1j])
def test_dropout_is_a_number(xp, dropout):
    rejects(TypeError, "dropout", repr(dropout), "real number", **good(xp, dropout=dropout, seed=0))


@pytest.mark.parametrize("dropout", [-0.1, 1, 1.0, 1.5, np.nan, np.inf])
def test_dropout_is_a_probability_below_one(xp, dropout):
    arguments = good(xp, dropout=dropout, seed=0)
    rejects(ValueError, "dropout", repr(dropout), "at least 0 and below 1", **arguments)


def test_dropout_needs_a_seed(xp):
    rejects(TypeError, "seed", "`dropout` needs", None, **good(xp, dropout=0.1))


@pytest.mark.parametrize("dropout", [None, 0, 0.1])
def test_bad_seeds(xp, dropout):
    for seed in (1.0, True, "1", np.float64(1)):
        rejects(TypeError, "seed", "an int", repr(seed), **good(xp, dropout=dropout, seed=seed))
    for seed in (-1, 2**64):
        arguments = good(xp, dropout=dropout, seed=seed)
        rejects(ValueError, "seed", 2**64 - 1, repr(seed), **arguments)
