"""Decorators of Triton kernels, and of the operators that launch them.

Each operator is one launch, and an entry of torch's dispatcher: so profilers and counters see it by its name, and the
stand-in for CUDA (`serve.runtime.accelerator.stand_in`) runs it on the CPU, interpreted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

__all__ = ["ceil_div", "is_interpreted", "kernel", "operator", "power_of_two"]

NAMESPACE = "mmdet3d_serve"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def kernel(function: Callable[..., Any]) -> Any:
    """Compile a function by Triton at its first call with new types or constants.

    Sizes are not specialised: one that happens to be 1 or a multiple of 16 would have code of its own compiled while a
    client waits.
    """
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    sizes = [name for name in names if function.__annotations__.get(name) == "int"]
    return triton.jit(function, do_not_specialize=sizes)


def operator(schema: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function that launches one kernel as an operator of torch.

    Args:
        schema: name, arguments and results in torch's notation; a tensor comes first.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _LIBRARY.define(schema)
        name = schema.partition("(")[0]

        def on_device(first: Tensor, *others: Any, **named: Any) -> Any:
            # Triton launches on the current device, which may be another than the tensors'.
            with torch.cuda.device(first.device):
                return function(first, *others, **named)

        _LIBRARY.impl(name, function, "CPU")
        _LIBRARY.impl(name, on_device, "CUDA")
        found: Callable[..., Any] = getattr(getattr(torch.ops, NAMESPACE), name).default
        return found

    return register


def is_interpreted(function: Any) -> bool:
    """Return whether a kernel runs interpreted, on the CPU."""
    return isinstance(function, InterpretedFunction)


def ceil_div(number: int, by: int) -> int:
    """Divide, rounding up."""
    return -(-number // by)


def power_of_two(number: int, least: int = 16) -> int:
    """Return the smallest power of two that is not below `number` and `least`."""
    return max(least, 1 << max(0, number - 1).bit_length())
