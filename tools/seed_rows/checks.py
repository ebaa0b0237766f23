"""Checks of rows that are no commands: ``python -m tools.seed_rows.checks NAME`` in the rows' folder."""

from __future__ import annotations

import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

_CONFIG_3D = """
point_cloud_range = [0, -39.68, -3, 69.12, 39.68, 1]
class_names = ['Pedestrian', 'Cyclist', 'Car']
_base_ = 'mmdet3d::_base_/models/pointpillars_hv_secfpn_kitti.py'
test_pipeline = [
    dict(type='LoadPointsFromFile', coord_type='LIDAR', load_dim=4, use_dim=4),
    dict(
        type='MultiScaleFlipAug3D', img_scale=(1333, 800), pts_scale_ratio=1, flip=False,
        transforms=[
            dict(
                type='GlobalRotScaleTrans', rot_range=[0, 0], scale_ratio_range=[1., 1.], translation_std=[0, 0, 0]),
            dict(type='RandomFlip3D'),
            dict(type='PointsRangeFilter', point_cloud_range=point_cloud_range),
            dict(type='DefaultFormatBundle3D', class_names=class_names, with_label=False),
            dict(type='Collect3D', keys=['points'])])]
data = dict(
    samples_per_gpu=6,
    train=dict(type='RepeatDataset', times=2, dataset=dict(type='KittiDataset', classes=class_names)),
    test=dict(
        type='KittiDataset', data_root='kitti/', ann_file='kitti/kitti_infos_val.pkl', split='training',
        pts_prefix='velodyne_reduced', pipeline=test_pipeline, classes=class_names, test_mode=True))
"""


def legacy3d() -> None:
    """Print a config of mmdet3d 0.x in today's form."""
    from serve.upstream import tools

    Path("old_pointpillars.py").write_text(_CONFIG_3D)
    tools.run("print_config", ["old_pointpillars.py"], package="mmdet3d")


def pipeline() -> None:
    """Print the steps of SECOND's training pipeline, after building them."""
    from serve.upstream import patches

    patches.apply()
    from mmdet3d.registry import TRANSFORMS
    from mmengine.config import Config
    from mmengine.registry import init_default_scope

    init_default_scope("mmdet3d")
    from serve import zoo

    config = Config.fromfile(str(zoo.resolve("second").config_path))
    steps = [step for step in config.train_pipeline if step["type"] != "ObjectSample"]
    print(*(type(TRANSFORMS.build(step)).__name__ for step in steps))


def storage() -> None:
    """Put the snippet of docs/storage.md on a config of the zoo and print what its loaders read from."""
    Path("stored.py").write_text(
        "_base_ = 'mmdet3d::second/second_hv_secfpn_8xb6-80e_kitti-3d-3class.py'\n"
        "custom_imports = dict(imports=['serve.storage.backends'])\n"
        "backend_args = dict(backend='petrel', path_mapping={'data/kitti/': 's3://bucket/kitti/'})\n"
        "train_dataloader = dict(dataset=dict(dataset=dict(backend_args=backend_args)))\n"
        "val_evaluator = dict(backend_args=backend_args)\n"
    )
    from serve.upstream import patches

    patches.apply()
    from mmengine.config import Config

    config = Config.fromfile("stored.py")
    print(
        config.train_dataloader.dataset.dataset.backend_args.backend,
        config.val_evaluator.backend_args.backend,
    )


def inference() -> None:
    """Detect in one picture and in a list by upstream's own functions."""
    from serve.upstream import patches

    patches.apply()
    from mmdet.apis import inference_detector, init_detector

    model = init_detector("frcnn.py", "w/frcnn.pth", device="cpu")
    pictures = [str(path) for path in sorted(Path("coco/val2017").glob("*.jpg"))[:2]]
    print(type(inference_detector(model, pictures[0])).__name__)
    print(f"{len(inference_detector(model, pictures))} results")


def det_inferencer() -> None:
    """Detect in one picture by mmdet's inferencer."""
    from serve.upstream import patches

    patches.apply()
    from mmdet.apis import DetInferencer

    inferencer = DetInferencer("frcnn.py", "w/frcnn.pth", device="cpu", show_progress=False)
    inferencer("coco/val2017/000000000007.jpg", out_dir="inferred", no_save_pred=False)


