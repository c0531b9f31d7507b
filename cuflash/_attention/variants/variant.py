"""The public Variant: expressions, then the values of their names."""

from __future__ import annotations

import numbers
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .blocks import Blocks
from .expression import parse, subscripts

_INT32 = -(2**31), 2**31 - 1


@dataclass(frozen=True)
class Part:
    """One pair of expressions, the axes of its names, and what is bound to them so far."""

    score: str | None
    mask: str | None
    axes: tuple[tuple[str, int], ...]
    values: tuple[Any, ...] | None = None
    blocks: Blocks | None = None  # of a BlockMask

    @property
    def numbers(self) -> tuple[Any, ...]:
        """The values that are no arrays, each with its type: 1 is neither 1.0 nor True."""
        return tuple(
            (type(x), x.hex() if isinstance(x, float) else x)  # 0.0 is not -0.0, and NaN is NaN
            for (_, axes), x in zip(self.axes, self.values or ())
            if not axes
        )


class Variant:
    """A score or a mask of your own, for every kernel: an expression in Python's syntax.

    Parameters
    ----------
    score : str, optional
        What becomes of a score, for example ``"score - slope[h] * abs(i - j)"``.
    mask : str, optional
        Which keys a query sees, for example ``"doc[b, i] == doc[b, j]"``. It is evaluated for every
        place; a hidden score is -inf whatever `score` makes of it.

    Raises
    ------
    TypeError
        For an expression that is no string.
    ValueError
        For one that is not allowed, with a caret under what is not.

    Notes
    -----
    An expression may name ``score`` (scaled, and as earlier variants left it), ``b`` (the batch
    entry, counted through all batch axes), ``h`` (the query head), ``row`` (the query), ``i``
    (``row + q_start``: the query's place among the keys), ``j`` (the key), ``len_q``, ``len_k``
    (``kv_lengths``, where given), and parameters of any other name: numbers, or arrays with
    subscripts. Functions are exp, log, tanh, sqrt, abs, minimum, maximum and
    ``where(condition, a, b)``; further ``+ - * / // %``, comparisons, ``and``, ``or``, ``not`` and
    ``a if c else b``. Nothing is ever run as Python.

    Integers have 32 bits and wrap; ``//`` and ``%`` round as Python's, and by 0 give 0. An index
    outside of an array is moved to its nearest end.

    Calling a Variant binds its parameters and returns another one. ``first & second`` has both
    masks, and the second's score made of the first's; a name that is bound in neither is one
    parameter of both. Values are arguments of the kernel: other
    ones of the same kind compile nothing.

    Rows of V that a mask hides from all queries must be finite, as in ``p @ v``.

    Examples
    --------
    >>> import numpy as np
    >>> import cuflash
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 6, 8))
    >>> near = cuflash.Variant(mask="abs(i - j) <= width")
    >>> out = cuflash.attention(q, k, v, variant=near(width=2))
    >>> np.allclose(out, cuflash.attention(q, k, v, window=2))
    True
    """

    def __init__(self, score: str | None = None, mask: str | None = None) -> None:
        if score is None and mask is None:
            raise TypeError("a Variant needs `score`, `mask` or both")
        axes: dict[str, int] = {}
        for name, source in (("score", score), ("mask", mask)):
            if source is None:
                continue
            for parameter, count in _subscripts(name, source).items():
                if axes.setdefault(parameter, count) != count:
                    raise ValueError(
                        f"`{parameter}` must have as many subscripts in `mask` as in `score`, "
                        f"{axes[parameter]}, not {count}"
                    )
        if not axes:  # nothing to bind: their types are known
            for wanted, source in (("float", score), ("bool", mask)):
                if source is not None:
                    parse(source, {}, wanted)  # type: ignore[arg-type]
        self.parts: tuple[Part, ...] = (Part(score, mask, tuple(axes.items())),)
        self._settle()

    def _settle(self) -> None:
        self.missing = tuple(
            dict.fromkeys(
                name for part in self.parts if part.values is None for name, _ in part.axes
            )
        )
        # What a repeated call is known by: all but the arrays, and these.
        self.key = tuple(
            (part.score, part.mask, part.axes, part.numbers, part.blocks) for part in self.parts
        )
        self.arrays = [
            value
            for part in self.parts
            for (_, count), value in zip(part.axes, part.values or ())
            if count
        ]

    def masks_alone(self) -> Variant:
        """The same without scores."""
        parts = [replace(part, score=None) for part in self.parts if part.mask is not None]
        if not parts:
            raise ValueError("`variant` must have a mask, but it has only scores")
        return _made(parts)

    def __call__(self, /, **values: Any) -> Variant:
        """Bind every parameter that is not bound yet."""
        if values.keys() != set(self.missing):
            wanted = ", ".join(f"`{name}`" for name in self.missing) or "none"
            given = ", ".join(f"`{name}`" for name in values) or "none"
            raise TypeError(f"the parameters to bind are {wanted}; given were {given}")
        return _made(_bound(part, values) for part in self.parts)

    def __and__(self, other: Variant) -> Variant:
        if not isinstance(other, Variant):
            return NotImplemented
        axes: dict[str, int] = {}
        for part in (*self.parts, *other.parts):
            for name, count in part.axes if part.values is None else ():
                if axes.setdefault(name, count) != count:
                    raise ValueError(
                        f"`{name}` must have as many subscripts in one as in the other, "
                        f"{axes[name]}, not {count}, or be bound before"
                    )
        return _made((*self.parts, *other.parts))

    def __repr__(self) -> str:
        return " & ".join(map(_shown, self.parts))


def _shown(part: Part) -> str:
    sources = (("score", part.score), ("mask", part.mask))
    text = ", ".join(f"{name}={source!r}" for name, source in sources if source)
    if part.values is None or not part.axes:
        return f"Variant({text})"
    bound = ", ".join(
        f"{name}=<array>" if axes else f"{name}={value!r}"
        for (name, axes), value in zip(part.axes, part.values)
    )
    return f"Variant({text})({bound})"


def _made(parts: Any) -> Variant:
    made = object.__new__(Variant)
    made.parts = tuple(parts)
    made._settle()
    return made


def _subscripts(name: str, source: Any) -> dict[str, int]:
    if not isinstance(source, str):
        raise TypeError(f"`{name}` must be a string or None, not {source!r}")
    return subscripts(source)


def _bound(part: Part, values: dict[str, Any]) -> Part:
    if part.values is not None:
        return part
    bound = (values[name] if axes else _number(name, values[name]) for name, axes in part.axes)
    return Part(part.score, part.mask, part.axes, tuple(bound))


def _number(name: str, value: Any) -> bool | int | float:
    """Return a parameter without subscripts as one of Python's own numbers."""
    if isinstance(value, (bool, np.bool)):
        return bool(value)
    if isinstance(value, numbers.Integral):
        if not _INT32[0] <= (integer := int(value)) <= _INT32[1]:
            raise ValueError(f"`{name}` must be an integer of 32 bits, not {value}")
        return integer
    if isinstance(value, numbers.Real):
        return float(value)
    raise TypeError(
        f"`{name}` has no subscripts in the expression, so it must be a number, not "
        f"{type(value).__name__}"
    )
