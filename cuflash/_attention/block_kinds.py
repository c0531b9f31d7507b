"""A mask looked at once, block by block: BlockMask.of, from checked arguments to its parts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .. import arrays
from ..jit.launch import Plan
from . import check
from .problem import BlockProblem, Operands
from .variants import bind
from .variants.blocks import Blocks
from .variants.program import Program
from .variants.variant import Part, Variant

_MOST_BLOCKS = 2**33  # four to each of 2**31 thread blocks


@dataclass(frozen=True)
class Asked:
    """What is to be found out, and what of."""

    caller: arrays.Caller
    problem: BlockProblem
    values: tuple[Any, ...]  # of the slots of problem.variant
    axes: tuple[str, ...]  # of "b" and "h", those that the mask names


def prepare(
    variant: Any,
    len_q: Any,
    len_k: Any,
    *,
    heads: Any = 1,
    batch: Any = 1,
    size: Any = 128,
    q_start: Any = None,
    like: Any = None,
) -> Asked:
    """Check the arguments of BlockMask.of and say what is to be done, without doing it."""
    if not isinstance(variant, Variant):
        raise TypeError(f"`variant` must be a cuflash.Variant, not {type(variant).__name__}")
    masks = bind.asked(None, variant.masks_alone())
    len_q = _integer("len_q", len_q, 0, check.LIMIT - 1)
    len_k = _integer("len_k", len_k, 0, check.LIMIT - 1)
    heads, batch = _integer("heads", heads, 1), _integer("batch", batch, 1)
    if q_start is not None:
        q_start = _integer("q_start", q_start, 1 - check.LIMIT, check.LIMIT - len_q)
    caller, native = _taken(masks.named_arrays, like)
    dtype = "float32" if like is None else check.common_dtype(native, ("like",))
    q = np.broadcast_to(np.False_, (batch, heads, len_q, 1))
    k = np.broadcast_to(np.False_, (batch, heads, len_k, 1))
    operands = Operands(q, k, k)
    program, values = bind.bind(masks, native, operands, dtype, q_start)
    axes = tuple(name for name in ("b", "h") if program.mask_names(name))
    problem = BlockProblem(
        dtype=dtype,
        batch=batch if "b" in axes else 1,
        heads=heads if "h" in axes else 1,
        len_q=len_q,
        len_k=len_k,
        q_start=len_k - len_q if q_start is None else q_start,
        size=size_of_blocks(size),
        variant=program,
    )
    blocks = math.prod(problem.shape)
    if blocks >= _MOST_BLOCKS:
        raise ValueError(f"`size` must make fewer than 2**33 blocks, not {blocks}: {problem.size}")
    return Asked(caller, problem, values, axes)


def find(asked: Asked) -> Any:
    """Return the kinds of the blocks, as the caller's kind of array: one axis for each of
    asked.axes, then blocks of queries and of keys."""
    lengths = dict(zip(("b", "h"), asked.problem.shape))
    shape = (*(lengths[axis] for axis in asked.axes), *asked.problem.shape[2:])
    with asked.caller:
        kinds = asked.caller.empty(shape, np.dtype(np.int8))
        if asked.caller.on_gpu:
            from . import gpu as backend
        else:
            from . import cpu as backend  # type: ignore[no-redef]
        backend.block_kinds(asked.problem, asked.values, kinds.reshape(asked.problem.shape))
    return asked.caller.give(kinds)


def parts(variant: Variant, asked: Asked, kinds: Any) -> list[Part]:
    """The parts of a variant, with masks that are evaluated only where blocks are partial."""
    return [_divided(part, asked, kinds) if part.mask else part for part in variant.parts]


def _divided(part: Part, asked: Asked, kinds: Any) -> Part:
    size, name = asked.problem.size, "kinds"
    while name in dict(part.axes):
        name += "_"
    at = ", ".join([*asked.axes, f"row // {size[0]}", f"j // {size[1]}"])
    # A comment may end the mask's last line.
    mask = f"{name}[{at}] == 2 or {name}[{at}] == 1 and (\n{part.mask}\n)"
    axes = (*part.axes, (name, len(asked.axes) + 2))
    blocks = Blocks(name, "int8", size, part.mask, _facts(asked.problem))
    return replace(part, mask=mask, axes=axes, values=(*(part.values or ()), kinds), blocks=blocks)


def _facts(problem: BlockProblem) -> tuple[tuple[str, int | str], ...]:
    """What decided about the blocks, as bind names it."""
    program: Program = problem.variant
    facts: dict[str, int | str] = {"len_q": problem.len_q, "len_k": problem.len_k}
    decided: Sequence[tuple[str, str, int | str]] = (
        ("b", "batch", problem.batch),
        ("h", "heads", problem.heads),
        ("i", "q_start", problem.q_start),
        ("len_k", "kv_lengths", problem.len_k),
    )
    facts |= {fact: value for name, fact, value in decided if program.mask_names(name)}
    if program.mask_computes:
        facts["dtype"] = problem.dtype
    return tuple(facts.items())


def size_of_blocks(size: Any) -> tuple[int, int]:
    """Return (queries, keys)."""
    pair = size if isinstance(size, tuple) else (size, size)
    if len(pair) != 2 or not all(map(check.is_int, pair)):
        raise TypeError(f"`size` must be an int or a pair of them, (queries, keys), not {size!r}")
    if min(pair) < 1 or max(pair) >= check.LIMIT:
        raise ValueError(f"`size` must be at least 1 and below 2**30, not {size!r}")
    return int(pair[0]), int(pair[1])


def _taken(named: dict[str, Any], like: Any) -> tuple[arrays.Caller, dict[str, Any]]:
    given = {"like": like, **named}
    if all(value is None for value in given.values()):
        given["like"] = np.empty(0, np.float32)
    return arrays.take(given, outputs=())


def _integer(name: str, value: Any, least: int, greatest: int = 2**31 - 1) -> int:
    if not check.is_int(value):
        raise TypeError(f"`{name}` must be an int, not {value!r}")
    check.in_range(name, value, least, greatest)
    return int(value)


def plans(*args: Any, **kwargs: Any) -> tuple[int, list[Plan]]:
    """Where a call of BlockMask.of would run, and what it would launch."""
    asked = prepare(*args, **kwargs)
    if not asked.caller.on_gpu:
        return -1, []
    from . import plan_around

    return asked.caller.device, [plan_around.block_kinds(asked.problem)]
