"""The checks behind api.py, each returning what its argument comes to.

Every error names the argument, what came and what is allowed.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from .. import arrays
from .dropout import STEPS, Dropout
from .problem import Operands, sum_dtype

DTYPES = ("float16", "bfloat16", "float32", "float64")
HALVES = ("float16", "bfloat16")
MAX_HEAD_DIM = 512
# Lengths, positions of queries and windows stay below this, so that sums of two fit int32.
LIMIT = 2**30


# Arguments that are not arrays.


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool)):
        raise TypeError(f"`{name}` must be True or False, not {value!r}")
    return bool(value)


def scale(value: Any, head_dim: int) -> float:
    if value is None:
        return 1 / math.sqrt(head_dim)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"`scale` must be a real number or None, not {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"`scale` must be finite, not {value!r}")
    return float(value)


def precision(value: Any, dtype: str) -> str | None:
    if value not in (None, "tf32"):
        raise ValueError(f'`precision` must be None or "tf32", not {value!r}')
    if value == "tf32" and dtype != "float32":
        raise ValueError(
            f'`precision` must be None for {dtype} inputs, not "tf32": it is float32\'s'
        )
    return value


def dropout(value: Any, seed: Any) -> Dropout | None:
    """Return what is dropped, None where nothing is."""
    chance: Any = 0 if value is None else value
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, type(None))):
        raise TypeError(f"`dropout` must be a real number or None, not {value!r}")
    if not 0 <= chance < 1:
        raise ValueError(f"`dropout` must be at least 0 and below 1, not {value!r}")
    if seed is None and not chance:
        return None
    if not is_int(seed):
        raise TypeError(f"`seed` must be an int, which `dropout` needs, not {seed!r}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"`seed` must be from 0 to {2**64 - 1}, not {seed!r}")
    if not chance:
        return None
    return Dropout(min(max(round(float(chance) * STEPS), 1), STEPS - 1), int(seed))


def window_sides(window: Any) -> tuple[int | None, int | None]:
    """Return (left, right), None for a side without a bound."""
    sides = (window, window) if window is None or is_int(window) else window
    if not isinstance(sides, (tuple, list)) or not all(s is None or is_int(s) for s in sides):
        raise TypeError(f"`window` must be an int, a pair (left, right) or None, not {window!r}")
    if len(sides) != 2 or any(s is not None and s < 0 for s in sides):
        raise ValueError(
            f"`window` must be an int >= 0 or a pair (left, right), each an int >= 0 or None for "
            f"no bound, not {window!r}"
        )
    left, right = (None if s is None or s >= LIMIT else int(s) for s in sides)
    return left, right


def int_or_array(name: str, value: Any) -> tuple[int | None, Any]:
    """Split what may be an int or an array into (int, array), one or both of them None."""
    if is_int(value):
        return int(value), None
    if isinstance(value, (numbers.Number, np.generic, str, list, tuple)):
        raise TypeError(f"`{name}` must be an int or an array of integers, not {value!r}")
    return None, value


def is_int(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def in_range(name: str, value: float, least: float, greatest: float) -> None:
    if not least <= value <= greatest:
        raise ValueError(f"`{name}` must be from {least} to {greatest}, not {value}")


# Inputs.


def array(name: str, value: Any, shape: tuple[int, ...], dtypes: Sequence[str]) -> None:
    if value is None:
        raise TypeError(f"`{name}` must be an array, not None")
    if value.shape != shape:
        raise ValueError(f"`{name}` must have shape {shape}, not {value.shape}")
    dtype = arrays.dtype_name(value.dtype)
    if dtype not in dtypes:
        raise TypeError(f"`{name}` must have dtype {' or '.join(dtypes)}, not {dtype}")


def common_dtype(native: dict[str, Any], names: Sequence[str]) -> str:
    """Return the name of the one floating dtype that all these arrays have."""
    found = []
    for name in names:
        if native[name] is None:
            raise TypeError(f"`{name}` must be an array, not None")
        dtype = arrays.dtype_name(native[name].dtype)
        if dtype not in DTYPES:
            raise TypeError(f"`{name}` must have dtype {' or '.join(DTYPES)}, not {dtype}")
        found.append(dtype)
        if dtype != found[0]:
            raise TypeError(
                f"`{name}` must have the dtype of `{names[0]}`, {found[0]}, not {dtype}: convert "
                f"one of them with astype"
            )
    return found[0]


def inputs(native: dict[str, Any]) -> Operands:
    """View the inputs with all the axes that Problem names."""
    q, k, v = native["q"], native["k"], native["v"]
    shapes = f"q has shape {q.shape}, k {k.shape}, v {v.shape}"
    one_head = q.ndim == 2
    for name, each in (("q", q), ("k", k), ("v", v)):
        if each.ndim < 2 or (each.ndim == 2) != one_head:
            raise ValueError(
                f"`{name}` must have shape (..., heads, length, head_dim), or each of `q`, `k` and "
                f"`v` (length, head_dim), but {shapes}"
            )
    if one_head:
        q, k, v = q[None], k[None], v[None]
    _lengths_and_dims(q, k, v, shapes)
    _heads(q, k, v, shapes)
    try:
        batch = np.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
    except ValueError:
        raise ValueError(
            f"`q`, `k` and `v` must have batch axes (those before heads) that broadcast, but "
            f"{shapes}"
        ) from None
    return Operands(
        q=broadcast(q, batch + q.shape[-3:]),
        k=broadcast(k, batch + k.shape[-3:]),
        v=broadcast(v, batch + v.shape[-3:]),
        q_start=_per_batch("q_start", native["q_start"], batch),
        kv_lengths=_per_batch("kv_lengths", native["kv_lengths"], batch),
        one_head=one_head,
    )


def packed_inputs(native: dict[str, Any]) -> Operands:
    """View packed inputs as all sequences have them: (sequences, heads, tokens, head_dim)."""
    q, k, v = native["q"], native["k"], native["v"]
    shapes = f"q has shape {q.shape}, k {k.shape}, v {v.shape}"
    for name, each in (("q", q), ("k", k), ("v", v)):
        if each.ndim != 3:
            raise ValueError(f"`{name}` must have shape (heads, tokens, head_dim), but {shapes}")
    _lengths_and_dims(q, k, v, shapes)
    _heads(q, k, v, shapes)
    k_name = "q_offsets" if native["k_offsets"] is None else "k_offsets"
    for name in ("q_offsets", k_name):
        _offsets(name, native[name])
    q_offsets, k_offsets = native["q_offsets"], native[k_name]
    if k_offsets.shape != q_offsets.shape:
        raise ValueError(
            f"`k_offsets` must have the shape of `q_offsets`, {q_offsets.shape}, not "
            f"{k_offsets.shape}"
        )
    batch = (q_offsets.shape[0] - 1,)
    return Operands(
        q=broadcast(q, batch + q.shape),
        k=broadcast(k, batch + k.shape),
        v=broadcast(v, batch + v.shape),
        q_start=_per_batch("q_start", native["q_start"], batch),
        q_offsets=q_offsets,
        k_offsets=k_offsets,
    )


def _offsets(name: str, values: Any) -> None:
    if values is None:
        raise TypeError(f"`{name}` must be an array of integers, not None")
    if values.dtype.kind not in "iu":
        dtype = arrays.dtype_name(values.dtype)
        raise TypeError(f"`{name}` must be an array of integers, not of {dtype}")
    if values.ndim != 1 or values.shape[0] < 2:
        raise ValueError(
            f"`{name}` must have shape (sequences + 1,), of one sequence at least, not "
            f"{values.shape}"
        )


def offsets(caller: arrays.Caller, operands: Operands) -> None:
    """Check the values of offsets, which on a GPU must be asked for, as `integers` does."""
    if caller.on_gpu and not arrays.checks_on_gpu():
        return
    for name, values, tokens in (
        ("q_offsets", operands.q_offsets, operands.q.shape[-2]),
        ("k_offsets", operands.k_offsets, operands.k.shape[-2]),
    ):
        with caller:
            first, last = int(values[0]), int(values[-1])
            falls = bool((values[1:] < values[:-1]).any())
        if first != 0 or falls or last > tokens:
            raise ValueError(
                f"`{name}` must begin with 0, never fall, and end at {tokens} at most, the number "
                f"of tokens, but it begins with {first}, ends with {last}"
                + (", and falls in between" if falls else "")
            )


def _lengths_and_dims(q: Any, k: Any, v: Any, shapes: str) -> None:
    for name, each in (("q", q), ("k", k), ("v", v)):
        if not 1 <= each.shape[-1] <= MAX_HEAD_DIM:
            raise ValueError(
                f"`{name}` must have a head_dim (last axis) from 1 to {MAX_HEAD_DIM}, not "
                f"{each.shape[-1]}: {shapes}"
            )
        if each.shape[-2] >= LIMIT:
            raise ValueError(f"`{name}` must have a length below 2**30, but {shapes}")
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(
            f"`k` must have q's head_dim (last axis), {q.shape[-1]}, not {k.shape[-1]}: {shapes}"
        )
    if v.shape[-2] != k.shape[-2]:
        raise ValueError(
            f"`v` must have k's length (next to last axis), {k.shape[-2]}, not {v.shape[-2]}: "
            f"{shapes}"
        )


def _heads(q: Any, k: Any, v: Any, shapes: str) -> None:
    heads, kv_heads = q.shape[-3], k.shape[-3]
    if v.shape[-3] != kv_heads:
        raise ValueError(
            f"`v` must have as many heads as k, {kv_heads}, not {v.shape[-3]}: {shapes}"
        )
    if heads % kv_heads if kv_heads else heads:
        raise ValueError(
            f"`q` must have a multiple of k's {kv_heads} heads, not {heads} heads: {shapes}"
        )


def _per_batch(name: str, values: Any, batch: tuple[int, ...]) -> Any:
    if values is None:
        return None
    if values.dtype.kind not in "iu":
        dtype = arrays.dtype_name(values.dtype)
        raise TypeError(f"`{name}` must be an int or an array of integers, not of {dtype}")
    try:
        return broadcast(values, batch)
    except ValueError:
        raise ValueError(
            f"`{name}` must have a shape that broadcasts to the batch axes, {batch}, not "
            f"{values.shape}"
        ) from None


def broadcast(each: Any, shape: tuple[int, ...]) -> Any:
    """Broadcast by strides of 0; NumPy hands another library's array to that library."""
    return each if each.shape == shape else np.broadcast_to(each, shape)


