"""Point-cloud files whose header lies: each is refused, or read, in bounded time and memory."""

from __future__ import annotations

import io
import struct
import time
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable, Mapping

import pytest

from serve.errors import ServeError
from serve.protocol.frame_spec import FrameSpec
from serve.protocol.frames import decode_frame
from serve.protocol.options import FrameOptions
from serve.settings import Limits

SPEC = FrameSpec("lidar", 4)
# Of a body of up to 32 MB; a decoder in C takes a tenth of it.
CPU_S, MEMORY_BYTES = 3.0, 512 << 20
MIB = 1 << 20
NPY = "{'descr': '<f4', 'fortran_order': False, 'shape': %s, }"


def npy(header: str, data: bytes = b"", version: int = 1) -> bytes:
    text = header.encode("latin-1")
    return (
        b"\x93NUMPY"
        + bytes((version, 0))
        + struct.pack("<H" if version == 1 else "<I", len(text))
        + text
        + data
    )


def zipped(content: bytes, kind: int = zipfile.ZIP_DEFLATED, entries: int = 1) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", kind) as archive:
        for k in range(entries):
            archive.writestr(f"points{k or ''}.npy", content)
    return stream.getvalue()


def pcd(points: str, data: bytes = b"", *, kind: str = "binary", fields: str = "x y z i") -> bytes:
    n = len(fields.split())
    head = f"VERSION .7\nFIELDS {fields}\nSIZE {'4 ' * n}\nTYPE {'F ' * n}\nCOUNT {'1 ' * n}\n"
    return (
        f"{head}WIDTH {points}\nHEIGHT 1\nVIEWPOINT 0 0 0 1 0 0 0\nPOINTS {points}\nDATA {kind}\n".encode()
        + data
    )


def ply(count: str, data: bytes = b"", *, kind: str = "binary_little_endian", names: str = "xyzi") -> bytes:
    properties = "".join(f"property float {name}\n" for name in names)
    return f"ply\nformat {kind} 1.0\nelement vertex {count}\n{properties}end_header\n".encode() + data


def las(data: bytes = bytes(30), **more: int) -> bytes:
    head = bytearray(375)
    head[:4], head[24], head[25], head[104] = b"LASF", 1, 4, more.get("format", 6)
    for at, kind, value in (
        (94, "<H", 375),
        (96, "<I", more.get("offset", 375)),
        (100, "<I", more.get("records", 0)),
        (105, "<H", more.get("size", 30)),
        (235, "<Q", more.get("extended_at", 0)),
        (243, "<I", more.get("extended", 0)),
        (247, "<Q", more.get("count", 1)),
    ):
        struct.pack_into(kind, head, at, value)
    return bytes(head) + data


