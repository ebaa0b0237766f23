"""Pooling of regions of every shape against loops from the definitions, and through mmcv."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate

from serve.ops.roi import bilinear
from serve.ops.roi import pool as roi_pool
from serve.ops.roi import sampling as roi_sampling

KERNELS = {name: getattr(module, name) for module in (roi_pool, roi_sampling) for name in module.__all__}


def sample(image: np.ndarray, y: float, x: float) -> np.ndarray:
    """Interpolate (C, H, W) bilinearly; the border's value up to one pixel outside, then zero."""
    height, width = image.shape[1:]
    if not (-1 <= y <= height and -1 <= x <= width):
        return np.zeros(image.shape[0])
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    total = np.zeros(image.shape[0])
    for i in range(height):
        for j in range(width):
            total += image[:, i, j] * max(0.0, 1 - abs(y - i)) * max(0.0, 1 - abs(x - j))
    return total


def maps_and_regions(seed: int, regions: int, columns: int, channels: int = 3):
    """Draw (2, C, 7, 9) maps and regions, partly outside, the first without extent."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(2, channels, 7, 9, generator=generator, dtype=torch.float64)
    rois = torch.rand(regions, columns, generator=generator, dtype=torch.float64) * 30 - 4
    rois[:, 0] = torch.arange(regions) % 2
    if columns == 5:
        rois[:, 3:] = rois[:, 1:3] + torch.rand(regions, 2, generator=generator) * 24
        if regions:
            rois[0, 3:] = rois[0, 1:3]
    elif columns == 6:
        rois[:, 3:5] = rois[:, 3:5].abs()
        rois[:, 5] = torch.rand(regions, generator=generator) * 14 - 7
        if regions:
            rois[0, 3:5] = 0
    return maps.float(), rois.float()


def grid(extent: float, bins: int, ratio: int) -> int:
    return ratio if ratio > 0 else math.ceil(extent / bins)


def naive_rotated(maps, rois, size, scale, ratio, aligned, clockwise):
    out = np.zeros((len(rois), maps.shape[1], *size))
    for r, (b, cx, cy, w, h, angle) in enumerate(rois.double().numpy()):
        shift = 0.5 if aligned else 0.0
        cx, cy, w, h = cx * scale - shift, cy * scale - shift, w * scale, h * scale
        if not aligned:
            w, h = max(w, 1.0), max(h, 1.0)
        angle = -angle if clockwise else angle
        gy, gx = grid(h, size[0], ratio), grid(w, size[1], ratio)
        for i, j in np.ndindex(*size):
            for a, c in np.ndindex(gy, gx):
                v = -h / 2 + (i + (a + 0.5) / gy) * h / size[0]
                u = -w / 2 + (j + (c + 0.5) / gx) * w / size[1]
                y = v * math.cos(angle) - u * math.sin(angle) + cy
                x = v * math.sin(angle) + u * math.cos(angle) + cx
                out[r, :, i, j] += sample(maps[int(b)].double().numpy(), y, x) / (gy * gx)
    return out


def run_both(kernel: str, maps: torch.Tensor, rois: torch.Tensor, shape, *args):
    """Run the numba version (float32) and the torch version (float64) of a kernel."""
    results = []
    for dtype in (torch.float32, torch.float64):
        output = torch.full(shape, 7.0, dtype=dtype)
        extra = [a.to(dtype) if isinstance(a, torch.Tensor) else a for a in args]
        before = [extra.pop(0)] if extra and isinstance(extra[0], torch.Tensor) else []
        KERNELS[kernel](maps.to(dtype), rois.to(dtype), *before, output, *extra)
        results.append(output.numpy())
    return results


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    ratio=st.sampled_from([0, 2]),
    aligned=st.booleans(),
    clockwise=st.booleans(),
)
def test_rotated_roi_align_equals_its_definition(seed, ratio, aligned, clockwise):
    maps, rois = maps_and_regions(seed, 4, 6)
    expected = naive_rotated(maps, rois, (2, 3), 0.25, ratio, aligned, clockwise)
    for got in run_both(
        "roi_align_rotated_forward", maps, rois, (4, 3, 2, 3), 2, 3, 0.25, ratio, aligned, clockwise
    ):
        np.testing.assert_allclose(got, expected, atol=2e-4)


@pytest.mark.parametrize("clockwise", [False, True])
def test_riroi_align_rotates_orientation_channels(clockwise, mmcv_ops):
    maps, rois = maps_and_regions(5, 4, 6, channels=8)
    pooled = naive_rotated(maps, rois, (2, 2), 0.25, 2, False, clockwise)
    # Without `aligned`, there is no half-pixel shift and regions have at least one pixel.
    expected = np.zeros_like(pooled)
    for r in range(len(rois)):
        steps = float(rois[r, 5]) * 4 / (2 * math.pi)
        whole = math.floor(steps)
        for c, o in np.ndindex(2, 4):
            here, after = c * 4 + (o - whole) % 4, c * 4 + (o - whole + 1) % 4
            expected[r, c * 4 + o] = (1 - steps + whole) * pooled[r, here] + (steps - whole) * pooled[
                r, after
            ]
    for got in run_both("riroi_align_rotated_forward", maps, rois, (4, 8, 2, 2), 2, 2, 0.25, 2, 4, clockwise):
        np.testing.assert_allclose(got, expected, atol=2e-4)
    layer = mmcv_ops.RiRoIAlignRotated((2, 2), 0.25, 2, 4, clockwise)
    np.testing.assert_allclose(layer(maps, rois), expected, atol=2e-4)


@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("shifted", [False, True])
def test_deform_roi_pool_shifts_each_bin(ratio, shifted, mmcv_ops):
    maps, rois = maps_and_regions(6, 4, 5)
    generator = torch.Generator().manual_seed(6)
    offset = torch.randn(4, 2, 2, 3, generator=generator) if shifted else torch.zeros(0)
    expected = np.zeros((4, 3, 2, 3))
    for r, (b, x1, y1, x2, y2) in enumerate(rois.double().numpy() * [1, 0.25, 0.25, 0.25, 0.25]):
        w, h = x2 - x1, y2 - y1
        gy, gx = grid(h, 2, ratio), grid(w, 3, ratio)
        for i, j in np.ndindex(2, 3):
            dx, dy = (0.1 * offset[r, :, i, j].double().numpy() * [w, h]) if shifted else (0.0, 0.0)
            for a, c in np.ndindex(gy, gx):
                y = y1 - 0.5 + dy + (i + (a + 0.5) / gy) * h / 2
                x = x1 - 0.5 + dx + (j + (c + 0.5) / gx) * w / 3
                expected[r, :, i, j] += sample(maps[int(b)].double().numpy(), y, x) / (gy * gx)
    for got in run_both("deform_roi_pool_forward", maps, rois, (4, 3, 2, 3), offset, 2, 3, 0.25, ratio, 0.1):
        np.testing.assert_allclose(got, expected, atol=2e-4)
    got = mmcv_ops.deform_roi_pool(maps, rois, offset if shifted else None, (2, 3), 0.25, ratio, 0.1)
    np.testing.assert_allclose(got, expected, atol=2e-4)


@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("aligned", [False, True])
def test_bezier_align_follows_both_curves(ratio, aligned, mmcv_ops):
    maps, rois = maps_and_regions(7, 3, 17)
    expected = np.zeros((3, 3, 2, 4))
    for r, row in enumerate(rois.double().numpy()):
        points = row[1:].reshape(8, 2) * 0.25
        upper, lower = points[:4], points[:3:-1]
        w, h = np.maximum(abs(upper[0] - upper[3]), abs(lower[0] - lower[3]))
        if not aligned:
            w, h = max(w, 1.0), max(h, 1.0)
        gy, gx = grid(h, 2, ratio), grid(w, 4, ratio)
        for i, j in np.ndindex(2, 4):
            u, v = j / 4, i / 2
            weights = [math.comb(3, k) * u**k * (1 - u) ** (3 - k) for k in range(4)]
            x, y = (1 - v) * np.dot(weights, upper) + v * np.dot(weights, lower) - (0.5 if aligned else 0)
            for a, c in np.ndindex(gy, gx):
                yy, xx = y + ((a + 0.5) / gy - 0.5) * h / 2, x + ((c + 0.5) / gx - 0.5) * w / 4
                expected[r, :, i, j] += sample(maps[int(row[0])].double().numpy(), yy, xx) / (gy * gx)
    for got in run_both("bezier_align_forward", maps, rois, (3, 3, 2, 4), 2, 4, 0.25, ratio, aligned):
        np.testing.assert_allclose(got, expected, atol=2e-4)
    layer = mmcv_ops.BezierAlign((2, 4), 0.25, ratio, aligned)
    np.testing.assert_allclose(layer(maps, rois), expected, atol=2e-4)


def naive_max(maps, rois, size, scale):
    out = np.zeros((len(rois), maps.shape[1], *size))
    at = np.full(out.shape, -1)
    height, width = maps.shape[2:]
    for r, roi in enumerate(rois.numpy()):
        x1, y1, x2, y2 = (np.float32(v) * np.float32(scale) for v in (*roi[1:3], *(roi[3:5] + 1)))
        h, w = y2 - y1, x2 - x1
        for c, i, j in np.ndindex(*out.shape[1:]):
            bounds = []
            for n, step, start, limit in ((i, h / size[0], y1, height), (j, w / size[1], x1, width)):
                ends = math.floor(n * step + start), math.ceil((n + 1) * step + start)
                bounds.append(tuple(min(max(v, 0), limit) for v in ends))
            (top, bottom), (left, right) = bounds
            if h <= 0 or w <= 0:
                at[r, c, i, j] = 0  # as it was
                continue
            if bottom <= top or right <= left:
                continue
            window = maps[int(roi[0]), c, top:bottom, left:right].numpy()
            out[r, c, i, j] = window.max()
            y, x = np.unravel_index(window.argmax(), window.shape)
            at[r, c, i, j] = (top + y) * width + left + x
    return out, at


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**16), regions=st.integers(0, 5))
def test_roi_pool_finds_the_first_maximum_of_each_bin(seed, regions):
    maps, rois = maps_and_regions(seed, regions, 5)
    maps = maps.round()  # many ties
    if regions > 1:
        rois[1, 3:] = rois[1, 1:3] - 5  # inside out
    expected, places = naive_max(maps, rois, (2, 3), 0.25)
    for dtype in (torch.float32, torch.float64):
        output, argmax = torch.zeros(regions, 3, 2, 3, dtype=dtype), torch.zeros(regions, 3, 2, 3).int()
        roi_pool.roi_pool_forward(maps.to(dtype), rois.to(dtype), output, argmax, 2, 3, 0.25)
        np.testing.assert_array_equal(output, expected)
        np.testing.assert_array_equal(argmax, places)


def test_mmcv_roi_pool_accepts_float16(mmcv_ops):
    maps, rois = maps_and_regions(2, 4, 5)
    expected, _ = naive_max(maps.half().float(), rois, (2, 2), 0.25)
    got = mmcv_ops.roi_pool(maps.half(), rois.half().float().half(), (2, 2), 0.25)
    assert got.dtype == torch.float16
    exact, _ = naive_max(maps.half().float(), rois.half().float(), (2, 2), 0.25)
    np.testing.assert_array_equal(got, exact)
    np.testing.assert_array_equal(mmcv_ops.RoIPool((2, 2), 0.25)(maps.half().float(), rois), expected)


def test_prroi_pool_integrates_the_interpolation(mmcv_ops):
    maps, _ = maps_and_regions(3, 0, 5, channels=1)
    rois = torch.tensor([[0, 2.0, 3, 17, 21], [1, -9, -8, 30, 14], [0, 5, 5, 5, 9], [1, 80, 80, 90, 90]])

    def height(y: float, x: float) -> float:
        return sum(
            float(image[i, j]) * max(0.0, 1 - abs(y - i)) * max(0.0, 1 - abs(x - j))
            for i in range(max(0, math.floor(y)), min(7, math.floor(y) + 2))
            for j in range(max(0, math.floor(x)), min(9, math.floor(x) + 2))
        )

    expected = np.zeros((4, 1, 2, 2))
    for r, (b, x1, y1, x2, y2) in enumerate(rois.numpy() * [1, 0.25, 0.25, 0.25, 0.25]):
        image = maps[int(b), 0].numpy()
        for i, j in np.ndindex(2, 2):
            h, w = (y2 - y1) / 2, (x2 - x1) / 2
            total = 0.0
            # Polynomial between pixels, so Gaussian quadrature is exact there.
            ys = [
                y1 + i * h,
                *range(math.floor(y1 + i * h) + 1, math.ceil(y1 + (i + 1) * h)),
                y1 + (i + 1) * h,
            ]
            xs = [
                x1 + j * w,
                *range(math.floor(x1 + j * w) + 1, math.ceil(x1 + (j + 1) * w)),
                x1 + (j + 1) * w,
            ]
            for a, c in pairwise(ys):
                for d, e in pairwise(xs):
                    total += integrate.fixed_quad(
                        lambda yy, d=d, e=e: np.array(
                            [
                                integrate.fixed_quad(
                                    lambda xx, y=y: np.array([height(y, x) for x in xx]), d, e, n=2
                                )[0]
                                for y in yy
                            ]
                        ),
                        a,
                        c,
                        n=2,
                    )[0]
            expected[r, 0, i, j] = total / (h * w) if h * w > 0 else 0
    for got in run_both("prroi_pool_forward", maps, rois, (4, 1, 2, 2), 2, 2, 0.25):
        np.testing.assert_allclose(got, expected, atol=1e-5)
    np.testing.assert_allclose(mmcv_ops.PrRoIPool((2, 2), 0.25)(maps, rois), expected, atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**16), steps=st.integers(1, 4), boxes=st.integers(0, 3))
def test_border_align_finds_the_maximum_along_each_border(seed, steps, boxes):
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(2, 8, 5, 6, generator=generator)
    corner = torch.rand(2, boxes, 2, generator=generator) * 6 - 1.4
    rows = torch.cat((corner, corner + torch.rand(2, boxes, 2, generator=generator) * 5), 2)
    expected, places = np.zeros((2, 2, boxes, 4)), np.zeros((2, 2, boxes, 4), dtype=int)
    for b, n, border in np.ndindex(2, boxes, 4):
        x1, y1, x2, y2 = rows[b, n].tolist()
        w, h = (x2 - x1) / steps, (y2 - y1) / steps
        start, step = [((x1, y1), (w, 0)), ((x1, y1), (0, h)), ((x2, y2), (-w, 0)), ((x2, y2), (0, -h))][
            border
        ]
        image = maps[b, border * 2 : border * 2 + 2].double().numpy()
        values = [sample(image, start[1] + k * step[1], start[0] + k * step[0]) for k in range(steps + 1)]
        expected[b, :, n, border], places[b, :, n, border] = np.max(values, 0), np.argmax(values, 0)
    for dtype in (torch.float32, torch.float64):
        output, argmax = torch.zeros(2, 2, boxes, 4, dtype=dtype), torch.zeros(2, 2, boxes, 4).int()
        roi_pool.border_align_forward(maps.to(dtype), rows.to(dtype), output, argmax, steps)
        np.testing.assert_allclose(output, expected, atol=1e-5)
        clear = np.array(expected) != 0
        np.testing.assert_array_equal(argmax.numpy()[clear], places[clear])


def test_mmcv_border_align_uses_these_kernels(mmcv_ops):
    maps = torch.arange(2 * 4 * 3 * 3, dtype=torch.float32).view(2, 4, 3, 3)
    boxes = torch.tensor([[[0.0, 0, 2, 2]]]).expand(2, 1, 4)
    got = mmcv_ops.BorderAlign(2)(maps, boxes)
    assert got[0, 0, 0].tolist() == [2, 15, 26, 35]


def test_roi_kernels_accept_slices_and_empty_inputs(mmcv_ops):
    maps, rois = maps_and_regions(9, 4, 6)
    layer = mmcv_ops.RoIAlignRotated((2, 2), 0.25, 2)
    expected = layer(maps, rois)
    wide = torch.cat((maps, maps), 1)[:, :3].to(memory_format=torch.channels_last)
    assert torch.equal(layer(wide, rois), expected)
    assert torch.equal(layer(maps, torch.cat((rois, rois), 1)[:, :6]), expected)
    assert layer(maps, rois[:0]).shape == (0, 3, 2, 2)
    coarse = layer(maps.half(), rois.half())
    assert coarse.dtype == torch.float16


def test_blocks_do_not_change_the_result(monkeypatch):
    maps, rois = maps_and_regions(4, 6, 6)
    whole = run_both("roi_align_rotated_forward", maps, rois, (6, 3, 2, 3), 2, 3, 0.25, 0, True, False)
    monkeypatch.setattr(roi_sampling, "SAMPLES_PER_BLOCK", 1)
    parts = run_both("roi_align_rotated_forward", maps, rois, (6, 3, 2, 3), 2, 3, 0.25, 0, True, False)
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(a, b)


def test_nan_samples_are_outside():
    maps = torch.ones(1, 2, 2, 1)
    nowhere = torch.tensor([[[float("nan"), float("inf"), -1e30, 0.0]]])
    for dtype in (torch.float32, torch.float64):
        mean = bilinear.average_samples(
            maps.to(dtype), torch.zeros(1).long(), nowhere.to(dtype), torch.zeros_like(nowhere).to(dtype)
        )
        assert mean.item() == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("error", "name", "rois"),
    [
        (IndexError, "rois name images", torch.tensor([[2.0, 0, 0, 4, 4, 0]])),
        (IndexError, "rois name images", torch.tensor([[-1.0, 0, 0, 4, 4, 0]])),
        (ValueError, "finite", torch.tensor([[0.0, 0, 0, float("nan"), 4, 0]])),
        (ValueError, "at least 0", torch.tensor([[0.0, 0, 0, -4, 4, 0]])),
        (ValueError, "rois", torch.zeros(1, 4)),
    ],
)
def test_invalid_regions_raise_errors_that_name_them(error, name, rois):
    maps = torch.zeros(2, 1, 4, 4)
    with pytest.raises(error, match=name):
        roi_sampling.roi_align_rotated_forward(maps, rois, torch.zeros(1, 1, 2, 2), 2, 2, 1.0, 2, True, False)


def test_outputs_of_wrong_shape_raise_errors_that_name_them():
    maps, rois = torch.zeros(1, 4, 4, 4), torch.zeros(1, 5)
    wrong = torch.zeros(1, 4, 3, 3)
    with pytest.raises(ValueError, match="output"):
        roi_pool.roi_pool_forward(maps, rois, wrong, wrong.int(), 2, 2, 1.0)
    with pytest.raises(ValueError, match="output"):
        roi_pool.prroi_pool_forward(maps, rois, wrong, 2, 2, 1.0)
    with pytest.raises(ValueError, match="offset"):
        roi_sampling.deform_roi_pool_forward(maps, rois, torch.zeros(3), wrong, 3, 3, 1.0, 1, 0.1)
    with pytest.raises(ValueError, match="num_orientations"):
        roi_sampling.riroi_align_rotated_forward(maps, torch.zeros(1, 6), wrong, 3, 3, 1.0, 1, 3, False)
    with pytest.raises(ValueError, match="multiple of 4"):
        roi_pool.border_align_forward(maps[:, :3], torch.zeros(1, 1, 4), wrong, wrong.int(), 1)
