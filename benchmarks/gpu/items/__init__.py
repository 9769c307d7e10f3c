"""What the items of `benchmarks.gpu.registry` do, by what they are about."""