FILES: Mapping[str, Callable[[], bytes]] = {
    "npy-shape-float": lambda: npy(NPY % "(100, 4.0)", bytes(1600)),
    "npy-shape-1e9": lambda: npy(NPY % "(1000000000, 4)", bytes(1600)),
    "npy-shape-negative": lambda: npy(NPY % "(-1, 4)", bytes(16)),
    "npy-shape-boolean": lambda: npy(NPY % "(True, 4)", bytes(16)),
    "npy-shape-digits": lambda: npy(NPY % f"({'9' * 4000}, 4)", bytes(16)),
    "npy-item-without-bytes": lambda: npy(
        "{'descr': [('x','<f4',(0,)),('y','<f4',(0,)),('z','<f4',(0,))], 'fortran_order': False, 'shape': (2000000,), }"
    ),
    "npy-item-huge": lambda: npy("{'descr': '|V2147483647', 'fortran_order': False, 'shape': (4, 4), }"),
    "npy-literal-brackets": lambda: npy("[" * 9000),
    "npy-literal-signs": lambda: npy("-" * 9000 + "1"),
    "npy-literal-product": lambda: npy("'a'*1000000000"),
    "npy-literal-power": lambda: npy("9**9**9"),
    "npy-literal-long": lambda: npy("(" * 60_000, version=2),
    "npy-objects": lambda: npy("{'descr': '|O', 'fortran_order': False, 'shape': (1, 4), }", bytes(64)),
    "npz-bomb": lambda: zipped(bytes(200 * MIB)),
    "npz-of-the-largest-cloud": lambda: zipped(npy(NPY % "(2000000, 4)", bytes(32_000_000))),
    "npz-bzip2": lambda: zipped(bytes(30 * MIB), zipfile.ZIP_BZIP2),
    "npz-lzma": lambda: zipped(bytes(30 * MIB), zipfile.ZIP_LZMA),
    # Python's reader unpacks these two whole, whatever size the header claims.
    "npz-bzip2-array": lambda: zipped(npy(NPY % "(1, 4)", bytes(16)), zipfile.ZIP_BZIP2),
    "npz-lzma-array": lambda: zipped(npy(NPY % "(1, 4)", bytes(16)), zipfile.ZIP_LZMA),
    "npz-entries-beside-an-array": lambda: zipped(npy(NPY % "(1, 4)", bytes(16)), entries=1500),
    "npz-entries": lambda: zipped(b"", entries=20_000),
    "pcd-1e18": lambda: pcd("1" + "0" * 18, bytes(16)),
    "pcd-digits": lambda: pcd("9" * 20_000, bytes(16)),
    "pcd-negative": lambda: pcd("-1", bytes(16)),
    "pcd-fields": lambda: pcd("1", bytes(20_000), fields=" ".join(f"f{k}" for k in range(5000))),
    "pcd-text-blank": lambda: pcd("1", b"\n" * (30 * MIB), kind="ascii"),
    "pcd-text-one-line": lambda: pcd("1", b"1 " * (15 * MIB), kind="ascii"),
    "pcd-compressed": lambda: pcd(
        "2000000", struct.pack("<II", 16, 32_000_000) + b"\xff" * 16, kind="binary_compressed"
    ),
    "ply-1e18": lambda: ply("1" + "0" * 18),
    "ply-properties": lambda: ply("1", bytes(12_000), names="".join(map(chr, range(0x4E00, 0x4E00 + 20)))),
    "ply-without-count": lambda: ply(""),
    "ply-text-of-the-largest-cloud": lambda: ply("2000000", b"1 1 1 1\n" * 2_000_000, kind="ascii"),
    "ply-text-one-line": lambda: ply("1", b"1 " * (15 * MIB), kind="ascii"),
    "ply-text-short": lambda: ply("3", b"1 1 1 1\n", kind="ascii"),
    "las-count": lambda: las(count=10**18),
    "las-size": lambda: las(size=65535),
    "las-records": lambda: las(records=4_000_000_000),
    "las-records-present": lambda: las(bytes(54 * 500_000), records=500_000),
    "las-extended-records": lambda: las(extended=4_000_000_000, extended_at=375),
    "las-offset": lambda: las(offset=4_000_000_000),
    "laz-count": lambda: las(format=128 + 6, count=1_000_000),
    "laz-extended-records": lambda: las(format=128 + 6, extended=4_000_000_000, extended_at=375),
}  # fmt: skip
READ = {"npz-of-the-largest-cloud", "ply-text-of-the-largest-cloud", "las-extended-records"}


def decode(body: bytes) -> ServeError | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            decode_frame(body, SPEC, FrameOptions(), Limits())
    except ServeError as error:
        return error
    return None


@pytest.mark.parametrize("name", FILES)
def test_lying_file_is_refused_in_bounded_time(name):
    body = FILES[name]()
    began = time.process_time()
    refused = decode(body)
    spent_s = time.process_time() - began
    assert (refused is None) == (name in READ), refused
    assert refused is None or 400 <= refused.status < 500
    assert spent_s < CPU_S


# Tracing a reader of text in C takes a minute for the largest cloud.
@pytest.mark.parametrize("name", sorted(set(FILES) - {"ply-text-of-the-largest-cloud", "npz-entries"}))
def test_lying_file_is_refused_in_bounded_memory(name):
    body = FILES[name]()
    tracemalloc.start()
    decode(body)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < MEMORY_BYTES
