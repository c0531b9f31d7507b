"""How cross-entropy's own kernels share rows and classes; the pass over the logits is `plan`'s."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from ..jit.gpu import Gpu
from ..jit.launch import Plan
from ..jit.source import Constant, Kernel
from . import plan, problem
from .layout import Layout
from .loss_problem import Problem
from .plan import SECTOR, WARP

THREADS = 256  # a block
ONE_BLOCK = 4096  # rows that one block adds up: a second launch would take longer
ONE_BLOCK_THREADS = 1024
# The gradient's registers a thread for logits in flight, and loads, half as many in float64; 64
# registers in all, or 128, so that 1024 or 512 threads a multiprocessor hide memory's latency.
REGISTERS, LOADS = 16, 8
BLOCKS = 4
# Across rows a thread holds what it must know of each of its rows beside the bytes in flight.
MOST_BESIDE, BYTES = 4, 32
# A block starts with what it must know of its rows, which is then good for so many rounds of loads
# at most, and for no more than leaves every multiprocessor this many blocks.
MOST_ROUNDS, LEAST_WAVES = 8, 32
SMALL = 2**30  # rows and classes that 32 bits count, with room for a block more

Constants = dict[str, Constant]

_C_TYPES = {
    "int8": "signed char",
    "int16": "short",
    "int32": "int",
    "int64": "int64",
    "uint8": "unsigned char",
    "uint16": "uint16",
    "uint32": "uint32",
    "uint64": "uint64",
}


@dataclass(frozen=True)
class Gradient:
    """The plan of the gradient's launch, and how the rows are cut for it."""

    plan: Plan
    chunk: int  # classes a block has
    chunks: int  # of a row


