"""Bad input to attention's variants: the error names the argument, what came and what is allowed,
and nothing has run."""

from __future__ import annotations

import re

import ml_dtypes
import numpy as np
import pytest
from test_attention_bad_input import OUT, good, nothing_runs, rejects

import cuflash
from cuflash import Variant

__all__ = ["nothing_runs"]  # a fixture
pytestmark = pytest.mark.usefixtures("nothing_runs")

# What each array broadcasts to, for q of shape (2, 4, 5, 16) and k of length 7.
TARGETS = {"alibi": (2, 4), "bias": (2, 4, 5, 7), "mask": (2, 4, 5, 7), "sinks": (2, 4)}
AXES = dict.fromkeys(("alibi", "sinks"), "(..., heads)")
AXES |= dict.fromkeys(("bias", "mask"), "(..., heads, len_q, len_k)")
arrays = pytest.mark.parametrize("name", TARGETS)


def made(xp, name, shape=None, dtype=None):
    """An array for a keyword, of its own shape and dtype unless told otherwise."""
    own = "bool" if name == "mask" else "float32"
    return xp.ones(TARGETS[name] if shape is None else shape, dtype or own)


# Soft caps.


@pytest.mark.parametrize("value", ["1", True, 1j, [1.0], np.ones(()), np.bool(1), object()])
def test_softcap_is_a_number(xp, value):
    rejects(TypeError, "softcap", "number or None", repr(value), **good(xp, softcap=value))


@pytest.mark.parametrize("value", [0, 0.0, -0.0, -1, -2.5, np.inf, -np.inf, np.nan])
def test_softcap_is_positive(xp, value):
    rejects(ValueError, "softcap", "positive and finite", value, **good(xp, softcap=value))


# Arrays of keywords.


@arrays
@pytest.mark.parametrize("value", [1.0, 1, True, "x", [1.0], (1.0,), object()])
def test_not_an_array(xp, name, value):
    rejects(TypeError, name, type(value).__name__, "array", **good(xp, **{name: value}))


@arrays
def test_dtype(xp, name):
    allowed = "bool" if name == "mask" else "float16 or bfloat16 or float32 or float64"
    wrong = ["int32", "int64", "uint32", "float32" if name == "mask" else "bool"]
    for dtype in wrong:
        array = made(xp, name, dtype=dtype)
        rejects(TypeError, name, allowed, dtype, **good(xp, **{name: array}))
    rejects(TypeError, name, "complex64", **good(xp, **{name: made(xp, name, dtype="complex64")}))


@arrays
def test_shape(xp, name):
    target = TARGETS[name]
    wrong = [(1, *target), (3, *target[1:]), (*target[:-1], 8), (*target[:-1], 2), (0,), (2, 1, 1)]
    wrong += [(2, 3, 5, 7), (4, 4, 1), (5, 1, 7)] if len(target) == 4 else [(3,), (2, 2)]
    for shape in wrong:
        if shape == (2, 1, 1) and len(target) == 4:
            continue
        array = made(xp, name, shape)
        rejects(ValueError, name, shape, AXES[name], target, **good(xp, **{name: array}))


@arrays
def test_shape_with_two_axes(xp, name):
    shapes = {"q": (5, 16), "k": (7, 16), "v": (7, 8)}
    arguments = {each: xp.ones(shape, "float32") for each, shape in shapes.items()}
    target = (1,) if len(TARGETS[name]) == 2 else (1, 5, 7)
    for shape in ((2, *target[1:]), (1, *target)):
        rejects(ValueError, name, target, **arguments, **{name: made(xp, name, shape)})


@arrays
def test_an_int_of_lengths_does_not_shorten_arrays(xp, name):
    if len(TARGETS[name]) == 2:
        return
    array = made(xp, name, (5, 3))
    rejects(ValueError, name, (5, 3), (2, 4, 5, 7), **good(xp, kv_lengths=3, **{name: array}))


