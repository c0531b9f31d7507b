"""Who else computes softmax, top-k, sampling and cross-entropy, as their users would write it."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

from .peers import as_jax, as_torch, find, jax_with_gpu, torch_with_gpu
from .rows import SAMPLES, SMALL
from .timing import Contestant


def softmax(operation: str, arrays: tuple[Any, ...], axis: int) -> list[Contestant]:
    """Return the peers of softmax, log_softmax, logsumexp, or of a backward pass."""
    found: list[Contestant] = []
    if torch := torch_with_gpu():
        tensors = cache(lambda: [as_torch(x) for x in arrays])
        theirs = _torch_backward(operation) or getattr(torch, operation)
        found.append(Contestant("torch", lambda: theirs(*tensors(), axis)))
    if operation in _FORMULAS:
        found.append(Contestant("CuPy", partial(_FORMULAS[operation], *arrays, axis)))
    elif special := getattr(find("cupyx.scipy.special"), operation, None):
        found.append(Contestant("CuPy", lambda: special(*arrays, axis=axis)))
    if _suits_jax(arrays[0], axis) and operation in ("softmax", "logsumexp"):
        jax = jax_with_gpu()
        function = jax.nn.softmax if operation == "softmax" else jax.nn.logsumexp
        found.append(_jax(partial(function, axis=axis), *arrays))
    return found


def _torch_backward(operation: str) -> Callable[..., Any] | None:
    """Return what autograd runs, called as if y had come from PyTorch."""
    if not operation.endswith("_backward"):
        return None
    kernel = getattr(torch_with_gpu().ops.aten, f"_{operation}_data")
    return lambda dy, y, axis: kernel(dy, y, axis, y.dtype)


def _softmax_backward(dy: Any, y: Any, axis: int) -> Any:
    return y * (dy - (dy * y).sum(axis, keepdims=True))


def _log_softmax_backward(dy: Any, y: Any, axis: int) -> Any:
    return dy - find("cupy").exp(y) * dy.sum(axis, keepdims=True)


# What CuPy has no function for.
_FORMULAS = {"softmax_backward": _softmax_backward, "log_softmax_backward": _log_softmax_backward}


def topk(operation: str, x: Any, k: int, axis: int) -> list[Contestant]:
    """Return the peers of softmax_topk, or of topk: pairs of values and indices."""
    fused = operation == "softmax_topk"
    found: list[Contestant] = []
    if torch := torch_with_gpu():
        tensor = cache(lambda: as_torch(x))

        def of_torch() -> Any:
            return (torch.softmax(tensor(), axis) if fused else tensor()).topk(k, axis)

        found.append(Contestant("torch", of_torch))
    special = find("cupyx.scipy.special")
    if special and x.size <= SMALL and k == 5:  # it sorts whole rows, whatever k is
        found.append(Contestant("CuPy", partial(_cupy_topk, x, k, axis, fused)))
    if _suits_jax(x, axis) and axis == 1 and k == 5:
        found.append(_jax_topk(x, k, fused))
    return found


def _cupy_topk(x: Any, k: int, axis: int, fused: bool) -> tuple[Any, Any]:
    cupy = find("cupy")
    p = find("cupyx.scipy.special").softmax(x, axis=axis) if fused else x
    length = p.shape[axis]
    chosen = cupy.argpartition(p, length - k, axis=axis)
    chosen = cupy.take(chosen, cupy.arange(length - k, length), axis=axis)
    values = cupy.take_along_axis(p, chosen, axis)
    order = cupy.argsort(-values, axis=axis)
    return cupy.take_along_axis(values, order, axis), cupy.take_along_axis(chosen, order, axis)


def _jax_topk(x: Any, k: int, fused: bool) -> Contestant:
    jax = jax_with_gpu()
    return _jax(lambda x: jax.lax.top_k(jax.nn.softmax(x) if fused else x, k), x)


def sample(x: Any, axis: int, top_k: int | None, top_p: float | None) -> list[Contestant]:
    """Return the peers of sample."""
    torch = torch_with_gpu()
    if torch is None:
        return []
    tensor = cache(lambda: as_torch(x).movedim(axis, -1))

    def call() -> Any:
        logits, places = tensor(), None
        if top_k is not None:
            logits, places = logits.topk(top_k)
        elif top_p is not None:
            logits, places = logits.sort(descending=True)
        p = torch.softmax(logits, -1)
        if top_p is not None:
            p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)
        chosen = torch.multinomial(p, 1)
        return chosen if places is None else places.gather(-1, chosen)

    return [Contestant("torch", call, view=lambda result: result[:, 0])]


def cross_entropy(x: Any, targets: Any, smoothing: float) -> list[Contestant]:
    """Return the peers of cross_entropy's mean over the rows."""
    if torch_with_gpu() is None:
        return []
    return [Contestant("torch", _torch_loss(x, targets, smoothing))]


def cross_entropy_backward(x: Any, targets: Any, smoothing: float) -> list[Contestant]:
    """Return the peers of its backward pass: autograd, from what the forward pass kept."""
    torch = torch_with_gpu()
    if torch is None:
        return []

    @cache
    def forward() -> tuple[Any, Any]:
        logits = as_torch(x).detach().requires_grad_()
        loss = _torch_loss(x, targets, smoothing, logits)
        return logits, loss()

    def call() -> Any:
        logits, loss = forward()
        return torch.autograd.grad(loss, logits, retain_graph=True)[0]

    return [Contestant("torch", call)]


def _torch_loss(x: Any, targets: Any, smoothing: float, logits: Any = None) -> Callable[[], Any]:
    functional = find("torch.nn.functional")
    tensors = cache(lambda: (as_torch(x) if logits is None else logits, as_torch(targets)))
    return lambda: functional.cross_entropy(*tensors(), label_smoothing=smoothing)


def _suits_jax(x: Any, axis: int) -> bool:
    """JAX is timed at a few shapes only: it compiles for each, and is timed by the host's clock."""
    wanted = x.dtype == "float32" and axis == 1 and x.shape in SAMPLES
    return wanted and jax_with_gpu() is not None


def _jax(function: Callable[..., Any], *arrays: Any) -> Contestant:
    jax = jax_with_gpu()
    compiled, inputs = jax.jit(function), cache(lambda: [as_jax(x) for x in arrays])
    return Contestant("JAX", lambda: compiled(*inputs()), wait=jax.block_until_ready)
