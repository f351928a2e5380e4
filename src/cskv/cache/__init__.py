"""The bi-branch cache of one layer: latents of old tokens, exact keys and values of the newest. Knows no model."""