def regnet() -> None:
    """Write a file with the names of pycls' RegNet."""
    import torch

    names = ["stem.conv.weight", "stem.bn.weight", "s1.b1.proj.weight", "s1.b1.bn.weight", "s1.b1.f.a.weight"]
    torch.save(
        {"model_state": {name: torch.ones(2, 2) for name in [*names, "head.fc.weight"]}}, "regnet.pyth"
    )


def detectron() -> None:
    """Write a file with the names of Detectron's ResNet-50."""
    blobs: dict[str, np.ndarray] = {"conv1_w": np.ones((2, 2), np.float32)}
    for norm in ("res_conv1_bn",):
        blobs |= {f"{norm}_b": np.ones(2, np.float32), f"{norm}_s": np.ones(2, np.float32)}
    for stage, count in enumerate((3, 4, 6, 3), 2):
        for block in range(count):
            for branch in ["branch2a", "branch2b", "branch2c", *(["branch1"] if block == 0 else [])]:
                name = f"res{stage}_{block}_{branch}"
                blobs[f"{name}_w"] = np.ones((2, 2), np.float32)
                blobs |= {f"{name}_bn_{part}": np.ones(2, np.float32) for part in "bs"}
    Path("detectron.pkl").write_bytes(pickle.dumps({"blobs": blobs}))


def voc() -> None:
    """Write the validation pictures of ``coco`` in Pascal VOC's layout."""
    from pycocotools.coco import COCO

    root = Path("VOCdevkit/VOC2007")
    for name in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / name).mkdir(parents=True, exist_ok=True)
    coco = COCO("coco/annotations/instances_val2017.json")
    stems = []
    for image in coco.imgs.values():
        stem = Path(image["file_name"]).stem
        stems.append(stem)
        shutil.copyfile(Path("coco/val2017", image["file_name"]), root / "JPEGImages" / f"{stem}.jpg")
        tree = ElementTree.Element("annotation")
        size = ElementTree.SubElement(tree, "size")
        for side in ("width", "height"):
            ElementTree.SubElement(size, side).text = str(image[side])
        for found in coco.loadAnns(coco.getAnnIds(image["id"])):
            shape = ElementTree.SubElement(tree, "object")
            ElementTree.SubElement(shape, "name").text = coco.cats[found["category_id"]]["name"]
            ElementTree.SubElement(shape, "difficult").text = "0"
            box = ElementTree.SubElement(shape, "bndbox")
            x, y, width, height = found["bbox"]
            for corner, value in zip(
                ("xmin", "ymin", "xmax", "ymax"), (x + 1, y + 1, x + width, y + height), strict=True
            ):
                ElementTree.SubElement(box, corner).text = str(round(value))
        ElementTree.ElementTree(tree).write(root / "Annotations" / f"{stem}.xml")
    (root / "ImageSets" / "Main" / "test.txt").write_text("\n".join(stems) + "\n")


def raw_kitti() -> None:
    """Copy the made KITTI data without the files that create_data writes, with pictures and four splits."""
    import cv2

    shutil.rmtree("raw", ignore_errors=True)
    for name in ("velodyne", "calib", "label_2"):
        shutil.copytree(Path("kitti/training", name), Path("raw/training", name))
        Path("raw/testing", name).mkdir(parents=True)
    pictures = Path("raw/training/image_2")
    pictures.mkdir()
    stems = sorted(path.stem for path in Path("raw/training/velodyne").glob("*.bin"))
    for stem in stems:
        cv2.imwrite(str(pictures / f"{stem}.png"), np.zeros((375, 1242, 3), np.uint8))
    first = stems[0]
    Path("raw/testing/image_2").mkdir()
    for name, suffix in (("velodyne", "bin"), ("calib", "txt"), ("image_2", "png")):
        shutil.copyfile(f"raw/training/{name}/{first}.{suffix}", f"raw/testing/{name}/{first}.{suffix}")
    shutil.copytree("kitti/ImageSets", "raw/ImageSets")
    Path("raw/ImageSets/trainval.txt").write_text("\n".join(stems) + "\n")
    Path("raw/ImageSets/test.txt").write_text(first + "\n")


CHECKS: dict[str, Callable[[], None]] = {
    function.__name__: function
    for function in (
        legacy3d,
        pipeline,
        storage,
        inference,
        det_inferencer,
        regnet,
        detectron,
        voc,
        raw_kitti,
    )
}

if __name__ == "__main__":
    CHECKS[sys.argv[1]]()
