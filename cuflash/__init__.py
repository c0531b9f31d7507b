"""Fused attention and online softmax for every GPU array, without a deep-learning framework."""

from ._attention.api import attention, merge_attention
from ._softmax.api import log_softmax, logsumexp, softmax
from .tools import explain, show_config, warmup

__all__ = [
    "attention",
    "explain",
    "log_softmax",
    "logsumexp",
    "merge_attention",
    "show_config",
    "softmax",
    "warmup",
]
