"""Counts of what a forward run asks of an accelerator: operators, synchronisations, uploads.

Each operator is at least one kernel launch, a few microseconds whatever its size; each synchronisation makes the
processor wait for the device, which is then idle until the next launch. Views cost neither.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["OperatorCounter", "OperatorCounts"]

VIEWS = frozenset(
    (
        "alias",
        "as_strided",
        "detach",
        "diagonal",
        "expand",
        "lift_fresh",
        "permute",
        "select",
        "slice",
        "split",
        "split_with_sizes",
        "squeeze",
        "t",
        "transpose",
        "unbind",
        "unfold",
        "unsqueeze",
        "view",
        "_reshape_alias",
        "_unsafe_view",
    )
)
# Their results, or the sizes of their results, are numbers that the processor waits for.
SYNCHRONISING = frozenset(
    (
        "_local_scalar_dense",
        "_unique2",
        "equal",
        "is_nonzero",
        "masked_select",
        "nonzero",
        "unique_consecutive",
        "unique_dim",
        "bincount",
        "repeat_interleave",
    )
)
INDEXING = frozenset(("index", "index_put", "index_put_", "_index_put_impl_"))


@dataclass
class OperatorCounts:
    """Counts of one run.

    Attributes:
        operators: calls of each operator on tensors of the device, views left out.
        synchronisations: those that the processor waits for: downloads, and operators with a size read from data.
        uploads: copies from the processor's memory; from pageable memory they wait too.
    """

    operators: Counter[str] = field(default_factory=Counter)
    synchronisations: Counter[str] = field(default_factory=Counter)
    uploads: int = 0

    @property
    def operator_count(self) -> int:
        """Number of operators."""
        return self.operators.total()

    @property
    def synchronisation_count(self) -> int:
        """Number of synchronisations."""
        return self.synchronisations.total()

    def record(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], is_on_device: Any) -> None:
        """Count one call; `is_on_device` tells whether a tensor is on the device."""
        name = function._schema.name.partition("::")[2]
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_device = [is_on_device(tensor) for tensor in tensors]
        target = kwargs.get("device")
        if name == "_to_copy" and target is not None and tensors:
            to_device = torch.device(target).type != "cpu"
            if on_device[0] and not to_device:
                self.synchronisations["download"] += 1
            elif to_device and not on_device[0]:
                self.uploads += 1
        elif name == "copy_" and on_device[0] != on_device[1]:
            if on_device[1]:
                self.synchronisations["download"] += 1
            else:
                self.uploads += 1
        elif not any(on_device) and (target is None or torch.device(target).type == "cpu"):
            return
        if name not in VIEWS:
            self.operators[name] += 1
        if name in SYNCHRONISING and not (
            name == "repeat_interleave" and kwargs.get("output_size") is not None
        ):
            self.synchronisations[name] += 1
        elif name in INDEXING:
            number = name != "index" and args[2].dim() == 0
            for index in args[1]:
                if index is None:
                    continue
                if not is_on_device(index):
                    self.uploads += 1
                # One number where a mask is true is written without looking for the places.
                elif index.dtype in (torch.bool, torch.uint8) and not number:
                    self.synchronisations["mask as index"] += 1


class OperatorCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Context that counts operators on tensors of any device but the CPU, or of the CPU itself."""

    def __init__(self, device: torch.device) -> None:
        """Count what runs on `device`."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts = OperatorCounts()
        self._type = device.type

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Count a call and make it."""
        kwargs = kwargs or {}
        self.counts.record(function, args, kwargs, lambda tensor: tensor.device.type == self._type)
        return function(*args, **kwargs)
