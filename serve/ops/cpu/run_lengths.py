"""Run lengths of masks in COCO's compressed form, from row-major masks.

COCO counts pixels column by column, alternating between background and mask (pycocotools 2.0, `common/maskApi.c`,
`rleEncode` and `rleToString`). Reading a row-major mask in that order misses the cache at every pixel, so that
pycocotools needs a transposed copy. Here every row is compared with the one above, which vectors do; only pixels that
differ, where runs begin, are looked at one by one.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from serve.ops.cpu.jit import jit

__all__ = ["encode_masks"]

I64 = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]

# Pixels that are looked at together: the bytes of a word.
_WORD = 8
# Bytes of the longest number: 64 bits, five of them in a byte.
_LONGEST = 13


def encode_masks(masks: npt.NDArray[np.bool_]) -> list[str]:
    """Encode masks (N, H, W) as COCO's compressed run lengths, the same characters as pycocotools writes.

    Raises:
        ValueError: not three dimensions.
    """
    if masks.ndim != 3:
        raise ValueError(f"masks must be (N, H, W), got {masks.shape}")
    pixels = np.ascontiguousarray(masks, dtype=np.bool_).view(np.uint8)
    return [_encode(mask).tobytes().decode("ascii") for mask in pixels]


@jit
def _encode(mask: U8) -> U8:  # pragma: no cover - compiled
    height, width = mask.shape
    counts = np.zeros(width + 1, np.int64)
    _visit_starts(mask, counts, np.empty(0, np.int64), False)
    for x in range(width):
        counts[x + 1] += counts[x]
    starts = np.empty(counts[width], np.int64)
    _visit_starts(mask, counts, starts, True)
    return _compress(starts, height * width)


@jit
def _visit_starts(mask: U8, counts: I64, starts: I64, writes: bool) -> None:  # pragma: no cover - compiled
    """Count the starts of runs by column, in ``counts[x + 1]``, or write them, from ``starts[counts[x]]`` on."""
    height, width = mask.shape
    above = np.zeros(width, np.uint8)
    if height:
        above[1:] = mask[height - 1, : width - 1]
    differs = np.zeros(-(-width // _WORD) * _WORD, np.uint8)
    words = differs.view(np.uint64)
    for y in range(height):
        row = mask[y]
        for x in range(width):
            differs[x] = row[x] ^ above[x]
        for i in range(words.shape[0]):
            if words[i] == 0:
                continue
            for x in range(i * _WORD, min((i + 1) * _WORD, width)):
                if differs[x]:
                    if writes:
                        starts[counts[x]] = x * height + y
                        counts[x] += 1
                    else:
                        counts[x + 1] += 1
        above = row


@jit
def _compress(starts: I64, pixels: int) -> U8:  # pragma: no cover - compiled
    """Write the lengths of the runs, from the third on relative to the last but one of the same kind."""
    runs = starts.shape[0] + 1
    text = np.empty(runs * _LONGEST, np.uint8)
    size = 0
    lengths = np.empty(runs, np.int64)
    begin = 0
    for i in range(runs):
        end = starts[i] if i < runs - 1 else pixels
        lengths[i] = end - begin
        begin = end
        rest = lengths[i] - lengths[i - 2] if i > 2 else lengths[i]
        more = True
        while more:
            five = rest & 0x1F
            rest >>= 5
            more = rest != (-1 if five & 0x10 else 0)
            text[size] = five + (0x20 if more else 0) + 48
            size += 1
    return text[:size]
