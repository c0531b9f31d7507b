"""The largest elements of each row, and random ones: topk, softmax_topk and sample."""
