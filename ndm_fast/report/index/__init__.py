"""Activations with their tokens on disk, and the search over them."""
