"""Point-cloud files are recognised by their first bytes, read by column name, and bounded before they are read."""

from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve.errors import FrameTooLarge, UndecodableFrame
from serve.protocol.point_columns import PointLayout, arrange
from serve.protocol.point_formats import read_point_file
from serve.protocol.point_signatures import sniff
from serve.protocol.points import decode_points
from serve.settings import Limits

NAMED = ("x", "y", "z", "intensity")
LAYOUT = PointLayout(NAMED, frozenset(range(4)))
POINTS = np.random.default_rng(0).uniform(-40, 40, (200, 4)).astype(np.float32)
POINTS[:, 3] = np.linspace(0, 1, 200)


def structured(order: str = "<", names: tuple[str, ...] = NAMED) -> np.ndarray:
    array = np.zeros(len(POINTS), dtype=[(name, f"{order}f4") for name in names])
    for k, name in enumerate(names):
        array[name] = POINTS[:, k]
    return array


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def npz(**arrays: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    return stream.getvalue()


def pcd(encoding: str, folder: Path) -> bytes:
    from pypcd4.pypcd4 import Encoding, PointCloud

    cloud = PointCloud.from_points(tuple(POINTS.T), NAMED, (np.float32,) * 4)
    cloud.save(folder / "cloud.pcd", encoding=Encoding(encoding))
    return (folder / "cloud.pcd").read_bytes()


def ply(*, text: bool = False, order: str = "<", faces: bool = True) -> bytes:
    from plyfile import PlyData, PlyElement

    elements = [PlyElement.describe(structured(), "vertex")]
    if faces:
        elements.append(PlyElement.describe(np.zeros(3, dtype=[("vertex_indices", "i4", (3,))]), "face"))
    stream = io.BytesIO()
    PlyData(elements, text=text, byte_order=order).write(stream)
    return stream.getvalue()


def las(folder: Path, suffix: str) -> bytes:
    import laspy

    header = laspy.LasHeader(point_format=3, version="1.2")
    header.scales = [1e-5] * 3
    cloud = laspy.LasData(header)
    cloud.x, cloud.y, cloud.z = (np.asarray(POINTS[:, k], dtype=np.float64) for k in range(3))
    cloud.intensity = np.round(POINTS[:, 3] * 1000).astype(np.uint16)
    cloud.write(str(folder / f"cloud.{suffix}"))
    return (folder / f"cloud.{suffix}").read_bytes()


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("point-files")
    return {
        "npy, structured": npy(structured()),
        "npy, big-endian": npy(structured(">")),
        "npz, structured": npz(points=structured(), other=np.zeros(3)),
        "PCD ascii": pcd("ascii", folder),
        "PCD binary": pcd("binary", folder),
        "PCD compressed": pcd("binary_compressed", folder),
        "PLY little-endian": ply(),
        "PLY big-endian": ply(order=">"),
        "PLY ascii": ply(text=True),
        "LAS": las(folder, "las"),
        "LAZ": las(folder, "laz"),
    }


NAMES = (
    "npy, structured",
    "npy, big-endian",
    "npz, structured",
    "PCD ascii",
    "PCD binary",
    "PCD compressed",
    "PLY little-endian",
    "PLY big-endian",
    "PLY ascii",
)


def read(body: bytes, limits: Limits | None = None) -> np.ndarray:
    name = sniff(body)
    assert name is not None
    return arrange(read_point_file(body, name, limits or Limits()), LAYOUT, {})


@pytest.mark.parametrize("name", NAMES)
def test_every_format_gives_the_same_points(files, name):
    assert np.array_equal(read(files[name]), POINTS)


@pytest.mark.parametrize("suffix", ["las", "laz"])
def test_las_gives_scaled_coordinates_and_its_own_intensity(tmp_path, suffix):
    points = read(las(tmp_path, suffix))
    assert np.abs(points[:, :3] - POINTS[:, :3]).max() < 2e-5
    assert np.array_equal(points[:, 3], np.round(POINTS[:, 3] * 1000))


def test_columns_are_matched_by_name_and_not_by_place():
    shuffled = np.zeros(len(POINTS), dtype=[(name, "<f4") for name in reversed(NAMED)])
    for k, name in enumerate(NAMED):
        shuffled[name] = POINTS[:, k]
    assert np.array_equal(read(npy(shuffled)), POINTS)


@pytest.mark.parametrize("spelling", ["Intensity", "reflectance", "i"])
def test_a_usual_spelling_of_a_column_is_understood(spelling):
    assert np.array_equal(read(npy(structured(names=("x", "y", "z", spelling)))), POINTS)


def test_a_columns_own_name_goes_before_another_spelling_of_it():
    both = np.zeros(len(POINTS), dtype=[(name, "<f4") for name in ("reflectivity", *NAMED)])
    both["reflectivity"] = 200
    for k, name in enumerate(NAMED):
        both[name] = POINTS[:, k]
    assert np.array_equal(read(npy(both)), POINTS)


@pytest.mark.parametrize(
    "lead", [b"\n", b"# written by a tool\n", b"\xef\xbb\xbf", "# 点云\n".encode(), b"#.PCD\n"]
)
@pytest.mark.parametrize("encoding", ["ascii", "binary", "binary_compressed"])
def test_a_pcd_is_recognised_by_its_header_whatever_stands_before_it(tmp_path, lead, encoding):
    body = pcd(encoding, tmp_path)
    plain = body[body.index(b"VERSION") :].replace(b"POINTS 200\n", b"")
    assert np.allclose(read(lead + plain), POINTS, atol=1e-5)


def test_a_file_far_from_the_sensor_says_that_its_origin_must_move(tmp_path):
    far = structured().astype([(name, "<f8") for name in NAMED])
    far["y"] += 4.5e6
    with pytest.raises(UndecodableFrame, match="from the sensor"):
        decode_points(npy(far), LAYOUT, Limits())


def test_a_missing_column_is_refused_by_its_name_unless_stated_or_unused():
    body = npy(structured()[["x", "y", "z"]])
    table = read_point_file(body, "npy", Limits())
    with pytest.raises(UndecodableFrame, match="intensity"):
        arrange(table, LAYOUT, {})
    assert (arrange(table, LAYOUT, {"intensity": 0.5})[:, 3] == 0.5).all()
    assert (arrange(table, PointLayout(NAMED, frozenset({0, 1, 2})), {})[:, 3] == 0).all()


@pytest.mark.parametrize(
    ("before", "between", "after"),
    [("", "\t", "\n"), ("  ", "   ", " \n"), (" ", " \t", "\t\r\n")],
    ids=["tabs", "aligned", "both"],
)
def test_numbers_of_a_text_pcd_may_have_any_blanks_around_them(tmp_path, before, between, after):
    header, _, numbers = pcd("ascii", tmp_path).partition(b"DATA ascii\n")
    spaced = "".join(
        before + between.join(line.split()) + after for line in numbers.decode().splitlines()
    ).encode()
    table = read_point_file(header + b"DATA ascii\n" + spaced, "PCD", Limits())
    assert np.allclose(arrange(table, LAYOUT, {}), POINTS, atol=1e-4)


def test_packed_colours_of_pcl_are_unpacked():
    from pypcd4.pypcd4 import PointCloud

    rgb = np.full(len(POINTS), (10 << 16) | (20 << 8) | 30, dtype=np.uint32).view(np.float32)
    cloud = PointCloud.from_points((*POINTS[:, :3].T, rgb), ("x", "y", "z", "rgb"), (np.float32,) * 4)
    stream = io.BytesIO()
    cloud.save(stream)
    table = read_point_file(stream.getvalue(), "PCD", Limits())
    coloured = arrange(table, PointLayout.default(6, is_depth=True), {})
    assert np.array_equal(coloured[0, 3:], (10, 20, 30))


@pytest.mark.parametrize(
    ("magic", "named"),
    [
        (b"\x1f\x8b\x08\0\0\0\0\0", "gzip"),
        (b"\x89HDF\r\n\x1a\n", "HDF5"),
        (b"PAR1\0\0\0\0", "Parquet"),
        (b"#ROSBAG V2.0\n", "ROS bag"),
        (b"\x89PNG\r\n\x1a\n", "PNG"),
        (b"\xff\xd8\xff\xe0\0\x10", "JPEG"),
        (b"\x80\x04\x95\0\0\0\0\0", "pickle"),
    ],
)
def test_a_file_of_another_kind_is_refused_by_its_name(magic, named):
    with pytest.raises(UndecodableFrame, match=named):
        sniff(magic + bytes(range(256)) * 5)


def test_coordinates_that_begin_like_another_format_are_points():
    points = POINTS.copy()
    points[0, 0] = np.frombuffer(b"BM\x20\x41", "<f4")[0]  # 10.018, whose first bytes are a BMP's
    assert sniff(points.tobytes()) is None


@pytest.mark.parametrize("name", NAMES)
def test_more_points_than_allowed_are_refused_before_they_are_read(files, name):
    with pytest.raises(FrameTooLarge):
        read(files[name], Limits(max_points=199))


@pytest.mark.parametrize(
    "body",
    [
        b"# .PCD v0.7\nFIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nCOUNT 1 1 1\nWIDTH 2000000\nHEIGHT 1\nPOINTS 2000000\n"
        b"DATA binary\n" + bytes(12),
        b"# .PCD v0.7\nFIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nCOUNT 1 1 1\nPOINTS 300\nDATA binary_compressed\n"
        + struct.pack("<II", 8, 0xFFFFFFFF)
        + bytes(8),
        b"ply\nformat binary_little_endian 1.0\nelement vertex 1999999\nproperty double x\nproperty double y\n"
        b"property double z\nend_header\n" + bytes(24),
        b"ply\nformat binary_little_endian 1.0\nelement vertex 1\nproperty list uint int x\nend_header\n"
        + b"\xff" * 8,
    ],
    ids=["PCD", "PCD compressed", "PLY", "PLY list"],
)
def test_a_header_that_claims_more_than_there_is_is_refused(body):
    with pytest.raises(UndecodableFrame):
        read(body)


def test_a_zip_bomb_is_refused_by_its_unpacked_size():
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("points.npy", bytes(80 << 20))
    with pytest.raises(FrameTooLarge):
        read(stream.getvalue(), Limits(max_frame_bytes=1 << 20))


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), name=st.sampled_from((*NAMES, "LAS", "LAZ")))
def test_damaged_files_are_refused_and_never_a_traceback(files, data, name):
    body = bytearray(files[name])
    # Headers decide most, so most damage is done there.
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.one_of(st.integers(0, min(400, len(body) - 1)), st.integers(0, len(body) - 1)))
        body[at] = data.draw(st.integers(0, 255))
    cut = bytes(body[: data.draw(st.one_of(st.just(len(body)), st.integers(8, len(body))))])
    try:
        kind = sniff(cut)
        if kind is not None:
            table = read_point_file(cut, kind, Limits(max_points=1000))
            assert table.count <= 1000
            assert all(values.shape == (table.count,) for values in table.columns.values())
    except (UndecodableFrame, FrameTooLarge):
        pass


def test_message_about_an_npy_header_holds_no_address_of_an_object():
    text = b"{'descr': '<f4', 'fortran_order': False, 'shape': (10**3, 4)}"
    body = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text
    with pytest.raises(UndecodableFrame, match="BinOp object>") as found:
        read_point_file(body, "npy", Limits())
    assert "0x" not in str(found.value)
