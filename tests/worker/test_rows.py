"""Rows of TorchServe with sweeps: one rule tells the part ``sweeps`` from the option of that name."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest

from serve.worker.rows import read_row

POSES = [{"time_lag_s": 0.05, "transform": np.eye(4).tolist()}]
PARTS = {"points": b"key.", "sweep.0": b"old.", "sweeps": json.dumps(POSES).encode()}
POINTS = base64.b64encode(PARTS["points"]).decode()
SWEEP = base64.b64encode(PARTS["sweep.0"]).decode()


@pytest.mark.parametrize(
    "row",
    [
        PARTS,
        {**PARTS, "sweeps": bytearray(PARTS["sweeps"])},
        {**PARTS, "sweeps": PARTS["sweeps"].decode()},
        {**PARTS, "sweeps": POSES},  # TorchServe parses a part whose content type is JSON
        {"body": {"points": {"b64": POINTS}, "sweeps": [{"points": {"b64": SWEEP}, **POSES[0]}]}},
        {"body": {"points": {"b64": POINTS}, "sweep.0": {"b64": SWEEP}, "sweeps": POSES}},
    ],
)
def test_row_of_sweeps_is_one_frame_of_parts(row):
    (frame,) = read_row(row, {}).frames
    body, options = frame.body, frame.options
    assert options.sweeps is None and body["points"] == b"key." and body["sweep.0"] == b"old."
    found = json.loads(bytes(body["sweeps"]))
    assert (found if isinstance(found, list) else found["sweeps"]) == POSES


@pytest.mark.parametrize(
    ("row", "headers"),
    [
        ({"body": b"cloud"}, {"X-Sweeps": "accumulated"}),
        ({"data": b"cloud", "sweeps": b"accumulated"}, {}),
        ({"points": b"cloud", "sweeps": "accumulated"}, {}),
    ],
)
def test_row_of_an_accumulated_cloud_is_one_frame_with_the_option(row, headers):
    (frame,) = read_row(row, headers).frames
    assert (frame.body, frame.options.sweeps) == (b"cloud", "accumulated")
