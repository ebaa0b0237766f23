"""The benchmark of skipping reports shares, times and equal bits."""

from __future__ import annotations

import json

import pytest
import torch

from serve.errors import SetupError
from serve.runtime import load_detector


def test_few_cells_of_the_golden_frame_are_computed_and_clouds_keep_their_bits(demo_archive):
    from tools.bench import skipping

    detector = load_detector(demo_archive, torch.device("cpu"))
    body = (demo_archive.root / "golden" / "frame.bin").read_bytes()
    found = skipping.run(detector, "frame.bin", body, rounds=1, clouds=4)
    assert found.equal_clouds == found.clouds == 4
    assert {"direct", "cellwise"} <= {layer.kind for layer in found.layers}
    assert 0 < found.layers[0].differs < 0.5
    assert "4 of 4 clouds" in found.table()
    assert json.loads(found.json_line())["skipping"]["model"] == detector.metadata.name


def test_model_without_a_map_is_refused(demo_archive):
    from tools.bench import skipping

    detector = load_detector(demo_archive, torch.device("cpu"))
    del detector.network.background
    with pytest.raises(SetupError):
        skipping.run(detector, "frame.bin", b"", rounds=1)
