"""What the users' pages print, run against a bucket and a packed file: mmengine's functions over our backends."""

from __future__ import annotations

import logging
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from serve import ops, storage
from serve.errors import ObjectNotFound, StorageError, UriError
from serve.storage import Cache, s3
from serve.storage.packed_folder import pack_folder
from tests.storage.conftest import ENDPOINT, made_bucket

ops.install()
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import mmengine.fileio as fileio
    from mmengine import Config
    from mmengine.fileio import FileClient
    from mmengine.logging import MMLogger

    from serve.storage.backends import FFRecordBackend, ObjectBackend, register

ROOT = Path(__file__).parents[2]
CLOUD = np.random.default_rng(0).random((50, 4), np.float32)


@pytest.fixture(autouse=True)
def fresh_mmengine(nobody):
    """mmengine keeps every client it made; those of another test have another server."""
    with warnings.catch_warnings():
        # mmengine announces the end of FileClient; the users' pages use it all the same.
        warnings.simplefilter("ignore", DeprecationWarning)
        FileClient._instances.clear()
        fileio.io.backend_instances.clear()
        yield
        FileClient._instances.clear()
        fileio.io.backend_instances.clear()


@pytest.fixture(autouse=True)
def current_logger_is_left_alone():
    """A Runner makes its own log the current one and closes the file at its end; who logs next would write there."""
    MMLogger.get_current_instance()
    before = MMLogger._instance_dict.copy()
    yield
    for name in MMLogger._instance_dict.keys() - before.keys():
        for handler in MMLogger._instance_dict[name].handlers:
            handler.close()
    MMLogger._instance_dict.clear()
    MMLogger._instance_dict.update(before)


@pytest.fixture
def yourbucket(account):
    """A bucket of the name that the page prints."""
    yield from made_bucket("yourbucket")


@pytest.fixture
def openmmlab(account):
    yield from made_bucket("openmmlab")


# --- Amazon S3 (the mmcv page) ---


@pytest.mark.parametrize(
    "made",
    [
        lambda uri: FileClient.infer_client(uri=uri),
        lambda uri: FileClient.infer_client(file_client_args={"backend": "aws"}),
        lambda uri: FileClient(backend="aws"),
        lambda uri: FileClient(prefix="s3"),
    ],
    ids=["by prefix", "by args", "by backend", "by prefix argument"],
)
def test_amazon_s3_page_reads_and_writes(yourbucket, tmp_path, made):
    img_path = tmp_path / "color.jpg"
    img_path.write_bytes(b"\xff\xd8 a picture")
    with open(img_path, "rb") as f:
        img_buff = f.read()
    s3_path = "s3://yourbucket/demo/img.jpg"
    file_client = made(s3_path)
    file_client.put(img_buff, s3_path)
    img_buff_with_s3 = file_client.get(s3_path).tobytes()
    assert img_buff == img_buff_with_s3
    assert list(file_client.list_dir_or_file("s3://yourbucket")) == ["demo"]
    assert list(file_client.list_dir_or_file("s3://yourbucket", recursive=True)) == ["demo", "demo/img.jpg"]
    assert file_client.exists(s3_path)
    file_client.remove(s3_path)
    assert not file_client.exists(s3_path)
    assert list(file_client.list_dir_or_file("s3://yourbucket")) == []


def test_file_client_args_read_images_of_a_data_set(yourbucket):
    import cv2
    from mmcv.transforms import LoadImageFromFile

    picture = np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8)
    storage.write_bytes(
        "s3://yourbucket/demo/data/coco/val2017/1.png", cv2.imencode(".png", picture)[1].tobytes()
    )
    file_client_args = dict(  # the page's spelling
        backend="aws",
        path_mapping=dict({"data/coco/": "s3://yourbucket/demo/data/coco/"}),
    )
    for arguments in ({"file_client_args": file_client_args}, {"backend_args": file_client_args}):
        found = LoadImageFromFile(**arguments)({"img_path": "data/coco/val2017/1.png"})
        np.testing.assert_array_equal(found["img"], picture)


def test_unmapped_path_raises_uri_error_naming_path_mapping(yourbucket):
    client = FileClient(backend="aws", path_mapping={"data/coco/": "s3://yourbucket/"})
    with pytest.raises(UriError, match="path_mapping"):
        client.get("elsewhere/1.jpg")