@arrays
def test_host_and_device_mixed(cp, name):
    rejects(TypeError, name, "`q`", **good(cp, **{name: made(np, name)}))
    rejects(TypeError, name, "`q`", **good(np, **{name: made(cp, name)}))


@arrays
def test_kinds_mixed(require, name):
    torch = require("torch")
    array = torch.ones(TARGETS[name], dtype=torch.bool if name == "mask" else torch.float32)
    rejects(TypeError, name, "`q`", "torch", **good(np, **{name: array}))


def odd_strides(axes: int) -> np.ndarray:
    """Floats 5 bytes apart."""
    return np.zeros((1,) * (axes - 1) + (2,), [("a", "u1"), ("x", "<f4")])["x"]


def test_strides_that_are_no_whole_elements():
    q, k, v = (np.ones((2, 8), np.float32) for _ in range(3))
    rejects(ValueError, "bias", "whole elements", q=q, k=k, v=v, bias=odd_strides(2))
    variant = Variant("score + x[j]")(x=odd_strides(1))
    rejects(ValueError, "variant's x", "whole elements", q=q, k=k, v=v, variant=variant)


def test_out_overlaps_a_bias(xp):
    memory = xp.zeros(2 * 4 * 5 * 8, "float32")
    bias = memory[: 5 * 7].reshape(5, 7)
    rejects(ValueError, "out", "overlap `bias`", **good(xp, bias=bias, out=memory.reshape(OUT)))
    variant = Variant("score + x[j]")(x=memory[:7])
    arguments = good(xp, variant=variant, out=memory.reshape(OUT))
    rejects(ValueError, "out", "overlap `variant's x`", **arguments)


# Making a Variant.


def refused(error, words, call):
    with pytest.raises(error, match=re.escape(words)):
        call()


@pytest.mark.parametrize("value", [3, b"score", ["score"], np.float32(1), lambda score: score])
def test_expressions_are_strings(value):
    refused(TypeError, "`score` must be a string or None, not", lambda: Variant(value))
    refused(TypeError, "`mask` must be a string or None, not", lambda: Variant(mask=value))


def test_a_variant_has_an_expression():
    refused(TypeError, "`score`, `mask` or both", Variant)


def test_syntax_is_refused_at_once():
    refused(ValueError, "not an expression", lambda: Variant("score +"))
    refused(ValueError, "only these are functions", lambda: Variant(mask="sin(i) > 0"))
    refused(ValueError, "\n  score ** 2\n  ^", lambda: Variant("score ** 2"))


def test_subscripts_must_agree():
    refused(ValueError, "subscripts of `x`", lambda: Variant("x[i] + x[i, j]"))
    refused(ValueError, "`x` must have as many subscripts", lambda: Variant("x[i]", "x > 0"))


WRONG_TYPES = {
    "a mask must be a truth value": {"mask": "i - j"},
    "a mask must not use `score`": {"mask": "score > 0"},
    "a score must be a number": {"score": "i < j"},
    "an integer is wanted here": {"score": "score * 2 if 1 < x[score] else score"},
}


@pytest.mark.parametrize("words", WRONG_TYPES)
def test_types_of_expressions(xp, words):
    def called():
        variant = Variant(**WRONG_TYPES[words])  # refused at once where no parameter is lacking
        variant = variant(x=xp.ones(3)) if variant.missing else variant
        cuflash.attention(**good(xp, variant=variant))

    refused(ValueError, words, called)


# Binding.


def test_names_to_bind():
    variant = Variant("score + x * y[j]")
    wanted = "the parameters to bind are `x`, `y`; given were "
    for values in ({}, {"x": 1}, {"y": 1}, {"x": 1, "y": 1, "z": 1}):
        given = ", ".join(f"`{name}`" for name in values) or "none"
        refused(TypeError, wanted + given, lambda values=values: variant(**values))
    bound = variant(x=1.0, y=np.ones(7))
    refused(TypeError, "to bind are none; given were `x`", lambda: bound(x=2.0))
    refused(TypeError, "to bind are none; given were `x`", lambda: Variant("score")(x=1))


