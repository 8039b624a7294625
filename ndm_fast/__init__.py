"""Neighbor distance minimization, fast: the interpretable subspaces of a transformer's activations."""

from ndm_fast.version import __version__

__all__ = ["__version__"]
