"""NMS, rotated IoU and RoIAlign against references written from their definitions."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import shapely
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.ops.boxes import iou3d, nms, rotated
from serve.ops.checks import torch_only
from serve.ops.roi import align as roi_align


def rectangles(seed: int, n: int) -> torch.Tensor:
    """Draw (n, 5) rotated rectangles, crowded, some equal, some touching, some of zero width."""
    rng = np.random.default_rng(seed)
    boxes = np.concatenate(
        (rng.uniform(-4, 4, (n, 2)), rng.uniform(0.2, 5, (n, 2)), rng.uniform(-7, 7, (n, 1))), axis=1
    )
    if n > 3:
        boxes[1] = boxes[0]
        boxes[2] = [boxes[0, 0] + boxes[0, 2], boxes[0, 1], boxes[0, 2], boxes[0, 3], 0]
        boxes[3, 2] = 0
    return torch.from_numpy(boxes)


def polygon(box) -> shapely.Polygon:
    x, y, w, h, a = (float(v) for v in box)
    corners = np.array([[w, h], [-w, h], [-w, -h], [w, -h]]) / 2
    turn = np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]])
    return shapely.Polygon(corners @ turn.T + [x, y])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), n=st.integers(1, 8), m=st.integers(1, 8))
def test_rotated_overlap_equals_polygon_intersection(seed, n, m):
    first, second = rectangles(seed, n), rectangles(seed + 1, m)
    expected = torch.tensor(
        [[polygon(a).intersection(polygon(b)).area for b in second] for a in first], dtype=torch.float64
    )
    # Boxes without area overlap nothing; the share of the first box is the overlap over its area.
    area = first[:, 2] * first[:, 3]
    shares = torch.full((n * m,), -1.0, dtype=torch.float64)
    rotated.box_iou_rotated(first, second, shares, mode_flag=1)
    expected = torch.where(area[:, None] > 0, expected / area[:, None], 0.0)
    torch.testing.assert_close(shares.view(n, m), expected, atol=1e-6, rtol=1e-6)
    pairs_a = first[:, None].expand(-1, m, 5).reshape(-1, 5)
    pairs_b = second[None].expand(n, m, 5).reshape(-1, 5)
    aligned = torch.full((n * m,), -1.0, dtype=torch.float64)
    rotated.box_iou_rotated(pairs_a, pairs_b, aligned, mode_flag=1, aligned=True)
    assert torch.equal(aligned, shares)


def test_iou_and_iof_follow_their_definitions():
    a, b = torch.tensor([[0.0, 0, 2, 2, 0]]), torch.tensor([[1.0, 0, 2, 2, np.pi / 2], [5, 5, 1, 1, 0]])
    ious = torch.zeros(2)
    rotated.box_iou_rotated(a, b, ious)
    assert ious.tolist() == pytest.approx([1 / 3, 0])
    rotated.box_iou_rotated(a, b, ious, mode_flag=1)
    assert ious.tolist() == pytest.approx([1 / 2, 0])
    one = torch.zeros(1)
    rotated.box_iou_rotated(a, b[:1], one, aligned=True)
    assert one.item() == pytest.approx(1 / 3)


def greedy(iou: np.ndarray, order: list[int], drops) -> list[int]:
    kept: list[int] = []
    for i in order:
        if not any(drops(iou[k, i]) for k in kept):
            kept.append(i)
    return kept


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**16), n=st.integers(1, 20), threshold=st.sampled_from([0.01, 0.3, 0.7]))
def test_nms_rotated_is_greedy(seed, n, threshold):
    boxes = rectangles(seed, n).float()
    scores = torch.rand(n, generator=torch.Generator().manual_seed(seed))
    labels = torch.arange(n) % 2
    ious = torch.zeros(n * n)
    rotated.box_iou_rotated(boxes, boxes, ious)
    iou = ious.view(n, n).numpy()
    order = torch.sort(scores, descending=True)[1]
    got = rotated.nms_rotated(boxes, scores, order, boxes[order], labels[:0], threshold)
    assert got.tolist() == greedy(iou, order.tolist(), lambda v: v >= threshold)
    # Appended labels change nothing.
    with_label = torch.cat((boxes, labels[:, None].float()), 1)
    same = rotated.nms_rotated(with_label, scores, order, with_label[order], labels, threshold, True)
    assert torch.equal(same, got)


def upright(seed: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(n, 2, generator=generator) * 10
    boxes = torch.cat((corner, corner + torch.rand(n, 2, generator=generator) * 6), 1)
    scores = (torch.rand(n, generator=generator) * 5).round() / 5  # many ties
    return boxes, scores


def iou_matrix(boxes: torch.Tensor, offset: float = 0.0) -> np.ndarray:
    b = boxes.numpy()
    w = np.minimum(b[:, None, 2], b[None, :, 2]) - np.maximum(b[:, None, 0], b[None, :, 0]) + offset
    h = np.minimum(b[:, None, 3], b[None, :, 3]) - np.maximum(b[:, None, 1], b[None, :, 1]) + offset
    inter = np.clip(w, 0, None) * np.clip(h, 0, None)
    area = (b[:, 2] - b[:, 0] + offset) * (b[:, 3] - b[:, 1] + offset)
    return inter / (area[:, None] + area[None] - inter)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**16), n=st.integers(0, 40), offset=st.sampled_from([0, 1]))
def test_nms_is_greedy_and_stable_for_equal_scores(seed, n, offset):
    boxes, scores = upright(seed, n)
    order = sorted(range(n), key=lambda i: (-float(scores[i]), i))
    expected = greedy(iou_matrix(boxes, offset), order, lambda v: v > np.float32(0.4))
    assert nms.nms(boxes, scores, 0.4, offset).tolist() == expected
    if n:
        device_way = torch.tensor(order)[nms.scan(nms.pack_bits(nms._iou(boxes[order], float(offset)) > 0.4))]
        assert device_way.tolist() == expected


def test_soft_nms_lowers_scores_by_overlap():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 8], [20, 20, 30, 30]])
    scores = torch.tensor([0.9, 0.8, 0.5])
    for method, second in ((0, None), (1, 0.8 * (1 - 0.8)), (2, 0.8 * np.exp(-0.64 / 0.5))):
        dets = torch.zeros(3, 5)
        kept = nms.softnms(boxes, scores, dets, 0.3, 0.5, 1e-3, method, 0)
        got = {int(i): float(s) for i, s in zip(kept, dets[:, 4], strict=False)}
        assert got[0] == pytest.approx(0.9) and got[2] == pytest.approx(0.5)
        assert (1 not in got) if second is None else got[1] == pytest.approx(second)


def test_nms_match_groups_each_box_with_the_box_that_suppresses_it():
    boxes, scores = upright(7, 30)
    groups = nms.nms_match(torch.cat((boxes, scores[:, None]), 1), 0.4)
    assert sorted(i for g in groups for i in g) == list(range(30))
    iou = iou_matrix(boxes)
    assert all(iou[group[0], i] >= 0.4 for group in groups for i in group[1:])


def test_iou3d_and_nms3d_use_the_birds_eye_view():
    boxes = torch.tensor([[0.0, 0, 0, 4, 2, 1, 0], [0, 0, 9, 2, 4, 1, np.pi / 2], [10, 0, 0, 4, 2, 1, 0]])
    overlap = torch.zeros(3, 3)
    iou3d.iou3d_boxes_overlap_bev_forward(boxes, boxes, overlap)
    assert overlap[0].tolist() == pytest.approx([8, 8, 0], abs=1e-5)
    keep, count = torch.zeros(3, dtype=torch.long), torch.zeros((), dtype=torch.long)
    iou3d.iou3d_nms3d_forward(boxes, keep, count, 0.5)
    assert keep[: int(count)].tolist() == [0, 2]
    iou3d.iou3d_nms3d_normal_forward(boxes, keep, count, 0.5)  # headings ignored: 4x2 and 2x4 share 4 of 12
    assert keep[: int(count)].tolist() == [0, 1, 2]


def naive_roi_align(maps, rois, size, scale, ratio, mode, aligned):
    out = np.zeros((len(rois), maps.shape[1], *size))
    for r, roi in enumerate(rois.numpy()):
        x1, y1, x2, y2 = roi[1:] * scale - (0.5 if aligned else 0)
        w, h = x2 - x1, y2 - y1
        if not aligned:
            w, h = max(w, 1), max(h, 1)
        bh, bw = h / size[0], w / size[1]
        gh, gw = (ratio, ratio) if ratio > 0 else (int(np.ceil(bh)), int(np.ceil(bw)))
        image = maps[int(roi[0])].numpy()
        for i in range(size[0]):
            for j in range(size[1]):
                samples = [
                    sample(image, y1 + (i + (a + 0.5) / gh) * bh, x1 + (j + (b + 0.5) / gw) * bw)
                    for a in range(gh)
                    for b in range(gw)
                ]
                if samples:
                    out[r, :, i, j] = (np.max if mode == 0 else np.mean)(samples, axis=0)
                elif mode == 0:
                    out[r, :, i, j] = -10000  # mmcv's maximum of nothing
    return out


def sample(image, y, x):
    height, width = image.shape[1:]
    if y < -1 or y > height or x < -1 or x > width:
        return np.zeros(image.shape[0])
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    y0, x0 = int(y), int(x)
    y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
    fy, fx = y - y0, x - x0
    top = image[:, y0, x0] * (1 - fx) + image[:, y0, x1] * fx
    return top * (1 - fy) + (image[:, y1, x0] * (1 - fx) + image[:, y1, x1] * fx) * fy


@pytest.mark.parametrize("mode", [0, 1])
@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("path", ["dispatched", "torch"])
def test_roi_align_equals_its_definition(mode, ratio, aligned, path):
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 5, 11, 9, generator=generator)
    corner = torch.rand(13, 2, generator=generator) * 30 - 6
    rois = torch.cat(
        (torch.arange(13)[:, None] % 2, corner, corner + torch.rand(13, 2, generator=generator) * 40), 1
    ).float()
    rois[0, 3:] = rois[0, 1:3]  # a region of no extent
    output = torch.zeros(13, 5, 3, 4)
    argmax = [torch.zeros_like(output), torch.zeros_like(output)] if mode == 0 else [torch.zeros(0)] * 2
    with torch_only() if path == "torch" else nullcontext():
        roi_align.roi_align_forward(maps, rois, output, *argmax, 3, 4, 0.25, ratio, mode, aligned)
    expected = naive_roi_align(maps, rois, (3, 4), 0.25, ratio, mode, aligned)
    np.testing.assert_allclose(output.numpy(), expected, atol=1e-5)


def test_roi_align_rejects_an_image_index_out_of_range():
    with pytest.raises(IndexError, match="rois"):
        roi_align.roi_align_forward(
            torch.zeros(1, 1, 4, 4), torch.tensor([[3.0, 0, 0, 2, 2]]), torch.zeros(1, 1, 2, 2),
            torch.zeros(0), torch.zeros(0), 2, 2, 1.0, 0, 1, True,
        )  # fmt: skip
