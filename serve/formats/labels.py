"""Labels of points, and masks of images, as answers encode them, to arrays.

Labels of points are ``{"dtype": "uint8", "shape": [N], "b64": "…"}``: little-endian bytes of that dtype in base64.
Masks are COCO's compressed run lengths.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["LABEL_DTYPES", "decode_labels", "decode_mask"]

LABEL_DTYPES = ("uint8", "uint16", "uint32")


def decode_labels(encoded: Mapping[str, Any]) -> npt.NDArray[np.int64]:
    """Decode the output of `serve.compare.labels.encode_labels`.

    Raises:
        ValueError: malformed.
    """
    try:
        if encoded["dtype"] not in LABEL_DTYPES:
            raise ValueError(f"dtype {encoded['dtype']!r} is not one of {', '.join(LABEL_DTYPES)}")
        raw = base64.b64decode(encoded["b64"], validate=True)
        labels = np.frombuffer(raw, dtype=np.dtype(encoded["dtype"]).newbyteorder("<"))
        return labels.reshape(tuple(encoded["shape"])).astype(np.int64)
    except (KeyError, TypeError, binascii.Error) as error:
        raise ValueError(f"malformed labels of points: {error!r}") from None


def decode_mask(encoded: Mapping[str, Any]) -> npt.NDArray[np.bool_]:
    """Decode COCO's compressed run lengths.

    Runs go down the columns and begin with one of zeros. A number is written in groups of five bits, lowest first, each
    plus 48 as a character, the sixth bit for "more follows"; from the third on it is the difference to the number two
    before (``rleFrString`` of cocoapi's maskApi.c).

    Args:
        encoded: ``size`` [height, width] and ``counts``, text or bytes.

    Returns:
        (H, W) mask.

    Raises:
        ValueError: malformed.
    """
    try:
        height, width = encoded["size"]
        counts = encoded["counts"]
        text = counts.encode() if isinstance(counts, str) else bytes(counts)
    except (KeyError, TypeError) as error:
        raise ValueError(f"malformed mask: {error!r}") from None
    runs: list[int] = []
    value = shift = 0
    for byte in text:
        group = byte - 48
        value |= (group & 31) << shift
        shift += 5
        if group & 32:
            continue
        if group & 16:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = shift = 0
    if shift or any(run < 0 for run in runs) or sum(runs) != height * width:
        raise ValueError(f"malformed mask: its runs are not {height} x {width} pixels")
    values = np.arange(len(runs)) % 2 == 1
    return np.repeat(values, runs).reshape(width, height).T
