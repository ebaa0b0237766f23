"""From bucket to bucket to answer: a SECOND archived from a config and checkpoint in a bucket, fetched, and served."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from serve import ops, storage
from serve.cli import archive as archive_command
from serve.errors import ArchiveError
from serve.storage.packed_folder import pack_folder
from serve.torchserve import ServedModel, TorchServe, TorchServeOptions
from tests.conftest import pick_free_ports

pytestmark = [pytest.mark.torchserve, pytest.mark.timeout(900)]

ops.install()
ROOT = Path(__file__).parents[2]
DEMO = ROOT / "serve" / "assets"


def run(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "serve", *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ,
    )


@pytest.fixture
def trained(bucket) -> tuple[str, str]:
    """Addresses of a config, that inherits, and its checkpoint."""
    root = f"s3://{bucket}/work"
    storage.upload(DEMO / "second_demo.py", f"{root}/_base_/second_base.py")
    storage.write_bytes(f"{root}/mine/second_demo.py", b"_base_ = '../_base_/second_base.py'\n")
    storage.upload(DEMO / "second_demo.pth", f"{root}/mine/second_demo.pth")
    return f"{root}/mine/second_demo.py", f"{root}/mine/second_demo.pth"


def test_archive_made_from_a_bucket_is_pushed_fetched_and_served(bucket, trained, tmp_path, capsys):
    from serve.synthetic.scenes import generate_scene, held_out_seed

    spec = importlib.util.spec_from_file_location(
        "comparing_tool", ROOT / "tools/deployment/test_torchserver.py"
    )
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)

    config, checkpoint = trained
    store = f"s3://{bucket}/models"
    words = f"make archive CONFIG={config} CHECKPOINT={checkpoint} STORE={store} NAME=second VENV={sys.prefix}".split()
    # The environment is the one that the tests run in; -o keeps make from looking whether it is up to date.
    words += ["-o", f"{sys.prefix}/.setup-stamp"]
    made = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=os.environ)
    assert made.returncode == 0, made.stderr
    assert f"uploaded  {store}/second.mar" in made.stdout
    with pytest.raises(ArchiveError, match="--force"):
        archive_command.main(
            [config, "--checkpoint", checkpoint, "--output-folder", store, "--model-name", "second"]
        )

    fetched = run("fetch", "--from", store, "--to", tmp_path / "store")
    assert fetched.returncode == 0, fetched.stderr
    sha256 = made.stdout.split("sha256")[1].split()[0]
    assert sha256 in fetched.stdout

    (tmp_path / "frames/velodyne").mkdir(parents=True)
    for i in range(2):
        body = generate_scene(held_out_seed(i)).to_bytes()
        (tmp_path / f"frames/velodyne/{i}.bin").write_bytes(body)
        storage.write_bytes(f"s3://{bucket}/frames/{i}.bin", body)
    pack_folder(tmp_path / "frames", tmp_path / "packed.ffr")

    ports = dict(zip(("inference_port", "management_port", "metrics_port"), pick_free_ports(3), strict=True))
    options = TorchServeOptions(model_store=tmp_path / "store", models=[ServedModel("second.mar")], **ports)
    with TorchServe(options):
        address = f"127.0.0.1:{ports['inference_port']}"
        for frames, count in (
            (f"s3://{bucket}/frames/", 2),
            (f"ffrecord://{tmp_path}/packed.ffr#velodyne/1.bin", 1),
        ):
            words = [frames, config, checkpoint, "second", "--inference-addr", address, "--device", "cpu"]
            assert tool.main(words) == 0
            assert f"match: {count} of {count} frames agree" in capsys.readouterr().out
