"""Attention over packed sequences: each one against the oracle, as if it were alone."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tolerance
from calling import host
from hypothesis import given, settings
from hypothesis import strategies as st
from poison import poison
from strategies import DTYPES, OUT_LAYOUTS, nan_filled, place

import cuflash

LENGTHS = st.integers(0, 20) | st.sampled_from((63, 64, 65, 127, 128, 129, 192, 193, 260))
DIMS = (64, 128, 40, 32, 63, 256)
INTEGERS = ("int32", "int64", "int16", "uint16")
some = settings(max_examples=max(8, settings().max_examples // 4))
few = settings(max_examples=max(4, settings().max_examples // 16))


@dataclass(frozen=True)
class Packed:
    """One call of attention_varlen, small enough to print."""

    seed: int = 0
    dtype: str = "float32"
    rows: tuple[int, ...] = (5, 3)  # of each sequence
    keys: tuple[int, ...] | None = None  # None: q's offsets serve both
    behind: tuple[int, int] = (0, 0)  # rows, and keys, of no sequence
    kv_heads: int = 1
    group: int = 1
    head_dim: int = 64
    head_dim_v: int = 64
    integer: str = "int32"
    layouts: tuple[str, str, str] = ("contiguous", "contiguous", "contiguous")
    scale: float | None = None
    causal: bool = False
    window: int | tuple[int | None, int | None] | None = None
    q_start: int | str | None = None
    softcap: float | None = None
    alibi: tuple[int, ...] | None = (
        None  # the axes of what is drawn: (0,), or (0, 1) with sequences
    )
    sinks: tuple[int, ...] | None = None

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group


@dataclass(frozen=True)
class Call:
    """The arguments of a Packed as NumPy arrays."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    offsets: tuple[np.ndarray, ...]
    options: dict[str, Any]
    layouts: tuple[str, str, str]

    def on(self, xp: ModuleType) -> tuple[list[Any], dict[str, Any]]:
        arrays = [
            place(array, layout, xp)
            for array, layout in zip((self.q, self.k, self.v), self.layouts, strict=True)
        ]
        options = {
            name: xp.asarray(x) if isinstance(x, np.ndarray) else x
            for name, x in self.options.items()
        }
        return [*arrays, *map(xp.asarray, self.offsets)], options


def materialise(p: Packed) -> Call:
    random = np.random.default_rng(p.seed)
    keys = p.rows if p.keys is None else p.keys
    tokens, key_tokens = sum(p.rows) + p.behind[0], sum(keys) + p.behind[1]
    if p.keys is None:
        key_tokens = tokens
    shapes = (
        (p.heads, tokens, p.head_dim),
        (p.kv_heads, key_tokens, p.head_dim),
        (p.kv_heads, key_tokens, p.head_dim_v),
    )
    q, k, v = (random.standard_normal(shape).astype(DTYPES[p.dtype]) for shape in shapes)
    lengths = (p.rows,) if p.keys is None else (p.rows, p.keys)
    offsets = tuple(np.cumsum((0, *each)).astype(p.integer) for each in lengths)
    options = {
        name: getattr(p, name)
        for name in ("scale", "causal", "window", "q_start", "softcap")
        if getattr(p, name) is not None
    }
    count = len(p.rows)
    if isinstance(p.q_start, str):
        options["q_start"] = random.integers(-2, 20, count).astype(p.q_start)
    for name in ("alibi", "sinks"):
        if (axes := getattr(p, name)) is not None:
            shape = [(p.heads,), (count, p.heads)][len(axes) - 1]
            options[name] = random.standard_normal(shape).astype(np.float32) / 4
    return Call(q, k, v, offsets, options, p.layouts)


@st.composite
def packed(draw: st.DrawFn, **fixed: Any) -> Packed:
    dtype = fixed.get("dtype") or draw(st.sampled_from(list(DTYPES)))
    rows = tuple(draw(st.lists(LENGTHS, min_size=1, max_size=6)))
    keys = draw(st.none() | st.tuples(*[LENGTHS for _ in rows]))
    sides = st.none() | st.integers(0, 3) | st.integers(0, 160)
    axes = st.sampled_from([(0,), (0, 1)])
    return Packed(
        seed=draw(st.integers(0, 2**32 - 1)),
        rows=rows,
        keys=keys,
        behind=draw(st.tuples(*[st.sampled_from([0, 0, 1, 70])] * 2)),
        kv_heads=draw(st.sampled_from([1, 2])),
        group=draw(st.sampled_from([1, 2, 4])),
        head_dim=draw(st.sampled_from(DIMS)),
        head_dim_v=draw(st.sampled_from(DIMS)),
        integer=draw(st.sampled_from(INTEGERS)),
        layouts=tuple(draw(st.sampled_from(["contiguous", "swapped", "gaps"])) for _ in range(3)),
        scale=draw(st.none() | st.sampled_from([1.0, 0.0, -0.3])),
        causal=draw(st.booleans()),
        window=draw(st.none() | st.integers(0, 160) | st.tuples(sides, sides)),
        q_start=draw(st.none() | st.integers(-20, 180) | st.sampled_from(["int32", "int16"])),
        **{
            "dtype": dtype,
            "softcap": draw(st.sampled_from([None, None, None, 8.0])),
            "alibi": draw(st.none() | axes),
            "sinks": draw(st.none() | axes),
            **fixed,
        },
    )


