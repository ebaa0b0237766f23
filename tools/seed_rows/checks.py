"""Checks of rows that are no commands: ``python -m tools.seed_rows.checks NAME`` in the rows' folder."""

from __future__ import annotations

import asyncio
import contextlib
import json
import pickle
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tools.seed_rows import bucket_checks, data_sets
from tools.seed_rows.work_folder import ROOT

ASSETS = ROOT / "serve" / "assets"
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
    """Read the config for Ceph on docs/storage.md, as printed there, and print which backends its parts read by."""
    page = (ROOT / "docs" / "storage.md").read_text()
    block = page.partition("### Ceph")[2].partition("```python\n")[2].partition("```")[0]
    Path("stored.py").write_text(block)
    from serve.upstream import patches

    patches.apply()
    from mmengine.config import Config

    config = Config.fromfile("stored.py")
    train = config.train_dataloader.dataset.dataset
    loader = next(step for step in train.pipeline if step.type == "LoadPointsFromFile")
    sampler = next(step for step in train.pipeline if step.type == "ObjectSample").db_sampler
    parts = [train, loader, sampler, sampler.points_loader]
    for split in ("val", "test"):
        dataset = config[f"{split}_dataloader"].dataset
        parts += [dataset, dataset.pipeline[0], config[f"{split}_evaluator"]]
    print(*(part.backend_args.backend if part.backend_args else None for part in parts))


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


PICTURE = "coco/val2017/000000000007.jpg"
CLOUD = "kitti/training/velodyne/000000.bin"


def show_result() -> None:
    """Detect and draw as the documentation of 2.x does."""
    from mmdet.apis import inference_detector, init_detector

    model = init_detector("frcnn.py", "w/frcnn.pth", device="cpu")
    model.show_result(PICTURE, inference_detector(model, PICTURE), score_thr=0.01, out_file="result.jpg")


def video_reader() -> None:
    """Detect in the frames of a video in a loop, as the documentation of 2.x does."""
    import mmcv
    from mmdet.apis import inference_detector, init_detector

    model = init_detector("frcnn.py", "w/frcnn.pth", device="cpu")
    drawn = 0
    for frame in mmcv.VideoReader("video.mp4"):
        result = inference_detector(model, frame)
        drawn += model.show_result(frame, result).shape == frame.shape
    print(f"{drawn} frames drawn")


def async_detector() -> None:
    """Detect by the asynchronous calls of 2.x, three at a time."""
    import torch
    from mmdet.apis import async_inference_detector, init_detector
    from mmdet.utils.contextmanagers import concurrent

    async def main() -> None:
        model = init_detector("frcnn.py", "w/frcnn.pth", device="cpu")
        streams: asyncio.Queue[Any] = asyncio.Queue()
        if torch.cuda.is_available():
            for _ in range(3):
                streams.put_nowait(torch.cuda.Stream())  # type: ignore[no-untyped-call]

        async def detect(path: Path) -> Any:
            async with concurrent(streams):
                return await async_inference_detector(model, str(path))

        found = await asyncio.gather(*map(detect, sorted(Path("coco/val2017").glob("*.jpg"))))
        print(f"{len(found)} results of {type(found[0]).__name__}")

    asyncio.run(main())


def lidar_inferencer() -> None:
    """Detect in one cloud by mmdet3d's inferencer, with a config that names no visualizer."""
    from mmdet3d.apis import LidarDet3DInferencer

    inferencer = LidarDet3DInferencer(
        str(ASSETS / "second_demo.py"), str(ASSETS / "second_demo.pth"), device="cpu"
    )
    found = inferencer({"points": CLOUD}, out_dir="inferred3d", no_save_vis=True)["predictions"][0]
    print(f"{len(found['scores_3d'])} boxes")


def notebook() -> None:
    """Run the cells of the notebook, one after the other."""
    cells = json.loads((ROOT / "docs" / "inference_demo.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    names: dict[str, Any] = {}
    for cell in code:
        exec(compile(cell, "cell", "exec"), names)
    print(f"{len(code)} cells ran")


def packed_loaders() -> None:
    """Load a picture from a packed file by ``file_client_args``."""
    from mmcv.transforms import LoadImageFromFile

    import serve.storage.backends  # noqa: F401

    loader = LoadImageFromFile(file_client_args={"backend": "ffrecord", "fname": "coco/coco.ffr"})
    print(loader({"img_path": PICTURE})["img"].shape)


def served() -> None:
    """Serve SECOND on the ports of upstream's page, ask each, and compare as ``test_torchserver.py`` does."""
    model = [str(ASSETS / "second_demo.py"), str(ASSETS / "second_demo.pth")]
    deployment = str(ROOT / "tools" / "deployment")
    subprocess.run(
        [sys.executable, f"{deployment}/mmdet3d2torchserve.py", *model,
         "--output-folder", "store75", "--model-name", "second", "-f"], check=True,
    )  # fmt: skip
    with _server("store75"):
        for address in ("8080/ping", "8081/models", "8082/metrics"):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{address}", timeout=30) as answer:
                    print(f"port {address}: {answer.status}", flush=True)
            except urllib.error.URLError:
                print(f"port {address}: closed", flush=True)
        subprocess.run(
            [sys.executable, f"{deployment}/test_torchserver.py", CLOUD, *model, "second"], check=True
        )


@contextlib.contextmanager
def _server(store: str) -> Iterator[None]:
    service = subprocess.Popen(
        [sys.executable, "-m", "serve", "serve", "--store", store, "--models", "second"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert service.stdout is not None
        for line in service.stdout:
            print(line, end="", flush=True)
            if line.startswith("Ctrl-C"):
                break
        else:
            raise SystemExit(f"the server ended with {service.wait()}")
        yield
    finally:
        service.send_signal(signal.SIGINT)
        service.communicate(timeout=60)


def without_ground_truth() -> None:
    """Write ``without.py``: the pictures that images2coco listed, for a test that writes a result file only."""
    Path("without.py").write_text(
        "_base_ = './frcnn.py'\n"
        # images2coco writes names with the folder that it was given.
        "test_dataloader = dict(dataset=dict(\n"
        "    data_root='', ann_file='coco/annotations/made.json', data_prefix=dict(img='')))\n"
        "test_evaluator = dict(ann_file='coco/annotations/made.json')\n"
    )


def bundle() -> None:
    """Write ``bundle_frcnn.py``: the old config with DefaultFormatBundle in place of ImageToTensor."""
    text = Path("old_frcnn.py").read_text()
    former = "dict(type='ImageToTensor', keys=['img'])"
    assert former in text
    Path("bundle_frcnn.py").write_text(text.replace(former, "dict(type='DefaultFormatBundle')"))


_FUNCTIONS: tuple[Callable[[], None], ...] = (
    *(legacy3d, pipeline, storage, inference, det_inferencer, lidar_inferencer, show_result, video_reader),
    *(async_detector, notebook, packed_loaders, served, without_ground_truth, bundle, regnet, detectron),
    *(bucket_checks.upload, bucket_checks.list_bucket, bucket_checks.file_client),
    *(bucket_checks.petrel_config, bucket_checks.aws_config, data_sets.raw_kitti, data_sets.video),
)
CHECKS = {function.__name__: function for function in _FUNCTIONS}

if __name__ == "__main__":
    CHECKS[sys.argv[1]]()
