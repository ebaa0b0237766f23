"""Plausibility of a ``.bin``: whether its numbers are points of a model's width.

The file has neither signature nor header. Another stride, float64, another byte order and columns one after another
show in the statistics of its numbers.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from serve.errors import UndecodableFrame
from serve.protocol.batch import Bytes

__all__ = ["check_layout"]

# Reject a layout only if another one explains the numbers far better than happens by chance.
_SAMPLE_FLOATS = 1 << 11
_MIN_FLOATS = 512
_STRIDES: tuple[int, ...] = (*range(3, 11), 12)  # 12: the longest of PCL's points
_FAR_BETTER = 0.35
# Of all numbers, those that may be coordinates, and those that are of no sensor but integers' bytes.
_MIN_PLAUSIBLE, _MAX_TINY, _TINY = 0.5, 0.1, 1e-20
_SAMPLE_PER_PART = 256
#: Share of the variance between groups: noise of a sample of that size is below the first.
_NOTHING, _MUCH = 0.02, 0.2
# Difference of means at the border of two columns, in standard deviations.
_JUMP = 0.45


def check_layout(body: Bytes, width: int) -> None:
    """Reject a ``.bin`` whose numbers cannot be little-endian float32 points of `width` columns.

    Numbers of another type or byte order are hardly ever of the size of coordinates. Of the right stride, numbers one
    stride apart are of the same column and mostly of neighbouring points: they differ far less than numbers any
    other distance apart.

    Of columns one after another, numbers of one point have nothing in common with those of another but
    the part of the file that they are in.

    Raises:
        UndecodableFrame: the message names the likely layout, and how to declare another.
    """
    sample = bytes(body[: 4 * _SAMPLE_FLOATS])
    sample = sample[: len(sample) // 8 * 8]
    if len(sample) < 4 * _MIN_FLOATS:
        return
    numbers = np.frombuffer(sample, "<f4")
    plausible = _plausible_share(numbers)
    for kind, name in ((">f4", "big-endian float32"), ("<f8", "float64"), (">f8", "big-endian float64")):
        if plausible < 0.9 and _plausible_share(np.frombuffer(sample, kind)) > 0.98:
            raise UndecodableFrame(
                f"the body looks like {name}, not float32 little-endian; convert it, or send .npy, "
                "which declares its type"
            )
    tiny = float(((numbers != 0) & (np.abs(numbers) < _TINY)).mean())
    if plausible < _MIN_PLAUSIBLE or tiny > _MAX_TINY:
        raise UndecodableFrame(
            f"the body does not look like float32 points: {1 - plausible:.0%} of its numbers are neither 0 nor of the "
            "size of a coordinate or intensity, as are integers, float16, packed colours or compressed bytes; "
            f"convert it, send .npy, which declares its type, or declare load_dim={width} if that is what they are"
        )
    if _is_by_column(np.frombuffer(body, "<f4"), width):
        raise UndecodableFrame(
            f"the body looks like {width} columns one after another (all x, then all y, …), not like points of "
            f"{width} numbers; write the transposed array, or declare load_dim={width} if that is what they are"
        )
    best = _likely_stride(numbers, width)
    if best is not None and (len(body) // 4) % best == 0:
        raise UndecodableFrame(
            f"the body looks like points of {best} numbers, this model takes {width}; name the columns, as in "
            f"columns=x,y,z,…, or declare load_dim={width} if that is what they are"
        )


def _is_by_column(numbers: npt.NDArray[np.float32], width: int) -> bool:
    """Whether a cloud is stored column by column.

    Each of `width` parts of the file is then of another quantity: sizes differ between parts, at once where one part
    ends, and do not differ between the places of a point.
    """
    head = _sizes(numbers[: _SAMPLE_FLOATS // width * width])
    if max(_between(values, np.arange(len(values)) % width, width) for values in head) >= _NOTHING:
        return False  # of most clouds: their first points show it
    count = len(numbers) // width
    rng = np.random.default_rng(0)  # evenly spaced places could keep step with the points
    parts = np.repeat(np.arange(width), _SAMPLE_PER_PART)
    sample = parts * count + rng.integers(0, count, len(parts))
    near = min(count, max(64, count // 64))  # a border is sharp
    before = count * np.arange(1, width)[:, None] - 1 - rng.integers(0, near, _SAMPLE_PER_PART)
    after = before + near
    differs = jumps = False
    for values, left, right in zip(
        *map(_sizes, (numbers[sample], numbers[before], numbers[after])), strict=True
    ):
        if _between(values, sample % width, width) >= _NOTHING:
            return False
        differs |= _between(values, parts, width) > _MUCH
        jumps |= float(np.abs(left.mean(1) - right.mean(1)).max()) > _JUMP * float(values.std())
    return differs and jumps


def _sizes(numbers: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float32], ...]:
    """Two quantities in which columns differ: the value, and its order of magnitude."""
    values = np.clip(np.nan_to_num(numbers), -1e3, 1e3)
    return values, np.log2(np.abs(values) + 1e-3)


def _between(values: npt.NDArray[np.float32], groups: npt.NDArray[np.int64], count: int) -> float:
    """Share of the variance that lies between groups (eta squared), 0 to 1."""
    spread = float(values.var())
    if not spread:
        return 0.0
    members = np.bincount(groups, minlength=count)
    means = np.bincount(groups, values, count) / np.maximum(members, 1)
    return float((members * (means - values.mean()) ** 2).sum() / (len(values) * spread))


def _plausible_share(numbers: npt.NDArray[np.floating]) -> float:
    """Return the share of numbers that may be coordinates, intensities, colours or zero."""
    with np.errstate(invalid="ignore"):
        size = np.abs(numbers)
        return float(((size == 0) | ((size > 1e-6) & (size < 1e5))).mean())


def _likely_stride(numbers: npt.NDArray[np.float32], width: int) -> int | None:
    """Return a stride that explains the numbers far better than `width`, or None."""
    with np.errstate(invalid="ignore", over="ignore"):
        clipped = np.clip(np.nan_to_num(numbers), -1e3, 1e3)
    change = {
        stride: float(np.median(np.abs(clipped[stride:] - clipped[:-stride])))
        for stride in {*_STRIDES, width}
    }
    best = min(_STRIDES, key=lambda stride: change[stride])
    if best != width and change[best] < _FAR_BETTER * change[width]:
        return best
    # Numbers two or more strides apart are of the same column too, so that a multiple explains them as well.
    for part in (stride for stride in _STRIDES if width % stride == 0 and stride < width):
        others = [change[stride] for stride in _STRIDES if stride % part]
        if change[part] < min(change[width], _FAR_BETTER * min(others)):
            return part
    return None
