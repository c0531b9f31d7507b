"""The public calls of this room: every argument is checked here, before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from .. import arrays, tools
from ..jit import repeat
from ..jit.launch import Plan, Recording
from . import check
from .problem import Operands, Problem, sum_dtype
from .variants import bind
from .variants.program import Program
from .variants.variant import Variant


class AttentionResult(NamedTuple):
    """What :func:`attention` returns with ``return_lse=True``."""

    out: Any
    lse: Any


class MergedAttention(NamedTuple):
    """What :func:`merge_attention` returns."""

    out: Any
    lse: Any


def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: int | tuple[int | None, int | None] | None = None,
    q_start: Any = None,
    kv_lengths: Any = None,
    softcap: float | None = None,
    alibi: Any = None,
    bias: Any = None,
    mask: Any = None,
    sinks: Any = None,
    variant: Variant | None = None,
    dropout: float | None = None,
    seed: int | None = None,
    precision: str | None = None,
    return_lse: bool = False,
    out: Any = None,
) -> Any:
    r"""Exact attention, ``softmax(scale * q @ k.T) @ v``, without ever holding the scores.

    The last two axes are (length, head_dim), as :func:`numpy.matmul` has them, the one before is
    heads, and any further leading axes are batch and broadcast. GPU arrays run the CUDA kernels on
    the current stream; NumPy arrays, and PyTorch and JAX arrays on the CPU, run the same tiled
    algorithm in NumPy.

    Parameters
    ----------
    q : array, shape (..., heads, len_q, d)
        Queries: float16, bfloat16, float32 or float64; d from 1 to 512.
    k : array, shape (..., kv_heads, len_k, d)
        Keys, of q's dtype. ``heads`` must be a multiple of ``kv_heads``: query head h uses key head
        ``h // (heads // kv_heads)``.
    v : array, shape (..., kv_heads, len_k, d_v)
        Values, of q's dtype; d_v from 1 to 512, which need not be d. Two axes in each of q, k and
        v mean one head.
    scale : float, optional
        What scores are multiplied by, ``1 / sqrt(d)`` by default. Zero and negative are allowed.
    causal : bool, default False
        Query i sees key j only when ``j <= i + q_start``.
    window : int or (int or None, int or None), optional
        ``(left, right)``: query i sees key j only when
        ``i + q_start - left <= j <= i + q_start + right``. None, or 2**30 and more, is no bound;
        ``window=w`` is ``(w, w)``. Causal caps the right side at 0, which leaves w + 1 keys.
    q_start : int or integer array, optional
        The key position of the first query: one, or one per batch entry, broadcasting to the
        batch axes. By default the queries are the last rows, ``len_k - len_q``, or with
        ``kv_lengths`` (per batch entry) ``kv_lengths - len_q``; 0 gives the top-left triangle.
        It matters only with ``causal``, ``window``, ``alibi`` or a ``variant`` that names ``i``.
    kv_lengths : int or integer array, optional
        How many keys there are, broadcasting to the batch axes: keys at or past it are absent.
    softcap : float, optional
        Scores become ``softcap * tanh(score / softcap)``: below it in size.
    alibi : array of shape (..., heads), optional
        Slopes: ``alibi[h] * abs(i + q_start - j)`` is taken off a score [2]_. It broadcasts to the
        batch axes and heads; float16, bfloat16, float32 or float64, as the two below.
    bias : array of shape (..., heads, len_q, len_k), optional
        What is added to scores. It broadcasts along any axis, as `mask` does, and is read in place,
        whatever its strides.
    mask : array of bool, shape (..., heads, len_q, len_k), optional
        True where a query sees a key.
    sinks : array of shape (..., heads), optional
        A score without a key, which only the sum of exponentials counts, and lse with it.
    variant : Variant, optional
        Scores and masks of your own. Scores are scaled, capped, biased by `alibi` and then by
        `bias`, and go to the variant; what a mask or a bound hides is -inf after that.
    dropout : float, optional
        The probability, from 0 to less than 1, with which each weight of ``softmax(scores)`` is
        dropped on its way to `v` [3]_. It is rounded to a multiple of 1/65536, but not to 0 or 1;
        the weights that stay are divided by the probability to stay. 0 and None drop nothing.
    seed : int, optional
        From 0 to 2**64 - 1, for `dropout`, which needs it: equal seeds drop the same weights.
        Without dropout it changes nothing.
    precision : {None, "tf32"}
        "tf32" allows float32 products on the tensor cores in TF32, which keeps 10 bits; it
        changes nothing in NumPy.
    return_lse : bool, default False
        Also return the logarithm of each row's sum of exponentials, for :func:`merge_attention`.
    out : array, or (array or None, array or None) with ``return_lse``, optional
        Where the results go, and what comes back. Its dtype is the inputs', or float32 for
        float16 and bfloat16 inputs; its last axis must be contiguous; it must not overlap an
        input.

    Returns
    -------
    array or AttentionResult
        ``out``, shape (..., heads, len_q, d_v), of q's dtype; with ``return_lse=True`` the named
        tuple ``(out, lse)``, lse of shape (..., heads, len_q) in float32 (float64 for float64).

    Raises
    ------
    TypeError
        For what is not an array, kinds or devices that are mixed, and dtypes.
    ValueError
        For shapes, values and memory. On a GPU the values in ``q_start`` and ``kv_lengths``
        arrays are clamped to what is allowed, not checked, unless ``CUFLASH_CHECK=1``.
    RuntimeError
        In the capture of a CUDA graph, for a call that would have to copy an argument.

    Notes
    -----
    Scores and sums accumulate in float32 (float64 for float64). A row that sees no key gives 0,
    and -inf in lse, or its sink. Scores and biases of hidden places, NaN and infinity included,
    never reach a result, nor do rows of v past `kv_lengths` or outside of every query's window; a
    NaN or infinity in a row of v that some query sees, or that only `mask` or `variant` hide, may
    reach other queries, as in ``p @ v``.

    With dropout of probability p and independent numbers u in [0, 1), one for each weight,

    .. math:: o_i = \frac{1}{1 - p} \sum_j [u_{ij} \ge p] \,
        \mathrm{softmax}(s_i)_j \, v_j ,

    and lse is that of all weights [4]_. Whether a weight is dropped is a function of `seed` and of
    its place alone, of batch entry, query head, row and key of this call: the same for every dtype,
    in NumPy and on every GPU. Other libraries drop others for an equal seed. A NaN or infinity in v
    reaches a row under a dropped weight, too, as in ``p @ v``.

    Views are used in place when their last axis is contiguous and, on a GPU, every row begins at
    a multiple of 16 bytes; q, k or v for which this is not so is copied once. The answer is bitwise
    the same every run.

    The algorithm is Algorithm 1 of FlashAttention-2 [1]_.

    References
    ----------
    .. [1] T. Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work
       Partitioning", 2023, arXiv:2307.08691.
    .. [2] O. Press, N. Smith, M. Lewis, "Train Short, Test Long: Attention with Linear Biases
       Enables Input Length Extrapolation", 2022, arXiv:2108.12409.
    .. [3] N. Srivastava, G. Hinton, A. Krizhevsky, I. Sutskever, R. Salakhutdinov, "Dropout: A
       Simple Way to Prevent Neural Networks from Overfitting", JMLR 15, 2014.
    .. [4] T. Dao, D. Y. Fu, S. Ermon, A. Rudra, C. Re, "FlashAttention: Fast and Memory-Efficient
       Exact Attention with IO-Awareness", 2022, arXiv:2205.14135: Algorithm 2, in appendix B.

    Examples
    --------
    Four query heads that share two key heads:

    >>> import numpy as np
    >>> import cuflash
    >>> rng = np.random.default_rng(0)
    >>> q = rng.standard_normal((2, 4, 5, 16), dtype=np.float32)
    >>> k = rng.standard_normal((2, 2, 7, 16), dtype=np.float32)
    >>> v = rng.standard_normal((2, 2, 7, 16), dtype=np.float32)
    >>> cuflash.attention(q, k, v, causal=True).shape
    (2, 4, 5, 16)

    With q = 0 every key has the same weight, and lse is the logarithm of their number:

    >>> out, lse = cuflash.attention(0 * q, k, v, kv_lengths=np.array([7, 3]), return_lse=True)
    >>> np.exp(lse[:, 0, 0]).round(3)
    array([7., 3.], dtype=float32)
    >>> np.allclose(out[1, 0, 0], v[1, 0, :3].mean(axis=0))
    True

    ``(batch, length, heads, d)`` data needs no copy:

    >>> x = np.ones((2, 5, 4, 16), np.float32)
    >>> cuflash.attention(*[x.swapaxes(-2, -3)] * 3).shape
    (2, 4, 5, 16)

    Half of the weights, those of seed 7:

    >>> halved = cuflash.attention(q, k, v, dropout=0.5, seed=7)
    >>> np.array_equal(halved, cuflash.attention(q, k, v, dropout=0.5, seed=7))
    True
    """
    dropped = None if dropout is None and seed is None else check.dropout(dropout, seed)
    numbers = {} if dropped is None else {"seed": dropped.seed}
    options: tuple[Any, ...] = (
        *(scale, causal, window, q_start, kv_lengths, precision, return_lse, softcap),
        *(dropout, dropped is not None),
    )
    inputs: tuple[Any, ...] = (q, k, v)
    if not (alibi is bias is mask is sinks is variant is None):
        inputs, options = with_variants(inputs, options, (alibi, bias, mask, sinks), variant)
    key, answers = None, None
    if out is None:
        key, answers = repeat.again("attention", inputs, options, (*numbers.values(),))
    if answers is not None:
        return AttentionResult(*answers) if return_lse else answers[0]
    caller, problem, operands = prepare(
        q,
        k,
        v,
        scale=scale,
        causal=causal,
        window=window,
        q_start=q_start,
        kv_lengths=kv_lengths,
        softcap=softcap,
        alibi=alibi,
        bias=bias,
        mask=mask,
        sinks=sinks,
        variant=variant,
        dropout=dropout,
        seed=seed,
        precision=precision,
        return_lse=return_lse,
        out=out,
    )
    return computed(caller, problem, operands, key, inputs, numbers)


def computed(
    caller: arrays.Caller,
    problem: Problem,
    operands: Operands,
    key: Any,
    inputs: Sequence[Any],
    numbers: dict[str, int],
) -> Any:
    """Do what was prepared, remember it under `key`, and return what the caller gets."""
    with caller, Recording() as made:
        result, lse = allocate(caller, problem, operands)
        _backend(caller).forward(problem, operands)
    repeat.remember(key, made, inputs, (result,) if lse is None else (result, lse), numbers)
    if not problem.return_lse:
        return caller.give(result)
    return AttentionResult(caller.give(result), caller.give(lse))


def merge_attention(outs: Sequence[Any], lses: Sequence[Any], *, out: Any = None) -> Any:
    """Join results of attention over disjoint sets of keys into the result over all of them.

    Parameters
    ----------
    outs : sequence of arrays, each of shape (..., heads, len_q, d_v)
        The parts' outputs, at least one, of one shape and dtype.
    lses : sequence of arrays, each of shape (..., heads, len_q)
        The parts' lse: float32, or float64 with float64 outs. A part whose lse is -inf in a row
        contributes nothing to it.
    out : array or (array or None, array or None), optional
        Where ``out`` and ``lse`` go, and what comes back; no overlap with the parts.

    Returns
    -------
    MergedAttention
        The named tuple ``(out, lse)``, as :func:`attention` would have given it, to the rounding
        of the outs' dtype. A row that no part has keys for is 0 and -inf.

    Raises
    ------
    TypeError
        For what is not an array, kinds or devices that are mixed, and dtypes.
    ValueError
        For no parts at all, shapes and memory.
    RuntimeError
        In the capture of a CUDA graph, for parts or outputs that are not contiguous, and for more
        than 64 parts.

    Notes
    -----
    ``lse = log(sum(exp(lse_i)))`` and ``out = sum(exp(lse_i - lse) * out_i)``, summed in float32
    (float64 for float64) in the order given.

    Dropout counts rows and keys from the first of each call: parts of one attention need seeds of
    their own, and together they drop other weights than one call would.

    Examples
    --------
    >>> import numpy as np
    >>> import cuflash
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 6, 8))
    >>> parts = [
    ...     cuflash.attention(q, k[:, part], v[:, part], return_lse=True)
    ...     for part in (slice(0, 4), slice(4, 6))
    ... ]
    >>> merged = cuflash.merge_attention(*zip(*parts))
    >>> np.allclose(merged.out, cuflash.attention(q, k, v))
    True
    """
    caller, native_outs, native_lses, result, lse = prepare_merge(outs, lses, out=out)
    with caller:
        if result is None:
            result = caller.empty(native_outs[0].shape, native_outs[0].dtype)
        if lse is None:
            lse = caller.empty(native_lses[0].shape, native_lses[0].dtype)
        _backend(caller).merge(native_outs, native_lses, result, lse)
    return MergedAttention(caller.give(result), caller.give(lse))


def prepare(
    q: Any,
    k: Any,
    v: Any,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: int | tuple[int | None, int | None] | None = None,
    q_start: Any = None,
    kv_lengths: Any = None,
    softcap: float | None = None,
    alibi: Any = None,
    bias: Any = None,
    mask: Any = None,
    sinks: Any = None,
    variant: Variant | None = None,
    dropout: float | None = None,
    seed: int | None = None,
    precision: str | None = None,
    return_lse: bool = False,
    out: Any = None,
) -> tuple[arrays.Caller, Problem, Operands]:
    """Check attention's arguments and say what is to be done, without doing any of it."""
    causal, return_lse = check.flag("causal", causal), check.flag("return_lse", return_lse)
    left, right = check.window_sides(window)
    asked = bind.asked(softcap, variant, alibi=alibi, bias=bias, mask=mask, sinks=sinks)
    dropped = check.dropout(dropout, seed)
    start, starts = check.int_or_array("q_start", q_start)
    length, lengths = check.int_or_array("kv_lengths", kv_lengths)
    outputs = check.named_outputs(out, both=return_lse)
    caller, native = arrays.take(
        {
            "q": q,
            "k": k,
            "v": v,
            "q_start": starts,
            "kv_lengths": lengths,
            **asked.named_arrays,
            **outputs,
        },
        outputs=tuple(outputs),
    )
    dtype = check.common_dtype(native, ("q", "k", "v"))
    operands = check.inputs(native)
    operands.dropout = dropped
    check.integers(caller, operands, start, length)
    program, operands.values = bind.bind(asked, native, operands, dtype, start, length)
    if length is not None:
        operands.k, operands.v = operands.k[..., :length, :], operands.v[..., :length, :]
    left, right = check.useful_sides(operands, start, left, 0 if causal else right)
    if left is None and right is None and not program.steps:
        start = operands.q_start = None
    problem = described(
        operands,
        dtype=dtype,
        scale=scale,
        left=left,
        right=right,
        q_start=start,
        precision=precision,
        return_lse=return_lse,
        variant=program,
    )
    shape = problem.out_shape[operands.one_head :]
    operands.given = check.given_outputs(native, outputs, shape, dtype)
    return caller, problem, operands


