"""Benchmarks of speed and memory: one runner, `python -m benchmarks.speed NAME`, for what `registry` lists."""
