"""What a program would launch, without a card: kernels with their signatures and constants.

Inside :func:`recorded`, launchers run on meta tensors as they would on a card, and their kernels are noted
instead of run: triton's own binder says what it would compile anew for. :meth:`Launch.compiled` then makes
the code that the card would get.

Not with TRITON_INTERPRET set, which makes kernels that cannot be compiled.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from . import launch

_ALLOCATION = 512
"""Torch's addresses on a card are multiples of it."""


class Launch(NamedTuple):
    """A specialisation of a kernel: what triton compiles anew for."""

    kernel: JITFunction
    signature: dict[str, str]
    """Types by parameter."""
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    """What is known of the others: multiples of 16."""
    options: dict[str, Any]
    arch: int
    grid: tuple[int, ...]
    """Of the first such launch."""

    @property
    def key(self) -> str:
        """What tells it from other specialisations."""
        return repr((self.name, self.signature, self.constants, self.attributes, self.options))

    @property
    def name(self) -> str:
        """The kernel's function."""
        return self.kernel.fn.__name__

    @property
    def choices(self) -> dict[str, Any]:
        """Constants by parameter."""
        names = self.kernel.arg_names
        return {names[place]: value for (place,), value in self.constants.items()}

    def compiled(self) -> CompiledKernel:
        """The code for its architecture."""
        source = ASTSource(self.kernel, self.signature, self.constants, self.attributes)
        return triton.compile(source, target=GPUTarget("cuda", self.arch, 32), options=self.options)


class _Address:
    """A tensor as the binder sees it on a card."""

    def __init__(self, tensor: Tensor) -> None:
        self.dtype = tensor.dtype
        self._address = _ALLOCATION + int(tensor.storage_offset()) * tensor.element_size()

    def data_ptr(self) -> int:
        return self._address


@contextmanager
def recorded(arch: int) -> Iterator[list[Launch]]:
    """Launches made inside, each specialisation once, as on a card of this compute capability."""
    launched: list[Launch] = []
    seen: set[str] = set()
    backend = make_backend(GPUTarget("cuda", arch, 32))

    def note(kernel: JITFunction, *given: Any, grid: tuple[int, ...], warmup: bool, **named: Any) -> None:
        del warmup
        positional = [_seen(value) for value in given]
        named = {name: _seen(value) for name, value in named.items()}
        binder = create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, special, options = binder(*positional, **named)
        chosen, signature, constants, attributes = kernel._pack_args(backend, named, bound, special, options)
        made = Launch(kernel, signature, constants, attributes, vars(chosen), arch, grid)
        if made.key not in seen:
            seen.add(made.key)
            launched.append(made)

    with mock.patch.object(JITFunction, "run", note), mock.patch.object(launch, "WITHOUT_A_CARD", arch):
        yield launched


def _seen(value: Any) -> Any:
    return _Address(value) if isinstance(value, torch.Tensor) else value
