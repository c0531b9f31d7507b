"""Whether values in GPU arrays are looked at, which waits for the GPU."""

from __future__ import annotations

import os


def on_device() -> bool:
    """Whether ``CUFLASH_CHECK=1`` asks for values in GPU arrays to be checked.

    Without it they are never trusted, but not looked at either. NumPy arrays are always checked.
    """
    return os.environ.get("CUFLASH_CHECK") == "1"
