"""Latents in few bits: the grid, its codes packed into bytes, the same with gradients. Knows no model or cache."""
