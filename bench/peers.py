"""Who else computes attention, and how other libraries are found, each only where it is installed.

PyTorch and JAX look at the same memory as the CuPy arrays, through DLPack.
"""

import importlib
import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache, partial
from typing import Any

import numpy as np

from .timing import Contestant, Stopwatch

# JAX would otherwise take most of the GPU's memory at its first touch.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

DTYPES = ("float16", "bfloat16", "float32", "float64")
MATMUL_SIZE = 8192


@cache
def find(name: str) -> Any:
    """Import a module, or return None where that fails for whatever reason."""
    try:
        return importlib.import_module(name)
    except Exception:
        return None


@cache
def torch_with_gpu() -> Any:
    torch = find("torch")
    return torch if torch is not None and torch.cuda.is_available() else None


@cache
def jax_with_gpu() -> Any:
    if torch_with_gpu() is None:
        return None  # whose profiler says how long JAX takes
    jax = find("jax")
    try:
        return jax if jax is not None and jax.default_backend() == "gpu" else None
    except RuntimeError:
        return None


def as_torch(array: Any) -> Any:
    """View a CuPy array as a tensor; bfloat16 and bool cross as what every version takes."""
    torch = torch_with_gpu()
    if array.dtype == "bool":
        return torch.from_dlpack(array.view(np.uint8)).view(torch.bool)
    if array.dtype == "bfloat16":
        return torch.from_dlpack(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_dlpack(array)


def as_jax(array: Any) -> Any:
    """View a CuPy array as a JAX array, bfloat16 by way of int16 again."""
    jax = jax_with_gpu()
    if array.dtype == "bfloat16":
        bits = jax.numpy.from_dlpack(array.view(np.int16))
        return jax.lax.bitcast_convert_type(bits, jax.numpy.bfloat16)
    return jax.numpy.from_dlpack(array)


def to_host(part: Any) -> np.ndarray:
    """Copy a piece of anybody's result to the host, as float64."""
    if type(part).__module__.startswith("torch"):
        return part.double().cpu().numpy()
    if type(part).__module__.startswith("cupy"):
        return part.astype(np.float64).get()
    return np.asarray(part).astype(np.float64)


def free_memory() -> None:
    """Return cached memory to the driver: the libraries' pools do not see one another."""
    import cupy

    cupy.get_default_memory_pool().free_all_blocks()
    if torch_with_gpu():
        torch_with_gpu().cuda.empty_cache()


@cache
def matmul(stopwatch: Stopwatch, dtype: str) -> tuple[Contestant, int]:
    """Return a large matrix product, the ceiling of attention, and its operations."""
    a, b = (stopwatch.normal((MATMUL_SIZE, MATMUL_SIZE), dtype) for _ in range(2))
    operations = 2 * MATMUL_SIZE**3
    if torch := torch_with_gpu():
        s, t = as_torch(a), as_torch(b)
        return Contestant("matmul", lambda: torch.mm(s, t)), operations
    return Contestant("matmul", lambda: a @ b), operations


def attention(q: Any, k: Any, v: Any, *, causal: bool) -> list[Contestant]:
    """Return the peers of attention that suit these CuPy arrays."""
    dtype = str(q.dtype)
    half = dtype in ("float16", "bfloat16")
    found = []
    if torch_with_gpu():
        fused = [("FA2", "FLASH_ATTENTION"), ("cuDNN", "CUDNN_ATTENTION")]
        single = [("mem-efficient", "EFFICIENT_ATTENTION")]
        if q.shape[-1] > 256:  # where FA2 ends, and perhaps cuDNN
            fused += single
        backends = fused if half else single if dtype == "float32" else [("torch math", "MATH")]
        found += [sdpa(name, backend, q, k, v, causal) for name, backend in backends]
    if half and find("flash_attn.cute.interface"):
        found.append(_flash_attention_4(q, k, v, causal))
    if half and q.shape[-1] == 128 and jax_with_gpu() and find("flash_attn3_jax"):
        flash = find("flash_attn3_jax").flash_mha
        found.append(_by_jax("FA3", lambda *qkv: flash(*qkv, is_causal=causal), q, k, v))
    if dtype == "bfloat16" and jax_with_gpu():
        cudnn = partial(
            jax_with_gpu().nn.dot_product_attention, is_causal=causal, implementation="cudnn"
        )
        found.append(_by_jax("JAX cuDNN", cudnn, q, k, v))
    if find("cupyx.scipy.special") and q.shape[-2] <= 4096:  # it holds the N x N scores
        found.append(_unfused(q, k, v, causal))
    return found


def sdpa(
    name: str,
    backend: str,
    q: Any,
    k: Any,
    v: Any,
    causal: bool = False,
    mask: Any = None,
    dropout: float = 0.0,
) -> Contestant:
    """Return one backend of PyTorch's attention; a mask is added to scores, or is of bool."""
    torch, nn = torch_with_gpu(), find("torch.nn.attention")
    given = (q, k, v) if mask is None else (q, k, v, mask)
    tensors = cache(lambda: [as_torch(x) for x in given])

    def scope() -> AbstractContextManager:
        return nn.sdpa_kernel(getattr(nn.SDPBackend, backend))

    def call() -> Any:
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(*tensors(), dropout_p=dropout, is_causal=causal)

    return Contestant(name, call, scope)


def _flash_attention_4(q: Any, k: Any, v: Any, causal: bool) -> Contestant:
    flash = find("flash_attn.cute.interface").flash_attn_func
    # Its layout is (batch, length, heads, d): it gets that, not a transpose in its time.
    tensors = cache(lambda: [as_torch(x).transpose(1, 2).contiguous() for x in (q, k, v)])

    def output(result: Any) -> Any:
        return (result[0] if isinstance(result, tuple) else result).transpose(1, 2)

    return Contestant("FA4", lambda: flash(*tensors(), causal=causal), view=output)


def _by_jax(name: str, function: Callable[..., Any], q: Any, k: Any, v: Any) -> Contestant:
    forward = jax_with_gpu().jit(function)
    # Both libraries want (batch, length, heads, d) as well.
    arrays = cache(lambda: [as_jax(x.swapaxes(1, 2).copy()) for x in (q, k, v)])
    return Contestant(
        name,
        lambda: forward(*arrays()),
        wait=lambda result: result.block_until_ready(),
        view=lambda result: result.swapaxes(1, 2),
    )


def _unfused(q: Any, k: Any, v: Any, causal: bool) -> Contestant:
    import cupy

    softmax = find("cupyx.scipy.special").softmax
    n, scale = q.shape[-2], 1 / math.sqrt(q.shape[-1])
    mask = cache(lambda: cupy.where(cupy.tri(n, dtype=bool), 0, -math.inf).astype(q.dtype))

    def call() -> Any:
        scores = q @ k.swapaxes(-1, -2)
        scores *= scale
        if causal:
            scores += mask()
        return softmax(scores, axis=-1) @ v

    return Contestant("CuPy unfused", call)
