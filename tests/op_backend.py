"""A backend on which the tests of the ops run."""

from typing import NamedTuple

from torch import Tensor


class Backend(NamedTuple):
    """A backend under test."""

    name: str
    device: str
    interpreted: bool
    """Runs a thousand times slower than the others: give it the smallest case that tells."""

    def few(self, many: int, few: int) -> int:
        return few if self.interpreted else many

    def on(self, *tensors: Tensor) -> list[Tensor]:
        """The tensors on its device."""
        return [tensor.to(self.device) for tensor in tensors]
