"""Optimisers on SO(d): the rotation moves by Adam, and stays orthogonal."""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from ndm_fast import step_ops
from ndm_fast.full_fp32 import full_fp32

EPSILON = 1e-8
"""Adam's guard against a zero second moment."""
_RENORMALISE_EVERY = 8
"""Steps between Newton-Schulz steps where the steps are small."""
_LOW_RATE, _FARTHEST = 1e-3, 0.4
"""Learning rate up to which :meth:`LieRotation.ahead` looks ahead (at higher ones updates turn too soon), and
how far, at most: the spectral norm of the turn, in radians."""
_POWER_STEPS = 6
"""Products with a vector that estimate a spectral norm: to 10 % for noise."""
_SMALL_STEP = 0.0063
"""``lr sqrt(d)`` up to which eight steps without one keep every entry of ``R'R`` to 1e-5.

``I + U + U^2/2`` is off by ``|U|^4 / 4``. Adam's update, with entries of size lr, has a norm of about
``2 lr sqrt(d)`` for gradients like noise, but of ``0.64 lr d`` for one of rank one, which spreads that error
over all entries.
"""


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


class LieRotation:
    """Adam on the Lie algebra with a local retraction (design section 5).

    With ``A = R'G - G'R`` (skew): Adam moments on A, ``U = -lr m/(sqrt(v) + eps)`` (skew),
    ``R <- R (I + U + U^2/2)``, then one Newton-Schulz step ``R <- R (3I - R'R)/2``: five products of d^3,
    no solve; at small rates only every eighth step needs the last two. Moments live in the moving frame.

    Args:
        start: [d, d] orthogonal.
        betas: decay of the first and the second moment.
    """

    def __init__(self, start: Tensor, betas: tuple[float, float] = (0.9, 0.999)) -> None:
        self._matrix = start.detach().float().clone(memory_format=torch.contiguous_format)
        self._first = torch.zeros_like(self._matrix)
        self._second = torch.zeros_like(self._matrix)
        self._steps = 0
        self._betas = betas

    @property
    def matrix(self) -> Tensor:
        """The current rotation, [d, d]."""
        return self._matrix

    @property
    def working(self) -> Tensor:
        """``matrix``, which is orthogonal after every step."""
        return self.matrix

    def step(self, gradient: Tensor, lr: float) -> None:
        """Move against ``gradient`` = dL/dR, [d, d], at this learning rate."""
        self.turn(gradient, self.next_turn(lr))

    def next_turn(self, lr: float) -> Turn:
        """Count a step at this learning rate; :meth:`turn` must take it."""
        self._steps += 1
        due = self._steps % _RENORMALISE_EVERY == 0
        return Turn(*self._factors(lr), restore=due or restores_every_step(lr, len(self._matrix)))

    @torch.no_grad()
    def turn(self, gradient: Tensor, turn: Turn) -> None:
        """The step's work on the device; no host sync."""
        update = self._update(self._matrix.T @ gradient, turn.scale, turn.guard)
        self._matrix = self._moved(update)
        if turn.restore:
            self._matrix = _newton_schulz(self._matrix)

    def put(self, matrix: Tensor) -> None:
        """Go on from [d, d] ``matrix``, with the moments as they are."""
        self._matrix = matrix

    @torch.no_grad()
    def ahead(self, steps: float, lr: float) -> Tensor:
        """[d, d] where the rotation will be if it goes on along its last update; low rates only.

        Singular values are within ``1 + 0.4^4 / 8`` of 1, which a search does not notice.
        """
        if self._steps == 0 or steps == 0 or lr > _LOW_RATE:
            return self.matrix
        return self._moved(_turn_at_most(self._update(None, *self._factors(steps * lr)), _FARTHEST))

    def _factors(self, lr: float) -> tuple[float, float]:
        """Scale and guard with which moments give ``-lr m/(sqrt(v) + eps)`` of the unbiased ones."""
        fast, slow = self._betas
        debias = math.sqrt(1 - slow**self._steps)
        return lr * debias / (1 - fast**self._steps), EPSILON * debias

    def _update(
        self, product: Tensor | None, scale: float | Tensor, guard: float | Tensor, half: bool = False
    ) -> Tensor:
        """[d, d] skew update, after moving the moments on by ``R'G`` where it is given."""
        return step_ops.lie_update(product, self._first, self._second, scale, guard, self._betas, half=half)

    def _moved(self, update: Tensor) -> Tensor:
        with full_fp32():
            turn = torch.addmm(update, update, update, alpha=0.5)
            return torch.addmm(self.matrix, self.matrix, turn)

    def state_dict(self) -> dict[str, Tensor]:
        """Matrix, moments and step count."""
        return {
            "matrix": self._matrix,
            "first": self._first,
            "second": self._second,
            "steps": torch.tensor(self._steps),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a ``state_dict``."""
        device = self._matrix.device
        self._matrix, self._first, self._second = (
            state[name].clone().to(device) for name in ("matrix", "first", "second")
        )
        self._steps = int(state["steps"])


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


def restores_every_step(lr: float, width: int) -> bool:
    """Whether :class:`LieRotation` makes the matrix orthogonal after every step, not every eighth."""
    return lr * math.sqrt(width) > _SMALL_STEP


def _turn_at_most(update: Tensor, largest: float) -> Tensor:
    """A skew update, scaled to a spectral norm of about ``largest`` where it is above; no host sync."""
    vector = torch.arange(len(update), device=update.device, dtype=update.dtype).cos()
    for _ in range(_POWER_STEPS):
        before, vector = vector, update @ vector
    norm = torch.linalg.vector_norm(vector) / torch.linalg.vector_norm(before)
    return update.mul_((largest / norm).clamp_max(1).nan_to_num(nan=0.0))


def _newton_schulz(matrix: Tensor) -> Tensor:
    """The matrix, nearer to orthogonal: an error e becomes about 3/4 e^2."""
    with full_fp32():
        return torch.addmm(matrix, matrix, matrix.T @ matrix, beta=1.5, alpha=-0.5)


def make_rotation(kind: str, start: Tensor, betas: tuple[float, float]) -> Rotation:
    """The optimiser by name, ``"lie"``, ``"lazy"`` or ``"exp"``, starting from an orthogonal matrix."""
    from ndm_fast.lazy_rotation import LazyRotation  # it builds on this module

    kinds: dict[str, type[Rotation]] = {"lie": LieRotation, "lazy": LazyRotation, "exp": ExpRotation}
    return kinds[kind](start, betas)


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
