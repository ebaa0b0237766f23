"""Configs of mmdet 2.x and mmdet3d 0.x become what the same model's config is today."""

from __future__ import annotations

import copy

import pytest
from mmengine.config import Config

from serve import ops, zoo
from serve.convert.legacy_config import is_legacy, modernize
from serve.errors import ArchiveError

ops.install()

NORM = {"mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375], "to_rgb": True}


def image_pipeline(*inner: dict, scale=(1333, 800), flip: bool = False) -> list[dict]:
    """A test pipeline as mmdet 2.x's documentation prints it."""
    steps = inner or (
        {"type": "Resize", "keep_ratio": True},
        {"type": "RandomFlip"},
        {"type": "Normalize", **NORM},
        {"type": "Pad", "size_divisor": 32},
        {"type": "ImageToTensor", "keys": ["img"]},
        {"type": "Collect", "keys": ["img"]},
    )
    augment = {"type": "MultiScaleFlipAug", "img_scale": scale, "flip": flip, "transforms": list(steps)}
    return [{"type": "LoadImageFromFile", "file_client_args": {"backend": "aws"}}, augment]


def old_2d(name: str = "faster-rcnn", pipeline: list[dict] | None = None, **test: object) -> dict:
    """Today's zoo model in the form of 2.x."""
    model = Config.fromfile(zoo.resolve(name).config_path).model.to_dict()
    model.pop("data_preprocessor")
    data = {"test": {"type": "CocoDataset", "pipeline": pipeline or image_pipeline(), **test}}
    return {"model": model, "data": {"samples_per_gpu": 2, **data}, "evaluation": {"interval": 1}}


def old_second() -> dict:
    """Today's SECOND in the form, and in the box frame, of mmdet3d 0.x."""
    model = Config.fromfile(zoo.resolve("second").config_path).model.to_dict()
    model["voxel_layer"] = model.pop("data_preprocessor")["voxel_layer"]
    generator = model["bbox_head"]["anchor_generator"]
    generator["sizes"] = [[width, length, height] for length, width, height in generator["sizes"]]
    model["bbox_head"]["dir_offset"] = 0.0
    for name in ("loss_cls", "loss_bbox", "loss_dir"):
        model["bbox_head"][name]["type"] = model["bbox_head"][name]["type"].removeprefix("mmdet.")
    still = {"rot_range": [0, 0], "scale_ratio_range": [1.0, 1.0], "translation_std": [0, 0, 0]}
    inner = [
        {"type": "GlobalRotScaleTrans", **still},
        {"type": "RandomFlip3D"},
        {"type": "PointsRangeFilter", "point_cloud_range": [0, -40, -3, 70.4, 40, 1]},
        {
            "type": "DefaultFormatBundle3D",
            "class_names": ["Pedestrian", "Cyclist", "Car"],
            "with_label": False,
        },
        {"type": "Collect3D", "keys": ["points"]},
    ]
    load = {"type": "LoadPointsFromFile", "coord_type": "LIDAR", "load_dim": 4, "use_dim": 4}
    augment = {"type": "MultiScaleFlipAug3D", "img_scale": (1333, 800), "pts_scale_ratio": 1, "flip": False}
    return {
        "model": model,
        "class_names": ["Pedestrian", "Cyclist", "Car"],
        "data": {"test": {"type": "KittiDataset", "pipeline": [load, {**augment, "transforms": inner}]}},
    }


def without(step: dict, *names: str) -> dict:
    return {name: value for name, value in step.items() if name not in names}


def test_a_2x_pipeline_becomes_todays_pipeline_and_preprocessor():
    converted = modernize(old_2d(), "mmdet").config
    today = Config.fromfile(zoo.resolve("faster-rcnn").config_path)
    assert converted["model"]["data_preprocessor"] == {
        name: value for name, value in today.model.data_preprocessor.to_dict().items() if name != "pad_mask"
    }
    expected = [
        without(dict(step), "backend_args")
        for step in today.test_dataloader.dataset.pipeline
        if step.type != "LoadAnnotations"
    ]
    found = converted["test_dataloader"]["dataset"]["pipeline"]
    assert [without(step, "meta_keys") for step in found] == [without(step, "meta_keys") for step in expected]


def test_a_0x_second_becomes_todays_with_its_anchors_in_todays_frame():
    result = modernize(old_second(), "mmdet3d")
    today = Config.fromfile(zoo.resolve("second").config_path).model.to_dict()
    model = result.config["model"]
    assert model["data_preprocessor"]["voxel_layer"] == today["data_preprocessor"]["voxel_layer"]
    assert "voxel_layer" not in model
    assert without(model["bbox_head"]) == without(today["bbox_head"])
    kinds = [step["type"] for step in result.config["test_pipeline"]]
    assert kinds == ["LoadPointsFromFile", "PointsRangeFilter", "Pack3DDetInputs"]
    assert any("anchors" in note for note in result.notes)


@pytest.mark.parametrize(
    "wrapper", ["RepeatDataset", "ConcatDataset", "ClassBalancedDataset", "MultiImageMixDataset"]
)
def test_wrapped_data_sets_give_their_pipeline_and_class_names(wrapper):
    config = old_2d(classes=("cat", "dog"))
    inner = config["data"]["test"]
    member = {"datasets": [inner]} if wrapper == "ConcatDataset" else {"dataset": inner}
    config["data"]["test"] = {"type": wrapper, "pipeline": [], **member}
    dataset = modernize(config, "mmdet").config["test_dataloader"]["dataset"]
    assert dataset["metainfo"] == {"classes": ("cat", "dog")}
    assert dataset["pipeline"][0]["type"] == "LoadImageFromFile"


def test_a_fixed_padding_after_normalisation_pads_with_the_mean():
    steps = (
        {"type": "Resize", "keep_ratio": True},
        {"type": "Normalize", **NORM},
        {"type": "Pad", "size": (896, 896)},
        {"type": "Collect", "keys": ["img"]},
    )
    pipeline = modernize(old_2d(pipeline=image_pipeline(*steps)), "mmdet").config["test_pipeline"]
    (pad,) = [step for step in pipeline if step["type"] == "Pad"]
    assert pad["pad_val"] == {"img": (103.53, 116.28, 123.675)}  # the image is BGR at that step
    assert pipeline[0]["to_float32"]


def test_a_centred_crop_records_its_border():
    steps = ({"type": "RandomCenterCropPad", "test_mode": True}, {"type": "Collect", "keys": ["img"]})
    packed = modernize(old_2d(pipeline=image_pipeline(*steps)), "mmdet").config["test_pipeline"][-1]
    assert "border" in packed["meta_keys"]


def test_test_time_augmentation_is_left_out_and_noted():
    pipeline = image_pipeline(scale=[(1333, 800), (1333, 640)], flip=True)
    result = modernize(old_2d(pipeline=pipeline), "mmdet")
    assert result.config["test_pipeline"][1]["scale"] == (1333, 800)
    assert any("augmentation" in note for note in result.notes)


def test_an_old_config_on_a_base_in_todays_form_keeps_the_bases_data_set():
    base = Config.fromfile(zoo.resolve("faster-rcnn").config_path).to_dict()
    config = {**base, "data": {"test": {"pipeline": image_pipeline()}}}
    converted = modernize(config, "mmdet").config
    assert converted["test_dataloader"]["dataset"]["type"] == "CocoDataset"
    assert converted["test_pipeline"][-1]["type"] == "PackDetInputs"


def test_a_rearranged_model_is_refused_by_its_name():
    config = old_2d()
    config["model"] = {
        "type": "DETR",
        "bbox_head": {"type": "DETRHead", "transformer": {"type": "Transformer"}},
    }
    with pytest.raises(ArchiveError, match="DETR"):
        modernize(config, "mmdet")


def test_a_config_without_a_test_pipeline_is_refused():
    with pytest.raises(ArchiveError, match="pipeline"):
        modernize({"model": {"type": "FCOS"}, "data": {"test": {"type": "CocoDataset"}}}, "mmdet")


def test_only_old_configs_are_taken_for_old():
    assert is_legacy(old_2d()) and is_legacy(old_second())
    for name in ("second", "faster-rcnn", "yolox"):
        assert not is_legacy(Config.fromfile(zoo.resolve(name).config_path))


def test_the_original_is_not_changed():
    config = old_second()
    before = copy.deepcopy(config)
    modernize(config, "mmdet3d")
    assert config == before


def test_storage_of_training_is_left_out_of_the_pipeline():
    loaded = {"type": "LoadImageFromFile", "backend_args": {"backend": "petrel"}, "file_client_args": {}}
    pipeline = [loaded, *image_pipeline()[1:]]
    assert modernize(old_2d(pipeline=pipeline), "mmdet").config["test_pipeline"][0] == {
        "type": "LoadImageFromFile"
    }
