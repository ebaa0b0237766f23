"""An archive whose weights were altered after its golden frame was recorded fails its self-test, whatever the model.

One model of each kind, and for each of its parts one tensor that is off by a few per cent. Rounding, which may exchange
some detections of such a model, is no excuse for it (docs/decisions/0014-equality.md).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from serve.errors import SelfTestError
from serve.runtime import detector as module
from serve.runtime import load_detector
from serve.runtime.selftest import self_test
from tests.e2e.small_models import KINDS, Small, make

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

FACTOR = 1.05
#: By kind: prefixes of backbone, neck and head, as far as the model has them. A layer before a group norm is not
#: altered: the norm takes a factor out again.
PARTS = {
    "one-stage": ("backbone.layer2", "neck.lateral", "bbox_head.retina_cls"),
    "two-stage": ("backbone.layer2", "neck.lateral", "rpn_head.rpn_reg", "roi_head.bbox_head.fc_reg"),
    "mask": ("backbone.layer2", "neck.lateral", "roi_head.bbox_head.fc_cls", "roi_head.mask_head.convs.3"),
    "transformer": ("backbone.layer4", "neck.convs", "decoder.layers.1.ffn", "bbox_head.fc_cls"),
    "rtmdet": ("backbone.stage3", "neck.out_convs.1", "bbox_head.rtm_reg.1"),
    "voxels": ("middle_encoder", "backbone", "neck", "bbox_head.conv_cls"),
    "pillars": ("voxel_encoder", "backbone", "neck", "bbox_head.conv_reg"),
    "two-stage-3d": ("backbone", "neck", "rpn_head.conv_cls", "roi_head.bbox_head.conv_cls"),
    "depth": ("backbone", "bbox_head.vote_module.conv_out", "bbox_head.conv_pred.conv_reg"),
    "mono3d": ("backbone.layer2", "neck.lateral", "bbox_head.conv_cls."),
    "fusion": ("img_backbone.layer2", "img_neck.lateral", "pts_backbone", "pts_bbox_head.conv_cls"),
    "multiview": ("backbone.layer2", "neck.lateral", "bbox_head_3d.conv_cls"),
    "segments": ("backbone", "decode_head.conv_seg"),
    "panoptic": ("backbone.layer2", "neck.lateral", "semantic_head.conv_logits"),
}


#: Of `make test`; the others, a minute or more together, are of the soak.
SHORT = ("one-stage", "pillars", "segments")


def test_every_kind_has_parts_to_alter():
    assert set(PARTS) == set(KINDS)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Small]:
    """`small(kind)`: the model, made once and forgotten with the next."""
    made: dict[str, Small] = {}

    def get(kind: str) -> Small:
        if kind not in made:
            made.clear()
            made[kind] = make(kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return get


def altered(weights: Path, part: str) -> dict[str, torch.Tensor]:
    """The weights with the first matrix or kernel below `part` off by `FACTOR`."""
    state = load_file(weights)
    name = next(name for name in state if name.startswith(part) and state[name].dim() > 1)
    # Labels are those of the largest logit, and all logits scaled alike keep them.
    step = 2 if part.endswith(("conv_seg", "conv_logits")) else 1
    state[name][::step] *= FACTOR
    return state


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in SHORT else pytest.mark.soak) for kind in PARTS]
)
def test_self_test_fails_for_a_tensor_off_by_five_per_cent(kind, small, monkeypatch):
    opened = small(kind).opened
    assert self_test(load_detector(opened, torch.device("cpu")), opened) > 0
    load = module.load_state_dict_strict
    passed = []
    for part in PARTS[kind]:
        state = altered(opened.weights, part)
        monkeypatch.setattr(
            module, "load_state_dict_strict", lambda network, _, state=state: load(network, state)
        )
        try:
            self_test(load_detector(opened, torch.device("cpu")), opened)
            passed.append(part)
        except SelfTestError as error:
            assert "differs from the recorded one" in str(error)
    assert not passed
