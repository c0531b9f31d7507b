"""``pytest --record``: what passed, on which GPU, with which versions, from which sources."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from digest import CHECKOUT, digest

DISTRIBUTIONS = [
    "cuflash",
    "numpy",
    "scipy",
    "cupy-cuda13x",
    "cupy-cuda12x",
    "nvidia-cuda-nvrtc",
    "nvidia-cuda-nvrtc-cu12",
    "ml_dtypes",
    "torch",
    "jax",
    "numba",
    "hypothesis",
    "pytest",
    "pytest-xdist",
]


KINDS = ("passed", "failed", "skipped")


class Record:
    """Counts every test's outcome by file and writes the sum at the end of the session.

    The suite may be run in parts, of whole files each: what was recorded of other files from the
    same sources, on the same GPU and with the same versions, stays.

    With pytest-xdist it is registered on the controller alone, which sees all workers' reports.
    """

    def __init__(self, arguments: list[str]) -> None:
        self.arguments = arguments
        self.outcomes: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # A test's three phases make one outcome: the worst of them.
        if report.failed:
            self.outcomes[report.nodeid] = "failed"
        elif report.skipped:
            self.outcomes.setdefault(report.nodeid, "skipped")
        elif report.when == "call":
            self.outcomes.setdefault(report.nodeid, "passed")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.outcomes[report.nodeid] = "failed"
        elif report.skipped:
            self.outcomes[report.nodeid] = "skipped"

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        path = CHECKOUT / "bench" / "results" / slug(gpu_name()) / "tests.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        record = joined(before, self.summary(int(exitstatus)))
        path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        print(f"\nrecord written to {path.relative_to(CHECKOUT)}")

    def summary(self, exitstatus: int) -> dict[str, object]:
        files: dict[str, Counter[str]] = {}
        for nodeid, outcome in sorted(self.outcomes.items()):
            files.setdefault(nodeid.split("::")[0], Counter())[outcome] += 1
        run = {
            "commit": commit(),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "profile": os.environ["HYPOTHESIS_PROFILE"],
            "arguments": self.arguments,
            "exit_status": exitstatus,
        }
        return {
            "digest": digest(),
            "gpu": gpu_name(),
            "driver": driver(),
            "versions": versions(),
            "runs": [run],
            "files": {file: {kind: files[file][kind] for kind in KINDS} for file in files},
        }


def joined(before: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """A record with what an earlier one has of other files, if both are of the same things."""
    files, runs = new["files"], new["runs"]
    if all(before.get(name) == new[name] for name in ("digest", "gpu", "driver", "versions")):
        files, runs = before["files"] | files, before["runs"] + runs
    sums = {kind: sum(count[kind] for count in files.values()) for kind in KINDS}
    return {**new, "runs": runs, **sums, "files": dict(sorted(files.items()))}


def gpu_name() -> str:
    import cupy

    return cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()


def slug(name: str) -> str:
    """``NVIDIA H100 80GB HBM3`` -> ``nvidia-h100-80gb-hbm3``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def commit() -> str | None:
    """The checked-out commit, unless ``CUFLASH_COMMIT`` tells what a copy was made of."""
    if told := os.environ.get("CUFLASH_COMMIT"):
        return told
    command = ["git", "-C", str(CHECKOUT), "rev-parse", "--verify", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def driver() -> str:
    """The kernel module's version if it can be read, and the CUDA version it supports."""
    import cupy

    supports = cupy.cuda.runtime.driverGetVersion()
    cuda = f"CUDA {supports // 1000}.{supports % 1000 // 10}"
    module = Path("/proc/driver/nvidia/version")
    found = re.search(r"\d+\.\d+(\.\d+)*", module.read_text()) if module.exists() else None
    return f"{found[0]} ({cuda})" if found else cuda


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
