"""Optimisers on SO(d), which move the rotation."""

from ndm_fast.train.rotation.make import make_rotation

__all__ = ["make_rotation"]
