"""The public BlockMask: a mask of whole blocks."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..check import is_int
from .variant import Part, Variant

# By the axes of the blocks; an axis of length 1 is that of all heads, or of all batch entries.
_EXPRESSIONS = {
    2: "blocks[row // size_q, j // size_k]",
    3: "blocks[h, row // size_q, j // size_k]",
    4: "blocks[b, h, row // size_q, j // size_k]",
}


class BlockMask(Variant):
    """Which blocks of scores there are: block-sparse attention.

    What is not there is neither read nor computed.

    Parameters
    ----------
    blocks : array of bool, shape ([[batch,] heads,] n_q, n_k)
        True where the queries of a block see its keys: ``n_q = ceil(len_q / size_q)`` and
        ``n_k = ceil(len_k / size_k)``. Length 1 along heads or batch serves all of them; the batch
        is counted through all batch axes.
    size : int or (int, int)
        Queries and keys of a block. Multiples of 128 fit the kernels' tiles.

    Raises
    ------
    TypeError
        For blocks that are no array of 2 to 4 axes, and sizes that are no integers.
    ValueError
        For sizes below 1. Shapes are compared with a call's.

    Notes
    -----
    It is a :class:`Variant`, passed as ``variant=`` and joined with others by ``&``: Algorithm 5 of
    FlashAttention [1]_, for blocks of any size. Where a block is only a part of a kernel's tile,
    its scores are computed and hidden.

    `local_global`, `strided` and `butterfly` make blocks.

    References
    ----------
    .. [1] T. Dao, D. Y. Fu, S. Ermon, A. Rudra, C. Re, "FlashAttention: Fast and Memory-Efficient
       Exact Attention with IO-Awareness", 2022, arXiv:2205.14135.

    Examples
    --------
    >>> import numpy as np
    >>> import cuflash
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 64, 8))
    >>> blocks = cuflash.BlockMask.local_global(4, 4, local=0, leading=1)
    >>> blocks.astype(int)
    array([[1, 1, 1, 1],
           [1, 1, 0, 0],
           [1, 0, 1, 0],
           [1, 0, 0, 1]])
    >>> out = cuflash.attention(q, k, v, variant=cuflash.BlockMask(blocks, 16))
    >>> mask = np.kron(blocks, np.ones((16, 16))) > 0
    >>> np.allclose(out, cuflash.attention(q, k, v, mask=mask))
    True
    """

    def __init__(self, blocks: Any, size: int | tuple[int, int]) -> None:
        axes = len(getattr(blocks, "shape", ()))
        if axes not in _EXPRESSIONS:
            raise TypeError(
                "`blocks` must be an array of 2, 3 or 4 axes, ([[batch,] heads,] n_q, n_k), not "
                f"{type(blocks).__name__} of shape {getattr(blocks, 'shape', None)}"
            )
        size_q, size_k = _sizes(size)
        super().__init__(mask=_EXPRESSIONS[axes])
        (part,) = self(blocks=blocks, size_q=size_q, size_k=size_k).parts
        self.parts = (Part(None, part.mask, part.axes, part.values, (size_q, size_k)),)
        self._settle()

    @staticmethod
    def local_global(n_q: int, n_k: int, *, local: int = 1, leading: int = 1) -> np.ndarray:
        """Blocks at most `local` off the diagonal, and all of the `leading` first ones' rows and
        columns, as NumPy has them: Longformer's and BigBird's windows with global tokens."""
        i, j = np.ogrid[:n_q, :n_k]
        return (abs(i - j) <= local) | (i < leading) | (j < leading)

    @staticmethod
    def strided(n_q: int, n_k: int, stride: int) -> np.ndarray:
        """Every `stride`-th block off the diagonal, and those up to the first of these: the Sparse
        Transformer's pattern without its triangle."""
        i, j = np.ogrid[:n_q, :n_k]
        return (abs(i - j) < stride) | ((i - j) % stride == 0)

    @staticmethod
    def butterfly(n_q: int, n_k: int) -> np.ndarray:
        """Blocks whose numbers are equal, or differ in one binary digit: Pixelated Butterfly's."""
        i, j = np.ogrid[:n_q, :n_k]
        differing = i ^ j
        return (differing & (differing - 1)) == 0


def check_blocks(label: str, part: Part, shape: tuple[int, ...], sizes: dict[str, int]) -> None:
    """Compare the shape of a part's blocks with a call's batch, heads, len_q and len_k."""
    assert part.blocks is not None
    n_q, n_k = (-(-sizes[n] // size) for n, size in zip(("len_q", "len_k"), part.blocks))
    if shape[-2:] != (n_q, n_k):
        raise ValueError(
            f"`{label}` must have shape (..., {n_q}, {n_k}), as blocks of {part.blocks[0]} queries "
            f"and {part.blocks[1]} keys need for {sizes['len_q']} and {sizes['len_k']}, not {shape}"
        )
    for name, length in zip(("heads", "batch"), reversed(shape[:-2])):
        if length not in (1, sizes[name]):
            raise ValueError(
                f"`{label}` must have 1 or {sizes[name]} along its axis of {name}, not {length}, "
                f"the shape being {shape}"
            )


def _sizes(size: Any) -> tuple[int, int]:
    pair = size if isinstance(size, tuple) else (size, size)
    if len(pair) != 2 or not all(map(is_int, pair)):
        raise TypeError(f"`size` must be an int or a pair of them, (queries, keys), not {size!r}")
    if min(pair) < 1:
        raise ValueError(f"`size` must be at least 1, not {size!r}")
    return int(pair[0]), int(pair[1])
