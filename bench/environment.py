"""Where and with what the numbers were measured."""

import datetime
import os
import platform
import re
import runpy
import subprocess
from contextlib import suppress
from importlib import metadata
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
DISTRIBUTIONS = (
    *("numpy", "ml_dtypes", "torch", "jax", "cupy-cuda13x", "cupy-cuda12x"),
    *("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12"),
    *("flash-attn-4", "nvidia-cutlass-dsl", "flash-attn3-jax"),
)


def environment() -> dict:
    """Return the GPU, the driver, the versions, the commit and the date."""
    import cupy

    runtime = cupy.cuda.runtime
    module = Path("/proc/driver/nvidia/version")
    driver = re.search(r"\d+\.\d+[.\d]*", module.read_text()) if module.exists() else None
    return {
        "gpu": runtime.getDeviceProperties(cupy.cuda.Device().id)["name"].decode(),
        "driver": driver[0] if driver else None,
        "cuda": runtime.driverGetVersion(),
        "versions": {"python": platform.python_version(), **_versions()},
        "settings": {k: v for k, v in os.environ.items() if k.startswith("CUFLASH_")},
        "commit": _commit(),
        "digest": runpy.run_path(str(CHECKOUT / "tests" / "digest.py"))["digest"](),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def slug(name: str) -> str:
    """``NVIDIA H100 80GB HBM3`` -> ``nvidia-h100-80gb-hbm3``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _versions() -> dict[str, str]:
    found = {}
    for name in DISTRIBUTIONS:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _commit() -> str | None:
    """Return the checked-out commit, unless ``CUFLASH_COMMIT`` tells what a copy was made of."""
    if told := os.environ.get("CUFLASH_COMMIT"):
        return told
    command = ["git", "-C", str(CHECKOUT), "rev-parse", "--verify", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
