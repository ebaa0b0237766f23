"""Configs of mmdet 2.x and mmdet3d 0.x over a real TorchServe answer what upstream does on the converted config."""

from __future__ import annotations

from pathlib import Path

import pytest

from serve.client import Client
from serve.convert import Conversion, configured_classes, convert, resolve_config
from serve.convert.golden import golden_frame
from serve.convert.random_weights import write_random_checkpoint
from serve.runtime.pipeline import frame_spec
from serve.torchserve import ServedModel, TorchServe, TorchServeOptions
from serve.verify.endpoint import verify
from serve.verify.reference_loading import load_reference
from serve.verify.report import frame_table
from tests.conftest import pick_free_ports

CONFIGS = Path(__file__).parent / "old_configs"
# One of each package in every run; each takes 20 to 40 seconds, most of them for the model.
SERVED = (
    "pointpillars/ceph_kitti",
    "faster_rcnn/image_to_tensor",
    pytest.param("regnet/ceph_nuscenes", marks=pytest.mark.soak),
    pytest.param("faster_rcnn/amazon", marks=pytest.mark.soak),
)


def test_both_ways_of_packing_are_the_same_config_today():
    first, second = (
        resolve_config(CONFIGS / "faster_rcnn" / f"{name}.py").config
        for name in ("image_to_tensor", "default_format_bundle")
    )
    assert first == second
    preprocessor = first["model"]["data_preprocessor"]
    assert (preprocessor["mean"], preprocessor["std"]) == ([0, 0, 0], [1, 1, 1])
    assert preprocessor["bgr_to_rgb"] and preprocessor["pad_size_divisor"] == 32


@pytest.mark.parametrize("name", ["regnet/ceph_nuscenes", "faster_rcnn/amazon"])
def test_old_config_that_is_not_served_in_every_run_is_converted_in_every_run(name):
    resolved = resolve_config(CONFIGS / f"{name}.py")
    assert any("converted to today's form" in note for note in resolved.notes)
    assert resolved.config["model"]["type"] and configured_classes(resolved.config)


@pytest.mark.slow
@pytest.mark.torchserve
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", SERVED)
def test_an_old_config_is_converted_served_and_equal_to_upstream(tmp_path, name):
    config, checkpoint, model = CONFIGS / f"{name}.py", tmp_path / "random.pth", name.replace("/", "-")
    resolved = resolve_config(config)
    assert any("converted to today's form" in note for note in resolved.notes)
    write_random_checkpoint(resolved.config, tuple(configured_classes(resolved.config)), checkpoint)
    made = convert(Conversion(config, checkpoint, tmp_path, model))
    assert made.golden_detections > 0
    ((file, body),) = golden_frame(frame_spec(resolved.config)).values()
    (tmp_path / file).write_bytes(body)
    ports = dict(zip(("inference_port", "management_port", "metrics_port"), pick_free_ports(3), strict=True))
    options = TorchServeOptions(
        model_store=tmp_path, models=[ServedModel(f"{model}.mar")], system_metrics=False, gpus=0, **ports
    )
    with TorchServe(options), Client(f"127.0.0.1:{ports['inference_port']}") as client:
        reference = load_reference(config, checkpoint, "cpu")
        (report,) = verify([tmp_path / file], reference, client, model, score_thr=0.05)
    assert report.comparison.ok and report.served["names"], frame_table(report, 20)