def sequences(call: Call) -> list[tuple[slice, slice]]:
    """The rows and keys of each sequence."""
    q_offsets, k_offsets = (call.offsets * 2)[:2]
    return [
        (slice(*map(int, q_offsets[n : n + 2])), slice(*map(int, k_offsets[n : n + 2])))
        for n in range(len(q_offsets) - 1)
    ]


def options_of(call: Call, n: int) -> dict[str, Any]:
    """What sequence n alone is asked for."""
    own = dict(call.options)
    if isinstance(own.get("q_start"), np.ndarray):
        own["q_start"] = int(own["q_start"][n])
    for name in ("alibi", "sinks"):
        if name in own and own[name].ndim == 2:
            own[name] = own[name][n]
    return own


def check(call: Call, out: np.ndarray, lse: np.ndarray) -> None:
    end = 0
    for n, (rows, keys) in enumerate(sequences(call)):
        alone = call.q[:, rows], call.k[:, keys], call.v[:, keys]
        truth = tolerance.reference(*alone, **options_of(call, n))
        truth.check(out[:, rows], lse[:, rows])
        end = rows.stop
    assert (out[:, end:] == 0).all()
    assert "sinks" in call.options or np.isneginf(lse[:, end:]).all()


def attend(call: Call, xp: ModuleType, **more: Any) -> tuple[np.ndarray, np.ndarray]:
    arrays, options = call.on(xp)
    poison(xp)
    out, lse = cuflash.attention_varlen(*arrays, **options, return_lse=True, **more)
    return host(out), host(lse)


@some
@given(problem=packed(softcap=None, alibi=None, sinks=None))
def test_problem(xp, problem):
    call = materialise(problem)
    check(call, *attend(call, xp))


@few
@given(problem=packed())
def test_problem_with_variants(xp, problem):
    call = materialise(problem)
    check(call, *attend(call, xp))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_sequences_around_the_tiles_edges(xp, dtype, causal):
    edges = (1, 0, 127, 128, 129, 63, 64, 65, 191, 192, 193, 2)
    problem = Packed(
        dtype=dtype, rows=edges, keys=edges[::-1], kv_heads=2, group=2, causal=causal, behind=(3, 9)
    )
    call = materialise(problem)
    check(call, *attend(call, xp))


def test_many_sequences(xp):
    """More than the threads that sort them, most of them empty."""
    random = np.random.default_rng(0)
    rows = tuple(int(n) for n in random.integers(0, 9, 3000) * (random.random(3000) < 0.2))
    call = materialise(Packed(dtype="float16", rows=rows, causal=True, head_dim=32, head_dim_v=32))
    out, lse = attend(call, xp)
    chosen = [n for n, (own, _) in enumerate(sequences(call)) if own.stop > own.start]
    for n in [*chosen[:20], *chosen[-20:]]:
        own, keys = sequences(call)[n]
        alone = call.q[:, own], call.k[:, keys], call.v[:, keys]
        truth = tolerance.reference(*alone, **options_of(call, n))
        truth.check(out[:, own], lse[:, own])


def test_what_other_sequences_hold_does_not_matter(xp):
    """NaN in other sequences' rows of k and v, and behind the last one, never leaks."""
    for dtype in DTYPES:
        clean = materialise(Packed(dtype=dtype, rows=(40, 100, 7), behind=(5, 0), causal=True))
        own = sequences(clean)[1][0]
        q, k, v = (np.full_like(x, np.nan) for x in (clean.q, clean.k, clean.v))
        for dirty, x in ((q, clean.q), (k, clean.k), (v, clean.v)):
            dirty[:, own] = x[:, own]
        dirty = dataclasses.replace(clean, q=q, k=k, v=v)
        for got, want in zip(attend(dirty, xp), attend(clean, xp)):
            assert np.array_equal(got[:, own], want[:, own])


