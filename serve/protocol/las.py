"""Read LAS, and LAZ in a process of its own (LAS 1.4-R15, ASPRS)."""

from __future__ import annotations

import io
import struct
import subprocess
import sys

import numpy as np

from serve.errors import UndecodableFrame
from serve.protocol import laz_process
from serve.protocol.batch import Bytes
from serve.protocol.point_table import PointTable, check_bytes, check_count, check_unpacked, standard_table
from serve.settings import Limits

__all__ = ["read_las"]

# Of the process that unpacks LAZ: its libraries' address space, and CPU time.
LAZ_PROCESS_BYTES = 2 << 30
LAZ_SECONDS = 10
# Variable length records, which hold no points; laspy reads one after another.
MAX_RECORDS = 1000

_LAS_POINT_BYTES_AT, _LAS_VLRS_AT, _LAS_OLD_COUNT_AT, _LAS_COUNT_AT = 105, 100, 107, 247


def read_las(body: Bytes, limits: Limits) -> PointTable:
    """Read a LAS or LAZ file: coordinates scaled (metres), other dimensions as stored.

    Raises:
        UndecodableFrame: a header that cannot be, or a LAZ file that cannot be unpacked.
        FrameTooLarge: more points, or more bytes unpacked, than the limits allow.
    """
    import laspy

    if len(body) < 227:
        raise UndecodableFrame(f"a LAS header has at least 227 bytes, the file has {len(body)}")
    head = bytes(body[:375])
    minor, vlrs = head[25], struct.unpack_from("<I", head, _LAS_VLRS_AT)[0]
    point_bytes = struct.unpack_from("<H", head, _LAS_POINT_BYTES_AT)[0]
    count = struct.unpack_from("<I", head, _LAS_OLD_COUNT_AT)[0]
    if minor >= 4 and len(head) >= _LAS_COUNT_AT + 8:
        count = struct.unpack_from("<Q", head, _LAS_COUNT_AT)[0]
    check_count(count, limits)
    if vlrs > MAX_RECORDS:
        raise UndecodableFrame(
            f"the LAS header claims {vlrs} variable length records, the limit is {MAX_RECORDS}"
        )
    is_compressed = bool(head[104] & 0x80)
    check_bytes("LAS", 0 if is_compressed else count, point_bytes, len(body))
    if is_compressed:
        check_unpacked("LAZ", count, point_bytes, limits)
        return _unpack_laz(body, count, limits)
    with laspy.open(io.BytesIO(bytes(body)), read_evlrs=False) as reader:
        points = reader.read_points(count)
        if len(points) != count:
            raise UndecodableFrame(f"the LAS header claims {count} points, {len(points)} follow")
        columns = {axis: np.asarray(getattr(points, axis), dtype=np.float64) for axis in "xyz"}
        for own in points.point_format.dimension_names:
            if own not in ("X", "Y", "Z"):
                columns[own] = np.asarray(points[own])
    return standard_table("LAS", columns, len(points))


def _unpack_laz(body: Bytes, count: int, limits: Limits) -> PointTable:
    """Unpack in a process of its own, bounded in memory and time (see `serve.protocol.laz_process`)."""
    bound = LAZ_PROCESS_BYTES + 4 * limits.max_frame_bytes
    command = [sys.executable, "-P", laz_process.__file__, str(bound), str(LAZ_SECONDS), str(count)]
    try:
        ran = subprocess.run(
            command, input=bytes(body), capture_output=True, timeout=2 * LAZ_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise UndecodableFrame(f"the LAZ file was not unpacked within {2 * LAZ_SECONDS} s") from None
    if ran.returncode:
        reason = ran.stderr.decode(errors="replace").strip().splitlines()
        raise UndecodableFrame(f"not a readable LAZ file: {reason[-1][:200] if reason else ran.returncode}")
    with np.load(io.BytesIO(ran.stdout), allow_pickle=False) as unpacked:
        columns = {name: unpacked[name] for name in unpacked.files}
    return standard_table("LAZ", columns, len(columns["x"]))
