"""Benchmarks of the continual-learning part."""
