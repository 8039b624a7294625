"""The published scheme: a matrix exponential from a fixed base, through autograd."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from ndm_fast.train.rotation.base import EPSILON, Turn


class ExpRotation:
    """The published scheme: Adam on the parameters of a matrix exponential from a fixed base point.

    ``torch.nn.utils.parametrizations.orthogonal`` with ``matrix_exp``: ``R = B exp(X - X')``.

    Args:
        start: [d, d] orthogonal, the base point.
        betas: decay of Adam's first and second moment.
    """

    def __init__(self, start: Tensor, betas: tuple[float, float] = (0.9, 0.999)) -> None:
        width = start.shape[0]
        self._layer = nn.utils.parametrizations.orthogonal(
            nn.Linear(width, width, bias=False, device=start.device), orthogonal_map="matrix_exp"
        )
        with torch.no_grad():
            self._layer.weight = start.detach().float()
        self._adam = torch.optim.Adam(self._layer.parameters(), betas=betas, eps=EPSILON)
        self._current = self._weight()

    def _weight(self) -> Tensor:
        """The rotation, computed anew from the parameters, with its graph."""
        return cast(Tensor, self._layer.weight)

    @property
    def matrix(self) -> Tensor:
        """The current rotation, [d, d]."""
        return self._current.detach()

    @property
    def working(self) -> Tensor:
        """``matrix``, which is orthogonal after every step."""
        return self.matrix

    def ahead(self, steps: float, lr: float) -> Tensor:
        """``matrix``: this scheme searches where it is."""
        return self.matrix

    def pace(self, deviations: Tensor) -> None:
        """Not possible: its parameters turn all pairs together."""
        raise NotImplementedError("an ExpRotation turns all pairs at one rate")

    def step(self, gradient: Tensor, lr: float) -> None:
        """Move against ``gradient`` = dL/dR, [d, d], at this learning rate."""
        self.turn(gradient, self.next_turn(lr))

    def next_turn(self, lr: float) -> Turn:
        """The learning rate; torch's Adam knows the rest."""
        return Turn(lr, EPSILON)

    def put(self, matrix: Tensor) -> None:
        """Not possible: the matrix follows from parameters."""
        raise NotImplementedError("an ExpRotation goes on from its parameters only")

    def turn(self, gradient: Tensor, turn: Turn) -> None:
        """The step's work on the device."""
        for group in self._adam.param_groups:
            group["lr"] = turn.scale
        self._adam.zero_grad(set_to_none=True)
        self._current.backward(gradient)
        self._adam.step()
        self._current = self._weight()

    def state_dict(self) -> dict[str, Tensor]:
        """Base point, parameters, moments and step count."""
        state = {f"layer.{name}": value for name, value in self._layer.state_dict().items()}
        for moments in self._adam.state_dict()["state"].values():
            state.update({f"adam.{name}": torch.as_tensor(value) for name, value in moments.items()})
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a ``state_dict``."""
        layer = {name.removeprefix("layer."): v for name, v in state.items() if name.startswith("layer.")}
        self._layer.load_state_dict(layer)
        moments = {
            name.removeprefix("adam."): v.clone() for name, v in state.items() if name.startswith("adam.")
        }
        adam = self._adam.state_dict()
        self._adam.load_state_dict({**adam, "state": {0: moments} if moments else {}})
        self._current = self._weight()
