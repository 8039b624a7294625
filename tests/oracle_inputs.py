"""Rotations and rows on which ops are compared with the fp64 oracle; torch's own generator draws them."""

import torch
from torch import Tensor


def rotation_of(width: int) -> Tensor:
    """[width, width] fp32, orthogonal."""
    return torch.linalg.qr(torch.randn(width, width, dtype=torch.float64))[0].float()


def heavy_tailed(rows: int, width: int) -> Tensor:
    """Like a residual stream: scales over orders of magnitude, a huge coordinate, outlier rows, an offset."""
    data = torch.randn(rows, width) * torch.exp(torch.randn(rows, 1)) + 5 * torch.randn(width)
    data[:, 0] *= 1000
    data[::17] *= 300
    return data
