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
        tests = {f"tests/{each.name}" for each in (checkout / "tests").glob("test_*.py")}
        missing = sorted(tests - record["files"].keys())
        if record.get("digest") != current:
            print(f"WARNING: {name} is older than the sources; on a GPU machine: pytest --record")
        elif record["failed"] or any(run["exit_status"] > 1 for run in record["runs"]):
            print(f"WARNING: {name} records failures: {record['failed']} tests failed")
        elif missing:
            print(f"WARNING: {name} lacks {', '.join(missing)}")
        else:
            print(f"{name} was made from these sources: {record.get('passed')} tests passed")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
