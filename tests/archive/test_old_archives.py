"""Archives written at commit c44dd86 (0.1.0) load, serve and prove themselves.

The manifest and the metadata below are literal copies of what that version wrote for the demo model, so a change of
the format or of a module that archives name cannot go unnoticed.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import zipfile
from pathlib import Path

import orjson
import pytest
import torch

from serve import archive
from serve.runtime import load_detector
from serve.runtime.selftest import self_test
from tests.worker.context import Context

MANIFEST = {
    "archiverVersion": "mmdet3d-serve 0.1.0",
    "model": {"handler": "handlers.mmdet3d_handler", "modelName": "second", "modelVersion": "1.0"},
    "runtime": "python",
}
METADATA = {
    "box_type_3d": "LiDAR",
    "classes": ["Pedestrian", "Cyclist", "Car"],
    "color_type": None,
    "format": 1,
    "golden_frame": "golden/frame.bin",
    "inference": {"autocast": "off", "channels_last": True, "fold_batch_norm": []},
    "load_dim": 4,
    "modality": "lidar",
    "name": "second",
    "package": "mmdet3d",
    "parts": ["points"],
    "serve_version": "0.1.0",
    "source": {
        "checkpoint": "second_demo.pth",
        "checkpoint_sha256": "07156fd36307eeb99496e57b7c7bff3fa939213f71f752468c64581996d5c574",
        "config": "second_demo.py",
        "config_sha256": "4334687f99eadb01e83b0bd5b80cdb99a1f3513fc55e2b94027f2319628e98ad",
        "mmcv-lite": "2.1.0",
        "mmdet": "3.2.0",
        "mmdet3d": "1.4.0",
        "mmengine": "0.10.7",
        "numpy": "2.4.6",
        "torch": "2.13.0+cpu",
    },
    "version": "1.0",
}


@pytest.fixture(scope="module")
def old_mar(demo_mar, tmp_path_factory) -> Path:
    """The demo model in the format of 0.1.0; config, weights and golden frame are today's."""
    with zipfile.ZipFile(demo_mar) as today:
        entries = {
            name: today.read(name)
            for name in ("config.json", "weights.safetensors", "golden/frame.bin", "golden/expected.json")
        }
        folded = orjson.loads(today.read("model.json"))["inference"]["fold_batch_norm"]
    metadata = {
        **METADATA,
        "inference": {**METADATA["inference"], "fold_batch_norm": folded},
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in entries.items()},
    }
    path = tmp_path_factory.mktemp("old") / "second.mar"
    with zipfile.ZipFile(path, "w") as old:
        for name, data in entries.items():
            old.writestr(name, data)
        old.writestr("model.json", json.dumps(metadata))
        old.writestr("MAR-INF/MANIFEST.json", json.dumps(MANIFEST))
    return path


@pytest.fixture(scope="module")
def opened(old_mar, tmp_path_factory) -> archive.Archive:
    return archive.extract(old_mar, tmp_path_factory.mktemp("opened-old"))


def test_old_archive_verifies_with_its_metadata(old_mar):
    metadata = archive.verify(old_mar)
    assert (metadata.name, metadata.serve_version, metadata.parts) == ("second", "0.1.0", ("points",))
    assert metadata.source == METADATA["source"]


def test_old_archive_proves_itself(opened):
    detector = load_detector(opened, torch.device("cpu"))
    self_test(detector, opened)


def test_old_archive_is_served_by_the_handler_it_names(opened):
    module = importlib.import_module(MANIFEST["model"]["handler"])
    handler = module.MMDet3DHandler()
    context = Context(opened.root)
    handler.initialize(context)
    (answer,) = handler.handle([{"body": opened.golden_frame()}], context)
    assert len(orjson.loads(answer)["scores_3d"]) > 0
