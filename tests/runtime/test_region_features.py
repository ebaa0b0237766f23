"""Features of regions are those of upstream's extractor, bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch

from serve import ops

ops.install("portable")

from serve.runtime import region_features  # noqa: E402
from serve.runtime.model import suppress_warnings  # noqa: E402


def extractor(**settings):
    with suppress_warnings():
        import mmdet.models  # noqa: F401
        from mmdet.registry import MODELS

        return MODELS.build(
            {"type": "mmdet.SingleRoIExtractor", "out_channels": 16, "featmap_strides": [4, 8, 16],
             "roi_layer": {"type": "RoIAlign", "output_size": 7, "sampling_ratio": 0}, **settings}
        )  # fmt: skip


def regions(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    corners = torch.rand(count, 2, generator=generator) * 200
    sizes = torch.rand(count, 2, generator=generator) ** 3 * 400
    images = torch.randint(0, 2, (count, 1), generator=generator)
    return torch.cat((images, corners, corners + sizes), dim=1)


def maps() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(2, 16, size, size + 3, generator=generator) for size in (64, 32, 16)]


@pytest.mark.parametrize("count", [0, 1, 60])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("scale", [None, 1.3])
def test_all_levels_at_once_give_the_bits_of_each_by_itself(count, layout, scale):
    network = torch.nn.Sequential(extractor())
    plain = copy.deepcopy(network)
    region_features.install(network)
    assert type(network[0]) is region_features.FusedRoIExtractor
    network[0].memory_format = layout
    rois = regions(count)
    expected, got = plain[0](maps(), rois, scale), network[0](maps(), rois, scale)
    assert torch.equal(got, expected) and got.is_contiguous(memory_format=layout)


def test_a_region_of_no_number_has_no_features():
    network = torch.nn.Sequential(extractor())
    plain = copy.deepcopy(network)
    region_features.install(network)
    rois = regions(5)
    rois[2, 1:] = float("nan")
    assert torch.equal(network[0](maps(), rois), plain[0](maps(), rois))


def test_extractors_that_pool_otherwise_are_left_as_they_are():
    network = torch.nn.Sequential(
        extractor(roi_layer={"type": "RoIAlign", "output_size": 7, "pool_mode": "max"}),
        extractor(roi_layer={"type": "RoIPool", "output_size": 7}),
    )
    region_features.install(network)
    assert all(type(one) is not region_features.FusedRoIExtractor for one in network)
