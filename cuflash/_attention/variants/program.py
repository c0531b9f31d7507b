"""Variants one after another, translated: what a Problem says of them, and kernels are made of."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import cuda, tiles
from .expression import Node, evaluate, parse
from .kinds import Kind


@dataclass(frozen=True)
class Step:
    """One variant without its values: expressions, and the kinds of what is bound to their names.

    Parameters
    ----------
    name : str
        Of a keyword, or "variant".
    score, mask, sink : str or None
        What becomes of a score, which keys a query sees, and a score that only the sum counts.
    kinds : tuple of (str, Kind)
    blocks : (int, int) or None
        Queries and keys of the blocks that the mask is made of.
    places : str or None
        What kernels evaluate in place of a mask that is made of blocks, for it says the same of
        each place. None where the blocks alone decide: then nothing, in tiles within one block.
    """

    name: str
    score: str | None = None
    mask: str | None = None
    sink: str | None = None
    kinds: tuple[tuple[str, Kind], ...] = ()
    blocks: tuple[int, int] | None = None
    places: str | None = None


class Program:
    """Steps in their order. Equal steps give one and the same object, so it is its own key."""

    def __init__(self, steps: tuple[Step, ...]) -> None:
        self.steps = steps
        self.slots = tuple(kind for step in steps for _, kind in step.kinds)
        self.trees: list[cuda.Trees] = []
        names = (f"p{number}" for number in range(len(self.slots)))
        for step in steps:
            self.trees.append(_translated(step, dict(zip((name for name, _ in step.kinds), names))))
        self.text = cuda.struct(self.trees, self.slots)
        # What classifies tiles, and whether its warps look at arrays together.
        self.tiles, self.dense = tiles.functions(self.trees) if self.has_mask else ("", False)
        self.names_entries = any(
            cuda.names(tree, "b")
            for each in self.trees
            for tree in (each.score, each.mask, each.sink)
            if tree
        )

    def __str__(self) -> str:
        return ", ".join(step.name for step in self.steps)

    @functools.cached_property
    def streamable(self) -> tuple[int, ...]:
        """The slots of arrays of 16 bits that scores read by row and key, tile by tile."""
        slots = dict.fromkeys(int(name[1:]) for name in cuda.streamable(self.trees))
        halves = (slot for slot in slots if self.slots[slot].dtype in ("float16", "bfloat16"))
        return tuple(slot for slot in halves if self.slots[slot].keys)

    def streaming(self, slot: int) -> str:
        """The text for a kernel that has tiles of this slot's array in shared memory."""
        return cuda.struct(self.trees, self.slots, slot)

    @property
    def has_score(self) -> bool:
        return any(each.score for each in self.trees)

    @property
    def has_mask(self) -> bool:
        return any(each.mask for each in self.trees)

    def mask_names(self, coordinate: str) -> bool:
        """Whether a mask depends on this coordinate."""
        return any(cuda.names(each.mask, coordinate) for each in self.trees if each.mask)

    def mask_depends(self, coordinate: str, values: Sequence[Any]) -> bool:
        """Whether a mask does, but as a subscript along which an array's elements are all one."""
        return any(
            _depends(each.mask, coordinate, names)
            for each, names in self._with_values(values)
            if each.mask
        )

    @property
    def mask_computes(self) -> bool:
        """Whether some mask computes with real numbers, which dtypes round differently."""
        return any(cuda.has_numbers(each.mask) for each in self.trees if each.mask)

    @functools.cached_property
    def mask_instructions(self) -> int | None:
        """Roughly what masks take for each score; None where they read elements key by key."""
        return cuda.instructions(self.trees)

    @property
    def blocks(self) -> tuple[tuple[int, int], ...]:
        """Queries and keys of the blocks that masks are made of."""
        return tuple(step.blocks for step in self.steps if step.blocks)

    @property
    def blocks_decide(self) -> bool:
        """Whether some mask is nothing but blocks."""
        return any(each.blocks_decide for each in self.trees)

    @property
    def has_sink(self) -> bool:
        return any(each.sink for each in self.trees)

    def score(self, places: Mapping[str, Any], values: Sequence[Any], dtype: np.dtype) -> Any:
        """What becomes of ``places["score"]``, in NumPy: arrays that broadcast."""
        score = places["score"]
        for each, names in self._with_values(values):
            if each.score:
                score = evaluate(each.score, {**places, **names, "score": score}, dtype)
        return score

    def mask(self, places: Mapping[str, Any], values: Sequence[Any], dtype: np.dtype) -> Any:
        """Which places are seen, in NumPy."""
        seen: Any = np.True_
        for each, names in self._with_values(values):
            if each.mask:
                seen = seen & evaluate(each.mask, {**places, **names}, dtype)
        return seen

    def sink(self, places: Mapping[str, Any], values: Sequence[Any], dtype: np.dtype) -> Any:
        """The score that only the sum counts, in NumPy; -inf where there is none."""
        for each, names in self._with_values(values):
            if each.sink:
                return evaluate(each.sink, {**places, **names}, dtype)
        return np.asarray(-np.inf, dtype)

    def _with_values(self, values: Sequence[Any]) -> Iterator[tuple[cuda.Trees, dict[str, Any]]]:
        for each in self.trees:
            yield each, {name: values[int(slot[1:])] for name, slot in each.names.items()}


@functools.lru_cache(maxsize=4096)
def program(steps: tuple[Step, ...]) -> Program:
    """The program of these steps.

    Raises
    ------
    ValueError
        That points at what is not allowed in an expression.
    """
    return Program(steps)


def _depends(node: Node, coordinate: str, values: Mapping[str, Any]) -> bool:
    operands = node.operands
    if node.operation == "element":
        array = values[node.value]
        last = slice(array.ndim - len(operands), None)
        axes = zip(operands, array.strides[last], array.shape[last])
        operands = tuple(index for index, stride, length in axes if stride and length > 1)
    if node.operation == "coordinate":
        return bool(node.value == coordinate)
    return any(_depends(each, coordinate, values) for each in operands)


def _translated(step: Step, names: Mapping[str, str]) -> cuda.Trees:
    kinds = dict(step.kinds)
    parameters = {name: kind.parameter for name, kind in step.kinds}

    def tree(source: str | None, wanted: Any) -> Node | None:
        return None if source is None else parse(source, parameters, wanted)

    score, mask, sink = tree(step.score, "float"), tree(step.mask, "bool"), tree(step.sink, "float")
    places = tree(step.places or step.mask, "bool")
    blocks_decide = step.blocks is not None and step.places is None
    return cuda.Trees(score, mask, sink, names, kinds, places, blocks_decide)
