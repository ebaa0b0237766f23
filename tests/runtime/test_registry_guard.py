"""Configs are untrusted data: they build registered classes, and never import, call or evaluate anything else."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from serve import ops
from serve.errors import ArchiveError
from serve.runtime.model import build_network
from serve.runtime.registry_guard import restrict_registry

ops.install()


def malicious_parts(mark: Path) -> list[dict[str, Any]]:
    """Return configs that would create the file `mark` if they were called."""
    return [
        {"type": "subprocess.Popen", "args": ["touch", str(mark)]},
        {"type": "os.system", "command": f"touch {mark}"},
        {"type": "pathlib.Path.touch", "self": mark},
        {"type": "mmengine.put_text", "text": "", "filepath": str(mark)},
        {"type": "mmengine.dump", "obj": 1, "file": f"{mark}.json"},
    ]


@pytest.mark.parametrize("which", range(5))
def test_model_with_an_unregistered_type_is_rejected(tmp_path, which):
    part = malicious_parts(tmp_path / "mark")[which]
    config = {"default_scope": "mmdet", "model": part}
    with pytest.raises(ArchiveError, match=part["type"]):
        build_network(config, ("car",))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("which", range(5))
def test_pipeline_step_with_an_unregistered_type_is_rejected(tmp_path, which):
    from mmdet3d.registry import TRANSFORMS

    restrict_registry()
    part = malicious_parts(tmp_path / "mark")[which]
    with pytest.raises((KeyError, RuntimeError), match=part["type"]):
        TRANSFORMS.build(part)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["antigravity", "this", "idlelib.idle"])
def test_config_type_does_not_import_a_module(name):
    from mmdet.registry import MODELS

    restrict_registry()
    with pytest.raises((KeyError, RuntimeError)):
        MODELS.build({"type": name})
    assert name not in sys.modules


def test_registered_class_can_be_named_by_path():
    from mmdet.models import ResNet
    from mmdet.registry import MODELS

    restrict_registry()
    for name in ("ResNet", "mmdet.ResNet", "mmdet.models.backbones.resnet.ResNet"):
        assert MODELS.get(name) is ResNet


def test_nms_type_is_looked_up_and_not_evaluated(tmp_path):
    from mmcv.ops import batched_nms

    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30]])
    scores, classes = torch.tensor([0.9, 0.8, 0.7]), torch.zeros(3, dtype=torch.long)
    for kind in ("nms", "soft_nms"):
        found, _ = batched_nms(boxes, scores, classes, {"type": kind, "iou_threshold": 0.5})
        assert len(found) == (2 if kind == "nms" else 3)
    mark = tmp_path / "mark"
    for text in (f"__import__('os').system('touch {mark}')", "eval", "torch", "NMSop"):
        with pytest.raises(ValueError, match=re.escape(repr(text))):
            batched_nms(boxes, scores, classes, {"type": text, "iou_threshold": 0.5})
    assert not mark.exists()


def test_label_dtype_is_looked_up_and_not_evaluated(tmp_path):
    import numpy as np
    from mmdet3d.datasets.transforms import LoadAnnotations3D

    assert LoadAnnotations3D(seg_3d_dtype="np.int64").seg_3d_dtype is np.int64
    mark = tmp_path / "mark"
    for text in (f"__import__('os').system('touch {mark}')", "np.load", "os"):
        with pytest.raises(ValueError, match=re.escape(repr(text))):
            LoadAnnotations3D(seg_3d_dtype=text)
    assert not mark.exists()
