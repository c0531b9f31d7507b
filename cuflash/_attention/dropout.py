"""Which weights dropout drops, in NumPy: `dropout.cuh` says the same in CUDA.

A weight's fate is a function of the seed and of its place (b, h, row, j): the batch entry, counted
through all batch axes, the query head, the row of queries and the key. So it is the same in every
tiling, on every engine, and in a backward pass, and nothing is stored.

One call of Philox serves eight places, those that one lane of a warp has of a 16 x 16 block of an
accumulator of the tensor cores: rows g and g + 8, keys 2t, 2t + 1, 2t + 8 and 2t + 9. Its four
words are eight numbers of 16 bits, and a weight is dropped where its number is below `threshold`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..philox import Array, philox

STEPS = 1 << 16  # probabilities are multiples of one in so many
ROUNDS = 7  # of Philox: FlashAttention-2 makes as many
BLOCK = 16  # rows, and keys, of the blocks that calls of Philox are for


@dataclass(frozen=True)
class Dropout:
    """What is dropped.

    Parameters
    ----------
    threshold : int
        A weight is dropped with the probability ``threshold / STEPS``: from 1 to ``STEPS - 1``.
    seed : int
        Of 64 bits.
    """

    threshold: int
    seed: int

    @property
    def rescale(self) -> float:
        """What the weights that are kept are multiplied by, 1 over the probability to keep one."""
        return STEPS / (STEPS - self.threshold)

    def kept(self, b: int, heads: Array, rows: Array, keys: Array) -> Array:
        """Which weights of batch entry `b` are kept, as a mask of (*heads.shape, rows, keys).

        Rows and keys are ranges: each number is one more than that before it.
        """
        top, left = rows[0] // BLOCK, keys[0] // BLOCK
        down, across = rows[-1] // BLOCK + 1 - top, keys[-1] // BLOCK + 1 - left
        x = 8 * top + np.arange(8 * down)
        y = 4 * left + np.arange(4 * across)
        counter = np.empty((heads.size, x.size, y.size, 4), np.uint32)
        counter[..., 0], counter[..., 1] = x[:, None], y
        counter[..., 2], counter[..., 3] = heads.reshape(-1, 1, 1), b
        key = np.array([self.seed & 0xFFFFFFFF, self.seed >> 32], np.uint32)
        words = philox(counter, key, ROUNDS)
        numbers = np.stack([words & 0xFFFF, words >> 16], axis=-1)
        # Of x a block and g, of y a block and t; then row // 8 % 2, key // 8 % 2 and key % 2.
        numbers = numbers.reshape(heads.size, down, 8, across, 4, 2, 2, 2)
        numbers = numbers.transpose(0, 1, 5, 2, 3, 6, 4, 7)
        blocks = numbers.reshape(*heads.shape, BLOCK * down, BLOCK * across) >= self.threshold
        first_row, first_key = rows[0] - BLOCK * top, keys[0] - BLOCK * left
        return blocks[..., first_row : first_row + rows.size, first_key : first_key + keys.size]
