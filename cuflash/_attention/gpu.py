"""The host side of the kernels: strides and pointers into a Params struct, and the launch."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import cupy as cp
import numpy as np

from .. import arrays
from ..gpu_arrays import capturing
from ..jit import compile
from ..jit import gpu as gpus
from ..jit.launch import Plan, launch, load, workspace
from ..jit.strides import address, fold
from . import plan, plan_around, tensor_maps
from .plan_around import PARTS
from .problem import PLAIN, BlockProblem, Operands, Problem, sum_dtype
from .variants.program import Program

BATCH_AXES = 4  # kBatchAxes
END_ALIGNED = -(1 << 62)  # kEndAligned
UNBOUNDED = 1 << 40

_STRIDED = np.dtype([("data", "u8"), ("batch", "i8", BATCH_AXES), ("head", "i8"), ("row", "i8")])
_DIVISOR = np.dtype([("length", "u4"), ("magic", "u4"), ("shift", "u4")])
_TILE_BITS = np.dtype(
    [
        *[("data", "u8"), ("counter", "u8"), ("order", "u8")],
        *[("batch", "i8", BATCH_AXES), ("head", "i8")],
        *[("words", "i4"), ("tasks", "i4")],
    ]
)
_DROPOUT = [("seed", "u8"), ("entries", "i8", BATCH_AXES), ("first", "i8")]
_COUNTER_BYTES = 16  # of a workspace of tile bits, or of sequences, in front
_SEQUENCE_BYTES = 24
_SEQUENCES = np.dtype(
    [
        *[("each", "u8"), ("of_tile", "u8"), ("tiles", "u8")],
        *[("offsets", "u8", 2), ("strides", "i8", 2), ("bytes", "i4", 2), ("count", "i4")],
    ],
    align=True,
)
_PER_BATCH = np.dtype([("data", "u8"), ("batch", "i8", BATCH_AXES), ("bytes", "i8")])


@functools.lru_cache(maxsize=1024)
def params_dtype(accumulator: str, variant: Program = PLAIN) -> np.dtype:
    """The struct Params of tile_loop.cuh."""
    arrays_ = [(name, _STRIDED) for name in ("q", "k", "v", "out", "lse")]
    per_batch = [(name, _PER_BATCH) for name in ("q_starts", "kv_lengths")]
    integers = [(name, "i8") for name in ("q_start", "left", "right")]
    factors = [(name, accumulator) for name in ("scale_log2", "factor", "scale")]
    divisors = [("batch_shape", _DIVISOR, BATCH_AXES)] + [
        (name, _DIVISOR) for name in ("heads", "group", "sweep", "last_sweep", "tiles_of_sweep")
    ]
    sizes = ("sweeps", "len_q", "len_k", "head_dim", "head_dim_v", "pack_shift", "by_head")
    sized = [(name, "i4") for name in sizes]
    fields = [*arrays_, *per_batch, *integers, *factors, *divisors, *sized]
    own = ("variant", variant_dtype(accumulator, variant))
    dropout = np.dtype([*_DROPOUT, ("rescale", accumulator), ("threshold", "u4")], align=True)
    last = [("bits", _TILE_BITS), ("sequences", _SEQUENCES), ("dropout", dropout)]
    return np.dtype([*fields, own, *last], align=True)


def variant_dtype(accumulator: str, variant: Program) -> np.dtype:
    """The struct Variant that variants/cuda.py writes."""
    numbers = {"float": accumulator, "int": "i4", "bool": "?"}
    fields: list[Any] = []
    for number, kind in enumerate(variant.slots):
        along = [("strides", "i8", (kind.axes,)), ("lengths", "i4", (kind.axes + kind.axes % 2,))]
        array = np.dtype([("data", "u8"), ("batch", "i8", BATCH_AXES), *along], align=True)
        fields.append((f"p{number}", array if kind.axes else numbers[kind.type]))
    return np.dtype([*fields, ("entries", "i8", BATCH_AXES), ("first", "i8")], align=True)


def blocks_dtype(accumulator: str, variant: Program) -> np.dtype:
    """The struct Params of blocks.cu."""
    integers = ("heads", "n_q", "n_k", "size_q", "size_k", "len_q", "len_k", "start")
    fields = [("kinds", "u8"), ("blocks", "i8"), *((name, "i4") for name in integers)]
    return np.dtype([*fields, ("variant", variant_dtype(accumulator, variant))], align=True)


_READ_BY_TMA = ("q", "k", "v")
_MAPPED = (*_READ_BY_TMA, "out")
_ROWS_OF_A_WARP = 16
_UNUSED_STRIDE = 16  # of an axis that is not walked along


@functools.lru_cache(maxsize=1024)
def hopper_dtype(variant: Program = PLAIN) -> np.dtype:
    """The struct HopperParams of forward_sm90.cu, whose size is a multiple of its alignment."""
    params, size = params_dtype("float32", variant), tensor_maps.MAP.itemsize
    begin = len(_MAPPED) * size
    end = begin + -(-params.itemsize // 64) * 64
    return np.dtype(
        {
            "names": [*_MAPPED, "params", "streamed"],
            "formats": [*[tensor_maps.MAP] * len(_MAPPED), params, tensor_maps.MAP],
            "offsets": [*range(0, begin, size), begin, end],
            "itemsize": end + size,
        }
    )


def divisor(length: int) -> tuple[int, int, int]:
    """What Divisor needs: n // length == n * magic >> shift for every n below 2**31."""
    shift = 31 + (length - 1).bit_length()
    return length, -(-(1 << shift) // length), shift


_MERGE = np.dtype(  # the struct Params of combine.cu
    [
        ("outs", "u8", PARTS),
        ("lses", "u8", PARTS),
        ("out", "u8"),
        ("lse", "u8"),
        ("elements", "i8"),
        ("head_dim_v", "i4"),
        ("parts", "i4"),
    ],
    align=True,
)
_OFFSET_NAMES = ("q_offsets", "k_offsets")
_PER_BATCH_NAMES = ("q_start", "kv_lengths", *_OFFSET_NAMES)
_WORDS = (np.int32, np.int64)  # that kernels read


def forward(problem: Problem, operands: Operands) -> None:
    """Fill ``operands.out`` and ``operands.lse``, on CuPy's current device and stream."""
    ready = in_place(with_batch(problem, operands))
    shape, strides = collapse(ready, problem.variant)
    problem, chosen = planned(problem, operands, ready)
    if 0 in chosen.grid:
        return
    load([*ahead(problem, chosen), chosen])
    chosen = chosen.settled()
    for index in np.ndindex(shape[:-BATCH_AXES]):  # more than one only where axes do not collapse
        filled = params(problem, chosen, ready, strides, index)
        if problem.varlen:
            fill_sequences(filled, problem, chosen, ready)
            launch(plan_around.sequences(problem, chosen), filled)
        if problem.variant.has_mask:
            order = plan_around.order(problem, chosen)
            place_tile_bits(filled["bits"], problem, chosen, ready, strides, order is not None)
            launch(plan_around.tiles(problem, chosen), filled)
            if order is not None:
                launch(order, filled)
        if plan.is_hopper(chosen):
            filled = mapped(problem, chosen, ready, strides, filled)
        launch(chosen, filled)


def plans(problem: Problem, operands: Operands) -> list[Plan]:
    """The launches of `forward`, without launching."""
    given = (x[None] if operands.one_head and x is not None else x for x in operands.given)
    operands = with_batch(problem, replace(operands, **dict(zip(("out", "lse"), given))))
    shape, _ = collapse(operands, problem.variant)
    problem, chosen = planned(problem, operands, operands)
    chosen = chosen if 0 in chosen.grid else chosen.settled()
    return [*ahead(problem, chosen), chosen] * math.prod(shape[:-BATCH_AXES])


def ahead(problem: Problem, chosen: plan.AttentionPlan) -> list[Plan]:
    """What is launched before an attention kernel."""
    found: list[Plan | None] = [plan_around.sequences(problem, chosen)] if problem.varlen else []
    if problem.variant.has_mask:
        found += [plan_around.tiles(problem, chosen), plan_around.order(problem, chosen)]
    return [each for each in found if each is not None]


def planned(
    problem: Problem, operands: Operands, ready: Operands
) -> tuple[Problem, plan.AttentionPlan]:
    """The part of a problem that is one launch, and its plan.

    `ready` are the operands as the kernel will see them, or as they are where nobody will launch.
    """
    out = operands.q if operands.given[0] is None else operands.given[0]
    shape, strides = collapse(ready, problem.variant)
    problem = replace(problem, batch=shape[-BATCH_AXES:])
    output, gpu = arrays.dtype_name(out.dtype), gpus.current()
    if not plan.uses_hopper(problem, gpu):
        return problem, plan.choose(problem, gpu, output, copied(operands))
    against = obstacle(problem, ready, strides)
    stored = stored_by_tma(problem, ready, strides)
    # The axis of a map that is the second one of the batch is then the heads of a pack.
    packs = problem.batch[-2] == 1 and ready.q.strides[-3] != 0 and not problem.varlen
    streams = next(
        (slot for slot in problem.variant.streamable if has_tiles(problem, ready, strides, slot)),
        None,
    )
    found = against, stored, packs, streams
    return problem, plan.choose(problem, gpu, output, copied(operands), *found)


def with_batch(problem: Problem, operands: Operands) -> Operands:
    """Packed outputs as all sequences have them, which share memory as the inputs' do."""
    if not problem.varlen:
        return operands
    found = {"out": operands.out, "lse": operands.lse}
    shared = {
        name: cp.broadcast_to(array, (*problem.batch, *array.shape))
        for name, array in found.items()
        if array is not None
    }
    return replace(operands, **shared)


def obstacle(
    problem: Problem, operands: Operands, strides: dict[str, tuple[int, ...]]
) -> str | None:
    """What keeps Hopper's copy engine from reading the operands, if anything does."""
    if not compile.takes_exact():
        return "NVRTC is older than 12.9"
    if any(length > 1 for length in problem.batch[:-2]):
        return "the batch takes more than two strides"
    copies = copied(operands)
    for name in _READ_BY_TMA:
        array = getattr(operands, name)
        one_row = array.shape[-2] > 1 and array.strides[-2] == 0  # and in a copy as well
        fits = tensor_maps.fits(*axes(problem, array, strides[name]))
        if one_row or not (fits or name in copies):
            return f"`{name}` is broadcast along its rows, or has negative or very long strides"
    return None


def stored_by_tma(
    problem: Problem, operands: Operands, strides: dict[str, tuple[int, ...]]
) -> bool:
    """Whether Hopper's copy engine can write the output: it writes words of 16 bytes."""
    if problem.head_dim_v % 8:
        return False
    if operands.out is None:  # nobody launches, and what would be allocated is contiguous
        return True
    return readable(operands.out) and tensor_maps.fits(*axes(problem, operands.out, strides["out"]))


def has_tiles(
    problem: Problem, operands: Operands, strides: dict[str, tuple[int, ...]], slot: int
) -> bool:
    """Whether Hopper's copy engine can bring a variant's array by tiles of queries and keys.

    Not where an index would be outside of the array: kernels move that to the nearest end.
    """
    if problem.varlen:
        return False
    array, axes_ = operands.values[slot], problem.variant.slots[slot].axes
    least = (problem.heads, problem.len_q, problem.len_k)[-axes_:]
    if any(length < needed for length, needed in zip(array.shape[-axes_:], least)):
        return False
    contiguous = array.shape[-1] == 1 or array.strides[-1] == array.itemsize
    fits = tensor_maps.fits(*streamed_axes(problem, operands, strides, slot))
    return contiguous and fits and address(array) % 16 == 0


def streamed_axes(
    problem: Problem, operands: Operands, strides: dict[str, tuple[int, ...]], slot: int
) -> tuple[list[int], list[int]]:
    """As `axes`, of a variant's array."""
    array = operands.values[slot]
    of_heads = array[None] if problem.variant.slots[slot].axes == 2 else array
    return axes(problem, of_heads, strides.get(f"p{slot}", (0,) * BATCH_AXES))


def axes(
    problem: Problem, array: cp.ndarray, batch: tuple[int, ...]
) -> tuple[list[int], list[int]]:
    """Sizes and strides in bytes of columns, rows, heads and two batch axes, the last one first.

    Columns have no stride. Along an axis with a stride of 0 there is one place, where the kernel
    stays; that of the rows is left as it is, for TMA has no such tiles.
    """
    lengths = *array.shape[-2:-4:-1], *problem.batch[:-3:-1]
    steps = *array.strides[-2:-4:-1], *(array.itemsize * stride for stride in batch[:-3:-1])
    rows, *others = lengths
    sizes = [rows, *(length if step else 1 for length, step in zip(others, steps[1:]))]
    strides = [step if size > 1 else _UNUSED_STRIDE for size, step in zip(sizes, steps)]
    return [max(1, size) for size in (array.shape[-1], *sizes)], strides


def packed(sizes: list[int], strides: list[int], pack: int) -> tuple[list[int], list[int]]:
    """The axes of an array whose heads, `pack` at a time, are one: (heads, rows, packs, batch)."""
    columns, rows, heads, batch, _ = sizes
    of_row, of_head, of_batch, _ = strides
    return (
        [columns, pack, rows, heads // pack, batch],
        [of_head, of_row, of_head * pack, of_batch],
    )


def merge(outs: list[Any], lses: list[Any], out: cp.ndarray, lse: cp.ndarray) -> None:
    """Fill `out` and `lse` with attention over the keys of all parts."""
    contiguous = all(each.flags.c_contiguous for each in (*outs, *lses, out, lse))
    refuse_in_capture("outs, lses and out", "pass contiguous ones", not contiguous)
    refuse_in_capture("intermediate results", f"merge {PARTS} parts at most", len(outs) > PARTS)
    while len(outs) > PARTS:  # the first ones, merged in full precision, become one part
        wide = cp.empty(out.shape, lse.dtype), cp.empty(lse.shape, lse.dtype)
        merge(outs[:PARTS], lses[:PARTS], *wide)
        rest = [each.astype(lse.dtype, copy=False) for each in outs[PARTS:]]
        outs, lses = [wide[0], *rest], [wide[1], *lses[PARTS:]]
    outs, lses = ([cp.ascontiguousarray(each) for each in parts] for parts in (outs, lses))
    results = [
        each if each.flags.c_contiguous else cp.empty(each.shape, each.dtype) for each in (out, lse)
    ]
    launch(merge_plans(outs, out)[-1], merge_params(outs, lses, *results))
    for given, result in zip((out, lse), results):
        if result is not given:
            given[...] = result


def merge_params(
    outs: list[Any], lses: list[Any], out: cp.ndarray, lse: cp.ndarray
) -> np.ndarray[Any, Any]:
    """The argument of combine.cu."""
    filled = np.zeros((), _MERGE)
    filled["outs"][: len(outs)] = [part.data.ptr for part in outs]
    filled["lses"][: len(lses)] = [part.data.ptr for part in lses]
    filled["out"], filled["lse"] = out.data.ptr, lse.data.ptr
    filled["elements"], filled["head_dim_v"] = out.size, out.shape[-1]
    filled["parts"] = len(outs)
    return filled


def merge_plans(outs: list[Any], out: cp.ndarray) -> list[Plan]:
    """The launches of `merge`, without launching."""
    dtype, output = arrays.dtype_name(outs[0].dtype), arrays.dtype_name(out.dtype)
    steps = [(dtype, output)]
    rounds = max(0, -(-(len(outs) - PARTS) // (PARTS - 1)))
    if rounds:
        wide = sum_dtype(dtype)
        steps = [(dtype, wide), *[(wide, wide)] * (rounds - 1), (wide, output)]
    copies = () if all(each.flags.c_contiguous for each in (*outs, out)) else ("outs, lses or out",)
    return [plan_around.merge(*step, out.shape, copies) for step in steps]


def block_kinds(problem: BlockProblem, values: tuple[Any, ...], kinds: cp.ndarray) -> None:
    """Fill `kinds`, contiguous and of the problem's shape, on CuPy's current device and stream."""
    filled = np.zeros((), blocks_dtype(sum_dtype(problem.dtype), problem.variant))
    filled["kinds"], filled["blocks"] = kinds.data.ptr, kinds.size
    _, filled["heads"], filled["n_q"], filled["n_k"] = problem.shape
    filled["size_q"], filled["size_k"] = problem.size
    filled["len_q"], filled["len_k"] = problem.len_q, problem.len_k
    filled["start"] = problem.q_start
    fill_variant(filled["variant"], problem.variant, values, {"b": (0,) * BATCH_AXES}, ())
    launch(plan_around.block_kinds(problem), filled)


def in_place(operands: Operands) -> Operands:
    """Operands that kernels can read; what they cannot read where it lies is copied once."""
    names = copied(operands)
    if not names:
        return operands
    remedy = "pass contiguous rows that start on multiples of 16 bytes, and int32 or int64 lengths"
    refuse_in_capture(" and ".join(names), remedy, True)
    copy = dict.fromkeys(("q", "k", "v"), padded) | dict.fromkeys(_PER_BATCH_NAMES, words)
    return replace(operands, **{name: copy[name](getattr(operands, name)) for name in names})


def copied(operands: Operands) -> tuple[str, ...]:
    """Names of the operands that kernels cannot read where they lie."""
    names = [name for name in ("q", "k", "v") if not readable(getattr(operands, name))]
    lengths = ((name, getattr(operands, name)) for name in _PER_BATCH_NAMES)
    narrow = [name for name, array in lengths if array is not None and array.dtype not in _WORDS]
    return (*names, *narrow)


def refuse_in_capture(what: str, remedy: str, copies: bool) -> None:
    """A copy's memory goes back to the pool with the call, but a graph would write to it again."""
    if copies and capturing():
        raise RuntimeError(
            f"{what} must be copied first, which a captured CUDA graph cannot do: {remedy}"
        )


def readable(array: cp.ndarray) -> bool:
    """Whether every row is contiguous and starts on a multiple of 16 bytes."""
    if array.shape[-1] > 1 and array.strides[-1] != array.itemsize:
        return False
    starts = (stride for stride, length in zip(array.strides[:-1], array.shape) if length > 1)
    return array.data.ptr % 16 == 0 and all(stride % 16 == 0 for stride in starts)


def padded(array: cp.ndarray) -> cp.ndarray:
    """A copy whose rows start on multiples of 16 bytes. Broadcast axes are copied once."""
    once = array[tuple(slice(0, 1) if s == 0 else slice(None) for s in array.strides[:-1])]
    unit = 16 // array.itemsize
    room = cp.empty((*once.shape[:-1], -(-once.shape[-1] // unit) * unit), array.dtype)
    copy = room[..., : once.shape[-1]]
    copy[...] = once
    return cp.broadcast_to(copy, array.shape)


def words(lengths: cp.ndarray) -> cp.ndarray:
    """Lengths as int64; what is beyond it is beyond any length, too."""
    if lengths.dtype == np.uint64:
        lengths = cp.minimum(lengths, np.uint64(2**62))
    return lengths.astype(np.int64)


def collapse(
    operands: Operands, variant: Program = PLAIN
) -> tuple[tuple[int, ...], dict[str, tuple[int, ...]]]:
    """Join the batch axes that every operand walks over in one stride.

    Returns the batch shape, at least BATCH_AXES axes long, and each operand's strides in elements.
    """
    batch = operands.q.shape[:-3]
    present = {name: array for name, array in vars(operands).items() if hasattr(array, "strides")}
    present |= walked(variant, operands)
    walks = {
        name: [stride // array.itemsize for stride in array.strides[: len(batch)]]
        for name, array in present.items()
    }
    if variant.names_entries or operands.dropout:
        walks["b"] = [math.prod(batch[axis + 1 :]) for axis in range(len(batch))]
    sizes, folded = fold(batch, list(walks.values()), range(len(batch)))
    missing = BATCH_AXES - len(sizes)
    strides = {name: (*[0] * missing, *walk) for name, walk in zip(walks, folded)}
    return (*[1] * missing, *sizes), strides


def walked(variant: Program, operands: Operands) -> dict[str, Any]:
    """The variant's arrays that have the batch axes, by the names of their slots."""
    return {
        f"p{number}": value
        for number, (kind, value) in enumerate(zip(variant.slots, operands.values))
        if kind.axes and value.ndim > kind.axes
    }


def params(
    problem: Problem,
    chosen: plan.AttentionPlan,
    operands: Operands,
    strides: dict[str, tuple[int, ...]],
    index: tuple[int, ...],
) -> np.ndarray:
    """The kernel's argument for the batch entries at `index` of the leading axes."""
    filled = np.zeros((), params_dtype(sum_dtype(problem.dtype), problem.variant))
    for name in ("q", "k", "v", "out", "lse", "q_start", "kv_lengths"):
        array = getattr(operands, name)
        if array is None:
            continue
        offset = sum(i * stride for i, stride in zip(index, strides[name]))
        field = filled["q_starts" if name == "q_start" else name]
        field["data"] = array.data.ptr + offset * array.itemsize
        field["batch"] = strides[name][-BATCH_AXES:]
        if name in ("q_start", "kv_lengths"):
            field["bytes"] = array.itemsize
        else:
            heads = -2 if name == "lse" else -3
            field["head"] = array.strides[heads] // array.itemsize
            field["row"] = array.strides[heads + 1] // array.itemsize
    filled["q_start"] = END_ALIGNED if problem.q_start is None else problem.q_start
    filled["left"] = UNBOUNDED if problem.left is None else problem.left
    filled["right"] = UNBOUNDED if problem.right is None else problem.right
    filled["scale_log2"], filled["factor"] = folded(problem.scale, filled["factor"].dtype)
    most = float(np.finfo(filled["scale"].dtype).max)
    filled["scale"] = min(max(problem.scale, -most), most)
    fill_variant(filled["variant"], problem.variant, operands.values, strides, index)
    if operands.dropout is not None:
        field = filled["dropout"]
        field["seed"], field["threshold"] = operands.dropout.seed, operands.dropout.threshold
        field["rescale"] = operands.dropout.rescale
        field["entries"], field["first"] = entries(strides, index)
    by_head = shared_by_entries(problem.variant, operands, strides)
    pack, sweep = chosen.pack, plan.sweep(problem, gpus.current(), chosen, by_head)
    pairs, tiles = plan.pairs_of_heads(problem) // pack, plan.query_tiles(problem, chosen)
    filled["batch_shape"] = [divisor(length) for length in problem.batch]
    filled["heads"], filled["group"] = (
        divisor(heads // pack) for heads in (problem.heads, problem.group)
    )
    filled["sweep"], filled["tiles_of_sweep"] = divisor(sweep), divisor(sweep * tiles)
    filled["sweeps"] = sweeps = -(-pairs // sweep)
    filled["last_sweep"] = divisor(pairs - (sweeps - 1) * sweep)
    filled["len_q"], filled["len_k"] = problem.len_q * pack, problem.len_k
    filled["head_dim"], filled["head_dim_v"] = problem.head_dim, problem.head_dim_v
    filled["pack_shift"] = pack.bit_length() - 1
    filled["by_head"] = by_head
    return filled


def shared_by_entries(
    variant: Program, operands: Operands, strides: dict[str, tuple[int, ...]]
) -> bool:
    """Whether several batch entries have one and the same array of queries and keys."""
    if math.prod(operands.q.shape[:-3]) == 1:
        return False
    scores = operands.q.shape[-2] * operands.k.shape[-2]
    large = (
        (f"p{number}", value)
        for number, (kind, value) in enumerate(zip(variant.slots, operands.values))
        if kind.axes and math.prod(value.shape[-kind.axes :]) >= scores
    )
    return any(not any(strides.get(name, ())) for name, _ in large)


def fill_variant(
    filled: np.ndarray,
    variant: Program,
    values: tuple[Any, ...],
    strides: dict[str, tuple[int, ...]],
    index: tuple[int, ...],
) -> None:
    """Fill in the struct Variant."""
    for number, (kind, value) in enumerate(zip(variant.slots, values)):
        name = f"p{number}"
        if not kind.axes:
            filled[name] = value
            continue
        walk = strides.get(name, (0,) * (len(index) + BATCH_AXES))
        offset = sum(i * stride for i, stride in zip(index, walk))
        field = filled[name]
        field["data"] = value.data.ptr + offset * value.itemsize
        field["batch"] = walk[-BATCH_AXES:]
        field["strides"] = [stride // value.itemsize for stride in value.strides[-kind.axes :]]
        field["lengths"][: kind.axes] = value.shape[-kind.axes :]
    if variant.names_entries:
        filled["entries"], filled["first"] = entries(strides, index)


def entries(
    strides: dict[str, tuple[int, ...]], index: tuple[int, ...]
) -> tuple[tuple[int, ...], int]:
    """By what the number of a batch entry grows along each axis, and the number of the first."""
    walk = strides["b"]
    return walk[-BATCH_AXES:], sum(i * stride for i, stride in zip(index, walk))


def fill_sequences(
    filled: np.ndarray, problem: Problem, chosen: plan.AttentionPlan, operands: Operands
) -> None:
    """Fill in the struct Sequences, and where the counter of query tiles is.

    Their memory is a workspace of the call, whose recording keeps it.
    """
    field, count = filled["sequences"], problem.batch[-1]
    of_each = _SEQUENCE_BYTES * (count + 2)
    tiles = plan.query_tiles(problem, chosen)
    memory = workspace(_COUNTER_BYTES + of_each + 4 * tiles)
    assert memory is not None
    first = memory.data.ptr
    filled["bits"]["counter"], field["tiles"] = first, first + 4
    field["each"] = first + _COUNTER_BYTES
    field["of_tile"] = first + _COUNTER_BYTES + of_each
    field["count"] = count
    for number, name in enumerate(_OFFSET_NAMES):
        array = getattr(operands, name)
        field["offsets"][number] = array.data.ptr
        field["strides"][number] = array.strides[0] // array.itemsize
        field["bytes"][number] = array.itemsize


def fill_tile_bits(
    filled: np.ndarray,
    problem: Problem,
    chosen: plan.AttentionPlan,
    operands: Operands,
    strides: dict[str, tuple[int, ...]],
) -> int:
    """Fill in the struct TileBits but for its memory; return how many bytes that needs.

    Heads and batch axes whose masks are one, as where an array broadcasts, have their bits once.
    """
    variant = problem.variant
    tiles, words = plan.query_tiles(problem, chosen), plan.tile_words(problem, chosen)
    step = tiles * 2 * words
    filled["words"] = words
    filled["tasks"] = plan.tasks(problem, chosen)
    if variant.mask_depends("h", operands.values):
        filled["head"] = step
        step *= problem.heads // chosen.pack
    lengths = problem.q_start_array or problem.kv_lengths_array
    if problem.varlen:
        return _COUNTER_BYTES + 4 * step  # sequences have query tiles of their own
    differ = lengths or variant.mask_depends("b", operands.values)
    walks = [strides[name][-BATCH_AXES:] for name in walked(variant, operands)]
    for axis in reversed(range(BATCH_AXES)):
        if differ or any(walk[axis] for walk in walks):
            filled["batch"][axis] = step
            step *= problem.batch[axis]
    return _COUNTER_BYTES + 4 * step


def place_tile_bits(
    filled: np.ndarray,
    problem: Problem,
    chosen: plan.AttentionPlan,
    operands: Operands,
    strides: dict[str, tuple[int, ...]],
    ordered: bool,
) -> None:
    """Fill in the struct TileBits: a counter, the bits and, where wanted, an order of tasks.

    Their memory is a workspace of the call, whose recording keeps it.
    """
    size = fill_tile_bits(filled, problem, chosen, operands, strides)
    memory = workspace(size + 4 * int(filled["tasks"]) * ordered)
    assert memory is not None
    first = memory.data.ptr
    if not problem.varlen:  # sequences have a counter already
        filled["counter"] = first
    filled["data"] = first + _COUNTER_BYTES
    if ordered:
        filled["order"] = first + size


def mapped(
    problem: Problem,
    chosen: plan.AttentionPlan,
    operands: Operands,
    strides: dict[str, tuple[int, ...]],
    filled: np.ndarray,
) -> np.ndarray:
    """The argument of forward_sm90.cu, from what the other kernels take."""
    constants, pack = dict(chosen.kernel.constants), chosen.pack
    hopper = np.zeros((), hopper_dtype(problem.variant))
    hopper["params"] = filled
    rows = {"q": plan.WARPGROUP, "k": constants["kBlockN"], "v": constants["kBlockN"]}
    if constants["kStaged"]:
        rows["out"] = _ROWS_OF_A_WARP
    for name, count in rows.items():
        if not getattr(operands, name).size:
            continue  # no tile is brought of it, and it may have no address
        sizes, steps = axes(problem, getattr(operands, name), strides[name])
        box = [int(count), 1, 1, 1]
        if pack > 1 and name in ("q", "out"):
            sizes, steps = packed(sizes, steps, pack)
            box = [pack, int(count) // pack, 1, 1]
        at = int(filled[name]["data"])
        hopper[name] = tensor_maps.encode(problem.dtype, at, sizes, steps, box)
    slot = chosen.streamed
    if slot is not None and operands.values[slot].size:
        sizes, steps = streamed_axes(problem, operands, strides, slot)
        dtype, at = problem.variant.slots[slot].dtype, int(filled["variant"][f"p{slot}"]["data"])
        box = [plan.WARPGROUP, 1, 1, 1]
        hopper["streamed"] = tensor_maps.encode(dtype, at, sizes, steps, box)
    return hopper


def folded(scale: float, dtype: np.dtype) -> tuple[float, int]:
    """|scale| log2(e) and the factor that scores are multiplied by before, 1 unless scale <= 0.

    What the kernels' arithmetic would flush to zero is zero: every key then has the same score.
    """
    least, most = float(np.finfo(dtype).tiny), float(np.finfo(dtype).max)
    size = abs(scale) * math.log2(math.e)
    if size < least:
        return 1, 0
    return min(size, most), 1 if scale > 0 else -1
