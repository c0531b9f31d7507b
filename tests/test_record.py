"""The record of tests on a GPU, run in parts."""

from __future__ import annotations

import pytest
from record import joined


def part(file: str, passed: int, failed: int = 0, digest: str = "d") -> dict:
    counts = {"passed": passed, "failed": failed, "skipped": 0}
    run = {"arguments": [file], "exit_status": int(failed > 0)}
    same = {"digest": digest, "gpu": "g", "driver": "1", "versions": {"numpy": "2"}}
    return {**same, "runs": [run], "files": {file: counts}}


def test_parts_of_the_same_sources_are_joined():
    first = joined({}, part("tests/test_b.py", 3))
    both = joined(first, part("tests/test_a.py", 4))
    assert both["passed"] == 7
    assert list(both["files"]) == ["tests/test_a.py", "tests/test_b.py"]
    assert [run["arguments"] for run in both["runs"]] == [["tests/test_b.py"], ["tests/test_a.py"]]


def test_a_file_that_is_run_again_counts_once():
    failed = joined({}, part("tests/test_a.py", 2, failed=1))
    again = joined(failed, part("tests/test_a.py", 3))
    assert (again["passed"], again["failed"]) == (3, 0)


@pytest.mark.parametrize("before", [{}, {"digest": "old", "commit": "c", "files": {}}])
def test_other_sources_begin_anew(before):
    assert joined(before, part("tests/test_a.py", 3))["passed"] == 3
    other = joined({}, part("tests/test_b.py", 5, digest="e"))
    assert list(joined(other, part("tests/test_a.py", 3))["files"]) == ["tests/test_a.py"]
