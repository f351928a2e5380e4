"""Attention on the compressed cache by compiled kernels for CPUs: one call a layer."""
