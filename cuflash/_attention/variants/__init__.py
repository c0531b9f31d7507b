"""Variants of attention: a caller's own expressions for scores and masks."""
