"""Pictures that are small to send and long to decode, or that end early inside a whole file."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import cv2
import numpy as np
from PIL import Image

from serve.protocol.image_size import PNG_SIGNATURE


def smooth(width: int = 96, height: int = 64) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(cv2.GaussianBlur(noise, (5, 5), 0))


def saved(image: Image.Image, suffix: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, suffix, **options)
    return buffer.getvalue()


# JPEG


def _bits(text: str) -> bytes:
    text += "1" * (-len(text) % 8)
    return int(text, 2).to_bytes(len(text) // 8, "big").replace(b"\xff", b"\xff\x00")


def jpeg_of_scans(width: int, height: int, scans: int) -> bytes:
    """A grey progressive JPEG of one DC scan and refinements, which visit all coefficients and name none."""
    blocks = -(-width // 8) * -(-height // 8)
    frame = b"\xff\xc2" + struct.pack(">HBHHB", 11, 8, height, width, 1) + b"\x01\x11\x00"
    quantization = b"\xff\xdb\x00\x43\x00" + bytes([1] * 64)
    one_code = bytes([1] + [0] * 15)
    # One code of one bit per table: no difference (DC); a run of 16384 and more blocks without coefficients (AC).
    huffman = (
        b"\xff\xc4" + struct.pack(">H", 38) + b"\x00" + one_code + b"\x00" + b"\x10" + one_code + b"\xe0"
    )
    runs, left = "", blocks
    while left > 0:
        runs += "0" + format(max(0, min(left, 32767) - 16384), "014b")
        left -= 32767
    dc = b"\xff\xda\x00\x08\x01\x01\x00\x00\x00\x00" + bytes(-(-blocks // 8))
    refinement = b"\xff\xda\x00\x08\x01\x01\x00\x01\x3f\x10" + _bits(runs)
    return b"\xff\xd8" + quantization + frame + huffman + dc + refinement * (scans - 1) + b"\xff\xd9"


def jpeg_with(segment: bytes, **options: Any) -> bytes:
    plain = saved(smooth(), "JPEG", **options)
    return plain[:2] + segment + plain[2:]


def closed_jpeg(part: float, **options: Any) -> bytes:
    """A JPEG that ends early, with an EOI marker all the same."""
    whole = saved(smooth(), "JPEG", quality=90, **options)
    return whole[: int(len(whole) * part)] + b"\xff\xd9"


# PNG


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def packed_zeros(count: int) -> bytes:
    packer = zlib.compressobj(9)
    parts = [packer.compress(bytes(min(1 << 20, count - at))) for at in range(0, count, 1 << 20)]
    return b"".join([*parts, packer.flush()])


def png(width: int, height: int, *, depth: int = 8, interlaced: bool = False, extra: bytes = b"") -> bytes:
    """A black PNG of RGBA."""
    passes = [(0, 0, 1, 1)]
    if interlaced:
        passes = [
            (0, 0, 8, 8),
            (4, 0, 8, 8),
            (0, 4, 4, 8),
            (2, 0, 4, 4),
            (0, 2, 2, 4),
            (1, 0, 2, 2),
            (0, 1, 1, 2),
        ]
    count = 0
    for left, top, step_x, step_y in passes:
        columns, rows = -(-(width - left) // step_x), -(-(height - top) // step_y)
        count += rows * (1 + columns * depth // 2) if columns > 0 and rows > 0 else 0
    header = struct.pack(">IIBBBBB", width, height, depth, 6, 0, 0, int(interlaced))
    return (
        PNG_SIGNATURE
        + chunk(b"IHDR", header)
        + extra
        + chunk(b"IDAT", packed_zeros(count))
        + chunk(b"IEND", b"")
    )


def closed_png(*, whole_stream: bool) -> bytes:
    """A PNG with half its rows, all checksums right."""
    whole = saved(smooth(), "PNG")
    at = whole.index(b"IDAT") - 4
    (length,) = struct.unpack_from(">I", whole, at)
    packed = whole[at + 8 : at + 8 + length]
    rows = zlib.decompress(packed)
    half = zlib.compress(rows[: len(rows) // 2]) if whole_stream else packed[: length // 2]
    return whole[:at] + chunk(b"IDAT", half) + chunk(b"IEND", b"")


# Frames


def apng(width: int, height: int, frames: int) -> bytes:
    def control(number: int) -> bytes:
        return chunk(b"fcTL", struct.pack(">IIIIIHHBB", number, width, height, 0, 0, 1, 10, 0, 0))

    data = packed_zeros(height * (1 + width * 4))
    rest = [control(2 * k - 1) + chunk(b"fdAT", struct.pack(">I", 2 * k) + data) for k in range(1, frames)]
    whole = png(width, height, extra=chunk(b"acTL", struct.pack(">II", frames, 0)) + control(0))
    return whole[:-12] + b"".join(rest) + whole[-12:]


def gif(width: int, height: int, frames: int) -> bytes:
    whole = saved(Image.new("P", (width, height)), "GIF")
    start = 13 + (3 * 2 ** ((whole[10] & 7) + 1) if whole[10] & 0x80 else 0)
    return whole[:start] + whole[start:-1] * frames + b";"


def closed_gif() -> bytes:
    """A GIF with half its blocks, and the terminator."""
    whole = saved(smooth().convert("P"), "GIF")
    start = 13 + (3 * 2 ** ((whole[10] & 7) + 1) if whole[10] & 0x80 else 0)
    image = whole.index(b",", start)
    at = image + 10 + (3 * 2 ** ((whole[image + 9] & 7) + 1) if whole[image + 9] & 0x80 else 0) + 1
    first, blocks = at, []
    while whole[at]:
        blocks.append(whole[at : at + 1 + whole[at]])
        at += 1 + whole[at]
    return whole[:first] + b"".join(blocks[: len(blocks) // 2]) + b"\x00;"


def webp(width: int, height: int, frames: int) -> bytes:
    def three(value: int) -> bytes:
        return struct.pack("<I", value)[:3]

    payload = saved(Image.new("RGB", (width, height)), "WEBP", quality=10)[12:]
    frame = bytes(6) + three(width - 1) + three(height - 1) + b"\x01\0\0\0" + payload
    frame = b"ANMF" + struct.pack("<I", len(frame)) + frame + bytes(len(frame) % 2)
    head = b"VP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + three(width - 1) + three(height - 1)
    body = b"WEBP" + head + b"ANIM" + struct.pack("<I", 6) + bytes(6) + frame * frames
    return b"RIFF" + struct.pack("<I", len(body)) + body


def closed_webp(*, lossless: bool) -> bytes:
    """A WebP with half its data, and lengths that say so."""
    whole = saved(smooth(), "WEBP", lossless=lossless)
    data = whole[20 : 20 + (len(whole) - 20) // 2 // 2 * 2]
    return b"RIFF" + struct.pack("<I", 12 + len(data)) + whole[8:16] + struct.pack("<I", len(data)) + data


# TIFF


def tiff(width: int, height: int, rows: int, data: bytes, *, compression: int = 8, samples: int = 3) -> bytes:
    """A TIFF in strips of `rows`, which all point to the same data."""
    strips = -(-height // rows)
    tags: dict[int, tuple[int, list[int]]] = {
        256: (4, [width]), 257: (4, [height]), 258: (3, [8] * samples), 259: (3, [compression]),
        262: (3, [2 if samples == 3 else 1]), 273: (4, [8] * strips), 277: (3, [samples]), 278: (4, [rows]),
        279: (4, [len(data)] * strips), 284: (3, [1]),
    }  # fmt: skip
    values, entries, base = bytearray(), [], 8 + len(data)
    for tag, (kind, numbers) in tags.items():
        raw = np.array(numbers, {3: "<u2", 4: "<u4"}[kind]).tobytes()
        field = raw.ljust(4, b"\0")
        if len(raw) > 4:
            field = struct.pack("<I", base + len(values))
            values += raw
        entries.append(struct.pack("<HHI", tag, kind, len(numbers)) + field)
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    return b"II*\0" + struct.pack("<I", base + len(values)) + data + bytes(values) + directory


def closed_tiff(compression: int) -> bytes:
    """A TIFF of one strip that holds half its rows."""
    rows = smooth().tobytes()
    half = rows[: len(rows) // 2]
    packed = {
        1: half,
        8: zlib.compress(half),
        32773: b"".join(b"\x7f" + half[k : k + 128] for k in range(0, len(half), 128)),
    }
    return tiff(96, 64, 64, packed[compression], compression=compression)


# JPEG 2000


def _code_stream(size: int, **options: Any) -> tuple[bytearray, int]:
    whole = bytearray(saved(Image.new("RGB", (size, size)), "JPEG2000", no_jp2=True, **options))
    return whole, whole.index(b"\xff\x52")


def jpeg2000_of_layers(size: int, layers: int) -> bytes:
    whole, style = _code_stream(size, precinct_size=(128, 128))
    whole[style + 6 : style + 8] = struct.pack(">H", layers)
    return bytes(whole)


def jpeg2000_of_precincts(size: int) -> bytes:
    """Precincts of two by two coefficients."""
    whole, style = _code_stream(size, precinct_size=(128, 128))
    count = whole[style + 3] - 12
    whole[style + 14 : style + 14 + count] = b"\x11" * count
    return bytes(whole)


def jpeg2000_of_tiles(size: int, tile: int) -> bytes:
    return saved(Image.new("RGB", (size, size)), "JPEG2000", tile_size=(tile, tile), num_resolutions=1)


def closed_jpeg2000() -> bytes:
    """A code stream with half its tile, whose length says so, and an EOC marker."""
    whole = bytearray(saved(smooth(), "JPEG2000", no_jp2=True))
    tile, data = whole.index(b"\xff\x90"), whole.index(b"\xff\x93") + 2
    half = whole[: data + (len(whole) - data) // 2]
    half[tile + 6 : tile + 10] = struct.pack(">I", len(half) - tile)
    return bytes(half + b"\xff\xd9")


# BMP


def bmp_of_runs(width: int, height: int, rows: int) -> bytes:
    """An 8-bit BMP in runs; `rows` of its rows are there before the end of the bitmap."""
    row = b"".join(bytes([min(255, width - at), 7]) for at in range(0, width, 255)) + b"\0\0"
    data, start = row * rows + b"\0\1", 14 + 40 + 1024
    head = b"BM" + struct.pack("<IHHI", start + len(data), 0, 0, start)
    head += struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(data), 0, 0, 256, 0)
    return head + bytes(range(256)) * 4 + data
