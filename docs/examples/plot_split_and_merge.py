"""
Attention in parts
==================

The keys may be in several places: in chunks that arrive one after the other, in a prefix that many
requests share, on several GPUs. Each part is attended to by itself, and `merge_attention` puts the
answers together as if all keys had been there.
"""

# %%
# A part's output is not enough to do so, since nobody knows any more how much the part weighed. The
# missing number is ``lse``, the logarithm of the sum of the exponentials of its scores, one for
# each query.

from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np

import cuflash

rng = np.random.default_rng(seed=3)
heads, len_q, len_k, d = 2, 24, 4096, 64
q = 2 * rng.standard_normal((heads, len_q, d), dtype=np.float32)
k = rng.standard_normal((heads, len_k, d), dtype=np.float32)
v = rng.standard_normal((heads, len_k, d), dtype=np.float32)

edges = [0, 512, 1536, 2560, 4096]
parts = [
    cuflash.attention(q, k[:, begin:end], v[:, begin:end], return_lse=True)
    for begin, end in pairwise(edges)
]
merged = cuflash.merge_attention([part.out for part in parts], [part.lse for part in parts])

# %%
# Merged and computed at once differ by the rounding of float32, in any order of the parts.

whole = cuflash.attention(q, k, v, return_lse=True)
reverse = cuflash.merge_attention(
    [part.out for part in reversed(parts)], [part.lse for part in reversed(parts)]
)
print(f"out: {np.abs(merged.out - whole.out).max():.1e}")
print(f"lse: {np.abs(merged.lse - whole.lse).max():.1e}")
print(f"out, the last part first: {np.abs(reverse.out - whole.out).max():.1e}")

# %%
# What a part weighs is :math:`e^{\text{lse}_\text{part} - \text{lse}}`, its share of the sum. The
# shares of each query add up to 1, and the merged output is the mean of the parts' outputs with
# these weights.

shares = np.exp(np.stack([part.lse for part in parts]) - merged.lse)
mean = sum(share[..., None] * part.out for share, part in zip(shares, parts, strict=True))
np.testing.assert_allclose(shares.sum(axis=0), 1, rtol=1e-5)
np.testing.assert_allclose(mean, merged.out, rtol=0, atol=1e-6)

figure, axis = plt.subplots(figsize=(8, 3.5), layout="constrained")
floor = np.zeros(len_q)
for share, (begin, end) in zip(shares[:, 0], pairwise(edges), strict=True):
    axis.bar(np.arange(len_q), share, bottom=floor, width=0.9, label=f"keys {begin} to {end - 1}")
    floor += share
axis.set_xlabel("query")
axis.set_ylabel("share of the sum")
axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

# %%
# A part may be empty for a query, as it is behind a causal mask: it comes back with out = 0 and
# lse = -inf, weighs nothing, and changes nothing.

nothing = cuflash.attention(q, k, v, kv_lengths=0, return_lse=True)
again = cuflash.merge_attention([merged.out, nothing.out], [merged.lse, nothing.lse])
np.testing.assert_array_equal(again.out, merged.out)
