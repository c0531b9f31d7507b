"""Random numbers by counting, for the NumPy twins: `device/philox.cuh` in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def philox(counter: Array, key: Array, rounds: int = 10) -> Array:
    """Philox4x32-10, or of fewer rounds, the counter-based generator of Salmon et al. [1]_.

    Parameters
    ----------
    counter : ndarray of uint32, (..., 4)
    key : ndarray of uint32, (..., 2)
    rounds : int
        By [1]_, 7 are the fewest that pass all of TestU01's tests, and 10 leave a margin.

    Returns
    -------
    ndarray of uint32, (..., 4)

    References
    ----------
    .. [1] J. K. Salmon, M. A. Moraes, R. O. Dror and D. E. Shaw, "Parallel random numbers: as easy
       as 1, 2, 3", SC 2011.

    Examples
    --------
    >>> import numpy as np
    >>> from cuflash.philox import philox
    >>> words = philox(np.zeros(4, np.uint32), np.zeros(2, np.uint32))
    >>> [f"{word:08x}" for word in words]
    ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    a, b, c, d = np.moveaxis(counter.astype(np.uint64), -1, 0)
    first, second = np.moveaxis(key.astype(np.uint64), -1, 0)
    low = np.uint64(0xFFFFFFFF)
    for _ in range(rounds):
        even, odd = a * np.uint64(0xD2511F53), c * np.uint64(0xCD9E8D57)
        a, b = (odd >> np.uint64(32)) ^ b ^ first, odd & low
        c, d = (even >> np.uint64(32)) ^ d ^ second, even & low
        first = (first + np.uint64(0x9E3779B9)) & low
        second = (second + np.uint64(0xBB67AE85)) & low
    return np.stack([a, b, c, d], axis=-1).astype(np.uint32)
