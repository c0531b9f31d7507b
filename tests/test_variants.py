"""Attention with soft caps, biases, masks and sinks against the oracle, as test_attention_problems
has it without."""

from __future__ import annotations

import dataclasses

import numpy as np
import oracle
import pytest
import tolerance
from calling import attend, host, judge
from hypothesis import given, settings
from hypothesis import strategies as st
from poison import poison
from strategies import (
    DTYPES,
    OUT_LAYOUTS,
    VARIANT_LAYOUTS,
    Call,
    Problem,
    Spec,
    materialise,
    nan_filled,
    problems,
    variations,
)
from test_attention_problems import assert_untouched, guarded, packed_whenever_possible

import cuflash
from cuflash._attention.variants import registry

KEYWORDS = [entry.keyword for entry in registry.ENTRIES]
NAMED = ("softcap", "alibi", "bias", "mask", "sinks")
AXES = {"alibi": 1, "bias": 3, "mask": 3, "sinks": 1}
# Each choice of variants, of their dtypes and of the inputs' is a kernel of its own on a GPU.
some = settings(max_examples=max(8, settings().max_examples // 8))
few = settings(max_examples=max(4, settings().max_examples // 16))


def changed(call: Call, **options) -> Call:
    return dataclasses.replace(call, options={**call.options, **options})


def test_every_keyword_is_drawn():
    assert set(KEYWORDS) == set(variations("float32")) == set(NAMED)


@some
@given(problem=problems(variants=True))
def test_problem(xp, problem):
    call = materialise(problem)
    judge(call).check(*attend(call, xp))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keyword", KEYWORDS)
@few
@given(data=st.data())
def test_keyword_alone(xp, keyword, dtype, data):
    others = dict.fromkeys((name for name in NAMED if name != keyword), None)
    value = data.draw(variations(dtype)[keyword])
    drawn = problems(variants=True, dtype=dtype, **{keyword: value}, **others)
    call = materialise(data.draw(drawn))
    judge(call).check(*attend(call, xp))


ORDINARY = Problem(batch=(2,), shared=((False,),) * 3, group=2, len_q=70, len_k=150)
SMALL = Problem(batch=(2,), shared=((False,),) * 3, group=2, len_q=20, len_k=70)


@pytest.mark.parametrize("own", [*DTYPES])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keyword", ["alibi", "bias", "sinks"])
def test_every_dtype_of_an_array(xp, keyword, dtype, own):
    for layout in VARIANT_LAYOUTS[:2]:
        spec = {keyword: Spec(dtype=own, layout=layout)}
        call = materialise(dataclasses.replace(SMALL, dtype=dtype, **spec))
        judge(call).check(*attend(call, xp))


ALL = {
    "softcap": 8.0,
    "alibi": Spec(values="powers"),
    "bias": Spec(values="holes"),
    "mask": Spec(values="random"),
    "sinks": Spec(),
}


WIDE = [(128, 128), (192, 40), (72, 256), (256, 256), (320, 100), (40, 384), (512, 512)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", WIDE, ids=str)
def test_wide_heads(xp, dims, dtype):
    for seed, options in enumerate(({}, {"causal": True}, {"window": (40, 3)})):
        wide = dataclasses.replace(SMALL, head_dim=dims[0], head_dim_v=dims[1], **options)
        call = materialise(dataclasses.replace(wide, seed=seed, dtype=dtype, **ALL))
        judge(call).check(*attend(call, xp))


EDGES = (1, 63, 64, 65, 96, 127, 129, 257)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("len_q", [1, 65, 129])
def test_lengths_at_the_edges_of_tiles(xp, len_q, dtype):
    sizes = {"dtype": dtype, "len_q": len_q, "head_dim": 64, "head_dim_v": 40, "group": 2}
    for seed, len_k in enumerate(EDGES):
        for options in ({}, {"causal": True}, {"window": (70, 3), "kv_lengths": len_k - 1}):
            call = materialise(Problem(seed, len_k=len_k, **sizes, **options, **ALL))
            judge(call).check(*attend(call, xp))


@pytest.mark.parametrize("group", [2, 4, 16])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@few
@given(data=st.data())
def test_packed_heads(cp, dtype, group, data):
    drawn = problems(variants=True, dtype=dtype, group=group, two_axes=False)
    call = materialise(data.draw(drawn))
    with packed_whenever_possible():
        judge(call).check(*attend(call, cp))


@few
@given(problem=problems(variants=True))
def test_lse_is_optional(xp, problem):
    call = materialise(problem)
    (q, k, v), options = call.on(xp)
    poison(xp)
    judge(call).check(host(cuflash.attention(q, k, v, **options)))


@few
@given(problem=problems(variants=True), data=st.data())
def test_margins_of_outputs_stay_untouched(xp, problem, data):
    call = materialise(problem)
    reference = judge(call)
    (q, k, v), options = call.on(xp)
    lse_dtype = np.dtype(np.float64 if problem.dtype == "float64" else np.float32)
    layouts = data.draw(st.tuples(*[st.sampled_from(OUT_LAYOUTS)] * 2))
    out_memory, out, out_written = guarded(reference.out.shape, call.q.dtype, layouts[0], xp)
    lse_memory, lse, lse_written = guarded(reference.lse.shape, lse_dtype, layouts[1], xp)
    poison(xp)
    result = cuflash.attention(q, k, v, **options, return_lse=True, out=(out, lse))
    assert result[0] is out
    assert result[1] is lse
    reference.check(host(out), host(lse))
    assert_untouched(out_memory, out_written)
    assert_untouched(lse_memory, lse_written)
    for name, array in options.items():
        if isinstance(array, xp.ndarray):
            assert host(array).tobytes() == call.options[name].tobytes(), f"{name} was written to"


@few
@given(problem=problems(variants=True, dtype="float16") | problems(variants=True, dtype="bfloat16"))
def test_half_inputs_may_have_a_float32_output(xp, problem):
    call = materialise(problem)
    truth = judge(call, out_dtype=np.float32)
    out = xp.asarray(nan_filled(truth.out.shape, np.dtype(np.float32)))
    truth.check(*attend(call, xp, out=(out, None)))


@pytest.mark.parametrize("softcap", [1e-50, 1e-38, 1e38, 1e39])
def test_a_soft_cap_beyond_float32(softcap):
    call = changed(materialise(Problem(len_q=3, len_k=9)), softcap=softcap)
    with pytest.raises(ValueError, match="`softcap` must be from"):
        attend(call, np)


# What is hidden.


def everywhere(call: Call, array: np.ndarray, axes: int) -> np.ndarray:
    """An array of variants with every axis that it broadcasts to."""
    batch = np.broadcast_shapes(*(x.shape[:-3] for x in (call.q, call.k, call.v)))
    heads = call.q.shape[-3] if call.q.ndim > 2 else 1
    sizes = (heads, call.q.shape[-2], call.k.shape[-2])[:axes]
    return np.broadcast_to(array, (*batch, *sizes)).copy()


@some
@given(problem=problems(variants=True, sinks=None), bad=st.sampled_from([np.nan, np.inf, -np.inf]))
def test_a_bias_on_hidden_places_never_leaks(xp, problem, bad):
    dtype = DTYPES[problem.bias.dtype if problem.bias else "float32"]
    call = materialise(problem)
    bias = everywhere(call, np.asarray(call.options.get("bias", 0), dtype), 3)
    truth = judge(changed(call, bias=bias))
    bias = np.where(np.broadcast_to(truth.allowed, bias.shape), bias, dtype.type(bad))
    truth.check(*attend(changed(call, bias=bias), xp))


@some
@given(
    problem=problems(variants=True, kv_lengths=3, len_k=70), bad=st.sampled_from([np.nan, np.inf])
)
def test_keys_past_the_length_never_leak(xp, problem, bad):
    call = materialise(dataclasses.replace(problem, layouts=("contiguous",) * 3))
    truth = judge(call)
    length = call.options["kv_lengths"]
    k, v = call.k.copy(), call.v.copy()
    k[..., length:, :] = bad
    v[..., length:, :] = bad
    truth.check(*attend(dataclasses.replace(call, k=k, v=v), xp))


@some
@given(problem=problems(variants=True), bad=st.sampled_from([np.nan, np.inf, -np.inf]))
def test_a_key_that_a_mask_hides_never_leaks(xp, problem, bad):
    """Of k: a row of v that some row might see has to be finite."""
    if problem.len_k == 0:
        return
    call = materialise(dataclasses.replace(problem, layouts=("contiguous",) * 3))
    mask = everywhere(call, np.asarray(call.options.get("mask", True)), 3)
    hidden = problem.seed % problem.len_k
    mask[..., hidden] = False
    k = call.k.copy()
    truth = judge(changed(call, mask=mask))
    k[..., hidden, :] = bad
    truth.check(*attend(dataclasses.replace(changed(call, mask=mask), k=k), xp))


NOTHING = {
    "nothing in a mask": {"mask": Spec("bool", "nothing", ones=(True, True))},
    "rows of a mask": {"mask": Spec("bool", "rows")},
    "a bias of -inf": {"bias": np.full(150, -np.inf, np.float32)},
    "rows of a bias": {"bias": np.where(np.arange(70) % 3 == 0, -np.inf, 0)[:, None]},
    "tiles of a bias": {"bias": np.where(np.arange(150) < 140, -np.inf, 0)},
    "no lengths": {"kv_lengths": 0, "bias": Spec(), "mask": Spec("bool")},
    "rows before the keys": {"causal": True, "q_start": -20, "alibi": Spec()},
}


@pytest.mark.parametrize("sinks", [None, Spec(values="large"), Spec(values="holes")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", NOTHING)
def test_a_row_without_keys(xp, case, dtype, sinks):
    """Its lse is that of its sink."""
    given_ = {n: x for n, x in NOTHING[case].items() if not isinstance(x, np.ndarray)}
    call = materialise(dataclasses.replace(ORDINARY, dtype=dtype, sinks=sinks, **given_))
    arrays = {n: x for n, x in NOTHING[case].items() if isinstance(x, np.ndarray)}
    call = changed(call, **arrays)
    truth = judge(call)
    out, lse = attend(call, xp)
    truth.check(out, lse)
    sink = np.asarray(call.options.get("sinks", -np.inf), np.float64)[..., None]
    empty = (truth.mass[..., 0] == 0) & (truth.lse == np.broadcast_to(sink, truth.lse.shape))
    assert empty.any() == (case != "tiles of a bias")
    assert (out[empty] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("values", ["random", "sparse", "rows", "tiles", "all", "nothing"])
def test_with_q_zero_lse_counts_the_keys(xp, values, dtype):
    masks = [Spec("bool", values, layout=layout) for layout in VARIANT_LAYOUTS]
    options = ({}, {"causal": True}, {"kv_lengths": "int32", "window": (50, 7)})
    for seed, mask in enumerate(masks):
        changes = {"dtype": dtype, "mask": mask, **options[seed % 3]}
        call = materialise(dataclasses.replace(ORDINARY, seed=seed, **changes))
        call = dataclasses.replace(call, q=np.zeros_like(call.q), k=call.k, v=call.v[..., :1])
        at = oracle.places(call.q, call.k, call.v, None, call.options.get("kv_lengths"))
        bounds = (call.options["causal"], call.options.get("window"), at)
        allowed = oracle.allowed_keys(call.q, call.k, call.v, *bounds) & call.options["mask"]
        _, lse = attend(call, xp)
        np.testing.assert_array_equal(np.exp(lse).round(2), allowed.sum(axis=-1))


# Axes.


def test_many_batch_axes(xp):
    """None joins its neighbour in one stride, and the arrays have only some of them."""
    batch = (2, 3, 2, 2, 3)
    shared = ((True, False, True, False, True), *((False, True, False, True, False),) * 2)
    sizes = {"len_q": 5, "len_k": 7, "head_dim": 64, "head_dim_v": 64, "group": 2}
    ones = (False, False, True, True, False, True, False, False)
    specs = {
        "alibi": Spec(layout="transposed", ones=(False, True)),
        "bias": Spec(layout="transposed", ones=ones),
        "mask": Spec("bool", "rows", layout="gaps", ones=ones[::-1]),
        "sinks": Spec(layout="negative"),
    }
    for dtype in DTYPES:
        for name in (*specs, "all"):
            chosen = specs if name == "all" else {name: specs[name]}
            call = materialise(Problem(7, dtype, batch, shared, causal=True, **sizes, **chosen))
            judge(call).check(*attend(call, xp))


@few
@given(problem=problems(variants=True, two_axes=True))
def test_two_axes_are_one_head(xp, problem):
    call = materialise(problem)
    judge(call).check(*attend(call, xp))


def assert_same(xp, call: Call, other: Call, change) -> None:
    """`other` gives call's answer, after `change` of every array of answers."""
    truth, limits = judge(call), judge(other)
    out, lse = attend(call, xp)
    other_out, other_lse = attend(other, xp)
    for name, got, limit, expected, its_limit in (
        ("out", other_out, limits.out_limit, out, truth.out_limit),
        ("lse", other_lse, limits.lse_limit, lse, truth.lse_limit),
    ):
        exact = expected.astype(truth.out.dtype)
        limit = change(np.broadcast_to(limit, got.shape)) + its_limit
        tolerance.assert_close(name, change(got), exact, limit)


AXES_OF_ANSWERS = {"batch": -4, "heads": -3, "rows": -2}


@pytest.mark.parametrize("axis", AXES_OF_ANSWERS)
@few
@given(data=st.data())
def test_what_is_permuted_with_its_arrays_is_permuted(xp, axis, data):
    """Batch entries, heads and rows take their parts of the arrays with them."""
    sizes = {"group": 1, "batch": (3,), "two_axes": False, "causal": False, "window": None}
    sizes |= {"alibi": None, "values": "normal"} if axis == "rows" else {}
    problem = data.draw(problems(variants=True, **sizes))
    call = materialise(problem)
    whole = {n: everywhere(call, call.options[n], AXES[n]) for n in AXES if n in call.options}
    q, k, v = (np.broadcast_to(x, (3, *x.shape[-3:])) for x in (call.q, call.k, call.v))
    whole = {n: np.broadcast_to(x, (3, *x.shape[-AXES[n] :])) for n, x in whole.items()}
    integers = {n: call.options.get(n) for n in ("q_start", "kv_lengths")}
    batch = {n: np.broadcast_to(x, 3) for n, x in integers.items() if isinstance(x, np.ndarray)}
    call = Call(q, k, v, {**call.options, **whole, **batch})
    size = {"batch": 3, "heads": problem.kv_heads, "rows": problem.len_q}[axis]
    order = np.random.default_rng(problem.seed).permutation(size)
    back = np.argsort(order)
    assert_same(xp, call, permuted(call, axis, order), lambda x: back_again(x, axis, back))


def permuted(call: Call, axis: str, order: np.ndarray) -> Call:
    take = lambda x, at: np.take(x, order, axis=at)
    options = dict(call.options)
    for name, axes in AXES.items():
        if name in options and not (axis == "rows" and axes == 1):
            at = {"batch": 0, "heads": -axes, "rows": -2}[axis]
            options[name] = take(options[name], at)
    if axis == "batch":
        for name in ("q_start", "kv_lengths"):
            if isinstance(options.get(name), np.ndarray):
                options[name] = take(options[name], 0)
    at = AXES_OF_ANSWERS[axis]
    q = take(call.q, at)
    k, v = (call.k, call.v) if axis == "rows" else (take(call.k, at), take(call.v, at))
    return Call(q, k, v, options)


def back_again(answer: np.ndarray, axis: str, back: np.ndarray) -> np.ndarray:
    """Both out, of four axes, and lse, of three."""
    return np.take(answer, back, axis={"batch": 0, "heads": 1, "rows": 2}[axis])


@pytest.mark.parametrize("dtype", DTYPES)
def test_repeats_are_bitwise_equal(xp, dtype):
    call = materialise(dataclasses.replace(ORDINARY, dtype=dtype, causal=True, **ALL))
    (q, k, v), options = call.on(xp)
    bits = set()
    for repeat in range(100 if xp.__name__ == "cupy" else 2):
        if repeat % 2 == 0:
            poison(xp)
        out, lse = cuflash.attention(q, k, v, **options, return_lse=True)
        bits.add(host(out).tobytes() + host(lse).tobytes())
    assert len(bits) == 1
