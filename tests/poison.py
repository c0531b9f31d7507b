"""NaN where nothing was written: fresh GPU memory that makes forgotten writes visible."""

from __future__ import annotations

from types import ModuleType

KEEP = 1 << 26  # bytes; more than a test's outputs and workspaces, little enough for many workers


def poison(xp: ModuleType) -> None:
    """Fill the free blocks of CuPy's memory pool with 0xFF bytes, a NaN in every float dtype.

    Whatever the next call allocates (outputs, workspaces) then holds NaN. With NumPy it does
    nothing: its fresh memory cannot be reached.
    """
    if xp.__name__ != "cupy":
        return
    pool = xp.get_default_memory_pool()
    pool.free_all_blocks()
    size = KEEP
    held = [(pool.malloc(size), size)]
    # Free blocks are multiples of 512 bytes: halving sizes take them up to the last one. When the
    # pool grows, no free block of that size was left.
    while size >= 512:
        total = pool.total_bytes()
        if pool.free_bytes() >= size:
            held.append((pool.malloc(size), size))
        if pool.free_bytes() < size or pool.total_bytes() > total:
            size //= 2
    for block, nbytes in held:
        block.memset_async(0xFF, nbytes)
