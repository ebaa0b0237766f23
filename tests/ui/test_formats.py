"""Clouds of every format: what the page draws of a file is what is in it."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from pypcd4 import Encoding, PointCloud

from tests.gateway.fake_torchserve import CLOUDS, FakeModel
from tests.gateway.running import eventually
from tests.ui.conftest import make_cloud
from tests.ui.test_page import picture
from tests.ui.test_routes import las_file, packed_npz

CLOUD = make_cloud(points=300)
NAMES = ("x", "y", "z", "intensity")


def npy(points: np.ndarray, *, version: tuple[int, int] = (1, 0)) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, points, version=version)
    return stream.getvalue()


def structured(kind: str) -> bytes:
    made = np.empty(
        len(CLOUD), [("time", "<u4"), ("z", kind), ("y", kind), ("x", kind), ("intensity", "<f4")]
    )
    for k, name in enumerate(NAMES):
        made[name] = CLOUD[:, k]
    return npy(made)


def pcd(encoding: str) -> bytes:
    stream = io.BytesIO()
    PointCloud.from_points(CLOUD, NAMES, (np.float32,) * 4).save(stream, encoding=Encoding(encoding))
    return stream.getvalue()


def ply(form: str) -> bytes:
    fields = "".join(f"property float {name}\n" for name in NAMES)
    head = f"ply\nformat {form} 1.0\nelement vertex {len(CLOUD)}\n{fields}end_header\n".encode()
    if form == "ascii":
        return head + b"".join(b"%f %f %f %f\n" % tuple(point) for point in CLOUD)
    return head + CLOUD.astype("<f4" if form.endswith("little_endian") else ">f4").tobytes()


def aligned() -> bytes:
    """A structured array with padding between its fields, as C's compilers lay a struct out."""
    kind = {"names": ["ring", *NAMES], "formats": ["u1", "f8", "f8", "f8", "f4"]}
    made = np.zeros(len(CLOUD), np.dtype(kind, align=True))
    for k, name in enumerate(NAMES):
        made[name] = CLOUD[:, k]
    return npy(made)


def with_vectors() -> bytes:
    made = np.zeros(len(CLOUD), [("normal", "f4", (3,)), *[(name, "f4") for name in NAMES]])
    for k, name in enumerate(NAMES):
        made[name] = CLOUD[:, k]
    return npy(made)


FILES = {
    "a.bin": CLOUD.tobytes(),
    "a.npy": npy(CLOUD),
    "double.npy": npy(CLOUD.astype("<f8"), version=(2, 0)),
    "fortran.npy": npy(np.asfortranarray(CLOUD)),
    "big.npy": npy(CLOUD.astype(">f4")),
    "structured.npy": structured("<f8"),
    "aligned.npy": aligned(),
    "vectors.npy": with_vectors(),
    "half.npy": npy(CLOUD.astype("<f2")),
    "a.npz": packed_npz(CLOUD),
    "ascii.pcd": pcd("ascii"),
    "binary.pcd": pcd("binary"),
    "compressed.pcd": pcd("binary_compressed"),
    "commented.pcd": b"# made elsewhere\n" + pcd("binary").partition(b"\n")[2],
    "reflectance.pcd": pcd("binary").replace(b"intensity", b"reflectance", 1),
    "ascii.ply": ply("ascii"),
    "little.ply": ply("binary_little_endian"),
    "big.ply": ply("binary_big_endian"),
    "scalar.ply": ply("binary_little_endian").replace(b"intensity", b"scalar_Intensity", 1),
    "a.las": las_file(CLOUD, is_compressed=False),
    "a.laz": las_file(CLOUD, is_compressed=True),
}


def extent() -> str:
    low, high = CLOUD[:, :3].min(0), CLOUD[:, :3].max(0)
    return ", ".join(f"{axis} {low[k]:.1f} to {high[k]:.1f}" for k, axis in enumerate("xyz")) + " m"


def test_cloud_of_every_format_is_drawn(page):
    info = page.page.locator("#frame-info")
    for name, body in FILES.items():
        page.drop((name, body))
        info.get_by_text(name).wait_for()
        try:
            info.get_by_text(f"{len(CLOUD):,} points").wait_for()
        except Exception:
            pytest.fail(f"{name}: {info.inner_text()}")
        low_precision = {"half.npy"}
        assert name in low_precision or extent() in info.inner_text(), name
        option = page.page.locator("#colour-by option[value=intensity]")
        assert option.get_attribute("disabled") is None, name


def test_colours_that_a_ply_does_not_have_are_not_offered(page):
    page.drop(("bare.ply", ply("binary_little_endian").replace(b"intensity", b"curvature", 1)))
    page.page.locator("#frame-info").get_by_text("bare.ply").wait_for()
    option = page.page.locator("#colour-by option[value=intensity]")
    eventually(lambda: option.get_attribute("disabled") is not None)


@pytest.mark.parametrize(
    "move",
    [
        lambda cloud: cloud + np.array([5e5, 5.5e6, 300, 0]),
        lambda cloud: cloud * np.array([100, 100, 100, 1]),
    ],
    ids=["map coordinates", "centimetres"],
)
def test_cloud_far_from_its_origin_is_seen(page, move):
    page.page.get_by_role("slider", name="Score from").fill("1")
    page.drop(("far.bin", move(make_cloud()).astype("<f4").tobytes()))
    page.page.locator("#frame-info").get_by_text("far.bin").wait_for()
    ground = (11, 15, 20)
    eventually(lambda: (abs(picture(page) - ground).max(2) > 60).sum() > 2000)


def test_colours_of_a_cloud_are_offered(page):
    made = np.empty(50, [("x", "f4"), ("y", "f4"), ("z", "f4"), ("r", "u1"), ("g", "u1"), ("b", "u1")])
    for k, name in enumerate(made.dtype.names):
        made[name] = np.arange(50) + k
    page.drop(("coloured.npy", npy(made)))
    page.page.locator("#frame-info").get_by_text("50 points").wait_for()
    colour = page.page.locator("#colour-by")
    eventually(lambda: colour.locator("option[value=rgb]").get_attribute("disabled") is None)
    assert colour.locator("option[value=intensity]").get_attribute("disabled") is not None


@pytest.mark.parametrize(
    "body",
    [b"\x00" * 7, b"\x93NUMPY\x01\x00", b"LASF", b"PK\x03\x04", b"ply\nformat ascii 1.0\n", b"VERSION .7\n"],
)
def test_file_that_is_no_cloud_is_said_so_and_its_answer_is_shown(page, body):
    page.drop(("odd.bin", body))
    page.page.locator("#frame-info").get_by_text("odd.bin is not shown").wait_for()
    page.page.locator("#found tbody tr").first.wait_for()


def test_columns_of_the_model_are_those_of_a_bin(scene, torchserve, gateway, open_page):
    torchserve.models = {"nuscenes": {"1.0": FakeModel(spec={**CLOUDS, "load_dim": 5})}}
    page = open_page(gateway.url)
    page.is_ready()
    page.drop(("five.bin", b"".join(struct.pack("<5f", k, 0, 0, 0, 0) for k in range(8))))
    page.page.locator("#frame-info").get_by_text("8 points").wait_for()
    assert "x 0.0 to 7.0, y 0.0 to 0.0" in page.page.locator("#frame-info").inner_text()
