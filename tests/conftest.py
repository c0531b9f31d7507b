"""Profiles, options and fixtures shared by all tests.

The same test bodies run on NumPy everywhere and on CUDA where there is a GPU (fixture ``xp``).
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from types import ModuleType

import hypothesis
import pytest

# Before NumPy is imported: the references' products are small, and workers share the cores.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# JAX takes most of the GPU's memory at its first use unless told not to; all workers share one.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


@functools.cache
def missing(name: str) -> str | None:
    """Why a test that needs `name` cannot run here, or None when it can."""
    if name == "cuda":
        return missing_module("cupy") or (
            None if importlib.import_module("cupy").cuda.is_available() else "no CUDA GPU"
        )
    if name == "two-gpus":
        return missing("cuda") or (
            None if importlib.import_module("cupy").cuda.runtime.getDeviceCount() > 1 else "one GPU"
        )
    if name in ("torch", "jax"):
        return missing_module(name)
    if name == "torch-cuda":
        return missing_module("torch") or (
            None if importlib.import_module("torch").cuda.is_available() else "PyTorch has no GPU"
        )
    if name == "jax-cuda":
        return missing_module("jax") or (
            None if importlib.import_module("jax").default_backend() == "gpu" else "JAX has no GPU"
        )
    if name == "numba-cuda":
        return missing_module("numba") or (
            None if importlib.import_module("numba.cuda").is_available() else "Numba has no GPU"
        )
    raise ValueError(f"require: unknown name {name!r}")


def missing_module(name: str) -> str | None:
    try:
        importlib.import_module(name)
    except ImportError as error:
        return f"{name} cannot be imported ({error})"
    return None


def choose_profile() -> None:
    common = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
    register = hypothesis.settings.register_profile
    register("ci", max_examples=50, derandomize=True, **common)
    register("gpu", max_examples=200, derandomize=True, **common)
    register("fuzz", max_examples=10**4, derandomize=False, print_blob=True, **common)
    # Set for the workers and the record as well, so that all speak of the same profile.
    automatic = "ci" if missing("cuda") else "gpu"
    hypothesis.settings.load_profile(os.environ.setdefault("HYPOTHESIS_PROFILE", automatic))


choose_profile()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("cuflash")
    group.addoption(
        "--require-cuda",
        action="store_true",
        help="fail, instead of skipping, what wants a GPU, PyTorch or JAX that is not there",
    )
    group.addoption(
        "--record",
        action="store_true",
        help="write bench/results/<gpu>/tests.json at the end (implies --require-cuda)",
    )
    group.addoption(
        "--no-pool",
        action="store_true",
        help="GPU memory without CuPy's pool, so that compute-sanitizer sees every overrun",
    )


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist starts its workers
def pytest_sessionstart(session: pytest.Session) -> None:
    config = session.config
    whole_suite = config.args_source is not pytest.Config.ArgsSource.ARGS
    parallel = bool(getattr(config.option, "numprocesses", None))
    is_worker = hasattr(config, "workerinput")
    drawn = any(kind in name for name in config.args for kind in ("attention", "dropout"))
    wanted = whole_suite or (parallel and drawn)
    if missing("cuda") or is_worker or config.option.collectonly or not wanted:
        return
    from compile_first import compile_first

    compile_first()


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--no-pool") and not missing("cuda"):
        importlib.import_module("cupy").cuda.set_allocator(None)
    if not config.getoption("--record"):
        return
    options = config.option
    if options.keyword or options.markexpr or any("::" in each for each in config.args):
        raise pytest.UsageError("--record counts whole files: name these, and no tests in them")
    config.option.require_cuda = True
    if missing("cuda"):
        raise pytest.UsageError(f"--record needs a GPU: {missing('cuda')}")
    if not hasattr(config, "workerinput"):  # the controller, or the only process
        from record import Record

        config.pluginmanager.register(Record(list(config.invocation_params.args)))


@pytest.fixture(scope="session")
def require(request: pytest.FixtureRequest) -> Callable[[str], ModuleType | None]:
    """``require("cuda")`` returns CuPy, or skips the test (fails it under --require-cuda).

    The names: cuda, torch, torch-cuda, jax, jax-cuda, numba-cuda, two-gpus. What comes back is
    the module, imported. A second GPU is the one thing that may always be missing.
    """
    must = request.config.getoption("--require-cuda")

    def require_one(name: str) -> ModuleType:
        reason = missing(name)
        if reason and must and name != "two-gpus":
            pytest.fail(f"--require-cuda: {name} is required: {reason}", pytrace=False)
        if reason:
            pytest.skip(f"needs {name}: {reason}")
        module = {"cuda": "cupy", "two-gpus": "cupy", "numba-cuda": "numba.cuda"}
        return importlib.import_module(module.get(name, name.removesuffix("-cuda")))

    return require_one


@pytest.fixture(scope="module")
def cp(require: Callable[[str], ModuleType]) -> ModuleType:
    """CuPy, on a machine with a GPU."""
    return require("cuda")


@pytest.fixture(scope="module", params=["numpy", "cupy"])
def xp(request: pytest.FixtureRequest, require: Callable[[str], ModuleType]) -> ModuleType:
    """NumPy, then CuPy: one test body for both."""
    return require("cuda") if request.param == "cupy" else importlib.import_module("numpy")
