"""Benchmarks of the panel part."""