# --- Ceph (the mmdetection3d page) ---

PETREL = dict(  # as the page has it
    backend="petrel",
    path_mapping=dict(
        {
            "./data/nuscenes/": "s3://openmmlab/datasets/detection3d/nuscenes/",
            "data/nuscenes/": "s3://openmmlab/datasets/detection3d/nuscenes/",
        }
    ),
)


@pytest.mark.parametrize("root", ["./data/nuscenes/", "data/nuscenes/"])
def test_ceph_page_loads_point_clouds_and_annotations(openmmlab, root):
    from mmdet3d.datasets.transforms import LoadPointsFromFile

    below = "s3://openmmlab/datasets/detection3d/nuscenes/"
    storage.write_bytes(below + "samples/1.bin", CLOUD.tobytes())
    storage.write_bytes(below + "infos_train.pkl", pickle.dumps({"data_list": [1]}))
    storage.write_bytes(below + "info.json", b'{"a": [1]}')
    loader = LoadPointsFromFile(coord_type="LIDAR", load_dim=4, use_dim=4, backend_args=PETREL)
    loaded = loader({"lidar_points": {"lidar_path": root + "samples/1.bin"}})
    np.testing.assert_array_equal(loaded["points"].tensor.numpy(), CLOUD)
    assert fileio.load(root + "infos_train.pkl", backend_args=PETREL) == {"data_list": [1]}
    assert fileio.load(root + "info.json", backend_args=PETREL) == {"a": [1]}


@pytest.mark.filterwarnings(
    "ignore:Exception ignored in.*kitti_dbinfos_train:pytest.PytestUnraisableExceptionWarning"
)
@pytest.mark.filterwarnings(
    "ignore:unclosed file.*kitti_dbinfos_train:ResourceWarning"
)  # mmdet3d leaves it open
def test_ceph_page_config_and_database_sampler_load(openmmlab, tmp_path):
    """db_sampler with backend_args and points_loader, read as a config and built by mmdet3d."""
    from mmdet3d.datasets.transforms import DataBaseSampler

    below = "s3://openmmlab/kitti/"
    storage.write_bytes(below + "gt/1.bin", CLOUD.tobytes())
    info = {
        "path": "gt/1.bin",
        "box3d_lidar": np.array([0, 0, 0, 1, 1, 1, 0], np.float32),
        "difficulty": 0,
        "num_points_in_gt": 50,
        "name": "Car",
    }
    storage.write_bytes(below + "kitti_dbinfos_train.pkl", pickle.dumps({"Car": [info]}))
    (tmp_path / "config.py").write_text(
        "backend_args = dict(backend='petrel', path_mapping=dict({'data/kitti/': 's3://openmmlab/kitti/'}))\n"
        "db_sampler = dict(\n"
        "    data_root='data/kitti/', info_path='data/kitti/kitti_dbinfos_train.pkl', rate=1.0,\n"
        "    prepare=dict(filter_by_difficulty=[-1], filter_by_min_points=dict(Car=5)),\n"
        "    sample_groups=dict(Car=1), classes=['Car'],\n"
        "    points_loader=dict(type='mmdet3d.LoadPointsFromFile', coord_type='LIDAR', load_dim=4, use_dim=4,\n"
        "                       backend_args=backend_args),\n"
        "    backend_args=backend_args)\n"
    )
    config = Config.fromfile(tmp_path / "config.py")
    sampler = DataBaseSampler(**config.db_sampler)
    sampled = sampler.sample_all(np.zeros((0, 7), np.float32), np.zeros(0, int))
    np.testing.assert_array_equal(sampled["points"].tensor.numpy(), CLOUD)


