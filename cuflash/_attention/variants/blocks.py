"""The blocks of a BlockMask: their size, and the calls that they are for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Blocks:
    """The array of blocks among a part's values.

    Parameters
    ----------
    name : str
        Of the array.
    dtype : str
    size : (int, int)
        Queries and keys of a block.
    places : str or None
        The mask of which these are the blocks: it says the same of each place by itself. None for
        a caller's own blocks.
    made_for : tuple of (str, int or str)
        What decided about the blocks, as a call must have it; empty for a caller's own.
    """

    name: str
    dtype: str
    size: tuple[int, int]
    places: str | None = None
    made_for: tuple[tuple[str, int | str], ...] = ()


def check(
    label: str, blocks: Blocks, shape: tuple[int, ...], call: Mapping[str, int | str | None]
) -> None:
    """Compare what blocks are for with a call, in which None is what its arrays decide."""
    for name, wanted in blocks.made_for:
        if call[name] != wanted:
            found = "one that arrays decide" if call[name] is None else call[name]
            raise ValueError(
                f"`{label}` were made for {name} {wanted}, not {found}: make the BlockMask anew"
            )
    if not blocks.made_for:
        _check_shape(label, blocks, shape, call)


def _check_shape(
    label: str, blocks: Blocks, shape: tuple[int, ...], call: Mapping[str, int | str | None]
) -> None:
    lengths = int(call["len_q"] or 0), int(call["len_k"] or 0)
    n_q, n_k = (-(-length // size) for length, size in zip(lengths, blocks.size))
    if shape[-2:] != (n_q, n_k):
        raise ValueError(
            f"`{label}` must have shape (..., {n_q}, {n_k}), as blocks of {blocks.size[0]} queries "
            f"and {blocks.size[1]} keys need for {lengths[0]} and {lengths[1]}, not {shape}"
        )
    for name, length in zip(("heads", "batch"), reversed(shape[:-2])):
        if length not in (1, call[name]):
            raise ValueError(
                f"`{label}` must have 1 or {call[name]} along its axis of {name}, not {length}, "
                f"the shape being {shape}"
            )
