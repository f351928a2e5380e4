"""Attention on latents with Triton kernels: plan, arguments, launch, kernels."""
