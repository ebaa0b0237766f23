"""Patches of mmcv's own Python work on a CPU after `serve.ops.install`."""

from __future__ import annotations

import warnings

import pytest
import torch

from serve import ops

ops.install()


def test_furthest_point_sample_runs_on_a_cpu():
    from mmcv.ops import furthest_point_sample

    line = torch.tensor([[[0.0, 0, 0], [1, 0, 0], [2, 0, 0], [10, 0, 0]]])
    assert furthest_point_sample(line, 3).tolist() == [[0, 3, 2]]


def test_knn_runs_on_a_cpu():
    from mmcv.ops import knn

    line = torch.tensor([[[0.0, 0, 0], [1, 0, 0], [5, 0, 0]]])
    found = knn(2, line, line)
    assert found.shape == (1, 2, 3) and found[0, :, 2].tolist() == [2, 1]


@pytest.mark.parametrize("name", ["points_in_boxes_part", "points_in_boxes_all"])
def test_points_in_boxes_runs_on_a_cpu(name):
    import mmcv.ops

    points = torch.tensor([[[0.0, 0, 0.5], [5, 0, 0.5]]])
    boxes = torch.tensor([[[0.0, 0, 0, 2, 2, 1, 0.3]]])
    inside = getattr(mmcv.ops, name)(points, boxes)
    assert inside.flatten().tolist() == ([0, -1] if name.endswith("part") else [1, 0])


def test_sparse_tensor_converts_to_dense_without_deprecation():
    from mmcv.ops import SparseConvTensor

    sparse = SparseConvTensor(
        torch.tensor([[1.0, 2.0]]), torch.tensor([[0, 1, 0, 2]], dtype=torch.int32), [2, 1, 3], 1
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dense = sparse.dense()
    assert dense.shape == (1, 2, 2, 1, 3) and dense[0, :, 1, 0, 2].tolist() == [1.0, 2.0] and dense.sum() == 3


def test_sparse_tensor_accepts_a_tensor_of_extents():
    from mmcv.ops import SparseConvTensor

    places = torch.tensor([[0, 1, 0, 2]], dtype=torch.int32)
    sparse = SparseConvTensor(torch.ones(1, 2), places, places.max(0)[0][1:] + 1, 1)
    assert sparse.spatial_shape == [2, 1, 3] and sparse.sparity == pytest.approx(1 / 6)


def test_deformable_attention_uses_the_kernel_on_a_cpu():
    from mmcv.ops import multi_scale_deform_attn

    from serve.ops.deform.attention import attend

    assert multi_scale_deform_attn.multi_scale_deformable_attn_pytorch is attend


def test_masked_convolution_runs_without_deprecation():
    from mmcv.ops import MaskedConv2d

    layer = MaskedConv2d(2, 3, 3, padding=1)
    image, mask = torch.ones(1, 2, 4, 4), torch.ones(1, 4, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        masked = layer(image, mask)
    torch.testing.assert_close(masked, torch.nn.Conv2d.forward(layer, image))


def test_options_reach_into_lists_and_a_none_of_a_base_can_become_a_dictionary():
    from mmengine.config import Config

    config = Config({"metrics": [{"type": "A"}, {"type": "B"}], "backend_args": None})
    config.merge_from_dict({"metrics.1.format_only": True, "backend_args.backend": "petrel"})
    assert config.metrics == [{"type": "A"}, {"type": "B", "format_only": True}]
    assert config.backend_args == {"backend": "petrel"}
