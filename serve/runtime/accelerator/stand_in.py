"""Stand-in for a CUDA device: tensors that say they are on one, with their values in the processor's memory.

What CUDA refuses is refused here too: tensors of two devices in one operator, and numpy arrays that share memory with
a tensor of the device. So code for a GPU runs end to end without one, chooses what it would choose there, and each
operator, upload and synchronisation is counted. Speed, precision and memory are the processor's: they say nothing
about a GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from serve.ops.patches import ModuleOverlay
from serve.runtime.accelerator import graphs
from serve.runtime.accelerator.operators import INDEXING, OperatorCounts

__all__ = ["DEVICE", "StandInDevice", "stand_in_device"]

DEVICE = torch.device("cuda", 0)
_META = torch.device("meta")


class _DeviceTensor(Tensor):
    """Tensor of the stand-in device; `held` has its values.

    To torch it is on the device "meta", which has no values, because a build for CPUs cannot guard a CUDA device.
    """

    held: Tensor
    device = property(lambda self: DEVICE)
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)

    @staticmethod
    def __new__(cls, held: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=_META,
        )

    def __init__(self, held: Tensor) -> None:
        self.held = held

    def tolist(self) -> Any:
        """Download, as torch does for a tensor of a device, but refuses for a subclass."""
        return self.cpu().tolist()

    def new_tensor(self, data: Any, dtype: torch.dtype | None = None, *args: Any, **options: Any) -> Tensor:
        """Upload `data`; torch makes no values on "meta"."""
        del args, options
        made = data.detach().cpu() if isinstance(data, Tensor) else torch.tensor(data)
        return made.to(DEVICE, dtype or self.dtype)

    def __getitem__(self, index: Any) -> Any:
        """Upload places that are listed; torch makes no values on "meta"."""
        return super().__getitem__(_listed(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        """Upload places that are listed."""
        super().__setitem__(_listed(index), value)

    def numpy(self, *, force: bool = False) -> Any:
        """Refuse, as torch does for a tensor of a device."""
        if not force:
            raise TypeError(f"a tensor on {DEVICE} has no numpy array; copy it to the CPU first")
        return self.cpu().numpy()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _run(function, args, kwargs or {})


class StandInDevice(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Dispatch mode that makes `DEVICE` exist; `counts` has the calls since `reset`."""

    def __init__(self) -> None:
        """Start with no counts."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts = OperatorCounts()
        self._tape: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] | None = None

    def reset(self) -> None:
        """Start counting anew."""
        self.counts = OperatorCounts()

    def record_launches(
        self, run: Callable[[], list[Tensor]], device: torch.device, pool: Any
    ) -> tuple[list[Tensor], Callable[[], None]]:
        """Record the operators of `run` in the place of `graphs.record_launches`; a replay counts as one.

        Raises:
            RuntimeError: `run` waits for the device or uploads from pageable memory, which a CUDA graph cannot hold.
        """
        counts, self.counts = self.counts, OperatorCounts()
        tape: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self._tape = tape
        try:
            outputs = run()
            kinds, uploads = dict(self.counts.synchronisations), self.counts.uploads
        finally:
            self._tape, self.counts = None, counts
        if kinds or uploads:
            raise RuntimeError(
                f"operation not permitted when stream is capturing: {kinds}, {uploads} uploads"
            )

        def replay() -> None:
            self.counts.operators["graph"] += 1
            for function, args, kwargs, before in tape:
                now = _run(function, args, kwargs)
                for one, other in zip(tree_leaves(now), tree_leaves(before), strict=True):
                    if isinstance(other, _DeviceTensor) and one.held.data_ptr() != other.held.data_ptr():
                        other.held.copy_(one.held)

        return outputs, replay

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Count a call, and run it on the held values."""
        kwargs = kwargs or {}
        if _stays(function, args, kwargs):
            return _DeviceTensor(args[0].held)
        self.counts.record(function, args, kwargs, lambda tensor: isinstance(tensor, _DeviceTensor))
        result = _run(function, args, kwargs)
        if self._tape is not None:
            self._tape.append((function, args, kwargs, result))
        return result


class _Kind(type):
    """Class to which tensors of the stand-in device with one of some dtypes belong, as to ``torch.cuda.LongTensor``."""

    dtypes: tuple[torch.dtype, ...] = ()

    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, _DeviceTensor) and value.dtype in cls.dtypes


class _BoolTensor(metaclass=_Kind):
    dtypes = (torch.bool,)


class _IndexTensor(metaclass=_Kind):
    dtypes = (torch.bool, torch.int64)


class _Allocation:
    """What mmcv takes of ``torch.cuda`` to allocate."""

    @staticmethod
    def IntTensor(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32).to(DEVICE)

    @staticmethod
    def FloatTensor(*shape: int) -> Tensor:
        return torch.empty(shape).to(DEVICE)


