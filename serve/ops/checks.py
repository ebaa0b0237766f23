"""Argument checks, compute dtypes and dispatch shared by the kernels.

A wrong tensor raises an exception that names the argument and the expected value; a compiled kernel would read invalid
memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

__all__ = [
    "as_compute_dtype",
    "as_numpy",
    "check_floating",
    "check_grid",
    "check_indices",
    "check_integer",
    "check_rank",
    "check_rulebook",
    "check_rulebook_rows",
    "check_same_device",
    "check_shape",
    "check_tensor",
    "check_voxel_buffers",
    "check_width",
    "check_writable_from",
    "compute_dtype",
    "torch_only",
    "uses_float32_kernel",
    "uses_numba",
    "uses_torch_only",
]


def check_rank(name: str, tensor: Tensor, rank: int) -> None:
    """Raise ValueError unless `tensor` has `rank` dimensions."""
    if tensor.dim() != rank:
        raise ValueError(f"{name} must have {rank} dimensions, got shape {tuple(tensor.shape)}")


def check_width(name: str, tensor: Tensor, width: int) -> None:
    """Raise ValueError unless `tensor` is (N, at least `width`)."""
    check_rank(name, tensor, 2)
    if tensor.shape[1] < width:
        raise ValueError(f"{name} must be (N, >={width}), got shape {tuple(tensor.shape)}")


def check_same_device(**tensors: Tensor) -> None:
    """Raise ValueError unless all tensors live on one device."""
    devices = {name: tensor.device for name, tensor in tensors.items()}
    if len(set(devices.values())) > 1:
        raise ValueError(
            "tensors must be on one device, got " + ", ".join(f"{n}: {d}" for n, d in devices.items())
        )


_torch_only: ContextVar[bool] = ContextVar("torch_only", default=False)


def uses_numba(tensor: Tensor) -> bool:
    """Return whether the numba version of a kernel handles `tensor` (on the CPU), not the torch version."""
    return tensor.device.type == "cpu" and not _torch_only.get()


def uses_torch_only() -> bool:
    """Return whether the torch versions are used on every device (inside `torch_only`)."""
    return _torch_only.get()


@contextmanager
def torch_only() -> Iterator[None]:
    """Use the torch versions on every device inside the block, to compare them with the others."""
    before = _torch_only.set(True)
    try:
        yield
    finally:
        _torch_only.reset(before)


def as_numpy(tensor: Tensor) -> npt.NDArray[Any]:
    """Return a C-contiguous numpy view of a CPU tensor, or a copy if it is not contiguous."""
    array: npt.NDArray[Any] = tensor.detach().contiguous().numpy()
    return array


def as_compute_dtype(tensor: Tensor) -> Tensor:
    """Convert `tensor` to the compute dtype of the kernels: float64 unchanged, everything else float32."""
    return tensor.detach() if tensor.dtype == torch.float64 else tensor.detach().float()


def compute_dtype(tensor: Tensor, name: str = "input") -> torch.dtype:
    """Return the dtype a kernel computes in: float64 for float64, float32 for other floating point types.

    Raises:
        TypeError: `tensor` is not floating point.
    """
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def uses_float32_kernel(tensor: Tensor) -> bool:
    """Return whether the numba version of a float32 kernel handles `tensor`, not the torch version."""
    return uses_numba(tensor) and compute_dtype(tensor) == torch.float32


def check_shape(name: str, tensor: Tensor, *expected: int | None) -> None:
    """Raise ValueError unless `tensor` has the `expected` shape; None stands for any size."""
    shape = tuple(tensor.shape)
    fits = len(shape) == len(expected)
    if not fits or any(want is not None and want != got for want, got in zip(expected, shape, strict=True)):
        wanted = ", ".join("*" if size is None else str(size) for size in expected)
        raise ValueError(f"{name} must have shape ({wanted}), got {shape}")


def check_floating(**tensors: Tensor) -> None:
    """Raise TypeError unless all tensors are floating point."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {tensor.dtype}")


def check_integer(**tensors: Tensor) -> None:
    """Raise TypeError unless all tensors are int32 or int64."""
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} must be int32 or int64, got {tensor.dtype}")


def check_writable_from(name: str, tensor: Tensor, source_name: str, source: Tensor) -> None:
    """Raise TypeError if `tensor` is integer and `source`, to be written to it, has another dtype."""
    if not tensor.is_floating_point() and tensor.dtype != source.dtype:
        raise TypeError(f"{name} must be {source.dtype} as {source_name} is, got {tensor.dtype}")


def check_tensor(like: tuple[str, Tensor], name: str, tensor: Tensor, *shape: int | None) -> None:
    """Raise unless `tensor` is floating point, of `shape`, and on the device of the named tensor `like`."""
    check_shape(name, tensor, *shape)
    check_floating(**{name: tensor})
    check_same_device(**{like[0]: like[1], name: tensor})


def check_indices(name: str, indices: Tensor, limit: int, least: int = 0) -> None:
    """Raise TypeError unless `indices` are int32 or int64, IndexError unless all lie in [least, limit).

    It costs one reduction and one transfer. Otherwise an index out of range would crash the process on CPU or corrupt
    the CUDA context.
    """
    check_integer(**{name: indices})
    if indices.numel() == 0:
        return
    low, high = (int(bound) for bound in torch.stack(torch.aminmax(indices)).tolist())
    if low < least or high >= limit:
        raise IndexError(f"{name} must lie in [{least}, {limit}), got values from {low} to {high}")


