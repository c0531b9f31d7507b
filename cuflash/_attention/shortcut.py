"""What decides about a call of attention but its pointers: see jit/repeat.py."""

from __future__ import annotations

from typing import Any

from ..jit import repeat


def find(
    q: Any, k: Any, v: Any, options: tuple[Any, ...]
) -> tuple[repeat.Key | None, repeat.Repeat | None]:
    """The key of a call without ``out=``, and what was remembered under it, if anything."""
    return repeat.find("attention", (q, k, v), options)