@contextmanager
def stand_in_device() -> Iterator[StandInDevice]:
    """Make `DEVICE` exist inside the block, for this thread.

    Raises:
        RuntimeError: there is a CUDA device, so that a stand-in would hide it.
    """
    if torch.cuda.is_available():
        raise RuntimeError("a stand-in for CUDA is of no use beside a CUDA device")
    from mmengine.structures import instance_data

    sampling = sys.modules.get("mmcv.ops.furthest_point_sample", SimpleNamespace(torch=torch))
    generator = torch.Generator()
    with (
        # mmcv makes its buffers on the current device.
        mock.patch.object(sampling, "torch", ModuleOverlay(torch, cuda=_Allocation)),
        # mmengine asks for the classes of tensors that index.
        mock.patch.object(
            instance_data,
            "IndexType",
            SimpleNamespace(__args__=(*instance_data.IndexType.__args__, _IndexTensor)),
        ),
        mock.patch.object(
            instance_data,
            "BoolTypeTensor",
            SimpleNamespace(__args__=(*instance_data.BoolTypeTensor.__args__, _BoolTensor)),
        ),
        # Otherwise `Module.to` would keep a parameter and give it the metadata of another, without its values.
        mock.patch.object(torch.__future__, "get_overwrite_module_params_on_conversion", lambda: True),
        mock.patch.object(torch.cuda, "_lazy_init", lambda: None),
        # They make their values where they are told, past every dispatch.
        mock.patch.object(torch, "tensor", _uploading(torch.tensor)),
        mock.patch.object(torch, "as_tensor", _uploading(torch.as_tensor)),
        mock.patch.object(torch.cuda, "get_rng_state", lambda device=None: generator.get_state()),
        mock.patch.object(torch.cuda, "set_rng_state", lambda state, device=None: None),
        StandInDevice() as device,
        mock.patch.object(graphs, "record_launches", device.record_launches),
    ):
        yield device


def _listed(index: Any) -> Any:
    """Turn lists and arrays of places into tensors on the CPU."""
    if isinstance(index, tuple):
        return tuple(_listed(one) for one in index)
    return torch.as_tensor(index) if isinstance(index, list | range | np.ndarray) else index


def _uploading(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Have a function make a tensor on the CPU, and copy it to the device that it is asked for."""

    def made(*args: Any, device: Any = None, **named: Any) -> Tensor:
        tensor = make(*args, **named)
        return tensor if device is None else tensor.to(device)

    return made


def _run(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name = function._schema.name.partition("::")[2]
    leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    own = [leaf for leaf in leaves if isinstance(leaf, _DeviceTensor)]
    target = kwargs.get("device")
    to_device = bool(own) if target is None else torch.device(target).type != "cpu"
    if name == "copy_":
        to_device = isinstance(args[0], _DeviceTensor)
    _check_devices(name, args, leaves, own)
    inner_args, inner_kwargs = tree_map(_held, (args, kwargs))
    if target is not None:
        inner_kwargs["device"] = torch.device("cpu")
    inner_kwargs.pop("pin_memory", None)
    result = function(*inner_args, **inner_kwargs)
    known = {id(leaf.held): leaf for leaf in own}

    def outer(value: Any) -> Any:
        if not isinstance(value, Tensor) or not to_device:
            return value
        same = known.get(id(value))
        return same if same is not None else _DeviceTensor(value)

    return tree_map(outer, result)


def _stays(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether a call asks for a tensor of the device on the device, as it is; torch takes it for another."""
    if function is not torch.ops.aten._to_copy.default or not isinstance(args[0], _DeviceTensor):
        return False
    target, dtype = kwargs.get("device"), kwargs.get("dtype")
    if target is None or torch.device(target).type != DEVICE.type or kwargs.get("memory_format") is not None:
        return False
    return dtype in (None, args[0].dtype)


def _held(value: Any) -> Any:
    return value.held if isinstance(value, _DeviceTensor) else value


def _check_devices(name: str, args: tuple[Any, ...], leaves: list[Tensor], own: list[Any]) -> None:
    """Raise RuntimeError, as CUDA does, for tensors of two devices; numbers without dimensions may be on the CPU."""
    if not own or name in ("copy_", "_to_copy"):
        return
    if name in INDEXING:  # indices may be on the CPU
        leaves = [leaf for leaf in (args[0], *args[2:3]) if isinstance(leaf, Tensor)]
        if not isinstance(args[0], _DeviceTensor):
            raise RuntimeError(
                "indices should be either on cpu or on the same device as the indexed tensor (cpu)"
            )
    if any(not isinstance(leaf, _DeviceTensor) and leaf.dim() > 0 for leaf in leaves):
        raise RuntimeError(f"{name} expected all tensors to be on the same device, found {DEVICE} and cpu")
