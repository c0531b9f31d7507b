"""Fused attention and online softmax for every GPU array, without a deep-learning framework."""

from ._attention.api import attention, merge_attention
from ._attention.variants.block_mask import BlockMask
from ._attention.variants.variant import Variant
from ._attention.varlen import attention_varlen
from ._softmax.api import log_softmax, logsumexp, softmax
from ._softmax.gradient import log_softmax_backward, softmax_backward
from ._softmax.loss import cross_entropy, cross_entropy_backward
from ._softmax.selection.sample_api import sample
from ._softmax.selection.topk_api import softmax_topk, topk
from .tools import explain, show_config, warmup

__all__ = [
    "BlockMask",
    "Variant",
    "attention",
    "attention_varlen",
    "cross_entropy",
    "cross_entropy_backward",
    "explain",
    "log_softmax",
    "log_softmax_backward",
    "logsumexp",
    "merge_attention",
    "sample",
    "show_config",
    "softmax",
    "softmax_backward",
    "softmax_topk",
    "topk",
    "warmup",
]
