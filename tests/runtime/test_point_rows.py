"""Voxel encoders that compute a row per point answer as mmdet3d's own do."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from mmengine.registry import DefaultScope
from torch import Tensor, nn

from serve import ops

ops.install("portable")

from serve.runtime import point_rows  # noqa: E402
from serve.runtime.model import suppress_warnings  # noqa: E402
from tests.runtime.test_fusion import prepare  # noqa: E402

PLACES = 8


class Network(nn.Module):
    """A network as `install` takes it."""

    def __init__(self, encoder: dict[str, Any]) -> None:
        super().__init__()
        from mmdet3d.registry import MODELS

        with suppress_warnings(), DefaultScope.overwrite_default_scope("mmdet3d"):
            self.voxel_encoder = MODELS.build(
                {"in_channels": 4, "with_cluster_center": True, "with_voxel_center": True,
                 "voxel_size": (0.2, 0.3, 4), "point_cloud_range": (0, -8, -3, 16, 8, 1), **encoder}
            )  # fmt: skip


def voxels(counts: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return points, counts and coordinates of voxels with so many points."""
    generator = torch.Generator().manual_seed(sum(counts))
    numbers = torch.tensor(counts, dtype=torch.int32)
    points = torch.rand((len(counts), PLACES, 4), generator=generator) * torch.tensor((16.0, 8.0, 2.0, 1.0))
    points[torch.arange(PLACES) >= numbers[:, None]] = 0
    coors = torch.randint(0, 40, (len(counts), 4), generator=generator, dtype=torch.int32)
    return points, numbers, coors


@pytest.mark.parametrize(
    "encoder",
    [
        {"type": "PillarFeatureNet", "feat_channels": [16]},
        {"type": "PillarFeatureNet", "feat_channels": [16], "legacy": False},
        {"type": "PillarFeatureNet", "feat_channels": [16, 32], "with_distance": True},
        {"type": "HardVFE", "feat_channels": [16]},
        {"type": "HardVFE", "feat_channels": [16, 16], "with_distance": True},
    ],
    ids=["pillars", "pillars-new", "pillars-two", "voxels", "voxels-two"],
)
def test_rows_of_points_give_what_padded_voxels_give(encoder):
    plain = Network(encoder)
    prepare(plain, 0)
    rows = copy.deepcopy(plain)
    point_rows.install(rows)
    assert isinstance(rows.voxel_encoder, point_rows.PointRows)
    for counts in ([1], [PLACES], [1, 2, PLACES, 3, 1, PLACES - 1] * 50):
        points, numbers, coors = voxels(counts)
        with torch.no_grad():
            ours = rows.voxel_encoder(points.clone(), numbers, coors)
            theirs = plain.voxel_encoder(points.clone(), numbers, coors)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "encoder",
    [
        {"type": "PillarFeatureNet", "feat_channels": [16], "mode": "avg"},
        {"type": "DynamicPillarFeatureNet", "feat_channels": [16]},
    ],
    ids=["mean", "dynamic"],
)
def test_other_encoders_stay_as_they_are(encoder):
    network = Network(encoder)
    before = network.voxel_encoder
    point_rows.install(network)
    assert network.voxel_encoder is before
