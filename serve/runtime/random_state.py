"""Fixed seeds of the global random generators.

Some models sample points at random during inference (VoteNet's `PointSample`, the sliding windows of PointNet++). With
a fixed seed per frame, the same frame has the same answer on every run.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

__all__ = ["RandomState", "fixed_seed"]

SEED = 0


@dataclass
class RandomState:
    """State of the generators in a `fixed_seed` block; `used` is set at its end if numbers were drawn."""

    used: bool = False


@contextmanager
def fixed_seed(device: torch.device, seed: int = SEED) -> Iterator[RandomState]:
    """Seed the global generators of Python, NumPy and torch inside the block; restore them afterwards.

    Args:
        device: device of the model; the generator of a CUDA device is seeded too.
        seed: seed of all generators.
    """
    random_state = RandomState()
    kept = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        random.seed(seed)
        np.random.seed(seed)
        torch.random.manual_seed(seed)
        before = _state(device)
        try:
            yield random_state
        finally:
            random_state.used = before != _state(device)
            random.setstate(kept[0])
            np.random.set_state(kept[1])


def _state(device: torch.device) -> tuple[object, ...]:
    numpy_state: Any = np.random.get_state()
    states = [torch.random.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return (
        random.getstate(),
        bytes(numpy_state[1]),
        numpy_state[2],
        *(bytes(state.numpy()) for state in states),
    )