@pytest.mark.parametrize("value", [np.ones(3), np.ones(()), [1], "1", None, 1j, (1,)])
def test_numbers(value):
    refused(TypeError, "`x` has no subscripts", lambda: Variant("score * x")(x=value))


@pytest.mark.parametrize("value", [2**31, -(2**31) - 1, np.int64(2**40), np.uint64(2**63)])
def test_integers_have_32_bits(value):
    refused(ValueError, "`x` must be an integer of 32 bits", lambda: Variant("score * x")(x=value))


def test_composition():
    with pytest.raises(TypeError):
        Variant("score") & "score"
    with pytest.raises(TypeError):
        None & Variant("score")


# Variants in a call.


@pytest.mark.parametrize("value", ["score", 1, Variant, lambda score: score, {"score": "score"}])
def test_not_a_variant(xp, value):
    rejects(
        TypeError, "variant", "cuflash.Variant", type(value).__name__, **good(xp, variant=value)
    )


def test_unbound(xp):
    variant = Variant("score * cap") & Variant(mask="x[b, j] > y")
    words = "(cap=..., x=..., y=...)"
    rejects(ValueError, "variant", "lacks values", words, **good(xp, variant=variant))


OWN = Variant("score + x[h, j]")


def test_axes_of_an_array(xp):
    for shape in ((), (4,), (2, 4, 7), (1, 1, 1)):
        arguments = good(xp, variant=OWN(x=xp.ones(shape, "float32")))
        rejects(ValueError, "variant's x", "as many axes as subscripts, 2", shape, **arguments)


@pytest.mark.parametrize("shape", [(0, 7), (4, 0)])
def test_empty_arrays(xp, shape):
    arguments = good(xp, variant=OWN(x=xp.ones(shape, "float32")))
    rejects(ValueError, "variant's x", "must have elements", shape, **arguments)


@pytest.mark.parametrize("dtype", ["uint32", "uint64"])
def test_dtype_of_an_array(xp, dtype):
    arguments = good(xp, variant=OWN(x=xp.ones((4, 7), dtype)))
    rejects(TypeError, "variant's x", "int32", dtype, **arguments)


@pytest.mark.parametrize("value", [1.0, [1.0], "x", object()])
def test_not_an_array_in_a_variant(xp, value):
    rejects(TypeError, "variant's x", type(value).__name__, **good(xp, variant=OWN(x=value)))


def test_none_for_an_array_in_a_variant(xp):
    rejects(TypeError, "variant's x", "None", **good(xp, variant=OWN(x=None)))


def test_the_second_of_two_variants_is_named(xp):
    first = OWN(x=xp.ones((4, 7), "float32"))
    variant = first & OWN(x=xp.ones((4, 7), "uint32"))
    rejects(TypeError, "variant's x (2)", "uint32", **good(xp, variant=variant))


def test_host_and_device_mixed_in_a_variant(cp):
    rejects(TypeError, "variant's x", "`q`", **good(cp, variant=OWN(x=np.ones((4, 7)))))


def test_types_that_only_the_arrays_tell(xp):
    """Of a name that is bound to truth values, numbers or integers the expression must be good."""
    bool_, float_ = xp.ones((4, 7), "bool"), xp.ones(7, ml_dtypes.bfloat16)
    for variant, words in (
        (OWN(x=bool_), "a number is wanted here, not bool"),
        (Variant("score + y[x[j]]")(x=float_, y=float_), "an integer is wanted here, not float"),
        (Variant(mask="x[j]")(x=float_), "a mask must be a truth value"),
    ):
        refused(ValueError, words, lambda v=variant: cuflash.attention(**good(xp, variant=v)))
