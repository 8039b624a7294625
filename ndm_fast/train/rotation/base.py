"""What every optimiser on SO(d) offers."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

EPSILON = 1e-8
"""Adam's guard against a zero second moment."""


class Turn(NamedTuple):
    """What one step takes beside its gradient, decided without looking at the device."""

    scale: float | Tensor
    """Learning rate, with Adam's bias corrections; a [] tensor where a CUDA graph replays the step."""
    guard: float | Tensor
    """Adam's epsilon, likewise."""
    second_order: bool = True
    """Whether ``U^2/2`` is formed."""
    restore: bool = False
    """Whether the matrix is made orthogonal at the end."""


class Rotation(Protocol):
    """A [d, d] orthogonal matrix that a gradient moves."""

    def __init__(self, start: Tensor, betas: tuple[float, float]) -> None: ...

    @property
    def matrix(self) -> Tensor:
        """The current rotation, [d, d] fp32; not to be written to."""
        ...

    @property
    def working(self) -> Tensor:
        """[d, d] where to take the next gradient: ``matrix``, or what it is before it is made orthogonal."""
        ...

    def step(self, gradient: Tensor, lr: float) -> None:
        """Move against ``gradient`` = dL/dR, [d, d], at this learning rate."""
        ...

    def pace(self, deviations: Tensor) -> None:
        """Turn each pair of columns by less, in the ratio of these [d] deviations along them."""
        ...

    def next_turn(self, lr: float) -> Turn:
        """Count a step at this learning rate; :meth:`turn` must take it."""
        ...

    def turn(self, gradient: Tensor, turn: Turn) -> None:
        """The step's work on the device."""
        ...

    def put(self, matrix: Tensor) -> None:
        """Go on from [d, d] ``matrix``, with the moments as they are."""
        ...

    def ahead(self, steps: float, lr: float) -> Tensor:
        """[d, d] orthogonal to 1 %: about where that many steps at this learning rate will lead."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that :meth:`load_state_dict` needs to go on identically."""
        ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a ``state_dict``."""
        ...
