"""Doors to other people's tools, a module for each; none imports its tool before it is used.

``transformer_lens``, ``nnsight`` and ``pyvene`` patch subspaces through those libraries with the mathematics
of ``ndm_fast.evaluate.patching``; ``mib`` and ``sae_lens`` write a partition in other formats, and read.
"""
