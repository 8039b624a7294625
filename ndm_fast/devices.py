"""Devices by name."""

from __future__ import annotations

from ndm_fast.errors import InputError


def check_device(name: str) -> None:
    """Refuse a device name that torch does not know, or a GPU that is not there."""
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"unknown device {name!r}: take cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(
            f"--device {name}, but torch sees no GPU: use --device cpu or install a CUDA build of torch"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise InputError(f"--device {name}, but torch sees {count} GPU(s): they count from cuda:0")
