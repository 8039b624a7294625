"""Where the text's residual stream [B, T, d] lies in the tensor that a block is given."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ndm_fast.errors import InputError

_ORDERS = ("btd", "tbd", "bdt")


@dataclass(frozen=True)
class Layout:
    """Order of a tensor's axes, and which of its positions are the text's."""

    order: str = "btd"
    """b rows, t positions, d width: XLNet has the positions first, SqueezeBERT last."""
    before: int = 0
    """Positions of the model's own before the text's, as in CPM-Ant."""
    streams: int = 1
    """As many streams one after the other, of which the text's is the first, as in ProphetNet."""

    def view(self, tensor: Tensor) -> Tensor:
        """[B, T, d] the text's part of a module's tensor, with the same memory.

        Raises:
            InputError: the tensor has fewer positions than the model puts before the text.
        """
        ordered = tensor.permute([self.order.index(axis) for axis in "btd"])
        count, rest = divmod(ordered.shape[1] - self.before, self.streams)
        if count < 1 or rest:
            raise InputError(
                f"a forward pass on {ordered.shape[1]} positions lacks those that the model puts beside the "
                "text's: run it on the whole text, without a cache"
            )
        return ordered.narrow(1, self.before, count)

    def put(self, tensor: Tensor, new: Tensor) -> Tensor:
        """The module's tensor with [B, T, d] in the place of :meth:`view`'s."""
        if self == PLAIN:
            return new
        whole = tensor.clone()
        self.view(whole).copy_(new)
        return whole


PLAIN = Layout()


def layout_of(
    short: torch.Size, long: torch.Size, rows: int, lengths: tuple[int, int]
) -> tuple[Layout, int] | None:
    """The layout and the width that explain a tensor's shape in a run on a short and on a long text."""
    if len(short) != 3 or len(long) != 3:
        return None
    for order in _ORDERS:
        b, t, d = (order.index(axis) for axis in "btd")
        if short[b] != rows or long[b] != rows or short[d] != long[d]:
            continue
        streams, rest = divmod(long[t] - short[t], lengths[1] - lengths[0])
        before = short[t] - streams * lengths[0]
        if rest or streams < 1 or before < 0 or (streams > 1 and before):
            continue
        return Layout(order, before, streams), short[d]
    return None
