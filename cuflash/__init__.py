"""Fused attention and online softmax for every GPU array, without a deep-learning framework."""

from ._attention.api import attention, merge_attention
from ._softmax.api import log_softmax, logsumexp, softmax

__version__ = "0.1.0"
__all__ = ["attention", "log_softmax", "logsumexp", "merge_attention", "softmax"]
