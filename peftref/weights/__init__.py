"""Weights of the small source networks, with the script that made them."""
