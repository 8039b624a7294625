"""Adam on the Lie algebra in bf16 products, made orthogonal only where someone looks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ndm_fast.ops.backends import has_fast_bf16
from ndm_fast.ops.product import product
from ndm_fast.train.rotation.base import Turn
from ndm_fast.train.rotation.lie import LieRotation

MOST_DRIFT = 0.03
"""Distance from orthogonality, as ``|R'R - I|``, at which a step restores it."""


_SEARCHED = 0.01
"""Drift up to which a search takes the matrix as it is: restoring takes two products in fp32, and a wait."""

_FIRST_ORDER = 0.005
"""Drift of a step without ``U^2/2`` up to which that product costs more than the repairs it saves."""


_FIRST_STEPS = 8
"""Steps that are followed by a repair each: Adam's first updates are sign matrices, the largest it makes."""


_REPAIRS = 8
"""Newton-Schulz steps that bring any drift below 1 to rounding: 0.99, 0.74, 0.41, 0.13, 1e-2, 1e-4, 1e-8."""


_ORTHOGONAL = 2e-6
"""Largest entry of ``R'R - I`` at which a matrix is handed out."""


class LazyRotation(LieRotation):
    """:class:`LieRotation` with two or three half-priced products a step instead of three to five.

    The polar factor of ``I + U`` is ``I + U + U^2/2 + O(U^4)``: where Newton-Schulz comes later anyway, the
    second-order term need not be formed. So a step at a small rate is ``R <- R + R U``, and orthogonality is
    restored when :attr:`matrix` is read, or before the drift, about ``4 d lr^2`` a step, is large. The
    products with the gradient and with U are in bf16 where the device has it (moments, R and what restores
    it in fp32): what bf16 rounds off ``R U`` is below ``2^-8`` of a step, and no longer seen after a read.

    Args:
        start, betas: as for :class:`LieRotation`.
    """

    def __init__(self, start: Tensor, betas: tuple[float, float] = (0.9, 0.999)) -> None:
        super().__init__(start, betas)
        self._half = has_fast_bf16(start.device)
        self._drift = 0.0
        self._moved_since_read = False

    @property
    def matrix(self) -> Tensor:
        """The current rotation, [d, d], ``|R'R - I|`` at most 1e-5 in every entry."""
        if self._moved_since_read:
            self._matrix, self._drift = self._orthogonal(self._matrix), 0.0
            self._moved_since_read = False
        return self._matrix

    @property
    def working(self) -> Tensor:
        """[d, d] the matrix as the last step left it."""
        return self._matrix

    def ahead(self, steps: float, lr: float) -> Tensor:
        """[d, d] orthogonal to 1 %: about where that many steps at this learning rate will lead."""
        if steps == 0 and self._drift <= _SEARCHED:
            return self._matrix
        return super().ahead(steps, lr)

    def next_turn(self, lr: float) -> Turn:
        """Count a step at this learning rate; :meth:`turn` must take it."""
        self._steps += 1
        self._moved_since_read = True
        second_order, drift = step_drift(lr, len(self._matrix))
        self._drift += drift
        restore = self._drift > MOST_DRIFT or self._steps <= _FIRST_STEPS
        if restore:
            self._drift = 0.0
        return Turn(*self._factors(lr), second_order, restore)

    @torch.no_grad()
    def turn(self, gradient: Tensor, turn: Turn) -> None:
        """The step's work on the device; no host sync."""
        matrix = self._matrix.bfloat16() if self._half else self._matrix
        tangent = matrix.T @ gradient.bfloat16() if self._half else self._turned_back(gradient)
        half = self._half and not turn.second_order
        update = self._update(tangent, turn.scale, turn.guard, half)
        if turn.second_order:
            update.add_(self._product(update, update), alpha=0.5)
        if self._half:
            self._matrix = self._matrix + matrix @ update.bfloat16()
        else:
            self._matrix = product(matrix, update, base=matrix, exact=False)
        if turn.restore:
            for _ in range(2):
                self._matrix = self._repaired(self._matrix, self._excess(self._matrix))

    def _moved(self, update: Tensor) -> Tensor:
        turn = self._product(update, update).mul_(0.5).add_(update)
        return self.matrix + self._product(self.matrix, turn)

    def state_dict(self) -> dict[str, Tensor]:
        """Matrix, moments and step count."""
        return {**super().state_dict(), "matrix": self.matrix}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a ``state_dict``."""
        super().load_state_dict(state)
        self._drift, self._moved_since_read = 0.0, False

    def _product(self, left: Tensor, right: Tensor) -> Tensor:
        if self._half:
            return (left.bfloat16() @ right.bfloat16()).float()
        return product(left, right, exact=False)

    def _orthogonal(self, matrix: Tensor) -> Tensor:
        """The nearest orthogonal matrix; reads numbers back, so it belongs between blocks of steps."""
        excess = self._excess(matrix)
        if 1 <= float(torch.linalg.vector_norm(excess)) < math.inf:
            left, _, right = torch.linalg.svd(matrix)
            return left @ right
        # Below 1 (in any norm that bounds the spectral one) Newton-Schulz converges; NaN ends it and stays.
        for _ in range(_REPAIRS):
            if not float(excess.abs().max()) > _ORTHOGONAL:
                break
            matrix = self._repaired(matrix, excess)
            excess = self._excess(matrix)
        return matrix

    def _repaired(self, matrix: Tensor, excess: Tensor) -> Tensor:
        """A Newton-Schulz step; the correction is small, so bf16 will do for it."""
        return matrix.sub(self._product(matrix, excess), alpha=0.5)

    @staticmethod
    def _excess(matrix: Tensor) -> Tensor:
        """[d, d] fp32 ``R'R - I``."""
        gram = product(matrix, matrix, transposed=True)
        gram.diagonal().sub_(1)
        return gram


def step_drift(lr: float, width: int) -> tuple[bool, float]:
    """Whether a step at this rate forms ``U^2/2``, and by how much it leaves orthogonality, ``|R'R - I|``."""
    drift = 4 * lr**2 * width
    second_order = drift > _FIRST_ORDER
    return second_order, drift**2 / 4 if second_order else drift