@pytest.mark.parametrize("layout", OUT_LAYOUTS)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_given_outputs(xp, layout, dtype):
    """Only what is an output is written, whatever its rows are beside."""
    call = materialise(Packed(dtype=dtype, rows=(70, 3, 130), kv_heads=2, behind=(2, 0)))
    want = attend(call, xp)
    arrays, options = call.on(xp)
    out = place(nan_filled(want[0].shape, want[0].dtype), layout, xp)
    lse = xp.full(want[1].shape, np.nan, want[1].dtype)
    given = cuflash.attention_varlen(*arrays, **options, return_lse=True, out=(out, lse))
    assert given.out is out
    assert given.lse is lse
    assert np.array_equal(host(out), want[0])
    assert np.array_equal(host(lse), want[1])


def test_a_wide_output(xp):
    call = materialise(Packed(dtype="bfloat16", rows=(70, 3, 130)))
    arrays, _ = call.on(xp)
    wide = xp.full((1, 203, 64), np.nan, np.float32)
    assert cuflash.attention_varlen(*arrays, out=wide) is wide
    narrow = host(cuflash.attention_varlen(*arrays)).astype(np.float32)
    assert np.allclose(host(wide), narrow, atol=2.0**-7, rtol=2.0**-7)


def test_a_variant_counts_within_its_sequence(xp):
    problem = Packed(rows=(33, 140, 2), keys=(60, 141, 5), kv_heads=2, group=2)
    call = materialise(problem)
    arrays, _ = call.on(xp)
    bias = np.random.default_rng(1).standard_normal((3, 141, 150)).astype(np.float32)
    variant = cuflash.Variant(
        score="score + bias[b, row, j] * (len_k - len_q)", mask="(i - j + h) % 3 != 1 or j == 0"
    )(bias=xp.asarray(bias))
    out, lse = cuflash.attention_varlen(*arrays, variant=variant, return_lse=True)

    for n, (rows, keys) in enumerate(sequences(call)):

        def score(score, row, j, len_q, len_k, n=n, **at):
            return score + bias[n, row, j] * (len_k - len_q).astype(np.float32)

        def visible(i, j, h, **at):
            return ((i - j + h) % 3 != 1) | (j == 0)

        alone = call.q[:, rows], call.k[:, keys], call.v[:, keys]
        truth = tolerance.reference(*alone, score=score, visible=visible)
        truth.check(host(out)[:, rows], host(lse)[:, rows])


