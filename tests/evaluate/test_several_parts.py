"""Frames of several parts: the same figures from an endpoint as natively, and upstream's of the same predictions."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from serve import zoo
from serve.cli.main import main
from serve.convert import configured_classes, resolve_config
from serve.convert.random_weights import write_random_checkpoint
from serve.protocol.json_bodies import encode_json
from serve.runtime.predictions import postprocess
from serve.synthetic.camera import HEIGHT, WIDTH
from serve.synthetic.kitti import write_kitti
from serve.synthetic.scenes import CLASSES
from tests.conftest import ASSETS, DEMO_CHECKPOINT
from tests.e2e import small_models
from tests.evaluate.answering import answering
from tests.evaluate.test_evaluation import upstream_figures

pytestmark = pytest.mark.slow
FRAMES = 4
# The demonstration SECOND as the branch of points of a detector that takes an image too.
FUSION = """
_base_ = ["second_sample.py"]
_points = _base_.model
model = dict(
    _delete_=True,
    type="MVXFasterRCNN",
    data_preprocessor=dict(
        type="Det3DDataPreprocessor", mean=[102.9801, 115.9465, 122.7717], std=[1.0, 1.0, 1.0], bgr_to_rgb=False,
        pad_size_divisor=32, voxel=True, voxel_layer=_points.data_preprocessor.voxel_layer),
    img_backbone=dict(
        type="mmdet.ResNet", depth=18, base_channels=8, num_stages=4, out_indices=(0, 1, 2, 3), style="pytorch"),
    img_neck=dict(type="mmdet.FPN", in_channels=[8, 16, 32, 64], out_channels=16, num_outs=4),
    pts_voxel_encoder=_points.voxel_encoder,
    pts_middle_encoder=_points.middle_encoder,
    pts_backbone=_points.backbone,
    pts_neck=_points.neck,
    pts_bbox_head=_points.bbox_head,
    train_cfg=dict(pts=_points.train_cfg),
    test_cfg=dict(pts=_points.test_cfg))
test_pipeline = [
    dict(type="LoadPointsFromFile", coord_type="LIDAR", load_dim=4, use_dim=4),
    dict(type="LoadImageFromFile"),
    dict(
        type="MultiScaleFlipAug3D", img_scale=(320, 96), pts_scale_ratio=1, flip=False,
        transforms=[
            dict(type="Resize", scale=0, keep_ratio=True),
            dict(type="PointsRangeFilter", point_cloud_range=_base_.point_cloud_range)]),
    dict(type="Pack3DDetInputs", keys=["points", "img"])]
test_dataloader = dict(
    dataset=dict(
        pipeline=test_pipeline, modality=dict(use_lidar=True, use_camera=True),
        data_prefix=dict(pts="training/velodyne_reduced", img="training/image_2")))
"""
PARTS = {
    "voxel_encoder": "pts_voxel_encoder",
    "middle_encoder": "pts_middle_encoder",
    "backbone": "pts_backbone",
    "neck": "pts_neck",
    "bbox_head": "pts_bbox_head",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Scenes with pictures of noise, different for each frame: what is compared does not look at them for long."""
    path = tmp_path_factory.mktemp("kitti") / "data"
    write_kitti(path, train=1, val=FRAMES)
    (path / "training" / "image_2").mkdir()
    rng = np.random.default_rng(0)
    for index in range(FRAMES + 1):
        picture = cv2.resize(rng.integers(0, 256, (24, 80, 3), np.uint8), (WIDTH, HEIGHT))
        cv2.imwrite(str(path / "training" / "image_2" / f"{index:06d}.png"), picture)
    for name in ("second_demo.py", "second_sample.py"):
        (path / name).write_bytes((ASSETS / name).read_bytes())
    return path


def options_of(folder: Path) -> dict[str, str]:
    return {
        "test_dataloader.dataset.data_root": f"{folder}/",
        "test_evaluator.ann_file": str(folder / "kitti_infos_val.pkl"),
    }


def written(options: dict[str, str]) -> list[str]:
    return ["--cfg-options", *(f"{name}={value}" for name, value in options.items())]


