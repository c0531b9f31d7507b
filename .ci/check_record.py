"""Warns when the committed GPU test record was made from other sources than these. Never fails.

python .ci/check_record.py CHECKOUT
"""

import json
import sys
from pathlib import Path


def main(checkout: Path) -> None:
    sys.path.insert(0, str(checkout / "tests"))
    from digest import digest

    current = digest(checkout)
    records = sorted((checkout / "bench" / "results").glob("*/tests.json"))
    if not records:
        print("WARNING: there is no GPU test record; on a GPU machine: pytest --record")
    for path in records:
        record = json.loads(path.read_text(encoding="utf-8"))
        name = path.relative_to(checkout)
        if record.get("digest") != current:
            print(f"WARNING: {name} is older than the sources; on a GPU machine: pytest --record")
        elif record.get("failed") != 0 or record.get("exit_status") != 0:
            print(f"WARNING: {name} records failures: {record.get('failed')} tests failed")
        else:
            print(f"{name} was made from these sources: {record.get('passed')} tests passed")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
