"""A loading step that derives from one of upstream's gives in memory what it gives on files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import orjson
import pytest

from serve import ops
from serve.convert.golden import golden_calibration, golden_frame, golden_image
from serve.errors import ArchiveError
from serve.protocol.frames import decode_frame
from serve.protocol.options import FrameOptions
from serve.settings import Limits

ops.install()

from serve.runtime.pipeline import InputPipeline, frame_spec  # noqa: E402
from tests.runtime import own_loaders  # noqa: E402  (registers the steps)

IMAGE_KEYS = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")


def image_config(*steps: dict) -> dict:
    pipeline = [
        *steps,
        {"type": "Resize", "scale": (64, 48), "keep_ratio": True},
        {"type": "PackDetInputs", "meta_keys": IMAGE_KEYS},
    ]
    return {"default_scope": "mmdet", "model": {}, "test_dataloader": {"dataset": {"pipeline": pipeline}}}


def cloud_config(*steps: dict, keys: tuple[str, ...] = ("points",)) -> dict:
    pipeline = [*steps, {"type": "Pack3DDetInputs", "keys": list(keys)}]
    return {"default_scope": "mmdet3d", "model": {}, "test_dataloader": {"dataset": {"pipeline": pipeline}}}


def on_files(config: dict, entries: dict) -> Any:
    """Run upstream's own composition of the configured steps."""
    from mmengine.dataset import Compose
    from mmengine.registry import DefaultScope

    steps = [
        step
        for step in config["test_dataloader"]["dataset"]["pipeline"]
        if "Annotations" not in step["type"] and step["type"] != "BoxesOfMine"
    ]
    with DefaultScope.overwrite_default_scope(config["default_scope"]):
        return Compose(steps)(entries)


def in_memory(config: dict, body: Any) -> Any:
    pipeline = InputPipeline(config)
    return pipeline.build(decode_frame(body, pipeline.spec, FrameOptions(), Limits()))


def cloud(count: int = 200, columns: int = 5, seed: int = 1) -> np.ndarray:
    points = np.random.default_rng(seed).uniform(0, 1, (count, columns)).astype(np.float32)
    points[:, :2] *= 40
    return points


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    path.write_bytes(cv2.imencode(".png", golden_image(96, 72))[1].tobytes())
    return path


def test_a_derived_point_loader_keeps_its_own_columns_and_changes(tmp_path):
    config = cloud_config({"type": "ClippedPoints", "high": 0.25})
    assert (frame_spec(config).load_dim, frame_spec(config).used_columns) == (5, (0, 1, 2, 3))
    path = tmp_path / "cloud.bin"
    cloud().tofile(path)
    expected = on_files(config, {"lidar_points": {"lidar_path": str(path)}})["inputs"]["points"]
    found = in_memory(config, path.read_bytes())["inputs"]["points"]
    assert np.array_equal(found, expected) and float(found[:, 3].max()) == 0.25


def test_a_derived_loader_of_sweeps_keeps_its_number_and_changes(tmp_path):
    load = {"type": "LoadPointsFromFile", "coord_type": "LIDAR", "load_dim": 5, "use_dim": 5}
    config = cloud_config(load, {"type": "NearSweeps", "use_dim": [0, 1, 2, 4]})
    spec = frame_spec(config)
    assert spec.sweeps is not None and spec.sweeps.number == 3
    pose = np.eye(4)
    pose[0, 3] = 1.5
    for k in range(5):
        cloud(seed=k).tofile(tmp_path / f"{k}.bin")
    infos = {
        "lidar_points": {"lidar_path": str(tmp_path / "0.bin")},
        "timestamp": 0.0,
        "lidar_sweeps": [
            {
                "timestamp": -0.1 * k,
                "lidar_points": {"lidar_path": str(tmp_path / f"{k}.bin"), "lidar2sensor": pose.tolist()},
            }
            for k in range(1, 5)
        ],
    }
    expected = on_files(config, infos)["inputs"]["points"]
    sweeps = [{"time_lag_s": 0.1 * k, "lidar2sensor": pose.tolist()} for k in range(1, 5)]

    body = {"points": (tmp_path / "0.bin").read_bytes(), "sweeps": orjson.dumps(sweeps)}
    body |= {f"sweep.{k - 1}": (tmp_path / f"{k}.bin").read_bytes() for k in range(1, 5)}
    found = in_memory(config, body)["inputs"]["points"]
    assert np.array_equal(found, expected) and len(np.unique(found[:, 3])) == 4


def test_a_derived_image_loader_keeps_its_colours(picture):
    config = image_config({"type": "GreyImage"})
    assert frame_spec(config).color_type == "grayscale"
    expected = on_files(config, {"img_path": str(picture), "img_id": 0})["inputs"]
    assert np.array_equal(in_memory(config, picture.read_bytes())["inputs"], expected)


