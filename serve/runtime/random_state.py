"""Random numbers that are the same every time.

Some models draw points at random while they answer (VoteNet's `PointSample`, the sliding windows of
PointNet++): fixed_seed alike for every frame, the same frame gets the same answer on every run. Knows nothing
about models.
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
    """Whether random numbers were drawn; known once the `fixed_seed` block is left."""

    used: bool = False


@contextmanager
def fixed_seed(device: torch.device, seed: int = SEED) -> Iterator[RandomState]:
    """Inside, the global generators of Python, NumPy and torch start from `seed`; afterwards they go on as before.

    Args:
        device: where the model runs; the generator of a CUDA device is fixed_seed too.
        seed: where to start.
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
