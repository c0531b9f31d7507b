"""Hypothesis draws a Problem: sizes, layouts, options and a seed. `materialise` makes the arrays.

Nothing bulky is drawn, so that a failing example prints as one line and shrinks quickly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import strategies as st

DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}
# Around the tiles' sizes, where a kernel's edges are.
LENGTHS = sorted(
    {tile * n + off for tile in (16, 32, 64, 128) for n in (1, 2) for off in (-1, 0, 1)}
)
DIMS = (
    64,
    128,
    8,
    16,
    32,
    40,
    72,
    96,
    160,
    192,
    224,
    256,
    1,
    2,
    3,
    5,
    7,
    33,
    63,
    65,
    127,
    129,
    255,
    257,
    320,
    384,
    511,
    512,
)
# Scores (len_q x len_k x heads x batch) and multiplications of one problem at most: an example
# takes milliseconds in NumPy.
MOST_SCORES = 1 << 17
MOST_WORK = 1 << 24

# How an array lies in memory. "same_rows" and "same_heads" have strides of 0; in "transposed"
# the last axis is not contiguous.
LAYOUTS = (
    "contiguous",
    "swapped",
    "inside_out",
    "gaps",
    "unaligned",
    "negative",
    "same_rows",
    "same_heads",
    "transposed",
)
# An output has a place for each of its elements.
OUT_LAYOUTS = ("contiguous", "swapped", "inside_out", "gaps", "unaligned", "negative")
# "rising" and "falling" scores move the running maximum at each tile, or never after the first;
# "offset" ones overflow unless the maximum is taken off first.
VALUES = ("normal", "rising", "falling", "offset")

# How the array of a variant lies, which kernels read in place. "expanded": strides of 0 along the
# axes it broadcasts along; "transposed": the last axis is not contiguous, nor are any others;
# "padded": rows of any length begin at multiples of 16 bytes, as Hopper's copy engine wants them.
VARIANT_LAYOUTS = ("contiguous", "transposed", "gaps", "negative", "offset", "expanded", "padded")
# Of one size that kernels are compiled for; the last two mean a copy, for rows begin anywhere.
VARIANT_DIMS = (64, 40, 48, 33, 63)
# "holes" of biases and sinks are -inf. A mask's "rows" and "tiles" are hidden, or seen, as a whole.
SPEC_VALUES = {
    "alibi": ("normal", "powers"),
    "bias": ("normal", "large", "holes"),
    "mask": ("random", "sparse", "rows", "tiles", "all", "nothing"),
    "sinks": ("normal", "large", "holes"),
}
DROPOUTS = (0.5, 0.1, 0.25, 1e-9, 0.9, 0.999999)
DROPOUT_SEEDS = (0, 1, 2**32 - 1, 2**32, 0xA4093822299F31D0, 2**64 - 1)
SOFTCAPS = (0.5, 1.0, 8.0, 50.0)
TILE_OF_KEYS = 64  # that a mask shows or hides as a whole


@dataclass(frozen=True)
class Spec:
    """The array of a variant: what it has of the axes it broadcasts to, and how it lies."""

    dtype: str = "float32"  # of a mask it is bool
    values: str = "normal"
    ones: tuple[bool, ...] = ()  # which axes have length 1, the last one first; no others
    absent: int = 0  # axes that it lacks in front
    layout: str = "contiguous"

    def shape(self, target: tuple[int, ...]) -> tuple[int, ...]:
        """A shape that broadcasts to `target`."""
        ones = (*self.ones, *[False] * len(target))[: len(target)][::-1]
        shape = tuple(1 if one else size for one, size in zip(ones, target, strict=True))
        return shape[min(self.absent, len(shape)) :]


@dataclass(frozen=True)
class Problem:
    """One call of attention, small enough to print."""

    seed: int = 0
    dtype: str = "float32"
    batch: tuple[int, ...] = ()
    # The axes of `batch` along which q, k and v have size 1 or, in front, no axis at all.
    shared: tuple[tuple[bool, ...], ...] = ((), (), ())
    kv_heads: int = 1
    group: int = 1
    len_q: int = 1
    len_k: int = 1
    head_dim: int = 64
    head_dim_v: int = 64
    two_axes: bool = False  # q, k and v are 2-D: one head, no batch
    layouts: tuple[str, str, str] = ("contiguous", "contiguous", "contiguous")
    values: str = "normal"
    scale: float | None = None
    causal: bool = False
    window: int | tuple[int | None, int | None] | None = None
    q_start: int | str | None = None  # "int32", say: an array of that dtype, one for each batch
    kv_lengths: int | str | None = None  # likewise
    precision: str | None = None
    softcap: float | None = None
    alibi: Spec | None = None
    bias: Spec | None = None
    mask: Spec | None = None
    sinks: Spec | None = None
    dropout: float | None = None
    dropout_seed: int = 0

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group


@dataclass(frozen=True)
class Call:
    """The arguments of a Problem as NumPy arrays, and its layouts for any library."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    options: dict[str, Any] = field(default_factory=dict)
    layouts: tuple[str, str, str] = ("contiguous", "contiguous", "contiguous")
    lie: dict[str, str] = field(default_factory=dict)  # the layouts of variants' arrays, by name

    def on(self, xp: ModuleType) -> tuple[list[Any], dict[str, Any]]:
        """The arrays placed as their layouts say, and the options, for NumPy or CuPy."""
        arrays = [
            place(array, layout, xp)
            for array, layout in zip((self.q, self.k, self.v), self.layouts, strict=True)
        ]
        options = {
            name: lay_out(option, self.lie.get(name, "contiguous"), xp)
            if isinstance(option, np.ndarray)
            else option
            for name, option in self.options.items()
        }
        return arrays, options


