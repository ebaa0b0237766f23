"""A config's top-level ``backend_args`` in the parts of its base, by the snippet that docs/storage.md prints."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mmdet3d")

from serve.storage.config_backend import give_backend

ROOT = Path(__file__).resolve().parents[2]
PETREL = {"backend": "petrel", "path_mapping": {"data/": "s3://bucket/data/"}}


@pytest.mark.slow
def test_ceph_snippet_of_the_page_reaches_every_part_of_a_zoo_config(tmp_path):
    check = [sys.executable, "-m", "tools.seed_rows.checks", "storage"]
    done = subprocess.run(
        check, cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "PATH": ""}, capture_output=True, text=True
    )
    assert done.stdout.split() == ["petrel"] * 10, done.stderr
    assert done.stderr.count("note: backend_args") == 1


def loader_of(dataset):
    return {"backend_args": dict(PETREL), "default_scope": "mmdet", "train_dataloader": {"dataset": dataset}}


def test_wrappers_steps_and_metrics_without_a_backend_get_the_configs():
    leaf = {"type": "CocoDataset", "pipeline": [{"type": "LoadImageFromFile"}, {"type": "PackDetInputs"}]}
    config = loader_of({"type": "ConcatDataset", "datasets": [{"type": "RepeatDataset", "dataset": leaf}]})
    config["val_evaluator"] = [{"type": "CocoMetric"}, {"type": "DumpDetResults"}]
    assert give_backend(config) == 3
    assert leaf["backend_args"] == leaf["pipeline"][0]["backend_args"] == PETREL
    assert config["val_evaluator"][0]["backend_args"] == PETREL
    assert "backend_args" not in leaf["pipeline"][1]
    assert "backend_args" not in config["val_evaluator"][1]
    assert "backend_args" not in config["train_dataloader"]["dataset"]


def test_a_part_keeps_its_own_backend():
    leaf = {"type": "CocoDataset", "backend_args": {"backend": "local"}}
    assert give_backend(loader_of(leaf)) == 0
    assert leaf["backend_args"] == {"backend": "local"}


def test_configs_without_a_backend_are_left_as_they_are():
    leaf = {"type": "CocoDataset", "backend_args": None}
    assert give_backend(loader_of(leaf) | {"backend_args": None}) == 0
    assert leaf["backend_args"] is None


def test_backend_of_cfg_options_reaches_the_parts_too():
    from mmengine.config import Config

    import serve.storage.backends  # noqa: F401

    config = Config(loader_of({"type": "CocoDataset", "backend_args": None}) | {"backend_args": None})
    config.merge_from_dict({"backend_args": {"backend": "petrel"}})
    assert config.train_dataloader.dataset.backend_args.backend == "petrel"