@pytest.mark.parametrize("options", [{}, {"dropout": 0.3, "seed": 5}], ids=["plain", "dropout"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_equal_lengths_are_a_batch(xp, dtype, options):
    """The law: sequences of one length give what a batch gives, and drop what it drops."""
    random = np.random.default_rng(0)
    q, k, v = (random.standard_normal((4, 3, 130, 64)).astype(DTYPES[dtype]) for _ in range(3))
    offsets = xp.asarray(np.arange(0, 5 * 130, 130, dtype=np.int32))
    on = [xp.asarray(x) for x in (q, k, v)]
    packs = [xp.ascontiguousarray(x.swapaxes(0, 1)).reshape(3, -1, 64) for x in on]
    out = cuflash.attention_varlen(*packs, offsets, causal=True, **options)
    want = cuflash.attention(*on, causal=True, **options)
    got = host(out).reshape(3, 4, 130, 64).swapaxes(0, 1)
    assert np.array_equal(got, host(want))


def test_every_run_is_the_same(cp):
    call = materialise(Packed(dtype="bfloat16", rows=(300, 5, 0, 129, 700), causal=True, group=4))
    first = attend(call, cp)
    for _ in range(20):
        for got, want in zip(attend(call, cp), first):
            assert np.array_equal(got.view(np.uint8), want.view(np.uint8))


@few
@given(data=st.data())
def test_offsets_on_a_gpu_are_never_trusted(cp, data):
    """Whatever they say, nothing is read or written out of bounds, and every row is written."""
    numbers = st.lists(st.integers(-(2**31), 2**31 - 1) | st.integers(-3, 200), min_size=3)
    raw = data.draw(numbers.map(lambda x: x[:7]))
    call = materialise(Packed(dtype=data.draw(st.sampled_from(list(DTYPES))), rows=(150,)))
    tokens = call.q.shape[1]
    given_offsets = np.array(raw, np.int32)
    clean = np.clip(given_offsets, 0, tokens)
    clean[0] = 0
    clean = np.maximum.accumulate(clean)
    q, k, v = (cp.asarray(x) for x in (call.q, call.k, call.v))
    poison(cp)
    got = cuflash.attention_varlen(q, k, v, cp.asarray(given_offsets), return_lse=True)
    want = cuflash.attention_varlen(call.q, call.k, call.v, clean, return_lse=True)
    assert not np.isnan(host(got.out)).any()
    assert not np.isnan(host(got.lse)).any()
    assert np.allclose(host(got.lse), want.lse, atol=1e-3)


def test_new_offsets_go_the_short_way(cp):
    """Other lengths in arrays of the same shape need no new plan, and nothing compiled."""
    from cuflash.jit import repeat

    first = materialise(Packed(dtype="float16", rows=(100, 28, 72), causal=True))
    arrays, options = first.on(cp)
    cuflash.attention_varlen(*arrays, **options)
    known = len(repeat._known)
    offsets = np.array([0, 3, 199, 200], np.int32)
    other = dataclasses.replace(first, offsets=(offsets,))
    check(other, *attend(other, cp))
    again = cuflash.attention_varlen(*arrays[:3], cp.asarray(offsets), **options)
    assert np.array_equal(host(again), attend(other, cp)[0])
    assert len(repeat._known) <= known + 2


X = np.zeros((2, 10, 16), np.float32)
OFFSETS = np.array([0, 4, 10])
BLOCKS = cuflash.BlockMask(np.ones((1, 1), bool), 128)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (
            (X[0], X, X, OFFSETS),
            {},
            ValueError,
            "`q` must have shape \\(heads, tokens, head_dim\\)",
        ),
        ((X, X, X[:, :5], OFFSETS), {}, ValueError, "`v` must have k's length"),
        ((X, X, X, None), {}, TypeError, "`q_offsets` must be an array of integers, not None"),
        ((X, X, X, [0, 10]), {}, TypeError, "q_offsets"),
        ((X, X, X, OFFSETS * 1.0), {}, TypeError, "`q_offsets` must be an array of integers"),
        ((X, X, X, OFFSETS[:1]), {}, ValueError, "`q_offsets` must have shape \\(sequences \\+ 1,"),
        ((X, X, X, OFFSETS, OFFSETS[:2]), {}, ValueError, "`k_offsets` must have the shape of"),
        ((X, X, X, OFFSETS + 1), {}, ValueError, "`q_offsets` must begin with 0"),
        ((X, X, X, OFFSETS[::-1]), {}, ValueError, "`q_offsets` must begin with 0"),
        ((X, X, X, np.array([0, 7, 4])), {}, ValueError, "falls in between"),
        ((X, X, X, OFFSETS, np.array([0, 4, 11])), {}, ValueError, "`k_offsets` .* end at 10"),
        ((X, X, X, OFFSETS), {"q_start": X[0, :3, 0] > 0}, TypeError, "`q_start`"),
        ((X, X, X, OFFSETS), {"q_start": np.zeros(3, int)}, ValueError, "`q_start` .* \\(2,\\)"),
        ((X, X, X, OFFSETS), {"alibi": np.zeros((3, 2))}, ValueError, "`alibi` must have a shape"),
        ((X, X, X, OFFSETS), {"bias": X}, TypeError, "bias"),
        ((X, X, X, OFFSETS), {"out": X}, ValueError, "`out` must not overlap"),
        ((X, X, X, OFFSETS), {"variant": BLOCKS}, ValueError, "`variant` must have no BlockMask"),
    ],
)
def test_bad_input(arguments, options, error, message):
    with pytest.raises(error, match=message):
        cuflash.attention_varlen(*arguments, **options)


def test_offsets_on_a_gpu_are_checked_when_asked_for(cp, monkeypatch):
    x = cp.asarray(X)
    cuflash.attention_varlen(x, x, x, cp.asarray(np.array([0, 4, 7])))  # of the same shapes
    monkeypatch.setenv("CUFLASH_CHECK", "1")
    with pytest.raises(ValueError, match="falls in between"):
        cuflash.attention_varlen(x, x, x, cp.asarray(np.array([0, 7, 4])))


def test_the_oracle_sees_other_lengths():
    """The judge is no formality: with an offset moved by one, the answer is refused."""
    call = materialise(Packed(rows=(40, 30)))
    out, lse = attend(call, np)
    moved = dataclasses.replace(call, offsets=(np.array([0, 41, 70], np.int32),))
    with pytest.raises(AssertionError):
        check(moved, out, lse)
