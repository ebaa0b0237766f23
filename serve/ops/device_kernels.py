"""Choice of the kernels for a device that is not the CPU: Triton where it works, else whole tensors of torch.

Triton comes with torch's builds for CUDA and is not imported for anything else. It compiles a kernel when it is first
called, for which it needs a C compiler, the headers of Python and a folder to write to; so a small kernel is tried once
per device, and if anything fails, torch's ways serve and the reason is reported.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from serve.ops.checks import uses_torch_only
from serve.settings.kernels import KernelSettings

__all__ = ["DeviceKernels", "device_kernels", "keep_code_in", "uses_triton", "without_triton"]

logger = logging.getLogger(__name__)

# Triton's own minimum for CUDA.
LEAST_CAPABILITY = (8, 0)
# Floats that the kernels take; others have torch's ways.
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


_without_triton: ContextVar[bool] = ContextVar("without_triton", default=False)


class DeviceKernels(NamedTuple):
    """Kernels of one device.

    Attributes:
        triton: whether kernels in Triton are used.
        description: of the choice, with its reason if they are not.
    """

    triton: bool
    description: str


def uses_triton(tensor: Tensor) -> bool:
    """Return whether the Triton version of a kernel handles `tensor`, not the one of whole tensors."""
    device = tensor.device
    return (
        device.type == "cuda"
        and (tensor.dtype in FLOATS or not tensor.is_floating_point())
        and not (uses_torch_only() or _without_triton.get())
        and device_kernels(device.index or 0).triton
    )


@contextmanager
def without_triton() -> Iterator[None]:
    """Use torch's ways on CUDA devices inside the block; the CPU keeps its own."""
    before = _without_triton.set(True)
    try:
        yield
    finally:
        _without_triton.reset(before)


def keep_code_in(folder: Path, *, confined: bool = False) -> None:
    """Have Triton keep compiled kernels in `folder`, before the first is compiled.

    Args:
        folder: made if it does not exist.
        confined: this process may write nowhere else, so its temporary files belong there, too.
    """
    try:
        import triton
    except ImportError:
        return
    place = folder.expanduser() / "triton"
    place.mkdir(parents=True, exist_ok=True, mode=0o700)
    if hasattr(triton, "knobs"):  # since 3.4
        triton.knobs.cache.dir = str(place)
    if confined:
        tempfile.tempdir = str(place)


@cache
def device_kernels(index: int) -> DeviceKernels:
    """Choose the kernels of CUDA device `index`, once per process."""
    if KernelSettings.from_environment().triton == "off":
        return DeviceKernels(False, "torch, as MMDET3D_SERVE_TRITON=off")
    try:
        import triton

        from serve.ops.triton import probe
    except ImportError as error:
        return DeviceKernels(False, f"torch, as Triton cannot be imported ({error})")
    name = f"triton {triton.__version__}"
    if probe.interpreted():
        return DeviceKernels(True, f"{name}, interpreted")
    if not torch.cuda.is_available():
        return DeviceKernels(False, "torch, as there is no CUDA device")
    capability = torch.cuda.get_device_capability(index)
    if capability < LEAST_CAPABILITY:
        least, has = (".".join(map(str, pair)) for pair in (LEAST_CAPABILITY, capability))
        return DeviceKernels(False, f"torch, as {name} needs compute capability {least}, this is {has}")
    try:
        probe.try_kernel(torch.device("cuda", index))
    except Exception as error:  # of the compiler, the driver, the file system …
        reason = f"{type(error).__name__}: {error}"[:300]
        logger.warning("Triton does not work here, torch's own ways are used: %s", reason)
        return DeviceKernels(False, f"torch, as {name} does not work here ({reason})")
    return DeviceKernels(True, name)
