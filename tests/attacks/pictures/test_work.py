"""What decoding a picture takes is bounded by its pixels and bytes, whatever its format hides."""

from __future__ import annotations

import contextlib
import resource
import struct
import time
import zlib
from collections.abc import Callable

import pytest

from serve.errors import FrameTooLarge, UndecodableFrame
from serve.protocol.image_size import image_size
from serve.protocol.image_work import MAX_PACKED_TEXTS, MAX_PASSES, MAX_PNG_CHUNKS, MAX_SCANS
from serve.protocol.images import decode_image
from tests.attacks.pictures import hostile

SMALL = 96 * 64
TEXT = hostile.chunk(b"zTXt", b"A\0\0" + zlib.compress(bytes(7_900_000), 9))


def cpu_s(work: Callable[[], object]) -> float:
    """CPU time of this process and of children that ended, seconds."""

    def now() -> float:
        return sum(
            usage.ru_utime + usage.ru_stime
            for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        )

    began = now()
    work()
    return now() - began


TOO_MUCH = {
    "scans of a JPEG": lambda: hostile.jpeg_of_scans(96, 64, MAX_SCANS + 1),
    "texts of a PNG": lambda: hostile.png(9, 9, extra=TEXT * (MAX_PACKED_TEXTS + 1)),
    "chunks of a PNG": lambda: hostile.png(9, 9, extra=hostile.chunk(b"abCd", b"") * (MAX_PNG_CHUNKS + 1)),
    "layers of a JPEG 2000": lambda: hostile.jpeg2000_of_layers(2000, 65535),
    "precincts of a JPEG 2000": lambda: hostile.jpeg2000_of_precincts(2000),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", TOO_MUCH)
def test_picture_of_too_much_work_is_refused_within_seconds(kind: str) -> None:
    body = TOO_MUCH[kind]()

    def refuse() -> None:
        with pytest.raises((FrameTooLarge, UndecodableFrame)):
            decode_image(body, "color", "cv2", 2000 * 2000)

    assert cpu_s(refuse) < 8


@pytest.mark.parametrize("decoder", ["cv2", "pillow"])
def test_scans_times_pixels_of_a_jpeg_are_bounded(decoder: str) -> None:
    allowed, refused = (hostile.jpeg_of_scans(96, 64, scans) for scans in (MAX_PASSES, MAX_PASSES + 1))
    assert decode_image(allowed, "color", decoder, SMALL).shape == (64, 96, 3)
    assert decode_image(refused, "color", decoder, SMALL + SMALL // MAX_PASSES).shape == (64, 96, 3)
    with pytest.raises(FrameTooLarge, match="MMDET3D_SERVE_MAX_PIXELS"):
        decode_image(refused, "color", decoder, SMALL)


def test_scans_hidden_behind_bytes_that_are_no_segment_are_counted() -> None:
    scans = hostile.jpeg_of_scans(96, 64, MAX_SCANS + 1)
    second = scans.index(b"\xff\xda", scans.index(b"\xff\xda") + 2)
    # Within a scan a decoder passes over such a marker; it has no length.
    hidden = scans[:second] + b"\xff\x02\xff\xff" + scans[second:]
    with pytest.raises(FrameTooLarge):
        decode_image(hidden, "color", "cv2", 10**9)


def test_scans_of_jpeg_strips_in_a_tiff_are_bounded() -> None:
    strips = hostile.tiff(96, 640, 64, hostile.jpeg_of_scans(96, 64, 90), compression=7, samples=1)
    with pytest.raises(FrameTooLarge):
        decode_image(strips, "color", "cv2", 96 * 64)
    with pytest.raises(FrameTooLarge):
        decode_image(strips, "color", "cv2", 96 * 340)


FRAMES = {"apng": hostile.apng, "gif": hostile.gif, "webp": hostile.webp}


@pytest.mark.parametrize("decoder", ["cv2", "pillow"])
@pytest.mark.parametrize("kind", FRAMES)
def test_only_the_first_frame_of_an_animation_is_decoded(kind: str, decoder: str) -> None:
    one, many = (FRAMES[kind](1500, 1500, frames) for frames in (1, 40))
    decode_image(one, "color", decoder, 1500 * 1500)  # what a first call loads is no part of the figure
    takes = [
        cpu_s(lambda body=body: decode_image(body, "color", decoder, 1500 * 1500)) for body in (one, many)
    ]
    assert takes[1] < 5 * takes[0] + 0.1, takes


HEADERS = {
    "comments of a JPEG": lambda: hostile.jpeg_with(b"\xff\xfe\x00\x02" * 2_000_000),
    "profiles of a JPEG": lambda: hostile.jpeg_with(b"\xff\xe1\x00\x02" * 2_000_000),
    "fill bytes of a JPEG": lambda: hostile.jpeg_with(b"\xff" * 8_000_000),
    "restart markers of a JPEG": lambda: hostile.jpeg_with(b"\xff\xd0" * 4_000_000),
    "blocks of a GIF": lambda: hostile.gif(64, 64, 1).replace(b",", bytes(8_000_000) + b",", 1),
    "comment of a PPM": lambda: b"P6\n#" + b"a" * 8_000_000 + b"\n64 64\n255\n" + bytes(64 * 64 * 3),
    "boxes of a JPEG 2000": lambda: (
        (j := hostile.saved(hostile.smooth(), "JPEG2000"))[:32] + b"\0\0\0\x08free" * 1_000_000 + j[32:]
    ),
    "boxes of an AVIF": lambda: (
        (a := hostile.saved(hostile.smooth(), "AVIF"))[:32] + b"\0\0\0\x08free" * 1_000_000 + a[32:]
    ),
    "sizes of a JPEG 2000": lambda: (
        hostile.saved(hostile.smooth(), "JPEG2000") + b"\xff\x4f\xff\x51" * 2_000_000
    ),
    "chunks of a WebP": lambda: hostile.webp(64, 64, 1) + (b"XXXX" + bytes(4)) * 1_000_000,
}


@pytest.mark.parametrize("kind", HEADERS)
def test_size_of_a_picture_is_read_within_milliseconds(kind: str) -> None:
    """The gateway reads it on its event loop."""
    body = HEADERS[kind]()
    assert len(body) >= 8_000_000 - 4096

    def read() -> float:
        began = time.thread_time()
        with contextlib.suppress(UndecodableFrame):
            image_size(body)
        return time.thread_time() - began

    assert min(read() for _ in range(3)) < 0.01


def test_strips_of_a_tiff_may_share_their_bytes() -> None:
    row = zlib.compress(bytes(300))
    assert decode_image(hostile.tiff(100, 5000, 1, row), "color", "cv2", 10**6).shape == (5000, 100, 3)


def test_opencv_prints_no_line_per_strip_that_it_cannot_read(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UndecodableFrame):
        decode_image(hostile.tiff(100, 300, 1, zlib.compress(bytes(9))), "color", "cv2", 10**6)
    assert "ERROR" not in capfd.readouterr().err


def test_frame_of_a_gif_beyond_its_screen_counts() -> None:
    body = bytearray(hostile.gif(64, 64, 1))
    body[6:10] = struct.pack("<HH", 8, 8)
    with pytest.raises((UndecodableFrame, FrameTooLarge)):
        decode_image(bytes(body), "color", "pillow", 63 * 64)


WHOLE = {
    "png, 16 bits, interlaced": lambda: hostile.png(7000, 7000, depth=16, interlaced=True),
    "jpeg, as many scans as may be": lambda: hostile.jpeg_of_scans(7000, 7000, MAX_PASSES),
    "png, as many texts as may be": lambda: hostile.png(64, 64, extra=TEXT * MAX_PACKED_TEXTS),
    "gif": lambda: hostile.gif(7000, 7000, 2),
    "webp": lambda: hostile.webp(7000, 7000, 2),
    "tiff, a strip per row": lambda: hostile.tiff(7000, 7000, 1, hostile.packed_zeros(21000)),
    "jpeg 2000 of tiles": lambda: hostile.jpeg2000_of_tiles(7000, 64),
    "jpeg 2000 of layers": lambda: hostile.jpeg2000_of_layers(7000, 300),
    "bmp of runs": lambda: hostile.bmp_of_runs(7000, 7000, 7000),
    "avif": lambda: hostile.saved(hostile.smooth(7000, 7000), "AVIF", speed=10),
}


@pytest.mark.soak
@pytest.mark.parametrize("kind", WHOLE)
def test_worst_allowed_picture_takes_seconds(kind: str) -> None:
    body = WHOLE[kind]()

    def decode() -> None:
        try:
            decode_image(body, "color", "cv2", 50_000_000)
        except FrameTooLarge:
            print("refused")

    takes = cpu_s(decode)
    print(f"{kind}: {len(body)} bytes, {takes:.2f} s of CPU time")
    assert takes < 20
