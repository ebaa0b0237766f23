"""Fuzzer of all kernels: call each with one corrupted argument at a time and print the outcomes as lines of JSON.

It is a program, because an invalid memory access may crash the process; it announces each call before it runs. An
outcome is ``same`` (the result of the valid call), ``error`` (an exception of an expected type, with its message),
``foreign`` (any other exception), ``random`` (two calls differ, with different garbage in free memory), or ``other`` (a
stable result other than the valid one).
"""

from __future__ import annotations

import inspect
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from serve.ops import extension
from tools.bench.kernels import boxes, images, points
from tools.bench.kernels.inputs import Inputs

CASES = {**boxes.CASES, **points.CASES, **images.CASES}
OURS = (TypeError, ValueError, IndexError)
# Tolerances for another dtype or summation order.
TOLERANCE = {"float16": 0.06, "float64": 1e-4, "not contiguous": 1e-5}

# Description, corrupted argument, and the valid argument it should be equivalent to (or None).
Change = tuple[str, Any, Any]


def names(kernel: Callable[..., Any], count: int) -> list[str]:
    found = [
        name
        for name, one in inspect.signature(kernel).parameters.items()
        if one.kind.name != "VAR_POSITIONAL"
    ]
    return (found + ["arguments"] * count)[:count]


def corrupt(tensor: torch.Tensor) -> Iterator[Change]:
    wide = torch.empty((*tensor.shape, 2), dtype=tensor.dtype)
    wide[..., 0], wide[..., 1] = tensor, 77
    if tensor.numel() > 1:
        yield "not contiguous", wide[..., 0], tensor
    if tensor.dim():
        yield "one dimension more", tensor[None].clone(), None
        yield "one dimension less", tensor.flatten() if tensor.dim() > 1 else tensor.sum(), None
    for axis in range(tensor.dim()):
        if tensor.shape[axis] > 0:
            yield f"shorter along {axis}", tensor.narrow(axis, 0, tensor.shape[axis] - 1).clone(), None
            last = tensor.narrow(axis, tensor.shape[axis] - 1, 1)
            yield f"longer along {axis}", torch.cat((tensor, last), dim=axis), None
            yield f"nothing along {axis}", tensor.narrow(axis, 0, 0).clone(), None
    yield "on another device", tensor.to("meta"), None
    if tensor.is_floating_point():
        yield "float16", tensor.half(), tensor.half().float()
        yield "float64", tensor.double(), tensor
        yield "int64", tensor.long(), tensor.long().float()
        if tensor.numel():
            one = tensor.clone()
            one.view(-1)[-1] = float("nan")
            yield "one NaN", one, None
            yield "all NaN", torch.full_like(tensor, float("nan")), None
            yield "infinite", torch.full_like(tensor, float("inf")), None
            yield "enormous", torch.full_like(tensor, 3e38), None
    else:
        yield "float32", tensor.float(), tensor
        if tensor.dtype in (torch.int32, torch.int64):
            yield (
                "the other int",
                tensor.to(torch.int64 if tensor.dtype == torch.int32 else torch.int32),
                tensor,
            )
            if tensor.numel():
                for what, value in (("an index of -7", -7), ("an index of a million", 10**6)):
                    one = tensor.clone()
                    one.view(-1)[-1] = value
                    yield what, one, None


def corrupt_number(value: Any) -> Iterator[Change]:
    if isinstance(value, bool) or not isinstance(value, int):
        return
    for other in (-1, 0, value + 1):
        if other != value:
            yield f"{other} for {value}", other, None


def copy(arguments: list[Any]) -> list[Any]:
    return [
        one.clone() if isinstance(one, torch.Tensor) and one.is_contiguous() else one for one in arguments
    ]


def call(kernel: Callable[..., Any], arguments: list[Any]) -> list[Any]:
    """Call a kernel; return its result and its arguments afterwards."""
    # Non-contiguous views are written through, so they need their own memory in each call.
    own = [
        torch.stack((one, one), dim=-1)[..., 0]
        if isinstance(one, torch.Tensor) and not one.is_contiguous()
        else one
        for one in copy(arguments)
    ]
    made = kernel(*own)
    return [made, *own]


def litter(seed: int) -> None:
    """Fill free memory with garbage for the next allocations."""
    for size in (16, 100, 500, 3000, 20000):
        kept = [torch.full((size,), float(seed) * 1e9 + number) for number in range(20)]
        del kept


def same(first: Any, second: Any, tolerance: float = 0.0) -> bool:
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        if first.device.type == "meta" or second.device.type == "meta":
            return True
        if first.numel() != second.numel():
            return False
        a, b = first.detach().double().flatten(), second.detach().double().flatten()
        if tolerance:
            return torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)
        return bool(((a == b) | (a.isnan() & b.isnan())).all())
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(
            same(a, b, tolerance) for a, b in zip(first, second, strict=True)
        )
    return bool(first == second) or (first != first and second != second)


def outcome(kernel: Callable[..., Any], arguments: list[Any], at: int, change: Change) -> dict[str, Any]:
    what, bad, counts_as = change
    tried = [*arguments[:at], bad, *arguments[at + 1 :]]
    try:
        litter(1)
        first = call(kernel, tried)
        litter(-3)
        second = call(kernel, tried)
    except Exception as error:
        kind = "error" if type(error) in OURS else "foreign"
        return {"outcome": kind, "type": type(error).__name__, "message": str(error)[:300]}
    if not same(first, second):
        return {"outcome": "random"}
    valid = arguments if counts_as is None else [*arguments[:at], counts_as, *arguments[at + 1 :]]
    try:
        expected = call(kernel, valid)
    except Exception:
        return {"outcome": "other"}
    # Output and unused buffers may have any shape or dtype: only the rest must be the same.
    skip = 1 + at if counts_as is None else None
    pairs = [pair for number, pair in enumerate(zip(first, expected, strict=True)) if number != skip]
    alike = len(pairs) > 0 and all(same(a, b, TOLERANCE.get(what, 0.0)) for a, b in pairs)
    return {"outcome": "same" if alike else "other"}


def main(wanted: list[str]) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for kernel_name in wanted or sorted(CASES):
        kernel = extension.kernels()[kernel_name]
        arguments = CASES[kernel_name](Inputs(False))
        for at, (name, value) in enumerate(zip(names(kernel, len(arguments)), arguments, strict=True)):
            changes = corrupt(value) if isinstance(value, torch.Tensor) else corrupt_number(value)
            for change in changes:
                attempt = {"kernel": kernel_name, "argument": name, "change": change[0]}
                print(json.dumps({"next": attempt}), flush=True)
                print(json.dumps({**attempt, **outcome(kernel, arguments, at, change)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
