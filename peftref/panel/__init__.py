"""Causal effects from panel data: double machine learning with unobserved differences between units."""