def integers(
    caller: arrays.Caller, operands: Operands, start: int | None, length: int | None
) -> None:
    """Check q_start and kv_lengths; looking into GPU arrays would wait, so that must be asked."""
    starts = (1 - LIMIT, LIMIT - operands.q.shape[-2])
    lengths = (0, operands.k.shape[-2])
    if start is not None:
        in_range("q_start", start, *starts)
    if length is not None:
        in_range("kv_lengths", length, *lengths)
    if caller.on_gpu and not arrays.checks_on_gpu():
        return
    for name, values, allowed in (
        ("q_start", operands.q_start, starts),
        ("kv_lengths", operands.kv_lengths, lengths),
    ):
        if values is not None and values.size:
            with caller:
                extremes = int(values.min()), int(values.max())
            for extreme in extremes:
                in_range(name, extreme, *allowed)


def useful_sides(
    operands: Operands, start: int | None, left: int | None, right: int | None
) -> tuple[int | None, int | None]:
    """Drop the sides of a window that no row can feel: a kernel without them has less to do."""
    if operands.q_start is not None:
        return left, right
    # A side is felt unless the last row reaches back to key 0, or the first row on to the last
    # key. By default the last row stands on the last key there is, wherever kv_lengths puts that.
    len_q, len_k = operands.q.shape[-2], operands.k.shape[-2]
    back = len_k - 1 if start is None else start + len_q - 1
    ahead = len_q - 1 if start is None else len_k - 1 - start
    return (
        None if left is None or left >= back else left,
        None if right is None or right >= ahead else right,
    )


