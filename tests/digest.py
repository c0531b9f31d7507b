"""The digest of the package's sources, by which a test record says what it was made of.

``python tests/digest.py`` prints it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
SUFFIXES = {".py", ".cu", ".cuh"}


def digest(checkout: Path = CHECKOUT) -> str:
    """SHA-256 over the paths and contents of all sources under ``cuflash``, in sorted order."""
    total = hashlib.sha256()
    package = checkout / "cuflash"
    sources = [path for path in package.rglob("*") if path.suffix in SUFFIXES and path.is_file()]
    for path in sorted(sources, key=lambda path: path.relative_to(checkout).as_posix()):
        for part in (path.relative_to(checkout).as_posix().encode(), path.read_bytes()):
            # The length in front keeps a path and its contents from running into each other.
            total.update(len(part).to_bytes(8, "little") + part)
    return total.hexdigest()


if __name__ == "__main__":
    print(digest())
