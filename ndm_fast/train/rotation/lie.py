"""Adam on the Lie algebra with a local retraction."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ndm_fast.ops.lie_update import direct_update
from ndm_fast.ops.product import product
from ndm_fast.train.rotation.base import EPSILON, Turn

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


class LieRotation:
    """Adam on the Lie algebra with a local retraction (docs/method.md).

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
        self._pace: Tensor | None = None
        self._adam = direct_update()

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

    @torch.no_grad()
    def pace(self, deviations: Tensor) -> None:
        """From now on turn each pair of columns by less, in the ratio of these [d] deviations along them."""
        logs = deviations.log()
        ratios = (logs - logs[:, None]).abs_().neg_().exp_()
        if self._pace is None:
            self._pace = ratios
        else:
            self._pace.copy_(ratios)  # where a CUDA graph reads it

    def next_turn(self, lr: float) -> Turn:
        """Count a step at this learning rate; :meth:`turn` must take it."""
        self._steps += 1
        due = self._steps % _RENORMALISE_EVERY == 0
        return Turn(*self._factors(lr), restore=due or restores_every_step(lr, len(self._matrix)))

    @torch.no_grad()
    def turn(self, gradient: Tensor, turn: Turn) -> None:
        """The step's work on the device; no host sync."""
        update = self._update(self._turned_back(gradient), turn.scale, turn.guard)
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
        update: Tensor = self._adam(
            product=product,
            first=self._first,
            second=self._second,
            scale=scale,
            guard=guard,
            betas=self._betas,
            half=half,
        )
        return update if self._pace is None else update.mul_(self._pace)

    def _turned_back(self, gradient: Tensor) -> Tensor:
        """[d, d] ``R'G``."""
        return product(self._matrix, gradient, transposed=True, exact=False)

    def _moved(self, update: Tensor) -> Tensor:
        turn = product(update, update, base=update, scale=0.5)
        return product(self.matrix, turn, base=self.matrix)

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
    return product(matrix, product(matrix, matrix, transposed=True), base=matrix, factor=1.5, scale=-0.5)
