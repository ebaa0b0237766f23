"""Random checkpoints behave in evaluation as they did when they were set."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from serve import ops
from serve.convert.config import resolve_config
from serve.convert.random_weights import LEAST_VARIANCE, write_random_checkpoint
from serve.runtime.model import build_network
from tests.convert.test_proof import SMALL

ops.install()


def test_norms_have_the_statistics_of_what_evaluation_gives_them(tmp_path: Path) -> None:
    """Of what goes in, not of a training run in which every norm before them standardised exactly."""
    (tmp_path / "config.py").write_text(SMALL)
    config = resolve_config(tmp_path / "config.py").config
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 1), np.uint8).repeat(3, axis=2)
    cv2.imwrite(str(tmp_path / "frame.png"), picture)
    write_random_checkpoint(config, ("cat", "dog"), tmp_path / "model.pth", frame=tmp_path / "frame.png")
    network = build_network(config, ("cat", "dog"))
    network.load_state_dict(torch.load(tmp_path / "model.pth", weights_only=True)["state_dict"])
    backbone = network.eval().backbone
    given: dict[str, Tensor] = {}
    for name, module in backbone.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_pre_hook(lambda _, inputs, name=name: given.update({name: inputs[0]}))
    frame = torch.from_numpy(picture).permute(2, 0, 1).float()
    with torch.no_grad():
        backbone(torch.stack([frame, frame.flip(-1)]))
    assert len(given) == 20
    for name, features in given.items():
        norm = backbone.get_submodule(name)
        variance, mean = torch.var_mean(features, (0, 2, 3))
        torch.testing.assert_close(norm.running_mean, mean, atol=1e-3, rtol=1e-3)
        bounded = variance.clamp(min=float(variance.mean()) * LEAST_VARIANCE)
        torch.testing.assert_close(norm.running_var, bounded, atol=1e-3, rtol=1e-3)
