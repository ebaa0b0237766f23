"""The page's routes without a browser: documents, assets, keys, and those that decode clouds and images."""

from __future__ import annotations

import hashlib
import io
import json
import re
from pathlib import Path

import cv2
import laspy
import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "serve" / "gateway" / "ui" / "source"
BUILT = ROOT / "serve" / "gateway" / "ui" / "built"
KEY = "correct horse battery"
BROWSER = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
ASSETS = sorted(path.name.removesuffix(".gz") for path in BUILT.iterdir())


def lines_of(names: list[str]) -> bytes:
    found = b""
    for name in sorted(names):
        found += f"{name}\n".encode() + hashlib.sha256((SOURCE / name).read_bytes()).digest()
    return found


def test_built_assets_are_those_of_the_sources():
    names = [str(path.relative_to(SOURCE)) for path in SOURCE.rglob("*") if path.is_file()]
    digest = hashlib.sha256(lines_of(names)).hexdigest()
    assert (BUILT / "sources.sha256").read_text().strip() == digest, "sources changed: run make ui"


def test_assets_fit_into_the_package():
    assert sum(path.stat().st_size for path in BUILT.iterdir()) < 1_500_000


def test_lock_of_the_page_has_digests_and_no_address():
    text = (SOURCE / "package-lock.json").read_text()
    packages = json.loads(text)["packages"]
    assert len(packages) > 5 and "http" not in text
    assert all("integrity" in package for name, package in packages.items() if name)


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_document_is_served_with_a_strict_policy_and_nothing_inline(gateway, path):
    answer = gateway.client.get(path, headers=BROWSER)
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/html")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'self'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert not re.search(r"https?://|<style|\son\w+=|\sstyle=", answer.text)
    scripts = re.findall(r"<script[^>]*>(.*?)</script>", answer.text, re.DOTALL)
    assert scripts and not any(scripts)
    for link in re.findall(r'(?:src|href)="([^"#]+)"', answer.text):
        assert gateway.client.get(f"/{link}").status_code == 200, link


@pytest.mark.parametrize("name", ASSETS)
def test_asset_is_served_compressed_or_not_and_once(gateway, name):
    packed = gateway.client.get(f"/ui/assets/{name}")
    plain = gateway.client.get(f"/ui/assets/{name}", headers={"accept-encoding": "identity"})
    assert packed.status_code == plain.status_code == 200
    assert packed.content == plain.content and "content-encoding" not in plain.headers
    assert packed.headers["x-content-type-options"] == "nosniff"
    kept = gateway.client.get(f"/ui/assets/{name}", headers={"if-none-match": packed.headers["etag"]})
    assert kept.status_code == 304 and not kept.content


@pytest.mark.parametrize("name", ["nothing.js", "..%2fpages.py", "%2e%2e/pages.py"])
def test_asset_that_does_not_exist_is_404(gateway, name):
    assert gateway.client.get(f"/ui/assets/{name}").status_code == 404


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_browser_without_a_key_gets_401_with_the_document_that_asks_for_it(start_gateway, path):
    locked = start_gateway(api_keys=(KEY,))
    for headers in ({}, {"x-api-key": "wrong"}):
        answer = locked.client.get(path, headers={**BROWSER, **headers})
        assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
        assert 'id="key"' in answer.text and "content-security-policy" in answer.headers
    assert locked.client.get(path, headers={**BROWSER, "x-api-key": KEY}).status_code == 200
    # Everything else that has no key gets the error of the API.
    assert locked.client.get(path).json()["error"]["code"] == "unauthorized"
    assert locked.client.post(path, headers=BROWSER).json()["error"]["code"] == "unauthorized"
    assert locked.client.get("/models", headers=BROWSER).json()["error"]["code"] == "unauthorized"


def test_assets_need_no_key_and_the_decoder_does(start_gateway):
    locked = start_gateway(api_keys=(KEY,))
    assert locked.client.get("/ui/assets/page.js").status_code == 200
    assert locked.client.get("/docs/assets/swagger-ui-bundle.js").status_code == 200
    assert locked.client.post("/ui/points", content=packed_npz(cloud_of(3))).status_code == 401


def test_ui_false_leaves_the_documentation(start_gateway):
    without = start_gateway(ui=False)
    assert without.client.get("/", headers=BROWSER).status_code == 404
    assert without.client.get("/ui/assets/page.js").status_code == 404
    assert without.client.post("/ui/points", content=packed_npz(cloud_of(3))).status_code == 404
    assert without.client.get("/docs").status_code == 200
    assert without.client.get("/docs/assets/docs.js").status_code == 200
    locked = start_gateway(ui=False, api_keys=(KEY,))
    assert locked.client.get("/", headers=BROWSER).json()["error"]["code"] == "unauthorized"


def cloud_of(count: int) -> np.ndarray:
    return np.random.default_rng(count).normal(size=(count, 4)).astype(np.float32)


def packed_npz(points: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, points=points)
    return stream.getvalue()


def las_file(points: np.ndarray, *, is_compressed: bool) -> bytes:
    made = laspy.create(point_format=3, file_version="1.2")
    made.header.scales = [0.001] * 3
    made.x, made.y, made.z = points[:, :3].T
    made.intensity = np.arange(len(points))
    stream = io.BytesIO()
    made.write(stream, do_compress=is_compressed)
    return stream.getvalue()


