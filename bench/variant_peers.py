"""FlexAttention: the variants as PyTorch compiles them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from . import peers
from .timing import Contestant

FLEX, APPROXIMATE = "FlexAttention", "Flex tanh.approx"
MOST = 2**31  # elements of an array that a score or a mask may name


@dataclass(frozen=True)
class Rule:
    """What becomes of a score, and which keys are seen, at (b, h, i, j) as in cuflash.Variant.

    Parameters
    ----------
    score : callable or None
        Of a score and where it is.
    mask : callable or None
        Of a place.
    sinks : array of shape (heads,) or None
        A score without a key, of each head.
    """

    score: Callable[..., Any] | None = None
    mask: Callable[..., Any] | None = None
    sinks: Any = None


def flex(
    qkv: Sequence[Any],
    rule: Callable[..., Rule],
    arrays: Sequence[Any],
    *,
    by_batch: bool,
    capped: bool,
) -> list[Contestant]:
    """Return FlexAttention, and where it has a tanh, also with the instruction that we use.

    What was compiled before is forgotten: PyTorch would rather compile no more than keep so much.
    """
    torch = peers.torch_with_gpu()
    if dynamo := peers.find("torch._dynamo"):
        dynamo.reset()
    kinds = [(FLEX, lambda: torch.tanh), (APPROXIMATE, approximate_tanh)][: 1 + capped]
    return [_flex(name, tanh, qkv, rule, arrays, by_batch) for name, tanh in kinds]


def _flex(
    name: str,
    tanh: Callable[[], Callable[[Any], Any]],
    qkv: Sequence[Any],
    rule: Callable[..., Rule],
    arrays: Sequence[Any],
    by_batch: bool,
) -> Contestant:
    @cache
    def ready() -> Callable[[], Any]:
        torch, module = peers.torch_with_gpu(), peers.find("torch.nn.attention.flex_attention")
        if max((x.size for x in arrays), default=0) > MOST:
            raise ValueError("its kernels index arrays in 32 bits")  # and would read elsewhere
        tensors = [peers.as_torch(x) for x in qkv]
        made = rule(tanh(), *(peers.as_torch(x) for x in arrays))
        batch, _, length, _ = tensors[0].shape
        mask = None
        if made.mask is not None:
            shape = (batch if by_batch else None, None, length, length)
            mask = module.create_block_mask(made.mask, *shape, device=tensors[0].device)
        # What cannot be compiled is an error: it would be computed with all scores in memory.
        compiled = partial(torch.compile, dynamic=False, fullgraph=True)
        if made.sinks is None:
            function = compiled(module.flex_attention)
            return lambda: function(*tensors, score_mod=made.score, block_mask=mask)

        def with_sinks(q: Any, k: Any, v: Any, sinks: Any, mask: Any) -> Any:
            wanted = module.AuxRequest(lse=True)
            out, more = module.flex_attention(q, k, v, block_mask=mask, return_aux=wanted)
            return (out * torch.sigmoid(more.lse - sinks[:, None])[..., None]).to(out.dtype)

        function = compiled(with_sinks)
        return lambda: function(*tensors, made.sinks, mask)

    return Contestant(name, lambda: ready()())


def flex_blocks(qkv: Sequence[Any], blocks: Any, size: int) -> list[Contestant]:
    """Return FlexAttention on blocks, (1 or heads, n_q, n_k), that need no mask inside."""
    torch = peers.torch_with_gpu()
    if dynamo := peers.find("torch._dynamo"):
        dynamo.reset()

    @cache
    def ready() -> Callable[[], Any]:
        module = peers.find("torch.nn.attention.flex_attention")
        there = peers.as_torch(blocks)[None]
        counts = there.sum(-1, dtype=torch.int32)
        indices = there.byte().argsort(dim=-1, descending=True, stable=True).int()
        partial_ones = torch.zeros_like(counts), torch.zeros_like(indices)
        mask = module.BlockMask.from_kv_blocks(
            *partial_ones,
            counts,
            indices,
            BLOCK_SIZE=size,
            mask_mod=lambda b, h, i, j: there[0, h % there.shape[1], i // size, j // size],
        )
        tensors = [peers.as_torch(x) for x in qkv]
        function = torch.compile(module.flex_attention, dynamic=False, fullgraph=True)
        return lambda: function(*tensors, block_mask=mask)

    return [Contestant(FLEX, lambda: ready()())]


@cache
def approximate_tanh() -> Callable[[Any], Any]:
    """Return tanh as the GPU's instruction, which PyTorch's own tanh is not."""
    torch, lowering = peers.torch_with_gpu(), peers.find("torch._inductor.lowering")
    operations = peers.find("torch._inductor.virtualized").ops
    tanh = torch.library.custom_op(
        "cuflash_bench::tanh",
        lambda x: torch.tanh(x),
        mutates_args=(),
        schema="(Tensor x) -> Tensor",
    )
    tanh.register_fake(torch.empty_like)
    tanh.register_vmap(lambda info, axes, x: (tanh(x), axes[0]))
    instruction = partial(operations.inline_asm_elementwise, asm="tanh.approx.f32 $0, $1;")
    lowering.register_lowering(torch.ops.cuflash_bench.tanh)(
        lambda x: lowering.make_pointwise(instruction)(x)
    )
    return torch.ops.cuflash_bench.tanh
