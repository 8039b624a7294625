"""Rotations to start from: random ones, and principal components."""

from __future__ import annotations

import torch
from torch import Tensor


def random_rotation(width: int, generator: torch.Generator) -> Tensor:
    """[d, d] fp32 rotation, uniform on SO(d): QR of a Gaussian matrix with the signs of R's diagonal."""
    gaussian = torch.randn(width, width, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    q = q * r.diagonal().sign()
    if torch.linalg.det(q) < 0:
        q[:, 0] = -q[:, 0]
    return q.float()


def principal_components(activations: Tensor) -> Tensor:
    """[d, d] fp32 principal directions of [N, d] activations, variance descending."""
    centred = activations.double() - activations.double().mean(0)
    directions = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)
    return directions.float().contiguous()
