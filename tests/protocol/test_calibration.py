"""Calibrations name what the model needs, and nothing else."""

from __future__ import annotations

import json

import numpy as np
import pytest

from serve.errors import BadRequest, UndecodableFrame
from serve.protocol.batch import pack_frames, unpack_frames
from serve.protocol.calibration import parse_calibration

MATRIX = np.eye(4).tolist()


def parse(document: object, cameras: tuple[str, ...] = ()) -> object:
    return parse_calibration(json.dumps(document).encode(), ("lidar2img",), cameras)


def test_matrix_of_an_unknown_name_is_refused() -> None:
    assert parse({"lidar2img": MATRIX})
    with pytest.raises(UndecodableFrame):
        parse({"lidar2img": MATRIX, "lidar2image": MATRIX})


def test_camera_that_the_model_does_not_have_is_refused() -> None:
    assert parse({"FRONT": {"lidar2img": MATRIX}}, ("FRONT",))
    with pytest.raises(UndecodableFrame):
        parse({"FRONT": {"lidar2img": MATRIX}, "BACK": {"lidar2img": MATRIX}}, ("FRONT",))


def test_bytes_behind_the_frames_of_a_batch_are_refused() -> None:
    packed = pack_frames([(bytes(16), {})])
    assert len(unpack_frames(packed)) == 1
    with pytest.raises(BadRequest):
        unpack_frames(packed + b"x")
