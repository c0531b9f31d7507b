"""The public BlockMask: a mask of whole blocks."""

from __future__ import annotations

from typing import Any

import numpy as np

from ... import tools
from .. import block_kinds
from .blocks import Blocks
from .variant import Part, Variant

# By the number of the axes, what stands before rows and keys. An axis of length 1 is that of
# all heads, or of all batch entries.
_FRONT = {2: "", 3: "h, ", 4: "b, h, "}


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

    Attributes
    ----------
    blocks : array
        As given; of a BlockMask that `of` made, int8: 0 where a block is empty, 1 where its mask
        shows some places, 2 where it shows all.

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

    `local_global`, `strided` and `butterfly` make blocks; `of` finds those of any Variant's mask.

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
        if axes not in _FRONT:
            raise TypeError(
                "`blocks` must be an array of 2, 3 or 4 axes, ([[batch,] heads,] n_q, n_k), not "
                f"{type(blocks).__name__} of shape {getattr(blocks, 'shape', None)}"
            )
        size_q, size_k = block_kinds.size_of_blocks(size)
        # As constants the sizes divide by a product, or by a shift.
        mask = f"blocks[{_FRONT[axes]}row // {size_q}, j // {size_k}]"
        own = Blocks("blocks", "bool", (size_q, size_k))
        self.blocks = blocks
        self.parts = (Part(None, mask, (("blocks", axes),), (blocks,), own),)
        self._settle()

    @staticmethod
    def of(
        variant: Variant,
        len_q: int,
        len_k: int,
        *,
        heads: int = 1,
        batch: int = 1,
        size: int | tuple[int, int] = 128,
        q_start: int | None = None,
        like: Any = None,
    ) -> BlockMask:
        """Look at a Variant's mask once, block by block, for many calls.

        The mask is evaluated at every place. Calls then skip the blocks that it leaves empty, and
        evaluate it in those alone that it divides.

        Parameters
        ----------
        variant : Variant
            With a mask and all its values; it may be several joined by ``&``, and have scores,
            which stay as they are.
        len_q, len_k : int
            As the calls will have them.
        heads, batch : int, default 1
            Query heads, and entries of all batch axes. They matter to a mask that names ``h`` or
            ``b``, which then has blocks for each.
        size : int or (int, int), default 128
            Queries and keys of a block.
        q_start : int, optional
            As the calls will have it: by default ``len_k - len_q``. It matters to a mask that names
            ``i``.
        like : array, optional
            An input of the calls, such as ``q``. The blocks are found where it is, by default where
            the variant's arrays are, and in NumPy for a variant without any; real numbers are
            computed as for its dtype, by default as for float32.

        Returns
        -------
        BlockMask
            The same mask, and the same scores.

        Raises
        ------
        TypeError
            For what is no Variant, arrays of several kinds or devices, dtypes, and numbers that are
            no integers.
        ValueError
            For a variant that has no mask or lacks values, and for numbers out of range.

        Notes
        -----
        A call that is not what the blocks were made for is an error: one of other lengths; of
        another ``q_start``, ``heads``, ``batch`` or ``kv_lengths``, if the mask names ``i``, ``h``,
        ``b`` or ``len_k``; and of another dtype, if it computes with real numbers. Arrays of
        ``q_start`` and ``kv_lengths`` are not looked into, so no name may depend on them: ``len_k``
        does on the second, and ``i`` on both, or on ``q_start`` alone where that is given.

        The blocks are of the values that the variant's arrays have now: make them anew when these
        change.

        Examples
        --------
        >>> import numpy as np
        >>> import cuflash
        >>> doc = np.repeat([0, 1], [16, 48])
        >>> same = cuflash.Variant(mask="doc[row] == doc[j] and j <= row")(doc=doc)
        >>> sparse = cuflash.BlockMask.of(same, 64, 64, size=16)
        >>> sparse.blocks
        array([[1, 0, 0, 0],
               [0, 1, 0, 0],
               [0, 2, 1, 0],
               [0, 2, 2, 1]], dtype=int8)
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 64, 8))
        >>> out = cuflash.attention(q, k, v, variant=sparse)
        >>> np.array_equal(out, cuflash.attention(q, k, v, variant=same))
        True
        """
        options = {"heads": heads, "batch": batch, "size": size, "q_start": q_start, "like": like}
        asked = block_kinds.prepare(variant, len_q, len_k, **options)
        mask = object.__new__(BlockMask)
        mask.blocks = block_kinds.find(asked)
        mask.parts = tuple(block_kinds.parts(variant, asked, mask.blocks))
        mask._settle()
        return mask

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


tools.register(BlockMask.of, block_kinds.plans)
