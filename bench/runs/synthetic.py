"""Made-up activations of any width: in every subspace a few hundred clusters, mixed by a rotation."""

from __future__ import annotations

import torch
from torch import Tensor

VALUES, NOISE, REFLECTIONS = 512, 0.15, 32


def clustered(rows: int, width: int, unit: int, seed: int = 0) -> Tensor:
    """[rows, width] fp32; variances fall over and inside the groups of ``unit`` coordinates."""
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.arange(1, unit + 1).float().rsqrt()
    out = torch.empty(rows, width)
    for group, columns in enumerate(out.split(unit, 1)):
        scale = spectrum * (group + 1) ** -0.5
        centres = torch.randn(VALUES, unit, generator=generator)
        drawn = torch.randint(VALUES, (rows,), generator=generator)
        noise = NOISE * torch.randn(rows, unit, generator=generator)
        torch.mul(centres[drawn] + noise, scale, out=columns)
    for _ in range(REFLECTIONS):
        normal = torch.nn.functional.normalize(torch.randn(width, generator=generator), dim=0)
        out.addr_(out @ normal, normal, alpha=-2)
    return out
