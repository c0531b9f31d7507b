"""The public call `sample`: every argument is checked here, before anything runs."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import numpy as np

from ... import arrays, tools
from ...jit import repeat
from ...jit.launch import Plan, Recording
from .. import check
from .sample_problem import Problem
from .topk_api import MOST_ON_GPU


def sample(
    logits: Any,
    *,
    seed: int,
    offset: int = 0,
    axis: int = -1,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Any:
    r"""Draw a token for each row of logits.

    Parameters
    ----------
    logits : array_like
        Unnormalised log-probabilities. Lists and numbers are taken too; booleans and integers
        become float64.
    seed : int
        From 0 to 2**64 - 1. Equal seeds and offsets draw equal tokens.
    offset : int, default 0
        From 0 to 2**64 - 1: which numbers of the seed's sequence to use. Add 1 at each step; every
        offset gives each row a number that is independent of all others.
    axis : int, default -1
        The axis of the tokens. A *row* is what lies along it.
    temperature : float, default 1.0
        Divides the logits. At 0 the largest logit is taken, ties by lowest index, NaN counting as
        the largest, as in :func:`numpy.argmax`.
    top_k : int, optional
        Keep only the `top_k` largest logits, ties by lowest index. On a GPU at most 1024, or all.
    top_p : float, optional
        Of those, keep only the most probable whose probabilities sum to `top_p`: a token stays if
        those before it, in descending order with ties by lowest index, have less than `top_p` of
        the mass that `top_k` left. The most probable token always stays.
    min_p : float, optional
        Of those, keep only tokens at least `min_p` times as probable as the most probable.

    Returns
    -------
    array or scalar
        The tokens' indices along `axis`, int64, of the shape of `logits` without `axis` and of its
        kind. A NumPy answer without axes is a scalar.

    Raises
    ------
    TypeError
        For what is not an array, for dtypes, and for options that are not numbers of their kind.
    ValueError
        For an axis that `logits` does not have (:exc:`numpy.exceptions.AxisError`) or that is
        empty, and for options that are out of range.
    ValueError
        For a row with NaN, with +inf or with nothing but -inf, which has no distribution. On a GPU
        the answer for such a row is -1, because looking would wait for the GPU; with
        ``CUFLASH_CHECK=1`` it waits, and raises. A temperature of 0 needs no distribution.

    Notes
    -----
    A token's weight is

    .. math:: w_i = e^{(x_i - m) / T}, \qquad m = \max_j x_j,

    in float32, or float64 for float64 logits, and its probability is its share of the weights that
    the filters keep. A row's number u in [0, 1) has 53 bits of Philox4x32-10 [1]_ with the seed as
    key and (row, offset) as counter, rows counted in C order. The token is the first in index
    order, or in descending order with `top_k`, at which the cumulative weight exceeds u times the
    total. A token of weight 0 is never drawn.

    `top_p` and `min_p` sort nothing. A token drawn from all is kept if the filters admit it, and
    else a next one is drawn from the tokens above it: every set drawn from holds all admitted
    tokens, so the one that is kept has their exact distribution. About ``1 / top_p`` draws do.

    A GPU reads the logits once, and once more for each draw with `top_p` or `min_p` unless a row
    fits in registers. A row must lie densely along `axis`, and rows must be evenly spaced; anything
    else is copied once. The same arguments give the same tokens in every run, and NumPy and a GPU
    differ only where rounding moves a boundary between tokens past u.

    References
    ----------
    .. [1] J. K. Salmon, M. A. Moraes, R. O. Dror and D. E. Shaw, "Parallel random numbers: as easy
       as 1, 2, 3", SC 2011.

    Examples
    --------
    >>> import numpy as np
    >>> import cuflash
    >>> logits = np.log([[0.1, 0.2, 0.7], [0.5, 0.4, 0.1]])
    >>> cuflash.sample(logits, seed=7, temperature=0)
    array([2, 0])

    A distribution shows in many draws, here a thousand of the first row:

    >>> many = np.broadcast_to(logits[0], (1000, 3))
    >>> tokens = cuflash.sample(many, seed=7)
    >>> (np.bincount(tokens) / 1000).round(1)
    array([0.1, 0.2, 0.7])

    The tokens of the next step, and those of a nucleus:

    >>> tokens = cuflash.sample(many, seed=7, offset=1)
    >>> np.unique(cuflash.sample(many, seed=7, top_p=0.8))
    array([1, 2])
    """
    options = (axis, temperature, top_k, top_p, min_p)
    key, answers = None, None
    if not arrays.checks_on_gpu():
        key, answers = repeat.again("sample", (logits,), options, (seed, offset))
    if answers is not None:
        return answers[0]
    caller, native, problem = prepare(logits, seed, offset, axis, temperature, top_k, top_p, min_p)
    with caller, Recording() as made:
        out = caller.empty((problem.rows,), np.dtype(np.int64))
        if problem.rows:
            _backend(caller).sample(problem, caller.converted(native, problem.dtype), out)
            if not caller.on_gpu or arrays.checks_on_gpu():
                _all_drawn(problem, out)
    answer = caller.give(out.reshape(problem.answer))
    repeat.remember(key, made, (logits,), (answer,), {"seed": seed, "offset": offset})
    return answer[()] if caller.kind == "numpy" and problem.answer == () else answer


def _sample_plans(
    logits: Any,
    *,
    seed: Any,
    offset: Any = 0,
    axis: Any = -1,
    temperature: Any = 1.0,
    top_k: Any = None,
    top_p: Any = None,
    min_p: Any = None,
) -> tuple[int, list[Plan]]:
    """Where a call would run and what it would launch: nothing where there is nothing to do."""
    caller, native, problem = prepare(logits, seed, offset, axis, temperature, top_k, top_p, min_p)
    if not (caller.on_gpu and problem.rows):
        return caller.device, []
    from . import sample_gpu

    with caller:
        return caller.device, sample_gpu.plans(problem, native)


tools.register(sample, _sample_plans)


def prepare(
    logits: Any,
    seed: Any,
    offset: Any,
    axis: Any,
    temperature: Any,
    top_k: Any,
    top_p: Any,
    min_p: Any,
) -> tuple[arrays.Caller, Any, Problem]:
    """Check all arguments: caller, native logits with at least one axis, problem."""
    caller, taken = arrays.take({"logits": logits}, sequences=True, outputs=())
    native = taken["logits"]
    dtype = check.working_dtype(native)
    along = check.one_axis("`logits`", axis, native.ndim)
    native = native if native.ndim else native[None]
    columns = native.shape[along]
    if columns == 0:
        raise ValueError(
            f"`logits` must have a token along `axis`, but axis {along} of its shape "
            f"{native.shape} is empty"
        )
    k = None if top_k is None else _integer("top_k", top_k, 1, columns)
    if caller.on_gpu and k is not None and MOST_ON_GPU < k < columns:
        raise ValueError(
            f"`top_k` must be at most {MOST_ON_GPU}, or all {columns}, on a GPU, not {top_k!r}"
        )
    p = None if top_p is None else _real("top_p", top_p, 1, above=0)
    least = None if min_p is None else _real("min_p", min_p, 1)
    return (
        caller,
        native,
        Problem(
            dtype=dtype,
            shape=tuple(native.shape),
            axis=along,
            seed=_integer("seed", seed, 0, 2**64 - 1),
            offset=_integer("offset", offset, 0, 2**64 - 1),
            temperature=_real("temperature", temperature, math.inf),
            top_k=None if k == columns else k,
            top_p=None if p == 1 else p,
            min_p=None if least == 0 else least,
        ),
    )


def _integer(name: str, value: Any, least: int, most: int) -> int:
    number = check.integer(value)
    if number is None:
        raise TypeError(f"`{name}` must be an int, not {value!r}")
    if not least <= number <= most:
        raise ValueError(f"`{name}` must be from {least} to {most}, not {value!r}")
    return number


def _real(name: str, value: Any, most: float, above: float | None = None) -> float:
    """A finite number from 0 to `most`, or above `above`."""
    if not check.is_number(value):
        raise TypeError(f"`{name}` must be a number, not {value!r}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not (0 <= number <= most and number < math.inf) or number == above:
        low = "at least 0" if above is None else f"above {above}"
        high = "finite" if most == math.inf else f"at most {most}"
        raise ValueError(f"`{name}` must be {low} and {high}, not {value!r}")
    return number


def _all_drawn(problem: Problem, out: Any) -> None:
    """Refuse rows that have no distribution; on a GPU this waits."""
    if int(out.min()) < 0:
        row = int(out.argmin())
        where = tuple(map(int, np.unravel_index(row, problem.answer))) if problem.answer else ()
        raise ValueError(
            "`logits` must have a finite number, and neither NaN nor +inf, in each row, but not so "
            f"row {where}"
        )


def _backend(caller: arrays.Caller) -> ModuleType:
    if caller.on_gpu:
        from . import sample_gpu

        return sample_gpu
    from . import sample_cpu

    return sample_cpu
