"""The variants that are keywords of attention: each one's expression, and the check of its value.

They stand in the order in which they apply: scale, softcap, ALiBi, bias, then the caller's Variant,
masks and sinks. Tests, benchmarks and the gallery go through this list.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import Any

FLOATS = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True)
class Entry:
    """A keyword of attention.

    Parameters
    ----------
    keyword : str
        Its expressions' one parameter has the same name.
    score, mask, sink : str or None
        As of a Step.
    axes : str
        Of an array, by their letters: h for heads, i for queries, j for keys. The batch axes come
        before. Empty for a number.
    dtypes : tuple of str
    """

    keyword: str
    score: str | None = None
    mask: str | None = None
    sink: str | None = None
    axes: str = ""
    dtypes: tuple[str, ...] = FLOATS


BEFORE = (
    Entry("softcap", score="softcap * tanh(score / softcap)"),
    Entry("alibi", score="score - alibi[h] * abs(i - j)", axes="h"),
    Entry("bias", score="score + bias[h, row, j]", axes="hij"),
)
AFTER = (
    Entry("mask", mask="mask[h, row, j]", axes="hij", dtypes=("bool",)),
    Entry("sinks", sink="sinks[h]", axes="h"),
)
ENTRIES = (*BEFORE, *AFTER)


def softcap(value: Any) -> float:
    """Return a soft cap that is a positive number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"`softcap` must be a number or None, not {value!r}")
    if not 0 < (cap := float(value)) < math.inf:
        raise ValueError(f"`softcap` must be positive and finite, not {value}")
    return cap
