"""Trial of Triton on a device: whether a kernel compiles, is launched, and gives the right numbers."""

from __future__ import annotations

import torch
import triton.language as tl

from serve.ops.triton.dispatch import is_interpreted, kernel

__all__ = ["interpreted", "try_kernel"]


@kernel
def _add_one(values, count: int, BLOCK: tl.constexpr):  # pragma: no cover - compiled
    place = tl.arange(0, BLOCK)
    found = tl.load(values + place, mask=place < count, other=0.0)
    tl.store(values + place, found + 1.0, mask=place < count)


def interpreted() -> bool:
    """Return whether kernels are interpreted (``TRITON_INTERPRET=1``)."""
    return is_interpreted(_add_one)


def try_kernel(device: torch.device) -> None:
    """Run a small kernel on `device`.

    Raises:
        Exception: of any kind; Triton needs a C compiler, the headers of Python and a folder to write to.
    """
    values = torch.arange(20.0, device=device)
    _add_one[(1,)](values, 19, BLOCK=32)
    expected = [number + 1.0 if number < 19 else 19.0 for number in range(20)]
    if values.tolist() != expected:
        raise RuntimeError(f"a kernel gave {values.tolist()}")