def materialise(problem: Problem) -> Call:
    """Make a Problem's arrays from its seed."""
    p = problem
    random = np.random.default_rng(p.seed)
    sizes = (
        (p.heads, p.len_q, p.head_dim),
        (p.kv_heads, p.len_k, p.head_dim),
        (p.kv_heads, p.len_k, p.head_dim_v),
    )
    arrays = []
    for size, shared, layout in zip(sizes, p.shared, p.layouts, strict=True):
        shape = (*shared_batch(p.batch, shared), *size)
        shape = shape[-2:] if p.two_axes else shape
        arrays.append(draw_array(random, shape, layout))
    add_trend(p, *arrays[:2])
    q, k, v = (array.astype(DTYPES[p.dtype]) for array in arrays)
    options: dict[str, Any] = {}
    for name in ("scale", "causal", "window", "precision"):
        if getattr(p, name) is not None:
            options[name] = getattr(p, name)
    batch = np.broadcast_shapes(*(x.shape[:-3] for x in (q, k, v)))
    bounds = {"kv_lengths": (0, p.len_k), "q_start": (-2, p.len_k + 2)}
    for name, (low, high) in bounds.items():
        option = getattr(p, name)
        if isinstance(option, str):
            option = integers(random, low, high, batch, np.dtype(option))
        if option is not None:
            options[name] = option
    if p.softcap is not None:
        options["softcap"] = p.softcap
    if p.dropout is not None:
        options["dropout"], options["seed"] = p.dropout, p.dropout_seed
    heads = q.shape[-3] if q.ndim > 2 else 1
    lie = {}
    for name, axes in (("alibi", 1), ("bias", 3), ("mask", 3), ("sinks", 1)):
        spec = getattr(p, name)
        if spec is not None:
            target = (*batch, *(heads, p.len_q, p.len_k)[:axes])
            options[name], lie[name] = draw_variant(random, name, spec, target), spec.layout
    return Call(q, k, v, options, p.layouts, lie)


