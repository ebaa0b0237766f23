"""Small constant tensors, uploaded to a device once."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["constant"]


@lru_cache(maxsize=1024)
def constant(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return `values`, a number or nested tuples of numbers, as a tensor that must not be changed."""
    return torch.tensor(values, dtype=dtype).to(device)
