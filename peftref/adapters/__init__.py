"""Adapters: a few added weights in a frozen model."""