def draw_variant(random, name: str, spec: Spec, target: tuple[int, ...]) -> np.ndarray:
    """The array of alibi, bias, mask or sinks that broadcasts to `target`."""
    shape = spec.shape(target)
    if name == "mask":
        return draw_mask(random, spec.values, shape)
    drawn = np.asarray(random.standard_normal(shape))
    if spec.values == "large":
        drawn = 30 * drawn
    elif spec.values == "powers":
        drawn = np.exp2(-np.ceil(4 * np.abs(drawn)))
    elif spec.values == "holes":
        drawn = np.where(random.random(shape) < 0.3, -np.inf, drawn)
    elif name == "alibi":
        drawn = drawn / 16
    return np.asarray(drawn, DTYPES[spec.dtype])


def draw_mask(random, values: str, shape: tuple[int, ...]) -> np.ndarray:
    if values in ("all", "nothing"):
        return np.full(shape, values == "all")
    if values == "rows" and len(shape) > 1:
        seen = random.random((*shape[:-1], 1)) < 0.5
        return seen & (random.random(shape) < 0.9)
    if values == "tiles" and shape:
        tiles = random.random((*shape[:-1], -(-shape[-1] // TILE_OF_KEYS))) < 0.5
        return np.repeat(tiles, TILE_OF_KEYS, axis=-1)[..., : shape[-1]]
    return np.asarray(random.random(shape) < (0.02 if values == "sparse" else 0.6))


def shared_batch(batch: tuple[int, ...], shared: tuple[bool, ...]) -> tuple[int, ...]:
    """Broadcastable to `batch`: 1 along shared axes, those in front left out."""
    shape = [1 if one else size for size, one in zip(batch, shared, strict=True)]
    while shape and shared[len(shared) - len(shape)]:
        del shape[0]
    return tuple(shape)


def draw_array(random: np.random.Generator, shape: tuple[int, ...], layout: str) -> np.ndarray:
    """Normal float64 numbers, equal along the axis in which the layout has a stride of 0."""
    axis = {"same_rows": 2, "same_heads": 3}.get(layout, 0)
    drawn = list(shape)
    if 0 < axis <= len(shape):
        drawn[-axis] = min(1, drawn[-axis])
    return np.broadcast_to(random.standard_normal(drawn), shape).copy()


def add_trend(p: Problem, q: np.ndarray, k: np.ndarray) -> None:
    """Let scores rise or fall with j, or lie far from 0, in place; rows stay equal if they were."""
    if p.values == "normal":
        return
    size = 4 * math.sqrt(math.sqrt(p.head_dim))
    ramp = {"rising": np.linspace(-1, 1, p.len_k), "falling": np.linspace(1, -1, p.len_k)}
    q[..., 0] = size
    k[..., 0] = size * (1.0 if p.layouts[1] == "same_rows" else ramp.get(p.values, 2.0))


def integers(random, low: int, high: int, batch: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Integers from low to high within the dtype's range, of a shape that broadcasts to batch."""
    shape = tuple(1 if random.random() < 0.2 else size for size in batch)
    shape = shape[1:] if shape and random.random() < 0.2 else shape
    low, high = max(low, np.iinfo(dtype).min), min(high, np.iinfo(dtype).max)
    return random.integers(low, high, shape, endpoint=True).astype(dtype)


def place(array: np.ndarray, layout: str, xp: ModuleType) -> Any:
    """`array` in memory of `xp` (NumPy or CuPy) as `layout` says, NaN in all gaps."""
    if layout == "same_rows" and array.shape[-2] > 0:
        return xp.broadcast_to(xp.asarray(array[..., :1, :]), array.shape)
    if layout == "same_heads" and array.ndim > 2:
        return xp.broadcast_to(xp.asarray(array[..., :1, :, :]), array.shape)
    if layout == "transposed":
        return xp.asarray(np.ascontiguousarray(array.swapaxes(-1, -2))).swapaxes(-1, -2)
    buffer, view = frame(array.shape, layout)
    host = nan_filled(buffer, array.dtype)
    view(host)[...] = array
    return view(xp.asarray(host))


def lay_out(array: np.ndarray, layout: str, xp: ModuleType) -> Any:
    """An array of any axes in memory of `xp` as one of VARIANT_LAYOUTS says, NaN in all gaps."""
    if layout == "transposed":
        return xp.asarray(np.ascontiguousarray(array.T)).T
    if layout == "gaps" and array.ndim:
        host = nan_filled(tuple(2 * size + 1 for size in array.shape), array.dtype)
        cut = (slice(1, None, 2),) * array.ndim
    elif layout == "negative" and array.ndim:
        host = np.empty(array.shape, array.dtype)
        cut = (slice(None, None, -1),) * array.ndim
    elif layout == "padded" and array.ndim:
        unit = -(-16 // array.itemsize)
        columns = (array.shape[-1] // unit + 1) * unit
        host = nan_filled((*array.shape[:-1], columns), array.dtype)
        cut = (..., slice(0, array.shape[-1]))
    elif layout == "offset":
        host = nan_filled((array.size + 3,), array.dtype)
        host[3:] = array.ravel()
        return xp.asarray(host)[3:].reshape(array.shape)
    elif layout == "expanded" and array.ndim:
        shape = tuple(3 if size == 1 else size for size in array.shape)
        cut = tuple(slice(0, 1) if size == 1 else slice(None) for size in array.shape)
        return xp.broadcast_to(xp.asarray(array), shape)[cut]
    else:
        return xp.asarray(np.ascontiguousarray(array)).reshape(array.shape)
    host[cut] = array
    return xp.asarray(host)[cut]


def frame(shape: tuple[int, ...], layout: str):
    """The shape of a buffer with margins, and a function that cuts `shape` out of it.

    The function works on NumPy and CuPy arrays; the view's last axis is contiguous.
    """
    if layout in ("contiguous", "unaligned"):
        size = math.prod(shape)
        skipped = 1 if layout == "unaligned" else 0
        return (size + skipped + 64,), lambda x: x[skipped : skipped + size].reshape(shape)
    *front, length, dim = shape
    if layout == "gaps":  # every second row; 8 columns or more between rows
        buffer = (*front, 2 * length + 3, (dim + 15) // 8 * 8)
        return buffer, lambda x: x[..., 2 : 2 + 2 * length : 2, :dim]
    if layout == "swapped" and front:  # (batch, length, heads, dim)
        return (*front[:-1], length, front[-1], dim), lambda x: x.swapaxes(-2, -3)
    if layout == "inside_out" and front:  # (length, heads, batch, dim), batch axes reversed too
        order = (*reversed(range(len(shape) - 1)), len(shape) - 1)
        return (length, *reversed(front), dim), lambda x: x.transpose(order)
    if layout == "negative":  # everything but the last axis backwards
        return shape, lambda x: x[(slice(None, None, -1),) * (len(shape) - 1)]
    return shape, lambda x: x


def nan_filled(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """All bits set: a NaN in every float dtype, and one that nobody computes."""
    return np.full(math.prod(shape) * dtype.itemsize, 0xFF, np.uint8).view(dtype).reshape(shape)


@st.composite
def problems(draw: st.DrawFn, variants: bool = False, drops: bool = False, **fixed: Any) -> Problem:
    """Problems of every kind; `fixed` fields are taken as given.

    With `variants` there are soft caps, biases and the like too, and few head dims: each choice of
    variants has kernels of its own. With `drops` there is dropout.
    """

    def pick(name: str, strategy: st.SearchStrategy) -> Any:
        return fixed[name] if name in fixed else draw(strategy)

    lengths = st.integers(0, 20) | st.sampled_from(LENGTHS) | st.integers(0, 160)
    len_q, len_k = pick("len_q", lengths), pick("len_k", lengths)
    dims = st.sampled_from(VARIANT_DIMS if variants else DIMS)
    dims = dims if variants else dims | st.integers(1, 512)
    head_dim, head_dim_v = pick("head_dim", dims), pick("head_dim_v", dims)
    room = most_heads(len_q * len_k, head_dim + head_dim_v)
    two_axes = pick("two_axes", st.integers(0, 9).map(lambda n: n == 9))
    batch = () if two_axes else pick("batch", st.sampled_from(batches(room)))
    room //= max(1, math.prod(batch))
    heads = [(1, 1), (2, 1), (1, 2), (1, 3), (2, 2), (1, 4), (3, 1), (2, 3), (1, 8)]
    heads = [(kv, group) for kv, group in heads if kv * group <= max(room, 1)]
    kv_heads, group = (1, 1) if two_axes else draw(st.sampled_from(heads))
    dtype = pick("dtype", st.sampled_from(list(DTYPES)))
    layout = st.just("contiguous") | st.sampled_from(LAYOUTS)
    sides = st.none() | st.integers(0, 3) | st.integers(0, 160)
    integer_arrays = st.sampled_from(["int64", "int32", "int16", "uint8"])
    precisions = [None, None, None, "tf32"] if dtype == "float32" else [None]
    return Problem(
        seed=pick("seed", st.integers(0, 2**32 - 1)),
        dtype=dtype,
        batch=batch,
        shared=tuple(tuple(draw(st.booleans()) for _ in batch) for _ in range(3)),
        kv_heads=pick("kv_heads", st.just(kv_heads)),
        group=pick("group", st.just(group)),
        len_q=len_q,
        len_k=len_k,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        two_axes=two_axes,
        layouts=pick("layouts", st.tuples(layout, layout, layout)),
        values=pick("values", st.sampled_from(VALUES)),
        scale=pick("scale", st.none() | st.sampled_from([1.0, 0.0, -0.3, 0.05, 4.0])),
        causal=pick("causal", st.booleans()),
        window=pick("window", st.none() | st.integers(0, 160) | st.tuples(sides, sides)),
        q_start=pick("q_start", st.none() | st.integers(-20, 180) | integer_arrays),
        kv_lengths=pick("kv_lengths", st.none() | st.integers(0, len_k) | integer_arrays),
        precision=pick("precision", st.sampled_from(precisions)),
        **{
            name: pick(name, st.none() | strategy) if variants or name in fixed else None
            for name, strategy in variations(dtype).items()
        },
        dropout=pick("dropout", st.sampled_from(DROPOUTS)) if drops else None,
        dropout_seed=draw(st.sampled_from(DROPOUT_SEEDS)) if drops else 0,
    )


def variations(dtype: str) -> dict[str, st.SearchStrategy]:
    """Of each keyword of attention that is a variant, for inputs of this dtype."""
    specs = {
        name: st.builds(
            Spec,
            dtype=st.just("bool") if name == "mask" else st.sampled_from([dtype, "float32"]),
            values=st.sampled_from(values),
            ones=st.tuples(*[st.integers(0, 3).map(lambda n: n == 3)] * 5),
            absent=st.sampled_from([0, 0, 1, 2]),
            layout=st.sampled_from(VARIANT_LAYOUTS) | st.just("padded"),
        )
        for name, values in SPEC_VALUES.items()
    }
    return {"softcap": st.sampled_from(SOFTCAPS), **specs}


def most_heads(scores: int, dims: int) -> int:
    """How many heads, over all batches, a problem of these sizes may have."""
    return max(1, min(MOST_SCORES // max(1, scores), MOST_WORK // max(1, scores * dims), 48))


def batches(room: int) -> list[tuple[int, ...]]:
    """Batch shapes with at most `room` members; two axes need not collapse into one."""
    shapes = [(), (1,), (2,), (3,), (2, 3), (3, 2), (2, 1, 2), (0,)]
    return [shape for shape in shapes if math.prod(shape) <= room]
