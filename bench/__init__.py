"""Benchmarks: check the answer, then time it beside every peer that is installed."""
