"""What measures the figures of the documentation. `python -m benchmarks.speed` lists the benchmarks of speed."""
