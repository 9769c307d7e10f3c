"""Samples of two-digit numbers, measured: what the benchmarks of text to image share."""
