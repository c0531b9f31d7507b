"""A user's program, for mypy --strict: what is right passes, and what is wrong is found.

Nothing here is run. An `ignore` that mypy does not need is an error under --strict, so each line
that carries one must be refused by the public signatures.
"""

import numpy as np

import cuflash

q = np.zeros((8, 10, 64), np.float32)
lengths = np.array([10])

cuflash.attention(q, q, q)
cuflash.attention(
    q,
    q,
    q,
    scale=0.5,
    causal=True,
    window=(4, None),
    q_start=0,
    kv_lengths=lengths,
    precision="tf32",
    return_lse=False,
    out=q,
)
out, lse = cuflash.attention(q, q, q, window=3, return_lse=True, out=(q, None))
packed = cuflash.attention_varlen(q, q, q, q, return_lse=True).lse
merged_out, merged_lse = cuflash.merge_attention([out, out], (lse, lse))

cuflash.softmax(q, axis=-1, out=q)
cuflash.log_softmax([1.0, 2.0], axis=(0,))
cuflash.logsumexp(q, axis=(0, 1), b=2.0, keepdims=True)
cuflash.logsumexp(q, -1, None, False, True)

near: cuflash.Variant = cuflash.Variant(mask="abs(i - j) < width")(width=3)
blocks: cuflash.Variant = cuflash.BlockMask(q, (64, 128)) & near
cuflash.attention(q, q, q, dropout=0.1, seed=7)
cuflash.attention(q, q, q, softcap=30.0, alibi=q, bias=q, mask=q, sinks=q, variant=blocks)

text: str = cuflash.explain(cuflash.attention, q, q, q, causal=True)
cuflash.warmup(cuflash.attention, q, q, q)
cuflash.show_config()

cuflash.attention(q, q)  # type: ignore[call-arg]
cuflash.attention(q, q, q, 0.5)  # type: ignore[call-arg]
cuflash.attention(q, q, q, attn_mask=q)  # type: ignore[call-arg]
cuflash.attention(q, q, q, dropout="0.1", seed=7)  # type: ignore[arg-type]
cuflash.attention(q, q, q, dropout=0.1, seed=0.5)  # type: ignore[arg-type]
cuflash.attention(q, q, q, softcap="30")  # type: ignore[arg-type]
cuflash.attention(q, q, q, variant="j <= i")  # type: ignore[arg-type]
cuflash.Variant(score=1)  # type: ignore[arg-type]
cuflash.BlockMask(q, "64")  # type: ignore[arg-type]
cuflash.attention(q, q, q, scale="small")  # type: ignore[arg-type]
cuflash.attention(q, q, q, window=1.5)  # type: ignore[arg-type]
cuflash.attention(q, q, q, return_lse="yes")  # type: ignore[arg-type]
cuflash.merge_attention(1, 2)  # type: ignore[arg-type]
cuflash.softmax(q, axis="rows")  # type: ignore[arg-type]
cuflash.softmax(q, -1, q)  # type: ignore[call-arg]
