"""Benchmarks of the test-time adaptation part."""
