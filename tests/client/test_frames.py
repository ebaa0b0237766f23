"""Frames as callers have them: arrays of any library, pictures, files, folders, parts."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from serve.client.frames import encode_frame, encode_image, encode_points
from serve.errors import UndecodableFrame
from serve.protocol.frame_spec import FrameSpec
from serve.protocol.frames import decode_frame
from serve.protocol.options import FrameOptions
from serve.settings import Limits

POINTS = np.random.default_rng(1).normal(size=(6, 4)).astype(np.float32)
PIXELS = np.random.default_rng(2).integers(0, 256, (5, 7, 3), dtype=np.uint8)


class Tensor:
    """What torch's tensors have of numpy's protocol, and a gradient."""

    def __init__(self, array: np.ndarray) -> None:
        self._array, self._is_detached = array, False

    def detach(self) -> Tensor:
        self._is_detached = True
        return self

    def cpu(self) -> Tensor:
        return self

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        if not self._is_detached:
            raise RuntimeError("a tensor that requires grad has no array")
        return self._array


def read_only(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    "made",
    [
        np.asfortranarray, read_only, Tensor, lambda a: a.astype(np.float64), lambda a: a.astype(">f4"),
        lambda a: np.repeat(a, 2, 0)[::2], lambda a: a[::-1][::-1], lambda a: np.ma.masked_array(a, np.zeros(a.shape)),
    ],
)  # fmt: skip
def test_array_of_any_kind_is_the_same_cloud(made: Callable[[np.ndarray], Any]) -> None:
    assert encode_frame(made(POINTS)) == (encode_points(POINTS), "application/octet-stream")


def test_tensor_of_torch_is_an_array() -> None:
    torch = pytest.importorskip("torch", reason="an optional library of callers")
    assert encode_frame(torch.from_numpy(POINTS).requires_grad_())[0] == encode_points(POINTS)
    assert encode_frame(torch.from_numpy(PIXELS))[0] == encode_image(PIXELS)


def test_structured_array_is_taken_by_the_names_of_its_fields() -> None:
    columns = dict(zip(("intensity", "z", "y", "x"), POINTS[:, ::-1].T, strict=True))
    structured = np.zeros(len(POINTS), [(name, np.float32) for name in columns])
    for name, values in columns.items():
        structured[name] = values
    body = encode_frame(structured)[0]
    assert isinstance(body, bytes)
    decoded = decode_frame(body, FrameSpec("lidar"), FrameOptions(), Limits()).data
    assert isinstance(decoded, np.ndarray) and (decoded == POINTS).all()


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1", "CMYK"])
def test_picture_of_pil_has_the_pixels_of_its_file(mode: str, tmp_path: Path) -> None:
    picture = Image.fromarray(PIXELS).convert(mode)
    body = encode_frame(picture)[0]
    assert isinstance(body, bytes)
    found = cv2.imdecode(np.frombuffer(body, np.uint8), cv2.IMREAD_COLOR)
    assert found is not None
    assert (found[..., ::-1] == np.asarray(picture.convert("RGB"))).all()
    picture.convert("RGB").save(tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as opened:
        again = encode_frame(opened)[0]
    assert isinstance(again, bytes)
    same = cv2.imdecode(np.frombuffer(again, np.uint8), cv2.IMREAD_COLOR)
    assert same is not None and (same == found).all()


def test_grey_image_may_have_a_channel() -> None:
    assert encode_frame(PIXELS[..., :1]) == encode_frame(PIXELS[..., 0])


def test_binary_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "frame.bin").write_bytes(POINTS.tobytes())
    with open(tmp_path / "frame.bin", "rb") as file:
        assert encode_frame(file)[0] == POINTS.tobytes()
    assert encode_frame({"points": io.BytesIO(b"points")})[0] == {"points": b"points"}
    with open(tmp_path / "frame.bin", encoding="latin-1") as text, pytest.raises(UndecodableFrame):
        encode_frame(text)


@pytest.mark.parametrize(
    "frame",
    [
        [[1.0, 2, 3, 4]], (POINTS,), {}, {3: POINTS}, {"points": POINTS.tolist()}, {"points": None},
        (each for each in [b""]), np.float32(3), "", "a\0b", POINTS.astype(np.int32), POINTS > 0,
        POINTS.astype(np.float64) * 1e300, np.ma.masked_array(POINTS, POINTS > 0), PIXELS.transpose(2, 0, 1),
        np.zeros((5, 7, 4), np.uint8), Image.fromarray(np.zeros((4, 4), np.uint16)),
        {"calibration": {"cam2img": np.full((3, 3), np.nan)}}, np.array([("a", None)], [("x", "O"), ("y", "O")]),
    ],
)  # fmt: skip
def test_what_is_no_frame_is_refused(frame: Any) -> None:
    with pytest.raises(UndecodableFrame):
        encode_frame(frame)


def test_matrices_of_a_calibration_may_be_tensors_and_its_text_is_json() -> None:
    expected = {"calibration": json.dumps({"cam2img": np.eye(3).tolist()}).encode()}
    assert encode_frame({"calibration": {"cam2img": Tensor(np.eye(3))}})[0] == expected
    assert encode_frame({"calibration": expected["calibration"].decode()})[0] == expected


def test_text_of_a_frame_is_no_path() -> None:
    assert encode_frame({"text": "a cat. a dog."})[0] == {"text": b"a cat. a dog."}


@pytest.mark.parametrize("names", [[], ["points.bin", "diary.txt"], ["image.png", "image.jpg"]])
def test_folder_of_something_else_is_not_sent(names: list[str], tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"private")
    with pytest.raises(UndecodableFrame):
        encode_frame(tmp_path)