@pytest.mark.parametrize("is_compressed", [False, True])
def test_las_and_laz_are_decoded(gateway, is_compressed):
    points = cloud_of(50)
    answer = gateway.client.post("/ui/points", content=las_file(points, is_compressed=is_compressed))
    assert answer.status_code == 200, answer.text
    names = answer.headers["x-columns"].split(",")
    assert names[:4] == ["x", "y", "z", "intensity"]
    decoded = np.frombuffer(answer.content, "<f4").reshape(50, len(names))
    np.testing.assert_allclose(decoded[:, :3], points[:, :3], atol=6e-4)
    assert decoded[:, 3].tolist() == list(range(50))


def test_npz_without_names_is_decoded_with_numbered_columns(gateway):
    points = cloud_of(7)
    answer = gateway.client.post("/ui/points", content=packed_npz(points))
    assert answer.headers["x-columns"] == "0,1,2,3"
    np.testing.assert_array_equal(np.frombuffer(answer.content, "<f4").reshape(7, 4), points)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        cloud_of(5).tobytes(),
        b"PK\x03\x04garbage",
        b"LASF",
        b"ply\n",
        b"VERSION .7\n",
        b"\x93NUMPY\x01\x00",
        packed_npz(cloud_of(5))[:90],
    ],
)
def test_file_that_is_no_cloud_with_a_signature_is_422(gateway, body):
    answer = gateway.client.post("/ui/points", content=body)
    assert answer.status_code == 422 and answer.json()["error"]["code"] == "undecodable_frame"
    assert re.search("; (send|convert)", answer.json()["error"]["message"])  # what to do


def test_limits_of_frames_hold_for_the_decoder(start_gateway, monkeypatch):
    points = packed_npz(cloud_of(2000))
    small = start_gateway(max_frame_bytes=len(points) - 1)
    assert small.client.post("/ui/points", content=points).json()["error"]["code"] == "frame_too_large"
    monkeypatch.setenv("MMDET3D_SERVE_MAX_POINTS", "1999")
    few = start_gateway()
    answer = few.client.post("/ui/points", content=points)
    assert answer.status_code == 413 and "1999" in answer.json()["error"]["message"]
    busy = start_gateway(max_pending_frames=1, max_frames_per_request=1, client_share=1.0)
    with busy.admission.permit("someone") as permit:
        permit.grow(items=1)
        assert busy.client.post("/ui/points", content=points).status_code == 429


def encoded(suffix: str, pixels: np.ndarray) -> bytes:
    if suffix == ".jp2":  # which OpenCV's wheel only reads
        stream = io.BytesIO()
        Image.fromarray(pixels[..., ::-1]).save(stream, "JPEG2000")
        return stream.getvalue()
    return cv2.imencode(suffix, pixels)[1].tobytes()


def picture(height: int = 30, width: int = 40) -> np.ndarray:
    """Blue above red (BGR)."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, :, 0] = pixels[height // 2 :, :, 2] = 200
    return pixels


@pytest.mark.parametrize("suffix", [".tif", ".jp2", ".ppm", ".hdr", ".pfm", ".png"])
def test_images_that_no_browser_reads_come_back_as_jpeg_of_their_size(gateway, suffix):
    pixels = picture()
    given = (
        pixels.astype(np.float32)
        if suffix == ".pfm"
        else pixels / np.float32(255)
        if suffix == ".hdr"
        else pixels
    )
    answer = gateway.client.post("/ui/image", content=encoded(suffix, given))
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "image/jpeg"
    shown = cv2.imdecode(np.frombuffer(answer.content, np.uint8), cv2.IMREAD_COLOR)
    assert shown.shape == pixels.shape
    assert abs(shown[3, 5].astype(int) - pixels[3, 5]).max() < 12
    assert abs(shown[-3, 5].astype(int) - pixels[-3, 5]).max() < 12


def test_sixteen_bits_are_shown_as_eight(gateway):
    answer = gateway.client.post("/ui/image", content=encoded(".tif", picture().astype(np.uint16) * 256))
    shown = cv2.imdecode(np.frombuffer(answer.content, np.uint8), cv2.IMREAD_COLOR)
    assert abs(shown[3, 5].astype(int) - picture()[3, 5]).max() < 12


@pytest.mark.parametrize("body", [b"", b"text", encoded(".tif", picture())[:80]])
def test_file_that_is_no_image_is_422(gateway, body):
    answer = gateway.client.post("/ui/image", content=body)
    assert answer.status_code == 422 and answer.json()["error"]["code"] == "undecodable_frame"


def test_limits_of_frames_hold_for_images(start_gateway, monkeypatch):
    body = encoded(".ppm", picture())
    small = start_gateway(max_frame_bytes=len(body) - 1)
    assert small.client.post("/ui/image", content=body).json()["error"]["code"] == "frame_too_large"
    monkeypatch.setenv("MMDET3D_SERVE_MAX_PIXELS", "1199")
    few = start_gateway(api_keys=(KEY,))
    assert few.client.post("/ui/image", content=body).status_code == 401
    answer = few.client.post("/ui/image", content=body, headers={"x-api-key": KEY})
    assert answer.status_code == 413 and "1199" in answer.json()["error"]["message"]
    monkeypatch.delenv("MMDET3D_SERVE_MAX_PIXELS")
    long = start_gateway(ui=True)
    answer = long.client.post("/ui/image", content=encoded(".ppm", picture(2, 70_000)))
    assert answer.status_code == 413 and "70000" in answer.json()["error"]["message"]
    assert start_gateway(ui=False).client.post("/ui/image", content=body).status_code == 404
