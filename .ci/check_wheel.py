"""The wheel holds exactly what git tracks under cuflash/, and is small.

python .ci/check_wheel.py CHECKOUT WHEEL
"""

import subprocess
import sys
import zipfile
from pathlib import Path

LIMIT = 1_000_000  # bytes


def main(checkout: Path, wheel: Path) -> int:
    command = ["git", "-C", str(checkout), "ls-files", "-z", "cuflash"]
    tracked = set(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\0")
    )
    tracked.discard("")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    packed = {name for name in names if ".dist-info/" not in name}

    for name in sorted(tracked - packed):
        print(f"tracked by git, but not in the wheel: {name}")
    for name in sorted(packed - tracked):
        print(f"in the wheel, but not tracked by git: {name}")
    size = wheel.stat().st_size
    print(f"{wheel.name}: {len(packed)} files, {size:,} bytes (at most {LIMIT:,})")
    return int(packed != tracked or size > LIMIT)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
