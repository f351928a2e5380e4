"""Whole texts read as from a compressed cache, in one differentiable forward, and what that costs in nats."""
