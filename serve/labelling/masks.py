"""Masks as labelling tools have them: Label Studio's run lengths of a brush, CVAT's run lengths, polygons."""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt

__all__ = ["brush_rle", "cvat_mask", "polygons"]

Mask = npt.NDArray[np.bool_]
# Bits of a run's length, four choices; "rle-pack" of thi.ng/umbrella, which Label Studio's brush is stored in.
_LENGTH_BITS = (4, 8, 12, 16)
_WORD_BITS = 8
_CHANNELS = 4  # RGBA, of which Label Studio shows A
_MIN_POLYGON_POINTS = 3


def brush_rle(mask: Mask) -> list[int]:
    """Encode a mask (H, W) as the ``rle`` of Label Studio's brush: bytes of RGBA, row by row, packed in runs.

    The head is the number of values (32 bits), bits of a value and of the four lengths (each less one, 5 and 4 x 4
    bits). A run is a 1, the choice of its length (2 bits), the length less one, and the value.
    """
    flat = np.ascontiguousarray(mask, dtype=bool).ravel()
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    begins = np.concatenate([[0], edges, [flat.size]])
    bits: list[str] = [f"{_CHANNELS * flat.size:032b}", f"{_WORD_BITS - 1:05b}"]
    bits += [f"{width - 1:04b}" for width in _LENGTH_BITS]
    longest = 1 << _LENGTH_BITS[-1]
    for begin, end in zip(begins[:-1].tolist(), begins[1:].tolist(), strict=True):
        value = "11111111" if flat[begin] else "00000000"
        left = _CHANNELS * (end - begin)
        while left > 0:
            length = min(left, longest)
            choice = next(i for i, width in enumerate(_LENGTH_BITS) if length <= 1 << width)
            bits.append(f"1{choice:02b}{length - 1:0{_LENGTH_BITS[choice]}b}{value}")
            left -= length
    text = "".join(bits)
    text += "0" * (-len(text) % 8)
    return list(int(text, 2).to_bytes(len(text) // 8, "big"))


def cvat_mask(mask: Mask) -> list[int]:
    """Encode a mask (H, W) as the points of CVAT's mask.

    Returns:
        Runs within the mask's bounding box, row by row, beginning with one of zeros, then the box: left, top, right,
        bottom, inclusive; empty for an empty mask.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not rows.size:
        return []
    top, bottom, left, right = (int(each) for each in (rows[0], rows[-1], columns[0], columns[-1]))
    flat = mask[top : bottom + 1, left : right + 1].ravel()
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    runs = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    return [*([0] if flat[0] else []), *runs, left, top, right, bottom]


def polygons(mask: Mask) -> list[npt.NDArray[np.float64]]:
    """Return the outlines of a mask's parts, each (N, 2) x, y in pixels; holes are filled.

    Points are centres of pixels on the edge, thinned to half a pixel; parts of fewer than three points are left out.
    """
    found, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    outlines = (cv2.approxPolyDP(contour, 0.5, True).reshape(-1, 2).astype(np.float64) for contour in found)
    return [outline for outline in outlines if len(outline) >= _MIN_POLYGON_POINTS]
