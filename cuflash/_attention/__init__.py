"""Exact attention: argument checks, plans, CUDA kernels and the NumPy twin."""