def evaluated(capsys, *arguments: str) -> dict:
    assert main(["evaluate", *arguments]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def predicted(folder: Path, box_type: str) -> dict[bytes, object]:
    """Ground truth of the validation frames, moved, in camera or LiDAR coordinates, by the bytes of the image."""
    from mmdet3d.structures import CameraInstance3DBoxes, Det3DDataSample
    from mmengine.structures import InstanceData

    content = pickle.loads((folder / "kitti_infos_val.pkl").read_bytes())
    rng = np.random.default_rng(8)
    samples = {}
    for entry in content["data_list"]:
        known = [one for one in entry["instances"] if rng.random() < 0.85]
        boxes = np.array([one["bbox_3d"] for one in known]) + rng.normal(0, 0.03, (len(known), 7))
        found = CameraInstance3DBoxes(torch.tensor(boxes, dtype=torch.float32))
        if box_type == "LiDAR":
            from mmdet3d.structures import Box3DMode

            to_lidar = np.linalg.inv(np.array(entry["images"]["CAM2"]["lidar2cam"]))
            found = found.convert_to(Box3DMode.LIDAR, to_lidar)
        names = list(content["metainfo"]["categories"])
        labels = [CLASSES.index(names[one["bbox_label_3d"]]) for one in known]
        sample = Det3DDataSample()
        sample.pred_instances_3d = InstanceData(
            bboxes_3d=found,
            scores_3d=torch.tensor(rng.random(len(known)), dtype=torch.float32),
            labels_3d=torch.tensor(labels),
        )
        samples[(folder / "training" / "image_2" / entry["images"]["CAM2"]["img_path"]).read_bytes()] = sample
    return samples


@pytest.mark.parametrize(
    ("model", "box_type"),
    [
        ("smoke_dla34_dlaneck_gn-all_4xb8-6x_kitti-mono3d", "Camera"),
        ("pgd_r101-caffe_fpn_head-gn_4xb3-4x_kitti-mono3d", "Camera"),
        ("mvxnet_fpn_dv_second_secfpn_8xb2-80e_kitti-3d-3class", "LiDAR"),
    ],
)
def test_figures_of_frames_of_several_parts_are_upstreams(model, box_type, folder, capsys):
    samples = predicted(folder, box_type)
    about = {"name": "made", "version": "1.0"}
    answers = {
        frame: json.loads(encode_json(postprocess(sample, CLASSES, box_type, about)))
        for frame, sample in samples.items()
    }
    config, options = zoo.resolve(model).config_path, options_of(folder)
    with answering(answers) as address:
        found = evaluated(capsys, str(config), "--url", address, "--model", "made", *written(options))
    expected = upstream_figures(config, samples, options)
    assert len(expected) > 100
    for key, value in expected.items():
        label, _, kind = key.rpartition("KITTI/")[2].partition("_")
        served = found["figures"]["all" if label == "Overall" else label][kind.replace("_", " ")]["served"]
        assert served == value, key
    assert 5 < found["figures"]["Car"]["3D AP40 moderate strict"]["served"] < 95


def fused(folder: Path) -> tuple[Path, Path]:
    """Config and checkpoint of the demonstration SECOND with a branch of images."""
    from serve.convert.checkpoint import load_checkpoint

    config = folder / "fusion.py"
    config.write_text(FUSION)
    random = with_random_weights(config, folder / "random.pth")
    weights = dict(load_checkpoint(random).state_dict)
    for name, tensor in load_checkpoint(DEMO_CHECKPOINT).state_dict.items():
        part, _, rest = name.partition(".")
        weights[f"{PARTS[part]}.{rest}"] = tensor
    path = folder / "fusion.pth"
    torch.save({"state_dict": weights, "meta": {"dataset_meta": {"classes": CLASSES}}}, path)
    return config, path


def with_random_weights(config: Path, path: Path) -> Path:
    resolved = resolve_config(config).config
    write_random_checkpoint(resolved, tuple(configured_classes(resolved)), path)
    return path


def monocular(folder: Path) -> tuple[Path, Path]:
    """The zoo's PGD for KITTI with a small backbone and picture, and weights that find something everywhere."""
    from mmengine.config import Config

    config = Config.fromfile(
        str(zoo.resolve("pgd_r101-caffe_fpn_head-gn_4xb3-4x_kitti-mono3d").config_path),
        import_custom_modules=False,
    )
    small_models.mono3d(config)
    config.test_dataloader.dataset.pipeline[1].pop("scale")
    path = folder / "monocular.py"
    config.dump(str(path))
    return path, with_random_weights(path, folder / "monocular.pth")


def archived(config: Path, checkpoint: Path, folder: Path) -> str:
    store = folder / "store"
    arguments = ["--checkpoint", str(checkpoint), "--model-name", "parts", "--output-folder", str(store)]
    assert main(["archive", str(config), *arguments]) in (0, 3)
    return str(store / "parts.mar")


def test_fusion_is_evaluated_as_native_and_a_lost_class_is_found(folder, tmp_path, capsys):
    config, checkpoint = fused(folder)
    mar = archived(config, checkpoint, tmp_path)
    capsys.readouterr()
    native = ["--checkpoint", str(checkpoint), "--device", "cpu"]
    found = evaluated(capsys, str(config), "--archive", mar, *native, "--out", str(tmp_path / "served.pkl"))
    assert found["largest_difference"] < 0.1
    assert found["detections"]["native"] == found["detections"]["served"] > 0
    assert found["figures"]["Car"]["3D AP40 moderate strict"]["served"] > 20
    assert (tmp_path / "served.pkl").stat().st_size > 0


def test_monocular_detection_is_evaluated_as_native(folder, tmp_path, capsys):
    config, checkpoint = monocular(tmp_path)
    mar = archived(config, checkpoint, tmp_path)
    capsys.readouterr()
    options = written(options_of(folder))
    native = ["--checkpoint", str(checkpoint), "--device", "cpu", "--limit", "2"]
    found = evaluated(capsys, str(config), "--archive", mar, *native, *options)
    assert found["largest_difference"] < 0.1
    assert found["detections"]["native"] == found["detections"]["served"] > 0
