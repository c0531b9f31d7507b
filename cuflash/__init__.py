"""Fused attention and online softmax for every GPU array, without a deep-learning framework."""

from ._attention.api import attention, merge_attention
from ._softmax.api import log_softmax, logsumexp, softmax
from ._softmax.gradient import log_softmax_backward, softmax_backward
from .tools import explain, show_config, warmup

__all__ = [
    "attention",
    "explain",
    "log_softmax",
    "log_softmax_backward",
    "logsumexp",
    "merge_attention",
    "show_config",
    "softmax",
    "softmax_backward",
    "warmup",
]