def test_pretrained_weights_and_load_from_read_the_bucket(openmmlab, tmp_path):
    from mmengine.model import BaseModule
    from mmengine.runner import load_checkpoint

    uri = "s3://openmmlab/checkpoints/mmdetection3d/regnetx_1.6gf"
    wanted = {"layer.weight": torch.ones(2, 2), "layer.bias": torch.ones(2)}
    torch.save(wanted, tmp_path / "w.pth")
    storage.upload(tmp_path / "w.pth", uri)

    class Net(BaseModule):
        def __init__(self, init_cfg=None):
            super().__init__(init_cfg)
            self.layer = torch.nn.Linear(2, 2)

        def forward(self, x):
            return self.layer(x)

    MMLogger.get_current_instance().setLevel(logging.ERROR)
    net = Net(init_cfg=dict(type="Pretrained", checkpoint=uri))
    net.init_weights()
    assert torch.equal(net.layer.weight, torch.ones(2, 2))
    other = Net()
    load_checkpoint(other, uri)
    assert torch.equal(other.layer.bias, torch.ones(2))


@pytest.mark.parametrize("keep_local", [True, False])
def test_training_writes_checkpoints_and_logs_to_the_bucket(openmmlab, tmp_path, keep_local):
    """The hooks behind out_dir='s3://…', through mmengine's own runner; load_from='s3://…' and max_keep_ckpts too."""
    from mmengine.evaluator import BaseMetric, Evaluator
    from mmengine.model import BaseModel
    from mmengine.runner import Runner
    from torch.utils.data import DataLoader

    class Net(BaseModel):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)

        def forward(self, inputs, mode="tensor", **_):
            out = self.layer(torch.as_tensor(inputs).float().reshape(-1, 1))
            return {"loss": out.sum()} if mode == "loss" else [{"out": 1}]

    class Score(BaseMetric):
        def process(self, data_batch, data_samples):
            self.results.append(1)

        def compute_metrics(self, results):
            return {"bbox": 1.0}

    out_dir = "s3://openmmlab/mmdetection3d"
    start = "s3://openmmlab/start.pth"
    torch.save({"state_dict": Net().state_dict(), "meta": {}}, tmp_path / "start.pth")
    storage.upload(tmp_path / "start.pth", start)
    data = [{"inputs": 1.0}, {"inputs": 2.0}]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runner = Runner(
            model=Net(),
            work_dir=str(tmp_path / "work"),
            train_dataloader=DataLoader(data),
            val_dataloader=DataLoader(data),
            val_evaluator=Evaluator(Score()),
            val_cfg={},
            train_cfg={"by_epoch": True, "max_epochs": 3, "val_interval": 1},
            optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.01}},
            load_from=start,
            default_hooks=dict(
                checkpoint=dict(
                    type="CheckpointHook",
                    interval=1,
                    max_keep_ckpts=2,
                    save_best="bbox",
                    rule="greater",
                    out_dir=out_dir,
                ),
                logger=dict(type="LoggerHook", interval=1, out_dir=out_dir, keep_local=keep_local),
            ),
            experiment_name=f"storage-{keep_local}",
            log_level="ERROR",
        )
        runner.train()
    listed = {one.name for one in s3.connect().list(storage.parse(out_dir + "/work"), recursive=True)}
    saved = {name for name in listed if name.endswith(".pth")}
    assert saved == {"best_bbox_epoch_1.pth", "epoch_2.pth", "epoch_3.pth"}
    assert any(name.endswith(".log") for name in listed) and any(name.endswith(".json") for name in listed)
    local = [path.suffix for path in (tmp_path / "work").rglob("*.log")]
    assert bool(local) == keep_local
    again = torch.load(
        storage.local_path(f"{out_dir}/work/epoch_3.pth", Cache(tmp_path / "cache", 1 << 30)),
        weights_only=False,
    )
    assert set(again["state_dict"]) == {"layer.weight", "layer.bias"}


@pytest.mark.skipif(bool(ENDPOINT), reason="writes keys of its own")
def test_petrel_configuration_and_cluster_names_apply(openmmlab, account, tmp_path, monkeypatch):
    conf = tmp_path / "my.conf"
    conf.write_text(f"[far]\naccess_key = A\nsecret_key = B\nendpoint_url = {account}\n")
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    arguments = {"backend": "petrel", "conf_path": str(conf), "enable_mc": False}
    fileio.put(b"1", "far:s3://openmmlab/x", backend_args=arguments)
    assert fileio.get("far:petrel://openmmlab/x", backend_args=arguments) == b"1"
    monkeypatch.setenv("AWS_ENDPOINT_URL", account)


# --- every function of the interface ---


