"""Checks of rows about buckets, run by `tools.seed_rows.checks` while the rows' S3 server is up."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["BUCKET", "aws_config", "file_client", "list_bucket", "petrel_config", "upload"]

BUCKET = "bucket"
_READERS = ("CocoDataset", "CocoMetric", "KittiDataset", "KittiMetric")


def upload() -> None:
    """Make the bucket and fill it with the data sets and checkpoints."""
    from serve import storage
    from serve.storage import s3

    s3.connect().client.create_bucket(Bucket=BUCKET)
    # Folders that are links, too: velodyne_reduced of synthetic streets is one.
    files = [
        Path(folder, file)
        for name in ("coco", "kitti")
        for folder, _, inside in os.walk(name, followlinks=True)
        for file in sorted(inside)
    ]
    for path in [*files, Path("w/frcnn.pth")]:
        storage.upload(path, f"s3://{BUCKET}/{path.as_posix()}")


def list_bucket() -> None:
    """Print the keys below ``out/`` of the bucket, and how many logs are here besides."""
    from serve.storage import parse, s3

    for found in s3.connect().list(parse(f"s3://{BUCKET}/out"), recursive=True):
        print(f"s3://{BUCKET}/out/{found.name}")
    for name in ("petrel", "aws"):
        print(f"local logs of {name}: {len(list(Path('w', name).rglob('*.log')))}")


def petrel_config() -> None:
    """Write ``second_petrel.py``: points, annotations, info files and objects to paste come from the bucket."""
    arguments = {"backend": "petrel", "path_mapping": {"data/kitti/": "s3://bucket/kitti/"}}
    config = _config("kitti/second_sample.py")
    _paste_objects(config)
    read = _relocate(config, str(Path("kitti").resolve()) + "/", "data/kitti/", arguments)
    config["load_from"] = "s3://bucket/kitti/second_demo.pth"
    config["train_cfg"]["max_epochs"] = 1
    _write_outputs(config, "s3://bucket/out")
    _dump(config, "second_petrel.py")
    print("from the bucket:", *sorted(read))


def _paste_objects(config: dict[str, Any]) -> None:
    """Add the step that pastes objects of the database into training frames, as the zoo's SECOND has it."""
    root = str(Path("kitti").resolve()) + "/"
    classes = ["Pedestrian", "Cyclist", "Car"]
    sampler = {
        "data_root": root,
        "info_path": root + "kitti_dbinfos_train.pkl",
        "rate": 1.0,
        "prepare": {"filter_by_min_points": dict.fromkeys(classes, 5)},
        "classes": classes,
        "sample_groups": dict.fromkeys(classes, 3),
        "points_loader": {"type": "LoadPointsFromFile", "coord_type": "LIDAR", "load_dim": 4, "use_dim": 4},
    }
    for part in _dicts(config["train_dataloader"]):
        kinds = [step["type"] for step in part.get("pipeline", ())]
        if "LoadAnnotations3D" in kinds:
            part["pipeline"].insert(
                kinds.index("LoadAnnotations3D") + 1, {"type": "ObjectSample", "db_sampler": sampler}
            )


def aws_config() -> None:
    """Write ``frcnn_aws.py``: annotations and pictures come from the bucket, by the loaders' ``file_client_args``."""
    arguments = {"backend": "aws", "path_mapping": {"data/coco/": "s3://bucket/coco/"}}
    config = _config("frcnn.py")
    read = _relocate(config, "coco", "data/coco/", arguments)
    for step in _dicts(config):
        if step.get("type") in ("LoadImageFromFile", "LoadAnnotations"):
            step.pop("backend_args", None)
            step["file_client_args"] = arguments
    config["model"]["backbone"]["init_cfg"] = {
        "type": "Pretrained",
        "checkpoint": "s3://bucket/w/frcnn.pth",
        "prefix": "backbone.",
    }
    config["load_from"] = "s3://bucket/w/frcnn.pth"
    _write_outputs(config, "s3://bucket/out", save_best="coco/bbox_mAP")
    _dump(config, "frcnn_aws.py")
    print("from the bucket:", *sorted(read))


def _config(name: str) -> dict[str, Any]:
    from mmengine.config import Config

    found: dict[str, Any] = Config.fromfile(name).to_dict()
    return found


def _relocate(config: dict[str, Any], root: str, other: str, arguments: dict[str, Any]) -> set[str]:
    """Replace the root of data sets, and have what reads them read by a back end; returns what does."""
    read = set()
    for part in _dicts(config):
        kind = str(part.get("type", "DataBaseSampler" if "sample_groups" in part else ""))
        for name, value in part.items():
            if isinstance(value, str) and (value.rstrip("/") == root.rstrip("/") or value.startswith(root)):
                part[name] = other + value[len(root) :].lstrip("/")
        if kind.startswith("Load") or kind in _READERS or "sample_groups" in part:
            part["backend_args"] = arguments
            read.add(kind)
    return read


def _dicts(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, list | tuple):
        for inner in value:
            yield from _dicts(inner)


def _write_outputs(config: dict[str, Any], place: str, **checkpoint: Any) -> None:
    hooks = config.setdefault("default_hooks", {})
    hooks["checkpoint"] = {"type": "CheckpointHook", "interval": 1, "max_keep_ckpts": 2, "out_dir": place}
    hooks["checkpoint"] |= checkpoint
    hooks["logger"] = {"type": "LoggerHook", "interval": 1, "out_dir": place, "keep_local": False}
    config["custom_imports"] = {"imports": ["serve.storage.backends"]}


def _dump(config: dict[str, Any], name: str) -> None:
    from mmengine.config import Config

    Config(config).dump(name)


def file_client() -> None:
    """Put, get, list and remove by all four forms of the page on Amazon S3."""
    from mmengine import FileClient

    import serve.storage.backends  # noqa: F401

    path = f"s3://{BUCKET}/demo/img.jpg"
    content = Path("coco/val2017/000000000007.jpg").read_bytes()
    for client in (
        FileClient.infer_client(uri=path),
        FileClient.infer_client(file_client_args={"backend": "aws"}),
        FileClient(backend="aws"),
        FileClient(prefix="s3"),
    ):
        client.put(content, path)
        same = client.get(path).tobytes() == content
        listed = list(client.list_dir_or_file(f"s3://{BUCKET}/demo"))
        client.remove(path)
        print(same, listed, client.exists(path))