# Outputs.


def named_outputs(out: Any, *, both: bool) -> dict[str, Any]:
    """Name out's arrays as messages do: "out", or "out[0]" and "out[1]" for (out, lse)."""
    if not isinstance(out, tuple):
        return {"out": out}
    if not both:
        raise TypeError("`out` must be one array, not a tuple, unless return_lse=True")
    if len(out) != 2:
        raise ValueError(f"`out` must be one array or a pair (out, lse), not a tuple of {len(out)}")
    return {"out[0]": out[0], "out[1]": out[1]}


def given_outputs(
    native: dict[str, Any], names: Iterable[str], shape: tuple[int, ...], dtype: str
) -> tuple[Any, Any]:
    """Check the outputs that were given, for an out of this shape; return (out, lse)."""
    given = [None, None]
    out_dtypes = (dtype, "float32") if dtype in HALVES else (dtype,)
    expected = (shape, out_dtypes), (shape[:-1], (sum_dtype(dtype),))
    for slot, (name, (its_shape, its_dtypes)) in enumerate(zip(names, expected)):
        if native[name] is not None:
            array(name, native[name], its_shape, its_dtypes)
            _own_memory(name, native)
            given[slot] = native[name]
    return given[0], given[1]


def _own_memory(name: str, native: dict[str, Any]) -> None:
    out = native[name]
    if out.size == 0:
        return
    if out.ndim and out.shape[-1] > 1 and out.strides[-1] != out.itemsize:
        raise ValueError(
            f"`{name}` must have a contiguous last axis, a stride of {out.itemsize} bytes, but its "
            f"strides are {out.strides}"
        )
    for other, values in native.items():
        if other != name and values is not None and arrays.may_share_memory(out, values):
            raise ValueError(f"`{name}` must not overlap `{other}` in memory")


# Parts to merge.


def parts(outs: Any, lses: Any) -> None:
    for name, value in (("outs", outs), ("lses", lses)):
        if not isinstance(value, (list, tuple)):
            raise TypeError(
                f"`{name}` must be a list or tuple of arrays, not {type(value).__name__}"
            )
    if not outs or len(outs) != len(lses):
        raise ValueError(
            f"`outs` and `lses` must have one array for each part, at least one, but outs has "
            f"{len(outs)} and lses {len(lses)}"
        )


def part_shape(first: Any) -> tuple[int, ...]:
    shape = first.shape
    if len(shape) < 2 or not 1 <= shape[-1] <= MAX_HEAD_DIM:
        raise ValueError(
            f"`outs[0]` must have shape (..., heads, len_q, d_v), d_v from 1 to {MAX_HEAD_DIM}, "
            f"not {shape}"
        )
    return shape
