"""The public attention over packed sequences, and the checks of its arguments."""

from __future__ import annotations

from typing import Any

from .. import arrays, tools
from ..jit import repeat
from ..jit.launch import Plan
from . import api, check
from .api import AttentionResult
from .problem import Operands, Problem
from .variants import bind
from .variants.variant import Variant


def attention_varlen(
    q: Any,
    k: Any,
    v: Any,
    q_offsets: Any,
    k_offsets: Any = None,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: int | tuple[int | None, int | None] | None = None,
    q_start: Any = None,
    softcap: float | None = None,
    alibi: Any = None,
    sinks: Any = None,
    variant: Variant | None = None,
    dropout: float | None = None,
    seed: int | None = None,
    precision: str | None = None,
    return_lse: bool = False,
    out: Any = None,
) -> Any:
    """Attention within each of several sequences that lie behind one another, without padding.

    Each sequence's rows see its own keys only: what :func:`attention` gives for it alone. Work and
    memory go with the sequences' lengths, not with the longest one's.

    Parameters
    ----------
    q : array, shape (heads, tokens, d)
        Queries of all sequences: float16, bfloat16, float32 or float64, as in :func:`attention`.
        Data of shape (tokens, heads, d) is passed as ``q.swapaxes(0, 1)`` and used in place.
    k : array, shape (kv_heads, key_tokens, d)
    v : array, shape (kv_heads, key_tokens, d_v)
    q_offsets : integer array, shape (sequences + 1,)
        Sequence n has the rows from ``q_offsets[n]`` to before ``q_offsets[n + 1]`` of q and out:
        0, then what never falls, up to `tokens` at most. Rows behind the last offset are of no
        sequence.
    k_offsets : integer array, shape (sequences + 1,), optional
        Likewise of k and v; `q_offsets` by default.
    scale, causal, window : optional
        As in :func:`attention`, with each sequence's own lengths.
    q_start : int or integer array, shape (sequences,), optional
        The key position of each sequence's first query. By default its queries are its last rows.
    softcap : float, optional
    alibi, sinks : array, shape (heads,) or (sequences, heads), optional
    variant : Variant, optional
        Here `b` is the number of the sequence, `row`, `i` and `j` count from its beginning, and
        `len_q` and `len_k` are its own lengths. A bias or mask of each sequence is an array that
        it names, for example ``"score + bias[b, row, j]"``.
    dropout : float, optional
    seed : int, optional
        As in :func:`attention`, with `b`, the row and the key as in a variant.
    precision : {None, "tf32"}
    return_lse : bool, default False
    out : array, or (array or None, array or None) with ``return_lse``, optional

    Returns
    -------
    array or AttentionResult
        ``out``, shape (heads, tokens, d_v), of q's dtype; with ``return_lse=True`` the named tuple
        ``(out, lse)``, lse of shape (heads, tokens). Rows of no sequence are those of one without
        keys: 0, and -inf or the last sequence's sink in lse.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As :func:`attention`. On a GPU the values of `q_offsets`, `k_offsets` and a `q_start` array
        are clamped to what is allowed, not checked, unless ``CUFLASH_CHECK=1``.

    Notes
    -----
    Offsets stay on the device, and nothing waits for them: a small launch ahead finds out which
    tiles of queries there are, and has those of the sequences with most keys start first. With a
    mask in a `variant`, each of them has bits for as many tiles of keys as k has in all.

    Examples
    --------
    Three sequences of 5, 1 and 4 tokens:

    >>> import numpy as np
    >>> import cuflash
    >>> x = np.random.default_rng(0).standard_normal((2, 10, 16))
    >>> offsets = np.array([0, 5, 6, 10])
    >>> out = cuflash.attention_varlen(x, x, x, offsets, causal=True)
    >>> last = x[:, 6:10]
    >>> np.allclose(out[:, 6:10], cuflash.attention(last, last, last, causal=True))
    True
    """
    dropped = None if dropout is None and seed is None else check.dropout(dropout, seed)
    numbers = {} if dropped is None else {"seed": dropped.seed}
    options: tuple[Any, ...] = (
        *(scale, causal, window, q_start, precision, return_lse, softcap),
        *(dropout, dropped is not None, k_offsets is None),
    )
    inputs: tuple[Any, ...] = (q, k, v, q_offsets)
    if k_offsets is not None:
        inputs += (k_offsets,)
    if not (alibi is sinks is variant is None):
        inputs, options = api.with_variants(inputs, options, (alibi, sinks), variant)
    key, answers = None, None
    if out is None and not arrays.checks_on_gpu():  # whoever asks to check asks for each call
        key, answers = repeat.again("attention_varlen", inputs, options, (*numbers.values(),))
    if answers is not None:
        return AttentionResult(*answers) if return_lse else answers[0]
    caller, problem, operands = prepare(
        q,
        k,
        v,
        q_offsets,
        k_offsets,
        scale=scale,
        causal=causal,
        window=window,
        q_start=q_start,
        softcap=softcap,
        alibi=alibi,
        sinks=sinks,
        variant=variant,
        dropout=dropout,
        seed=seed,
        precision=precision,
        return_lse=return_lse,
        out=out,
    )
    return api.computed(caller, problem, operands, key, inputs, numbers)


def prepare(
    q: Any,
    k: Any,
    v: Any,
    q_offsets: Any,
    k_offsets: Any = None,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: int | tuple[int | None, int | None] | None = None,
    q_start: Any = None,
    softcap: float | None = None,
    alibi: Any = None,
    sinks: Any = None,
    variant: Variant | None = None,
    dropout: float | None = None,
    seed: int | None = None,
    precision: str | None = None,
    return_lse: bool = False,
    out: Any = None,
) -> tuple[arrays.Caller, Problem, Operands]:
    """Check attention_varlen's arguments and say what is to be done, without doing any of it."""
    causal, return_lse = check.flag("causal", causal), check.flag("return_lse", return_lse)
    left, right = check.window_sides(window)
    asked = bind.asked(softcap, variant, alibi=alibi, sinks=sinks)
    if asked.variant is not None and any(part.blocks for part in asked.variant.parts):
        raise ValueError(
            "`variant` must have no BlockMask, whose blocks are of one length: index blocks of "
            'your own as "blocks[b, row // 128, j // 128]"'
        )
    dropped = check.dropout(dropout, seed)
    start, starts = check.int_or_array("q_start", q_start)
    outputs = check.named_outputs(out, both=return_lse)
    caller, native = arrays.take(
        {
            "q": q,
            "k": k,
            "v": v,
            "q_offsets": q_offsets,
            "k_offsets": k_offsets,
            "q_start": starts,
            "kv_lengths": None,
            **asked.named_arrays,
            **outputs,
        },
        outputs=tuple(outputs),
    )
    dtype = check.common_dtype(native, ("q", "k", "v"))
    operands = check.packed_inputs(native)
    operands.dropout = dropped
    check.integers(caller, operands, start, None)
    check.offsets(caller, operands)
    program, operands.values = bind.bind(asked, native, operands, dtype)
    problem = api.described(
        operands,
        dtype=dtype,
        scale=scale,
        left=left,
        right=0 if causal else right,
        q_start=start,
        precision=precision,
        return_lse=return_lse,
        variant=program,
    )
    operands.given = check.given_outputs(native, outputs, problem.out_shape, dtype)
    return caller, problem, operands


def _plans(*args: Any, **kwargs: Any) -> tuple[int, list[Plan]]:
    """Where a call of attention_varlen would run, and what it would launch."""
    return api.launches(*prepare(*args, **kwargs))


tools.register(attention_varlen, _plans)
