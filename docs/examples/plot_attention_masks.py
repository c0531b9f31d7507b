"""
Who sees whom: masks in pictures
================================

``causal``, ``window``, ``q_start`` and ``kv_lengths`` are one thing: they give each query an
interval of keys. Two tricks draw the intervals without looking inside.
"""

# %%
# With all queries zero, every score is zero and each key that a query may see has the same weight.
# With the identity matrix for values, the output *is* the matrix of weights.

import matplotlib.pyplot as plt
import numpy as np

import cuflash


def weights(len_q: int, len_k: int, **options) -> np.ndarray:
    """Return how much of each key (columns) each query (rows) takes when all keys are alike."""
    q = np.zeros((len_q, 8), np.float32)
    k = np.ones((len_k, 8), np.float32)
    v = np.eye(len_k, dtype=np.float32)
    return cuflash.attention(q, k, v, **options)


def draw(pictures: dict[str, np.ndarray]) -> None:
    """Draw matrices of weights side by side: a key that is seen in blue."""
    _, axes = plt.subplots(1, len(pictures), figsize=(10, 2.6), layout="constrained")
    for axis, (title, matrix) in zip(axes, pictures.items(), strict=True):
        axis.pcolormesh(matrix > 0, cmap="Blues", vmin=0, vmax=1.5, edgecolors="0.8")
        axis.set(xlabel="keys", aspect="equal", xticks=[], yticks=[])
        axis.set_title(title, fontsize=10)
        axis.invert_yaxis()
    axes[0].set_ylabel("queries")
    plt.show()


# %%
# As many queries as keys: ``causal`` is the lower triangle. A window counts the keys to the left
# and to the right of the query's own, ``None`` for no bound; ``causal`` sets the right side to 0.

draw(
    {
        "all": weights(12, 12),
        "causal": weights(12, 12, causal=True),
        "window=(3, 1)": weights(12, 12, window=(3, 1)),
        "window=(None, 2)": weights(12, 12, window=(None, 2)),
        "causal, window=3": weights(12, 12, causal=True, window=3),
    }
)

# %%
# Fewer queries than keys: by default the queries stand at the end, as the newest tokens of a text
# do. ``q_start`` puts the first of them elsewhere: 0 at the beginning, which gives the triangle at
# the top left.

draw(
    {
        "causal": weights(5, 12, causal=True),
        "causal, q_start=0": weights(5, 12, causal=True, q_start=0),
        "causal, q_start=4": weights(5, 12, causal=True, q_start=4),
        "window=(2, 1), q_start=4": weights(5, 12, window=(2, 1), q_start=4),
    }
)

# %%
# More queries than keys: the first queries stand before the first key. Those that see nothing get
# exactly 0.

draw(
    {
        "causal": weights(12, 5, causal=True),
        "window=(1, 1)": weights(12, 5, window=(1, 1)),
        "causal, q_start=0": weights(12, 5, causal=True, q_start=0),
    }
)

# %%
# ``kv_lengths`` ends the keys earlier, for each member of a batch at its own place; the queries
# then stand at the end of what is left.

q = np.zeros((3, 1, 5, 8), np.float32)  # (batch, heads, len_q, d)
k = np.ones((3, 1, 12, 8), np.float32)
v = np.broadcast_to(np.eye(12, dtype=np.float32), (3, 1, 12, 12))
lengths = np.array([12, 9, 3])
out, lse = cuflash.attention(q, k, v, causal=True, kv_lengths=lengths, return_lse=True)

draw({f"kv_lengths = {length}": out[n, 0] for n, length in enumerate(lengths)})

# %%
# ``lse`` counts them: each key that is seen adds :math:`e^0 = 1` to the sum, so its logarithm is
# that of the number of keys, and :math:`-\infty` for a query that sees none.

print(np.exp(lse[:, 0]).round().astype(int))
