"""Continual learning: one model over a stream of tasks."""