def test_a_derived_loader_of_one_camera_keeps_its_change(picture):
    config = cloud_config({"type": "MirroredMono"}, keys=("img",))
    spec = frame_spec(config)
    assert (spec.modality, spec.calibration) == ("mono3d", ("cam2img",))
    cam2img = np.diag([500.0, 500.0, 1.0, 1.0]).tolist()
    entries = {"images": {"CAM2": {"img_path": str(picture), "cam2img": cam2img}}}
    expected = on_files(config, entries)["inputs"]["img"]

    body = {"image": picture.read_bytes(), "calibration": orjson.dumps({"cam2img": cam2img})}
    assert np.array_equal(in_memory(config, body)["inputs"]["img"], expected)


def test_a_derived_loader_of_views_keeps_its_change(tmp_path):
    config = cloud_config({"type": "BrightViews", "num_views": 2, "color_type": "color"}, keys=("img",))
    spec = frame_spec(config)
    assert spec.modality == "multiview" and len(spec.cameras) == 2
    parts = {name: body for name, (_, body) in golden_frame(spec).items()}
    entries: dict[str, Any] = {"images": {}}
    for camera in spec.cameras:
        (tmp_path / f"{camera}.png").write_bytes(parts[f"image.{camera}"])
        matrices = {name: np.array(rows) for name, rows in golden_calibration(spec)[camera].items()}
        entries["images"][camera] = {"img_path": str(tmp_path / f"{camera}.png"), **matrices}
    expected = on_files(config, entries)["inputs"]["img"]
    assert np.array_equal(in_memory(config, parts)["inputs"]["img"], expected)


@pytest.mark.parametrize("to_float32", [False, True])
@pytest.mark.parametrize(
    ("suffix", "dtype"), [("png", np.uint16), ("tiff", np.uint16), ("tiff", np.int16), ("pfm", np.float32)]
)
def test_unchanged_samples_of_more_than_8_bits_reach_the_model_as_in_upstream(
    tmp_path, suffix, dtype, to_float32
):
    step = {"type": "LoadImageFromFile", "color_type": "unchanged", "to_float32": to_float32}
    config = image_config(step)
    path = tmp_path / f"picture.{suffix}"
    path.write_bytes(cv2.imencode(f".{suffix}", golden_image(96, 72).astype(dtype) * 100)[1].tobytes())
    expected = on_files(config, {"img_path": str(path), "img_id": 0})["inputs"]
    found = in_memory(config, path.read_bytes())["inputs"]
    assert found.dtype == expected.dtype and np.array_equal(found, expected)
    assert found.float().max() > 255


def test_a_grey_image_of_float_samples_is_no_point_cloud(tmp_path):
    body = cv2.imencode(".pfm", golden_image(96, 72)[..., 0].astype(np.float32))[1].tobytes()
    spec = frame_spec(image_config({"type": "LoadImageFromFile", "color_type": "unchanged"}))
    frame = decode_frame(body, spec, FrameOptions(), Limits())
    assert frame.data.dtype == np.float32 and frame.points is None


def test_a_derived_loader_of_annotations_is_left_out(picture):
    config = image_config({"type": "LoadImageFromFile"}, {"type": "BoxesOfMine", "with_bbox": True})
    assert in_memory(config, picture.read_bytes())["inputs"].shape == (3, 48, 64)


def test_a_class_that_replaces_upstreams_under_its_name_is_used(picture):
    from mmdet.registry import TRANSFORMS

    config = image_config({"type": "LoadImageFromFile"})
    former = TRANSFORMS.module_dict.get("LoadImageFromFile")
    TRANSFORMS.register_module(name="LoadImageFromFile", module=own_loaders.GreyImage, force=True)
    try:
        assert frame_spec(config).color_type == "grayscale"
        expected = on_files(config, {"img_path": str(picture), "img_id": 0})["inputs"]
        assert np.array_equal(in_memory(config, picture.read_bytes())["inputs"], expected)
    finally:
        TRANSFORMS.module_dict.pop("LoadImageFromFile")
        if former is not None:
            TRANSFORMS.module_dict["LoadImageFromFile"] = former


def test_a_step_that_reads_its_file_by_itself_is_refused_by_its_name(picture):
    load = {"type": "FileOfMyOwn", "coord_type": "LIDAR", "load_dim": 4, "use_dim": 4}
    with pytest.raises(ArchiveError, match=r"own_loaders\.FileOfMyOwn.*LoadPointsFromFile"):
        in_memory(cloud_config(load), cloud(columns=4).tobytes())
    with pytest.raises(ArchiveError, match=r"own_loaders\.DecodedByMe.*LoadImageFromFile"):
        in_memory(image_config({"type": "DecodedByMe"}), picture.read_bytes())


def test_a_step_that_cannot_be_created_is_refused_by_its_name():
    with pytest.raises(ArchiveError, match="ClippedPoints"):
        frame_spec(cloud_config({"type": "ClippedPoints", "hihg": 1}))