def check_grid(points: Tensor, voxel_size: Tensor, coors_range: Tensor) -> None:
    """Raise unless `points` are (N, at least 3) float, and the others 3 and 6 readable floats."""
    check_rank("points", points, 2)
    if points.shape[1] < 3:
        raise ValueError(f"points must be (N, >=3), got shape {tuple(points.shape)}")
    check_floating(points=points, voxel_size=voxel_size, coors_range=coors_range)
    check_shape("voxel_size", voxel_size, 3)
    check_shape("coors_range", coors_range, 6)
    for name, tensor in (("points", points), ("voxel_size", voxel_size), ("coors_range", coors_range)):
        _check_values(name, tensor)


def check_voxel_buffers(
    points: Tensor,
    voxels: Tensor,
    coors: Tensor,
    num_points_per_voxel: Tensor,
    voxel_num: Tensor,
    max_points: int,
    max_voxels: int,
) -> None:
    """Raise unless the buffers, written in place, have room for `max_voxels` voxels of `max_points` points."""
    if max_points < 0 or max_voxels < 0:
        raise ValueError(f"max_points and max_voxels must be at least 0, got {max_points} and {max_voxels}")
    check_tensor(("points", points), "voxels", voxels, None, None, points.shape[1])
    check_shape("coors", coors, None, 3)
    check_shape("num_points_per_voxel", num_points_per_voxel, None)
    check_same_device(points=points, coors=coors, num_points_per_voxel=num_points_per_voxel)
    if voxels.dtype != points.dtype:
        raise TypeError(f"voxels must be {points.dtype} as points are, got {voxels.dtype}")
    check_integer(coors=coors, num_points_per_voxel=num_points_per_voxel, voxel_num=voxel_num)
    if voxel_num.numel() != 1:
        raise ValueError(f"voxel_num must hold one number, got shape {tuple(voxel_num.shape)}")
    _check_values("voxel_num", voxel_num)
    if voxels.shape[1] < max_points:
        raise ValueError(
            f"voxels must have room for max_points={max_points}, got shape {tuple(voxels.shape)}"
        )
    for name, out in (("voxels", voxels), ("coors", coors), ("num_points_per_voxel", num_points_per_voxel)):
        if out.shape[0] < max_voxels:
            raise ValueError(
                f"{name} must have room for max_voxels={max_voxels}, got shape {tuple(out.shape)}"
            )
        # Otherwise the rows would be written to a copy.
        if not out.is_contiguous():
            raise ValueError(f"{name} must be contiguous: it is written in place")


def check_rulebook(
    features: Tensor, indice_pairs: Tensor, indice_pair_num: Tensor, num_act_out: int, subm: int = 0
) -> None:
    """Raise unless `features` (N, C), pairs (K, 2, P) and counts (K,) are consistent; values are not read."""
    check_shape("features", features, None, None)
    check_floating(features=features)
    check_shape("indice_pairs", indice_pairs, None, 2, None)
    check_shape("indice_pair_num", indice_pair_num, indice_pairs.shape[0])
    check_integer(indice_pairs=indice_pairs, indice_pair_num=indice_pair_num)
    check_same_device(features=features, indice_pairs=indice_pairs, indice_pair_num=indice_pair_num)
    for name, tensor in (("features", features), ("indice_pairs", indice_pairs)):
        _check_values(name, tensor)
    if num_act_out < 0:
        raise ValueError(f"num_act_out must be at least 0, got {num_act_out}")
    if subm and features.shape[0] != num_act_out:
        raise ValueError(
            f"features must have num_act_out={num_act_out} rows in a submanifold convolution, got {features.shape[0]}"
        )


def check_rulebook_rows(
    indice_pairs: Tensor, indice_pair_num: Tensor, inputs: int, outputs: int, inverse: bool = False
) -> None:
    """Raise IndexError unless the counted pairs are rows of `inputs` and `outputs`; one transfer."""
    pairs, room = indice_pairs, indice_pairs.shape[2]
    if pairs.shape[0] == 0:
        return
    taken = torch.arange(room, device=pairs.device) < indice_pair_num[:, None]
    rows = torch.where(taken[:, None], pairs, torch.zeros_like(pairs)).transpose(0, 1).flatten(1)
    # A dummy row, for empty rulebooks.
    rows = torch.cat((rows, rows.new_zeros((2, 1))), dim=1)
    bounds = torch.cat(
        (
            torch.stack((rows.amin(dim=1), rows.amax(dim=1))).flatten().long(),
            torch.stack(torch.aminmax(indice_pair_num)).long(),
        )
    ).tolist()
    if bounds[4] < 0 or bounds[5] > room:
        raise IndexError(f"indice_pair_num must lie in 0..{room}, got {bounds[4]}..{bounds[5]}")
    if bounds[5] == 0:
        return
    for place, what in ((0, "input"), (1, "output")):
        limit = outputs if (what == "output") != inverse else inputs
        if bounds[place] < 0 or bounds[2 + place] >= limit:
            raise IndexError(
                f"indice_pairs[:, {place}] must be {what} rows in [0, {limit}), "
                f"got {bounds[place]} to {bounds[2 + place]}"
            )


def _check_values(name: str, tensor: Tensor) -> None:
    if tensor.device.type == "meta":
        raise ValueError(f"{name} must have values, got a tensor on {tensor.device}")