@functools.lru_cache(maxsize=4096)
def losses(
    asked: Problem, outer_axes: int, gpu: Gpu, copies: tuple[str, ...] = ()
) -> tuple[Plan, ...]:
    """Plan what follows once every row's logsumexp is known: one launch, or two for many rows.

    Parameters
    ----------
    asked : Problem
    outer_axes : int
        Axes of the rows, once folded.
    gpu : Gpu
    copies : tuple of str
        The arguments that had to be copied.
    """
    each = asked.reduction == "none"
    constants = _constants(asked, outer_axes) | {
        "kEach": each,
        "kMean": asked.reduction == "mean",
        "kSmoothed": asked.label_smoothing != 0,
    }
    if not each:
        return _sums(asked, constants, gpu, copies)
    blocks = -(-asked.rows // THREADS)
    return (_loss(constants, asked.rows, blocks, THREADS, "a thread for each row", copies),)


@functools.lru_cache(maxsize=4096)
def counts(asked: Problem, outer_axes: int, gpu: Gpu) -> tuple[Plan, ...]:
    """Plan the count of the rows that are not ignored, as `losses`."""
    constants = _constants(asked, outer_axes) | {"Element": asked.accumulator, "kCounts": True}
    return _sums(asked, constants, gpu, ())


def _constants(asked: Problem, outer_axes: int) -> Constants:
    return {
        "Element": asked.dtype,
        "Result": asked.accumulator,
        "Target": _C_TYPES[asked.target],
        "Index": _index(asked),
        "kOuterAxes": outer_axes,
        "kReducedAxes": 1,
        "kEach": False,
        "kCounts": False,
        "kJoins": False,
        "kWhole": False,
        "kMean": False,
        "kSmoothed": False,
        "kIgnores": asked.ignore_index is not None,
    }


def _sums(
    asked: Problem, constants: Constants, gpu: Gpu, copies: tuple[str, ...]
) -> tuple[Plan, ...]:
    if asked.rows <= ONE_BLOCK:
        threads = min(ONE_BLOCK_THREADS, max(THREADS, plan.power_of_two(asked.rows)))
        whole = constants | {"kWhole": True}
        return (_loss(whole, asked.rows, 1, threads, "one block for all rows", copies),)
    blocks = min(-(-asked.rows // THREADS), 4 * gpu.multiprocessors)
    joins = constants | {
        "Element": asked.accumulator,
        "Target": "int64",
        "Index": "int",
        "kOuterAxes": 1,
        "kJoins": True,
        "kWhole": True,
        "kSmoothed": False,
        "kIgnores": False,
    }
    return (
        _loss(
            constants | {"kMean": False},
            asked.rows,
            blocks,
            THREADS,
            f"{blocks} blocks add up their rows",
            copies,
        ),
        _loss(joins, blocks, 1, THREADS, "one block adds up the parts", copies),
    )


def _loss(
    constants: Constants, rows: int, blocks: int, threads: int, why: str, copies: tuple[str, ...]
) -> Plan:
    all_constants = {**constants, "kThreads": threads}
    # A target; its logit, of which a sector is read; lse, a sum, and the loss.
    return Plan(
        kernel=Kernel("_softmax/loss.cu", "cross_entropy_loss", tuple(all_constants.items())),
        grid=(blocks, 1, 1),
        threads=threads,
        shared_memory=0,
        bytes=rows * (8 + SECTOR + 8),
        operations=4 * rows,
        why=why,
        copies=copies,
    )


@functools.lru_cache(maxsize=4096)
def gradient(asked: Problem, layout: Layout, gpu: Gpu, copies: tuple[str, ...] = ()) -> Gradient:
    """Plan the gradient's launch.

    Parameters
    ----------
    asked : Problem
    layout : Layout
        Of the logits and out: it fits.
    gpu : Gpu
    copies : tuple of str
        The arguments that had to be copied for that.
    """
    # In the row engine's terms the gradient is a map of rows to rows.
    rows = problem.Problem("softmax", asked.dtype, asked.result, (asked.rows, asked.classes), (1,))
    across, ragged = plan.lies_across(rows, layout), False
    vector = plan.widest_vector(
        rows, layout, layout.outer[-1] if across else asked.classes, along_rows=not across
    )
    if across:
        vector = min(vector, MOST_BESIDE)
    elif asked.classes > plan.RAGGED:
        whole = plan.ragged_vector(rows, layout)
        ragged, vector = whole > vector, max(vector, whole)
    span = asked.classes + (vector - 1 if ragged else 0)
    most = LOADS // plan.words(rows)
    loads = min(most, max(1, REGISTERS // (vector * plan.words(rows))))
    if across:
        loads = min(most, max(1, BYTES // (vector * layout.x.itemsize)))
        lanes = min(WARP, plan.power_of_two(-(-asked.rows // vector)))
        pitch, tile, needed = THREADS // lanes, lanes * vector, span
        loads = min(loads, -(-needed // pitch))
        why = f"{tile} rows side by side"
    else:
        needed = -(-span // vector)
        # Few threads a row have more loads in flight each, but should fill sectors together.
        least = min(needed, max(1, 2 * SECTOR // (vector * layout.x.itemsize)))
        lanes = min(THREADS, plan.power_of_two(max(-(-needed // loads), least)))
        loads = min(loads, -(-needed // lanes))
        pitch, tile = lanes * vector, THREADS // lanes
        why = f"{lanes} threads a row"
    rounds, tiles = -(-span // (pitch * loads)), -(-asked.rows // tile)
    each = max(1, min(MOST_ROUNDS, rounds, rounds * tiles // (LEAST_WAVES * gpu.multiprocessors)))
    chunk = each * pitch * loads
    chunks = -(-span // chunk)
    constants: Constants = {
        "Element": asked.dtype,
        "Result": asked.result,
        "Target": _C_TYPES[asked.target],
        "Index": _index(asked),
        "kOuterAxes": len(layout.outer),
        "kReducedAxes": 1,
        "kThreads": THREADS,
        "kBlocks": BLOCKS // plan.words(rows),
        "kAcross": across,
        "kLanes": lanes,
        "kVector": vector,
        "kRagged": ragged,
        "kDense": not across and layout.x.reduced == layout.out.reduced == (1,),
        "kLoads": loads,
        "kIgnores": asked.ignore_index is not None,
    }
    elements = asked.rows * asked.classes
    planned = Plan(
        kernel=Kernel(
            "_softmax/loss_backward.cu", "cross_entropy_backward", tuple(constants.items())
        ),
        grid=(tiles * chunks, 1, 1),
        threads=THREADS,
        shared_memory=0,
        bytes=elements * (layout.x.itemsize + layout.out.itemsize),
        operations=5 * elements,
        why=f"{why}, one read; {vector * layout.x.itemsize} bytes a load",
        copies=copies,
    )
    return Gradient(planned, chunk, chunks)


def _index(asked: Problem) -> str:
    return "int" if max(asked.rows, asked.classes) < SMALL else "int64"