def described(
    operands: Operands,
    *,
    dtype: str,
    scale: float | None,
    left: int | None,
    right: int | None,
    q_start: int | None,
    precision: str | None,
    return_lse: bool,
    variant: Program,
) -> Problem:
    """Describe a call of these arrays; `scale` and `precision` are as the caller gave them."""
    *batch, heads, len_q, head_dim = operands.q.shape
    kv_heads, len_k, head_dim_v = operands.v.shape[-3:]
    return Problem(
        dtype=dtype,
        batch=tuple(batch),
        heads=heads,
        kv_heads=kv_heads,
        len_q=len_q,
        len_k=len_k,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        scale=check.scale(scale, head_dim),
        left=left,
        right=right,
        q_start=q_start,
        q_start_array=operands.q_start is not None,
        kv_lengths_array=operands.kv_lengths is not None,
        precision=check.precision(precision, dtype),
        return_lse=return_lse,
        variant=variant,
        varlen=operands.q_offsets is not None,
        dropout=operands.dropout is not None,
    )


def with_variants(
    inputs: tuple[Any, ...], options: tuple[Any, ...], given: tuple[Any, ...], variant: Any
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """A call's arrays and what else it is known by, those of variants among them."""
    present = tuple(array is not None for array in given)
    inputs += tuple(array for array in given if array is not None)
    if isinstance(variant, Variant):
        return (*inputs, *variant.arrays), (*options, present, variant.key)
    return inputs, (*options, present, variant)


def allocate(caller: arrays.Caller, problem: Problem, operands: Operands) -> tuple[Any, Any]:
    """Make the outputs that were not given; return (out, lse) with the caller's axes.

    To be called inside ``with caller``.
    """
    out, lse = operands.given
    if out is None:
        out = caller.empty(problem.out_shape[operands.one_head :], operands.q.dtype)
    if lse is None and problem.return_lse:
        lse = caller.empty(problem.lse_shape[operands.one_head :], np.dtype(problem.lse_dtype))
    operands.out = out[None] if operands.one_head else out
    operands.lse = lse[None] if operands.one_head and lse is not None else lse
    return out, lse


def prepare_merge(
    outs: Sequence[Any], lses: Sequence[Any], *, out: Any = None
) -> tuple[arrays.Caller, list[Any], list[Any], Any, Any]:
    """Check merge_attention's arguments; return caller, outs, lses, out and lse (or None)."""
    check.parts(outs, lses)
    out_names = [f"outs[{i}]" for i in range(len(outs))]
    lse_names = [f"lses[{i}]" for i in range(len(lses))]
    outputs = check.named_outputs(out, both=True)
    caller, native = arrays.take(
        {**dict(zip(out_names, outs)), **dict(zip(lse_names, lses)), **outputs},
        outputs=tuple(outputs),
    )
    dtype = check.common_dtype(native, out_names)
    shape = check.part_shape(native[out_names[0]])
    for out_name, lse_name in zip(out_names, lse_names):
        check.array(out_name, native[out_name], shape, (dtype,))
        check.array(lse_name, native[lse_name], shape[:-1], (sum_dtype(dtype),))
    given = check.given_outputs(native, outputs, shape, dtype)
    parts = [native[name] for name in out_names], [native[name] for name in lse_names]
    return caller, *parts, *given


def _plans(*args: Any, **kwargs: Any) -> tuple[int, list[Plan]]:
    """Where a call of attention would run, and what it would launch."""
    return launches(*prepare(*args, **kwargs))


def launches(caller: arrays.Caller, problem: Problem, operands: Operands) -> tuple[int, list[Plan]]:
    """Where what was prepared would run, -1 for NumPy, and its launches."""
    if not caller.on_gpu:
        return -1, []
    with caller:
        return caller.device, _backend(caller).plans(problem, operands)


def _merge_plans(*args: Any, **kwargs: Any) -> tuple[int, list[Plan]]:
    """Where a call of merge_attention would run, and what it would launch."""
    caller, outs, _, result, _ = prepare_merge(*args, **kwargs)
    if not caller.on_gpu:
        return -1, []
    return caller.device, _backend(caller).merge_plans(outs, outs[0] if result is None else result)


def _backend(caller: arrays.Caller) -> ModuleType:
    """Return where the work is done; only a GPU array brings in CuPy."""
    if caller.on_gpu:
        from . import gpu

        return gpu
    from . import cpu

    return cpu


tools.register(attention, _plans)
tools.register(merge_attention, _merge_plans)
