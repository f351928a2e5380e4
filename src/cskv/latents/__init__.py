"""Sealed latents as they are stored and read: one sequence after the other in memory, or in pages."""