@pytest.mark.parametrize("kind", ["functions", "client"])
def test_every_mmengine_fileio_function_works(bucket, tmp_path, kind):
    root = f"s3://{bucket}"
    io = ObjectBackend() if kind == "client" else fileio
    io.put(b"bytes", f"{root}/a/1.bin")
    io.put_text("tëxt", f"{root}/a/2.txt")
    assert io.get(f"{root}/a/1.bin") == b"bytes" and isinstance(io.get(f"{root}/a/1.bin"), bytes)
    assert io.get_text(f"{root}/a/2.txt") == "tëxt"
    assert io.exists(f"{root}/a") and io.isdir(f"{root}/a") and not io.isfile(f"{root}/a")
    assert io.isfile(f"{root}/a/1.bin") and not io.isdir(f"{root}/a/1.bin") and not io.exists(f"{root}/none")
    assert io.join_path(f"{root}/a/", "/b", "c.bin") == f"{root}/a/b/c.bin"
    with io.get_local_path(f"{root}/a/1.bin") as path:
        assert Path(path).read_bytes() == b"bytes"
    assert not Path(path).exists()
    assert io.copyfile(f"{root}/a/1.bin", f"{root}/b/1.bin") == f"{root}/b/1.bin"
    assert io.copyfile(f"{root}/a/2.txt", f"{root}/b") == f"{root}/b/2.txt"
    io.copytree(f"{root}/b", f"{root}/c")
    with pytest.raises(FileExistsError):
        io.copytree(f"{root}/b", f"{root}/c")
    assert sorted(io.list_dir_or_file(f"{root}/c", list_dir=False, suffix=".txt")) == ["2.txt"]
    with pytest.raises(TypeError):
        list(io.list_dir_or_file(root, suffix=".txt"))
    assert sorted(io.list_dir_or_file(root, list_file=False)) == ["a", "b", "c"]
    (tmp_path / "up/deep").mkdir(parents=True)
    (tmp_path / "up/deep/x").write_bytes(b"x")
    assert io.copyfile_from_local(tmp_path / "up/deep/x", f"{root}/a") == f"{root}/a/x"
    io.copytree_from_local(tmp_path / "up", f"{root}/up")
    assert io.get(f"{root}/up/deep/x") == b"x"
    (tmp_path / "down").mkdir()
    # mmengine's functions choose the backend by where the copy goes, so it has to be named.
    named = {} if kind == "client" else {"backend_args": {"backend": "petrel"}}
    assert Path(io.copyfile_to_local(f"{root}/a/x", tmp_path / "down", **named)).read_bytes() == b"x"
    io.copytree_to_local(f"{root}/up", tmp_path / "tree", **named)
    assert (tmp_path / "tree/deep/x").read_bytes() == b"x"
    io.remove(f"{root}/a/x")
    with pytest.raises(FileNotFoundError):
        io.remove(f"{root}/a/x")
    with pytest.raises(IsADirectoryError):
        io.remove(f"{root}/a")
    assert io.copy_if_symlink_fails(f"{root}/a/1.bin", f"{root}/link.bin") is False
    assert io.copy_if_symlink_fails(f"{root}/c", f"{root}/link") is False
    io.rmtree(f"{root}/up")
    assert not io.exists(f"{root}/up") and io.isfile(f"{root}/link/1.bin")
    assert "Signature=" in fileio.generate_presigned_url(f"{root}/a/1.bin")


