"""Arguments for each kernel for feature maps, at inference sizes or small."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tools.bench.kernels.inputs import Inputs

__all__ = ["CASES"]

I64 = torch.int64
SCALE = 0.25


def _maps(x: Inputs, channels: int = 256) -> tuple[torch.Tensor, int, int]:
    """Create a feature map; return it, its channels and the side of its image in pixels."""
    c, side = x.size(4, channels), x.size(8, 100)
    return x.normal(1, c, side, side), c, int(side / SCALE)


def _align(x: Inputs, mode: int) -> list[Any]:
    maps, c, extent = _maps(x)
    r = x.size(4, 1000)
    arg = [x.zeros(r, c, 7, 7) if mode == 0 else x.zeros(0) for _ in "yx"]
    return [maps, x.regions(r, extent), x.zeros(r, c, 7, 7), *arg, 7, 7, SCALE, 0, mode, True]


def roi_align_forward(x: Inputs) -> list[Any]:
    return _align(x, 1)


def roi_align_backward(x: Inputs) -> list[Any]:
    maps, rois, output, *rest = _align(x, 1)
    return [torch.ones_like(output), rois, *rest[:2], torch.zeros_like(maps), *rest[2:]]


def _pool(x: Inputs) -> list[Any]:
    maps, c, extent = _maps(x)
    r = x.size(4, 1000)
    return [maps, x.regions(r, extent), x.zeros(r, c, 7, 7)]


def roi_pool_forward(x: Inputs) -> list[Any]:
    maps, rois, output = _pool(x)
    return [maps, rois, output, torch.zeros_like(output, dtype=torch.int32), 7, 7, SCALE]


def roi_pool_backward(x: Inputs) -> list[Any]:
    from serve.ops.roi.pool import roi_pool_forward as forward

    maps, rois, output, argmax, *rest = roi_pool_forward(x)
    forward(maps, rois, output, argmax, *rest)
    return [torch.ones_like(output), rois, argmax, torch.zeros_like(maps), *rest]


def prroi_pool_forward(x: Inputs) -> list[Any]:
    return [*_pool(x), 7, 7, SCALE]


def prroi_pool_backward(x: Inputs) -> list[Any]:
    maps, rois, output = _pool(x)
    return [torch.ones_like(output), rois, torch.zeros_like(maps), 7, 7, SCALE]


def prroi_pool_coor_backward(x: Inputs) -> list[Any]:
    maps, rois, output = _pool(x)
    return [output, torch.ones_like(output), maps, rois, torch.zeros_like(rois), 7, 7, SCALE]


def border_align_forward(x: Inputs) -> list[Any]:
    maps, c, _ = _maps(x, 64)
    n, side = x.size(6, 10000), maps.shape[3]
    out = (1, c // 4, n, 4)
    return [maps, x.boxes(n, side)[None], x.zeros(*out), x.zeros(*out, dtype=torch.int32), 10]


def border_align_backward(x: Inputs) -> list[Any]:
    from serve.ops.roi.pool import border_align_forward as forward

    maps, boxes, output, argmax, steps = border_align_forward(x)
    forward(maps, boxes, output, argmax, steps)
    return [torch.ones_like(output), boxes, argmax, torch.zeros_like(maps), steps]


def roi_align_rotated_forward(x: Inputs) -> list[Any]:
    maps, c, extent = _maps(x)
    r = x.size(4, 1000)
    return [maps, x.rotated_regions(r, extent), x.zeros(r, c, 7, 7), 7, 7, SCALE, 2, True, True]


def roi_align_rotated_backward(x: Inputs) -> list[Any]:
    maps, rois, output, *rest = roi_align_rotated_forward(x)
    return [torch.ones_like(output), rois, torch.zeros_like(maps), *rest]


def riroi_align_rotated_forward(x: Inputs) -> list[Any]:
    maps, rois, output, *_ = roi_align_rotated_forward(x)
    return [maps, rois, output, 7, 7, SCALE, 2, x.size(2, 8), True]


def riroi_align_rotated_backward(x: Inputs) -> list[Any]:
    maps, rois, output, *rest = riroi_align_rotated_forward(x)
    return [torch.ones_like(output), rois, torch.zeros_like(maps), *rest]


def deform_roi_pool_forward(x: Inputs) -> list[Any]:
    maps, rois, output = _pool(x)
    return [maps, rois, 0.1 * x.normal(len(rois), 2, 7, 7), output, 7, 7, SCALE, 2, 0.1]


def deform_roi_pool_backward(x: Inputs) -> list[Any]:
    maps, rois, offset, output, *rest = deform_roi_pool_forward(x)
    return [
        torch.ones_like(output),
        maps,
        rois,
        offset,
        torch.zeros_like(maps),
        torch.zeros_like(offset),
        *rest,
    ]


def bezier_align_forward(x: Inputs) -> list[Any]:
    maps, c, extent = _maps(x)
    r = x.size(3, 100)
    corner = x.uniform(r, 1, 2, high=0.6 * extent)
    upper = torch.stack((x.numbers(0.0, 0.1, 0.2, 0.3), x.numbers(0.0, 0.02, 0.02, 0.0)), dim=-1) * extent
    lower = upper.flip(0) + x.numbers(0.0, 0.08 * extent)
    rois = torch.cat((x.zeros(r, 1), (corner + torch.cat((upper, lower))).flatten(1)), dim=1)
    return [maps, rois, x.zeros(r, c, 8, 32), 8, 32, SCALE, 2, True]


def bezier_align_backward(x: Inputs) -> list[Any]:
    maps, rois, output, *rest = bezier_align_forward(x)
    return [torch.ones_like(output), rois, torch.zeros_like(maps), *rest]


def rotated_feature_align_forward(x: Inputs) -> list[Any]:
    maps, _, extent = _maps(x)
    side = maps.shape[3]
    boxes = x.rotated(side * side, extent).view(1, side, side, 5)
    return [maps, boxes, torch.zeros_like(maps), SCALE, 5]


def rotated_feature_align_backward(x: Inputs) -> list[Any]:
    maps, boxes, output, *rest = rotated_feature_align_forward(x)
    return [torch.ones_like(output), boxes, torch.zeros_like(maps), *rest]


def active_rotated_filter_forward(x: Inputs) -> list[Any]:
    o, i = x.size(2, 64), x.size(3, 64)
    places = torch.stack(
        [torch.randperm(72, generator=torch.Generator().manual_seed(k)) for k in range(8)], dim=1
    )
    indices = (places + 1).view(8, 3, 3, 8).int().to(x.device)
    return [x.normal(o, i, 8, 3, 3), indices, x.zeros(o * 8, i * 8, 3, 3)]


def active_rotated_filter_backward(x: Inputs) -> list[Any]:
    filters, indices, output = active_rotated_filter_forward(x)
    return [torch.ones_like(output), indices, torch.zeros_like(filters)]


def correlation_forward(x: Inputs) -> list[Any]:
    maps, _, _ = _maps(x, 128)
    side, patch = maps.shape[3], x.size(3, 9)
    return [maps, torch.roll(maps, 1, 3), x.zeros(1, patch, patch, side, side), 1, 1, patch, patch, 0, 0] + [
        1
    ] * 6


def correlation_backward(x: Inputs) -> list[Any]:
    first, second, output, *rest = correlation_forward(x)
    return [torch.ones_like(output), first, second, torch.zeros_like(first), torch.zeros_like(second), *rest]


def tin_shift_forward(x: Inputs) -> list[Any]:
    c, s = x.size(4, 256), x.size(5, 3136)
    moved = x.normal(2, 8, c, s)
    return [moved, x.whole(3, 2, 2) - 1, torch.zeros_like(moved)]


tin_shift_backward = tin_shift_forward


def _deform(x: Inputs) -> tuple[torch.Tensor, ...]:
    maps, c, _ = _maps(x)
    side = maps.shape[3]
    return maps, x.normal(c, c, 3, 3), x.normal(1, 18, side, side), torch.zeros_like(maps), x.zeros(0)


def deform_conv_forward(x: Inputs) -> list[Any]:
    maps, weight, offset, output, none = _deform(x)
    return [maps, weight, offset, output, none, none.clone(), 3, 3, *[1] * 8, 32]


def deform_conv_backward_input(x: Inputs) -> list[Any]:
    maps, weight, offset, output, none = _deform(x)
    grads = torch.zeros_like(maps), torch.zeros_like(offset)
    return [maps, offset, torch.ones_like(output), *grads, weight, none, 3, 3, *[1] * 8, 32]


def deform_conv_backward_parameters(x: Inputs) -> list[Any]:
    maps, weight, offset, output, none = _deform(x)
    ones = torch.ones_like(output)
    return [maps, offset, ones, torch.zeros_like(weight), none, none.clone(), 3, 3, *[1] * 8, 1.0, 32]


def modulated_deform_conv_forward(x: Inputs) -> list[Any]:
    maps, weight, offset, output, none = _deform(x)
    mask, bias = x.uniform(1, 9, *maps.shape[2:]), x.normal(weight.shape[0])
    return [maps, weight, bias, none, offset, mask, output, none.clone(), 3, 3, *[1] * 8, True]


def modulated_deform_conv_backward(x: Inputs) -> list[Any]:
    maps, weight, bias, none, offset, mask, output, columns, *rest = modulated_deform_conv_forward(x)
    grads = [torch.zeros_like(one) for one in (maps, weight, bias, offset, mask)]
    return [maps, weight, bias, none, offset, mask, columns, *grads, torch.ones_like(output), *rest]


def ms_deform_attn_forward(x: Inputs) -> list[Any]:
    sides = [x.size(4, 100), x.size(2, 50), x.size(2, 25), x.size(1, 13)]
    shapes = x.numbers(*(s for side in sides for s in (side, side)), dtype=I64).view(4, 2)
    starts = [sum(side * side for side in sides[:level]) for level in range(4)]
    keys, queries = sum(side * side for side in sides), x.size(3, 900)
    heads, channels = x.size(2, 8), x.size(3, 32)
    weights = x.uniform(1, queries, heads, 4, 4)
    places = x.uniform(1, queries, heads, 4, 4, 2)
    return [x.normal(1, keys, heads, channels), shapes, x.numbers(*starts, dtype=I64), places, weights, 64]


def ms_deform_attn_backward(x: Inputs) -> list[Any]:
    value, shapes, starts, places, weights, step = ms_deform_attn_forward(x)
    grad = x.normal(1, places.shape[1], value.shape[2] * value.shape[3])
    grads = [torch.zeros_like(one) for one in (value, places, weights)]
    return [value, shapes, starts, places, weights, grad, *grads, step]


def masked_im2col_forward(x: Inputs) -> list[Any]:
    maps, c, _ = _maps(x)
    side, m = maps.shape[3], x.size(5, 2000)
    return [maps, x.whole(side, m, dtype=I64), x.whole(side, m, dtype=I64), x.zeros(c * 9, m), 3, 3, 1, 1]


def masked_col2im_forward(x: Inputs) -> list[Any]:
    maps, c, _ = _maps(x)
    side, m = maps.shape[3], x.size(5, 2000)
    flat = torch.randperm(side * side, generator=torch.Generator().manual_seed(0))[:m].to(x.device)
    return [x.normal(c, m), flat // side, flat % side, torch.zeros_like(maps), side, side, c]


def carafe_naive_forward(x: Inputs) -> list[Any]:
    maps, c, _ = _maps(x)
    side = maps.shape[3]
    masks = torch.softmax(x.normal(1, 25, 2 * side, 2 * side), dim=1)
    return [maps, masks, x.zeros(1, c, 2 * side, 2 * side), 5, 1, 2]


def carafe_forward(x: Inputs) -> list[Any]:
    maps, masks, output, *rest = carafe_naive_forward(x)
    buffers = [torch.zeros_like(one) for one in (maps, output, masks)]
    return [maps, masks, *buffers, output, *rest]


def carafe_naive_backward(x: Inputs) -> list[Any]:
    maps, masks, output, *rest = carafe_naive_forward(x)
    return [torch.ones_like(output), maps, masks, torch.zeros_like(maps), torch.zeros_like(masks), *rest]


def carafe_backward(x: Inputs) -> list[Any]:
    top, maps, masks, grad, grad_masks, *rest = carafe_naive_backward(x)
    buffers = [torch.zeros_like(one) for one in (top, top, maps, masks)]
    return [top, maps, masks, *buffers, grad, grad_masks, *rest]


def psamask_forward(x: Inputs) -> list[Any]:
    side, mask = x.size(4, 60), x.size(3, 59)
    half = (mask - 1) // 2
    sizes = [0, 1, side, side, mask, mask, half, half]
    return [x.normal(1, mask * mask, side, side), x.zeros(1, side * side, side, side), *sizes]


def psamask_backward(x: Inputs) -> list[Any]:
    masks, output, *rest = psamask_forward(x)
    return [torch.ones_like(output), torch.zeros_like(masks), *rest]


def sigmoid_focal_loss_forward(x: Inputs) -> list[Any]:
    n, c = x.size(6, 20000), x.size(3, 80)
    return [x.normal(n, c), x.whole(c + 1, n, dtype=I64), x.zeros(0), x.zeros(n, c), 2.0, 0.25]


sigmoid_focal_loss_backward = sigmoid_focal_loss_forward


def softmax_focal_loss_forward(x: Inputs) -> list[Any]:
    n, c = x.size(6, 20000), x.size(3, 80)
    return [x.normal(n, c).softmax(dim=1), x.whole(c, n, dtype=I64), x.zeros(0), x.zeros(n), 2.0, 0.25]


def softmax_focal_loss_backward(x: Inputs) -> list[Any]:
    p, target, weight, buff, *rest = softmax_focal_loss_forward(x)
    return [p, target, weight, buff, torch.zeros_like(p), *rest]


def _norm(x: Inputs) -> tuple[torch.Tensor, int]:
    c = x.size(3, 64)
    return x.normal(2, c, x.size(5, 10000)), c


def sync_bn_forward_mean(x: Inputs) -> list[Any]:
    maps, c = _norm(x)
    return [maps, x.zeros(c)]


def sync_bn_forward_var(x: Inputs) -> list[Any]:
    maps, c = _norm(x)
    return [maps, x.normal(c), x.zeros(c)]


def sync_bn_forward_output(x: Inputs) -> list[Any]:
    maps, c = _norm(x)
    mean, var, weight, bias, moved = (x.uniform(c) for _ in range(5))
    norm = torch.zeros_like(maps)
    return [maps, mean, var, weight, bias, moved, moved.clone(), norm, x.zeros(c), norm.clone(), 1e-5, 0.1, 1]


def sync_bn_backward_param(x: Inputs) -> list[Any]:
    maps, c = _norm(x)
    return [maps, x.normal(*maps.shape), x.zeros(c), x.zeros(c)]


def sync_bn_backward_data(x: Inputs) -> list[Any]:
    maps, c = _norm(x)
    weight, by_weight, by_bias, std = (x.uniform(c, low=0.5) for _ in range(4))
    return [maps, weight, by_weight, by_bias, x.normal(*maps.shape), std, torch.zeros_like(maps)]


def pixel_group(x: Inputs) -> list[Any]:
    side = x.size(6, 160)
    label = torch.zeros(side, side, dtype=torch.int32)
    label[1:3, 1:3], label[4:, 4:] = 1, 2
    score, embedding = x.uniform(side, side).cpu(), x.normal(side, side, 4).cpu()
    return [score, score > 0.3, embedding, label, (label > 0).to(torch.uint8), 3, 3.0]


def contour_expand(x: Inputs) -> list[Any]:
    side = x.size(6, 160)
    label = torch.zeros(side, side, dtype=torch.int32)
    label[1:3, 1:3], label[4:, 4:] = 1, 2
    return [(x.uniform(3, side, side) < 0.8).to(torch.uint8).cpu(), label, 2, 3]


CASES: dict[str, Callable[[Inputs], list[Any]]] = {
    name: build
    for name, build in globals().items()
    if callable(build) and not name.startswith("_") and getattr(build, "__module__", "") == __name__
}
