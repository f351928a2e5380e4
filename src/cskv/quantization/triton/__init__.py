"""Packing and unpacking with Triton kernels."""