def test_interrupted_download_leaves_no_local_file(bucket, tmp_path):
    client = FileClient(backend="aws").client
    with pytest.raises(ObjectNotFound), client.get_local_path(f"s3://{bucket}/none"):
        pass
    with pytest.raises(FileNotFoundError):
        client.copyfile_to_local(f"s3://{bucket}/none", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_register_is_idempotent():
    register()
    register()
    assert isinstance(FileClient(prefix="s3").client, ObjectBackend)
    assert isinstance(fileio.get_file_backend("s3://bucket/x"), ObjectBackend)


_TOUCHING = """
import sys, warnings
warnings.simplefilter("ignore")
from pathlib import Path
from mmengine.fileio.backends import PetrelBackend, backends, prefix_to_backends
from serve import convert, storage
from serve.runtime import model

def fresh():
    del sys.modules["serve.storage.backends"], storage.backends
    prefix_to_backends["s3"] = PetrelBackend
    backends.pop("ffrecord", None)

def registered():
    assert prefix_to_backends["s3"].__module__ == "serve.storage.backends" == backends["ffrecord"].__module__

path = Path("serve/assets/second_demo.py")
config = convert.resolve_config(path).config
registered()
fresh()
model.build_network(config, ["a", "b", "c"])
registered()
fresh()
from serve.verify import reference_loading
reference_loading.load_reference(path, path.with_suffix(".pth"), "cpu")
registered()
"""


def test_convert_serve_and_verify_register_the_backends():
    done = subprocess.run([sys.executable, "-c", _TOUCHING], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- FFRecord (the page of High-Flyer) ---


@pytest.fixture
def coco(tmp_path, monkeypatch):
    """The page's folders: coco packed to data/coco/coco.ffr, annotations beside it."""
    for name, body in (("annotations/a.json", b"{}"), ("train2017/1.jpg", b"one"), ("val2017/2.jpg", b"two")):
        path = tmp_path / "coco" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)
    pack_folder(tmp_path / "coco", tmp_path / "data/coco/coco.ffr")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("path", ["val2017/2.jpg", "data/coco/val2017/2.jpg", "./data/coco/val2017/2.jpg"])
def test_ffrecord_page_reads_by_file_client_args(coco, path):
    file_client_args = dict(backend="ffrecord", fname="data/coco/coco.ffr")
    client = FileClient(**file_client_args)
    assert (
        client.get(path).tobytes() == b"two" and client.get(coco / path if "data" in path else path) == b"two"
    )
    assert fileio.get(path, backend_args=file_client_args) == b"two"
    assert (
        client.exists("data/coco/train2017")
        and client.isdir("train2017")
        and client.isfile("train2017/1.jpg")
    )
    assert list(client.list_dir_or_file("data/coco", list_dir=False, suffix=".jpg", recursive=True)) == [
        "train2017/1.jpg",
        "val2017/2.jpg",
    ]
    with client.get_local_path(path) as local:
        assert Path(local).read_bytes() == b"two"
    with pytest.raises(ObjectNotFound):
        client.get("val2017/none.jpg")


def test_packed_file_feeds_images_and_point_clouds_to_pipelines(tmp_path):
    import cv2
    from mmcv.transforms import LoadImageFromFile
    from mmdet3d.datasets.transforms import LoadPointsFromFile

    (tmp_path / "in").mkdir()
    picture = np.zeros((4, 4, 3), np.uint8)
    cv2.imwrite(str(tmp_path / "in/p.png"), picture)
    (tmp_path / "in/c.bin").write_bytes(CLOUD.tobytes())
    pack_folder(tmp_path / "in", tmp_path / "packed.ffr")
    arguments = dict(backend="ffrecord", fname=str(tmp_path / "packed.ffr"))
    found = LoadImageFromFile(file_client_args=arguments)({"img_path": "p.png"})
    np.testing.assert_array_equal(found["img"], picture)
    loader = LoadPointsFromFile(coord_type="LIDAR", load_dim=4, use_dim=4, backend_args=arguments)
    loaded = loader({"lidar_points": {"lidar_path": "c.bin"}})
    np.testing.assert_array_equal(loaded["points"].tensor.numpy(), CLOUD)


def test_packed_backend_pickles_to_data_loader_workers(coco):
    backend = FFRecordBackend("data/coco/coco.ffr", path_mapping={"data/c/": ""})
    assert backend.get("data/c/val2017/2.jpg") == b"two"
    assert pickle.loads(pickle.dumps(backend)).get_text("train2017/1.jpg") == "one"
    with pytest.raises(StorageError, match="read-only"):
        backend.put(b"", "x")


def test_mmengine_lmdb_backend_and_lmdb_uri_read_the_same_value(tmp_path):
    import lmdb

    with lmdb.open(str(tmp_path / "f.lmdb")) as database, database.begin(write=True) as transaction:
        transaction.put(b"a/1.png", b"picture")
    client = FileClient(backend="lmdb", db_path=str(tmp_path / "f.lmdb"))
    assert bytes(client.get("a/1.png")) == b"picture"
    client.client._client.close()
    assert storage.read_bytes(f"lmdb://{tmp_path}/f.lmdb#a/1.png") == b"picture"
