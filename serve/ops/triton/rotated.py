"""Overlaps of rotated boxes as bits, for greedy suppression.

A program has one box and 32 later ones. The shared polygon of a pair has at most 24 corners (16 crossings of sides, 4
corners of each box), one per lane; they are put in order by the angle around their mean, and the area is the sum over
neighbours. Both of mmcv's rules for what belongs to the polygon are here (`serve.ops.boxes.corner_hull`,
`serve.ops.boxes.bev`); areas agree with theirs up to the rounding of float32, as positions are taken relative to the
midpoint of a pair.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from serve.ops.triton.dispatch import kernel, operator
from serve.ops.triton.suppression import words_for

__all__ = ["rotated_overlap_bits"]

# Pairs at a time: a lane per corner and other corner, so 1024 numbers per pair.
CHUNK = 8
_MARGIN = tl.constexpr(1e-2)
_EPSILON = tl.constexpr(1e-8)
_NOTHING = tl.constexpr(1e-14)
_SLACK = tl.constexpr(1e-6)


@kernel
def _corner_x(index, half_x, half_y, cos, sin):  # pragma: no cover - compiled
    along = tl.where((index == 1) | (index == 2), half_x, -half_x)
    across = tl.where(index >= 2, half_y, -half_y)
    return along * cos - across * sin


@kernel
def _corner_y(index, half_x, half_y, cos, sin):  # pragma: no cover - compiled
    along = tl.where((index == 1) | (index == 2), half_x, -half_x)
    across = tl.where(index >= 2, half_y, -half_y)
    return along * sin + across * cos


@kernel
def _claims(x, y, half_x, half_y, cos, sin, BEV: tl.constexpr):
    # pragma: no cover - compiled
    along, across = tl.abs(x * cos + y * sin), tl.abs(y * cos - x * sin)
    if BEV:
        inside = (along < half_x + _MARGIN) & (across < half_y + _MARGIN)
    else:
        # Corners on a side count, also if rounding moved them.
        slack = (half_x + half_y) * _SLACK
        inside = (along <= half_x + slack) & (across <= half_y + slack)
    return inside


@kernel
def _turn(ax, ay, bx, by):  # pragma: no cover - compiled
    return ax * by - bx * ay


@kernel
def _crosses(px, py, ux, uy, qx, qy, vx, vy, t, s, det, BEV: tl.constexpr):  # pragma: no cover - compiled
    if BEV:
        wx, wy = qx - px, qy - py
        s1, s2 = _turn(wx, wy, ux, uy), _turn(ux, uy, wx + vx, wy + vy)
        s3, s4 = _turn(-wx, -wy, vx, vy), _turn(vx, vy, ux - wx, uy - wy)
        hit = (s1 * s2 > 0) & (s3 * s4 > 0)
    else:
        hit = (tl.abs(det) > _NOTHING) & (t >= 0) & (t <= 1) & (s >= 0) & (s <= 1)
    return hit


@kernel
def _shared_area(x, y, valid):  # pragma: no cover - compiled
    """Compute the area (P,) of polygons with corners (P, 32) in any order, of which those that are `valid` count."""
    count = tl.sum(valid.to(tl.int32), axis=1)
    number = tl.maximum(count, 1).to(tl.float32)
    x, y = tl.where(valid, x, 0.0), tl.where(valid, y, 0.0)
    x, y = x - (tl.sum(x, axis=1) / number)[:, None], y - (tl.sum(y, axis=1) / number)[:, None]
    # Grows with the angle from -pi to pi, without a trigonometric function.
    reach = tl.abs(x) + tl.abs(y)
    slope = x / tl.where(reach > 0, reach, 1.0)
    angle = tl.where(valid, tl.where(y >= 0, 1.0 - slope, slope - 1.0), 4.0)
    lanes = tl.arange(0, 32)
    mine, other = angle[:, :, None], angle[:, None, :]
    earlier = (lanes[None, :] < lanes[:, None])[None, :, :]
    before = (other < mine) | ((other == mine) & earlier)
    rank = tl.sum(before.to(tl.int32), axis=2)
    last = (count - 1)[:, None]
    follows = tl.where(rank == last, 0, rank + 1)
    successor = (rank[:, None, :] == follows[:, :, None]) & valid[:, None, :]
    next_x = tl.sum(tl.where(successor, x[:, None, :], 0.0), axis=2)
    next_y = tl.sum(tl.where(successor, y[:, None, :], 0.0), axis=2)
    doubled = tl.sum(tl.where(valid, x * next_y - next_x * y, 0.0), axis=1)
    return tl.where(count > 2, tl.abs(doubled) * 0.5, 0.0)


@kernel
def _rotated_bits(
    frames, bits, count: int, words: int, threshold: float, BEV: tl.constexpr, CHUNK: tl.constexpr
):  # pragma: no cover - compiled
    row = tl.program_id(0)
    word = tl.program_id(1)
    packed = tl.zeros((CHUNK,), dtype=tl.int64)
    # Only later boxes are dropped: words left of the diagonal stay zero.
    if word * 32 + 31 > row:
        a = frames + row.to(tl.int64) * 6
        xa, ya, hxa, hya = tl.load(a), tl.load(a + 1), tl.load(a + 2), tl.load(a + 3)
        cosa, sina = tl.load(a + 4), tl.load(a + 5)
        k = tl.arange(0, 32)
        # Lanes: side i of a with side j of b (16), corners of b in a (4), corners of a in b (4), nothing (8).
        i, j = tl.where(k < 16, k >> 2, k & 3), k & 3
        ax, ay = _corner_x(i, hxa, hya, cosa, sina)[None, :], _corner_y(i, hxa, hya, cosa, sina)[None, :]
        e = (i + 1) & 3
        ux = _corner_x(e, hxa, hya, cosa, sina)[None, :] - ax
        uy = _corner_y(e, hxa, hya, cosa, sina)[None, :] - ay
        j, f = j[None, :], ((j + 1) & 3)[None, :]
        crossing, of_b, of_a = (
            (k < 16)[None, :],
            ((k >= 16) & (k < 20))[None, :],
            ((k >= 20) & (k < 24))[None, :],
        )
        reach_a = tl.sqrt(hxa * hxa + hya * hya)
        for chunk in range(32 // CHUNK):
            lanes = chunk * CHUNK + tl.arange(0, CHUNK)
            columns = word * 32 + lanes
            later = (columns > row) & (columns < count)
            b = frames + columns.to(tl.int64) * 6
            xb, yb = tl.load(b, mask=later, other=0.0), tl.load(b + 1, mask=later, other=0.0)
            hxb, hyb = tl.load(b + 2, mask=later, other=0.0), tl.load(b + 3, mask=later, other=0.0)
            dx, dy = xa - xb, ya - yb
            reach = (reach_a + tl.sqrt(hxb * hxb + hyb * hyb)) * 1.001 + 0.03
            near = later & (dx * dx + dy * dy <= reach * reach)
            if tl.max(near.to(tl.int32), axis=0) > 0:
                cosb, sinb = tl.load(b + 4, mask=later, other=1.0), tl.load(b + 5, mask=later, other=0.0)
                half_x, half_y, cos, sin = hxb[:, None], hyb[:, None], cosb[:, None], sinb[:, None]
                shift_x, shift_y = (dx * 0.5)[:, None], (dy * 0.5)[:, None]
                bx, by = _corner_x(j, half_x, half_y, cos, sin), _corner_y(j, half_x, half_y, cos, sin)
                vx = _corner_x(f, half_x, half_y, cos, sin) - bx
                vy = _corner_y(f, half_x, half_y, cos, sin) - by
                px, py, qx, qy = ax + shift_x, ay + shift_y, bx - shift_x, by - shift_y
                det = vx * uy - ux * vy
                safe = tl.where(tl.abs(det) > _NOTHING, det, 1.0)
                t = (vx * (qy - py) - (qx - px) * vy) / safe
                s = (ux * (qy - py) - (qx - px) * uy) / safe
                valid = crossing & _crosses(px, py, ux, uy, qx, qy, vx, vy, t, s, det, BEV)
                valid = valid | (of_b & _claims(qx - shift_x, qy - shift_y, hxa, hya, cosa, sina, BEV))
                valid = valid | (of_a & _claims(px + shift_x, py + shift_y, half_x, half_y, cos, sin, BEV))
                x = tl.where(crossing, px + ux * t, tl.where(of_b, qx, px))
                y = tl.where(crossing, py + uy * t, tl.where(of_b, qy, py))
                shared = _shared_area(x, y, valid)
                area_a, area_b = 4.0 * hxa * hya, 4.0 * hxb * hyb
                union = area_a + area_b - shared
                if BEV:
                    iou = shared / tl.maximum(union, _EPSILON)
                else:
                    empty = tl.minimum(area_a, area_b) < _NOTHING
                    iou = tl.where(empty, 0.0, shared / tl.where(empty, 1.0, union))
                hits = near & (iou > threshold)
                packed += hits.to(tl.int64) << lanes.to(tl.int64)
    tl.store(bits + row.to(tl.int64) * words + word, tl.sum(packed, axis=0).to(tl.int32))


@operator("rotated_overlap_bits(Tensor frames, float threshold, bool bev) -> Tensor")
def rotated_overlap_bits(frames: Tensor, threshold: float, bev: bool) -> Tensor:
    """Find which boxes a rotated box drops if it is kept; the result is as that of `overlap_bits`.

    Args:
        frames: (N, 6) float32, best first: centre x and y, half width, half height, cosine and sine of the angle.
        threshold: IoU, at least 0, above which the later box is dropped.
        bev: by mmcv's rule for upright 3D boxes, which counts corners up to 1 cm outside; else that for rotated ones.

    Returns:
        (N, W) uint8 with W a multiple of 8: bit j of byte i is box 8 i + j.
    """
    count = len(frames)
    words = words_for(count)
    bits = torch.empty((count, words), dtype=torch.int32, device=frames.device)
    if count:
        _rotated_bits[(count, words)](
            frames.contiguous(), bits, count, words, float(threshold), BEV=bev, CHUNK=CHUNK, num_warps=4
        )
    return bits.view(torch.uint8)
