"""Convex solids that synthetic LiDAR scenes are built of: cars, people, cyclists, street furniture.

Every solid is either a convex polytope (half spaces ``n . p <= c``) or an ellipsoid; an object is a list of
solids in its own frame (x along the heading, y to the left, z up, origin at the bottom centre, metres), so
that a union of convex parts gives a car its bonnet, cabin and wheels. Proportions were chosen by eye to
fill the box of the KITTI-like sizes drawn in `serve.synthetic.layout`.

Does not know: where objects stand, how they are seen, any class label, torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Ellipsoid",
    "Material",
    "Polytope",
    "Solid",
    "box",
    "car",
    "cyclist",
    "disc_outline",
    "frustum",
    "pedestrian",
    "place",
    "prism",
]

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Material:
    """How a surface answers a laser pulse.

    Args:
        reflectivity: intensity in [0, 1] at normal incidence.
        drop: chance in [0, 1] that a pulse gives no return at all (glass) or passes (porous).
        depth: mean depth in metres that a pulse travels inside before it returns; 0 for hard surfaces.
            Leaves have one; a pulse that leaves the solid first is not returned by it.
    """

    reflectivity: float
    drop: float = 0.0
    depth: float = 0.0


@dataclass(frozen=True, slots=True)
class Polytope:
    """Convex polytope: all p with ``normals @ p <= offsets``; ``vertices`` (V, 3) bound it (for culling)."""

    normals: Array
    offsets: Array
    vertices: Array
    material: Material


@dataclass(frozen=True, slots=True)
class Ellipsoid:
    """Ellipsoid with ``centre`` (3,), ``radii`` (3,) along its own axes, turned by ``yaw`` about z."""

    centre: Array
    radii: Array
    yaw: float
    material: Material


Solid = Polytope | Ellipsoid


def prism(
    outline: Sequence[tuple[float, float]] | Array,
    low: float,
    high: float,
    material: Material,
    *,
    axis: str = "z",
) -> Polytope:
    """Prism over a convex counter-clockwise outline (K, 2).

    ``axis='z'``: the outline lies in (x, y) and is extruded over z in [low, high]; ``axis='y'``: the outline
    lies in (x, z) and is extruded over y (wheels, lengthwise profiles).
    """
    ring = np.asarray(outline, dtype=np.float64)
    edge = np.roll(ring, -1, axis=0) - ring
    normal = np.stack([edge[:, 1], -edge[:, 0]], axis=1)
    normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    reach = (normal * ring).sum(axis=1)
    count = len(ring)
    zeros = np.zeros(count)
    side = np.stack([normal[:, 0], normal[:, 1], zeros], axis=1)
    normals = np.concatenate([side, [[0.0, 0.0, 1.0], [0.0, 0.0, -1.0]]])
    offsets = np.concatenate([reach, [high, -low]])
    vertices = np.concatenate(
        [np.column_stack([ring, np.full(count, low)]), np.column_stack([ring, np.full(count, high)])]
    )
    if axis == "y":
        normals, vertices = normals[:, [0, 2, 1]], vertices[:, [0, 2, 1]]
    elif axis != "z":
        raise ValueError(f"axis must be 'y' or 'z', not {axis!r}")
    return Polytope(normals, offsets, vertices, material)


def disc_outline(centre_x: float, centre_y: float, radius: float, corners: int = 8) -> Array:
    """Counter-clockwise regular polygon (corners, 2) inscribed in a circle (all in metres)."""
    angle = np.arange(corners) * (2 * math.pi / corners)
    return np.stack([centre_x + radius * np.cos(angle), centre_y + radius * np.sin(angle)], axis=1)


def box(
    x: tuple[float, float], y: tuple[float, float], z: tuple[float, float], material: Material
) -> Polytope:
    """Axis-aligned cuboid in the object frame, metres."""
    return prism([(x[0], y[0]), (x[1], y[0]), (x[1], y[1]), (x[0], y[1])], z[0], z[1], material)


def _ordered(a: float, b: float) -> tuple[float, float]:
    return (a, b) if a <= b else (b, a)


def frustum(
    bottom: tuple[float, float, float, float],
    top: tuple[float, float, float, float],
    z: tuple[float, float],
    material: Material,
) -> Polytope:
    """Frustum between two rectangles ``(x0, x1, y0, y1)`` at heights z[0] and z[1], metres."""
    (low, high), rings = z, []
    for (x0, x1, y0, y1), height in ((bottom, low), (top, high)):
        rings.append(np.array([[x0, y0, height], [x1, y0, height], [x1, y1, height], [x0, y1, height]]))
    normals, offsets = [np.array([0.0, 0.0, 1.0]), np.array([0.0, 0.0, -1.0])], [high, -low]
    for corner in range(4):
        along = rings[0][(corner + 1) % 4] - rings[0][corner]
        up = rings[1][corner] - rings[0][corner]
        normal = np.cross(along, up)
        normal /= np.linalg.norm(normal)
        normals.append(normal)
        offsets.append(float(normal @ rings[0][corner]))
    return Polytope(np.array(normals), np.array(offsets), np.concatenate(rings), material)


def place(solids: Sequence[Solid], x: float, y: float, z: float, yaw: float) -> list[Solid]:
    """Move solids from the object to the sensor frame: turn by yaw (rad, counter-clockwise), shift (m)."""
    cos, sin = math.cos(yaw), math.sin(yaw)
    turn = np.array([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]])
    shift = np.array([x, y, z])
    placed: list[Solid] = []
    for solid in solids:
        if isinstance(solid, Polytope):
            normals = solid.normals @ turn.T
            placed.append(
                Polytope(
                    normals, solid.offsets + normals @ shift, solid.vertices @ turn.T + shift, solid.material
                )
            )
        else:
            placed.append(replace(solid, centre=turn @ solid.centre + shift, yaw=solid.yaw + yaw))
    return placed


def car(length: float, width: float, height: float, rng: np.random.Generator) -> list[Solid]:
    """Body with chamfered corners, sloping cabin of glass, roof, wheels and number plates inside the box."""
    half_l, half_w = length / 2, width / 2
    paint = Material(float(rng.choice([0.04, 0.12, 0.25, 0.4, 0.6]) * rng.uniform(0.8, 1.2)), drop=0.04)
    glass = Material(0.06, drop=float(rng.uniform(0.35, 0.75)))
    rubber, plate = Material(0.05, drop=0.15), Material(0.95)
    waist = height * float(rng.uniform(0.54, 0.64))
    chamfer_x, chamfer_y = float(rng.uniform(0.12, 0.35)), float(rng.uniform(0.15, 0.35))
    outline = [
        (half_l, -half_w + chamfer_y),
        (half_l, half_w - chamfer_y),
        (half_l - chamfer_x, half_w),
        (-half_l + chamfer_x, half_w),
        (-half_l, half_w - chamfer_y),
        (-half_l, -half_w + chamfer_y),
        (-half_l + chamfer_x, -half_w),
        (half_l - chamfer_x, -half_w),
    ]
    body = prism(outline, 0.2, waist, paint)
    # The bonnet falls towards the front: one more half space through (0.22 L, waist) and (L/2, waist - fall).
    fall = float(rng.uniform(0.08, 0.22))
    slope = np.array([fall, 0.0, 0.28 * length])
    slope /= np.linalg.norm(slope)
    body = replace(
        body,
        normals=np.vstack([body.normals, slope]),
        offsets=np.append(body.offsets, slope @ np.array([0.22 * length, 0.0, waist])),
    )
    style = int(rng.integers(3))  # 0 saloon, 1 hatchback, 2 estate
    rear_low = (-0.40, -0.485, -0.49)[style] * length
    rear_top = (-0.27, -0.37, -0.45)[style] * length
    front_low, front_top = float(rng.uniform(0.19, 0.25)) * length, float(rng.uniform(0.02, 0.09)) * length
    low_w, top_w = 0.96 * half_w, float(rng.uniform(0.72, 0.84)) * half_w
    roof_z = height - 0.06
    solids: list[Solid] = [
        body,
        frustum(
            (rear_low, front_low, -low_w, low_w), (rear_top, front_top, -top_w, top_w), (waist, roof_z), glass
        ),
        box((rear_top, front_top), (-top_w, top_w), (roof_z, height), paint),
        box((half_l - 0.02, half_l), (-0.26, 0.26), (0.42, 0.53), plate),
        box((-half_l, -half_l + 0.02), (-0.26, 0.26), (0.55, 0.67), plate),
    ]
    for side in (-1.0, 1.0):
        # B pillars and door frames: opaque strips in the glass.
        pillar_x = 0.5 * (rear_top + front_top)
        solids.append(
            frustum(
                (pillar_x - 0.08, pillar_x + 0.08, *_ordered(side * low_w, side * (low_w - 0.06))),
                (pillar_x - 0.08, pillar_x + 0.08, *_ordered(side * top_w, side * (top_w - 0.06))),
                (waist, roof_z),
                paint,
            )
        )
        for axle in (-0.31 * length, 0.31 * length):
            y0, y1 = sorted((side * half_w, side * (half_w - 0.22)))
            solids.append(prism(disc_outline(axle, 0.32, 0.32, 10), y0, y1, rubber, axis="y"))
    return solids


def pedestrian(length: float, width: float, height: float, rng: np.random.Generator) -> list[Solid]:
    """Two striding legs, torso, swinging arms and a head inside the box."""
    cloth = Material(float(rng.uniform(0.08, 0.5)), drop=0.03)
    trousers = Material(float(rng.uniform(0.05, 0.4)), drop=0.04)
    skin = Material(0.35, drop=0.05)
    leg_top, shoulder = 0.48 * height, 0.83 * height
    stride = max(length / 2 - 0.12, 0.03) * float(rng.uniform(0.4, 1.0))
    hip = min(0.1, width / 4)
    depth, half_w = min(0.15, length / 2), min(0.22, width / 2 - 0.07)
    torso = [
        (depth, -0.6 * half_w), (depth, 0.6 * half_w), (0.4 * depth, half_w), (-0.4 * depth, half_w),
        (-depth, 0.6 * half_w), (-depth, -0.6 * half_w), (-0.4 * depth, -half_w), (0.4 * depth, -half_w),
    ]  # fmt: skip
    solids: list[Solid] = [
        prism(torso, leg_top, shoulder, cloth),
        Ellipsoid(np.array([0.02, 0.0, height - 0.13]), np.array([0.11, 0.09, 0.13]), 0.0, skin),
    ]
    for side in (-1.0, 1.0):
        foot = side * stride
        leg = [(foot - 0.07, 0.0), (foot + 0.12, 0.0), (0.08, leg_top), (-0.08, leg_top)]
        y0, y1 = sorted((side * (hip - 0.07), side * (hip + 0.07)))
        solids.append(prism(leg, y0, y1, trousers, axis="y"))
        hand = -side * stride * 0.9
        arm = [
            (hand - 0.05, 0.46 * height),
            (hand + 0.05, 0.46 * height),
            (0.06, shoulder),
            (-0.06, shoulder),
        ]
        y0, y1 = sorted((side * half_w, side * (half_w + 0.08)))
        solids.append(prism(arm, y0, y1, cloth, axis="y"))
    return solids


def cyclist(length: float, width: float, height: float, rng: np.random.Generator) -> list[Solid]:
    """Two wheels, frame, handlebar and a leaning rider inside the box."""
    radius = 0.33
    wheel, metal = Material(0.1, drop=0.45), Material(float(rng.uniform(0.2, 0.6)), drop=0.2)
    cloth = Material(float(rng.uniform(0.08, 0.6)), drop=0.03)
    trousers, skin = Material(float(rng.uniform(0.05, 0.4)), drop=0.05), Material(0.35, drop=0.05)
    front, rear = length / 2 - radius, -length / 2 + radius
    saddle, shoulder = 0.53 * height, 0.86 * height
    lean, half_w = float(rng.uniform(0.15, 0.4)), min(0.22, width / 2 - 0.06)
    seat = rear + 0.22
    solids: list[Solid] = [
        prism(disc_outline(front, radius, radius, 12), -0.03, 0.03, wheel, axis="y"),
        prism(disc_outline(rear, radius, radius, 12), -0.03, 0.03, wheel, axis="y"),
        prism(
            [(rear, radius - 0.03), (0.0, radius - 0.03), (front - 0.1, 0.85), (seat, 0.85)],
            -0.03, 0.03, metal, axis="y",
        ),
        box((front - 0.14, front - 0.06), (-width / 2, width / 2), (0.95, 1.02), metal),
        prism(
            [
                (seat - 0.15, saddle),
                (seat + 0.15, saddle),
                (seat + lean + 0.16, shoulder),
                (seat + lean - 0.12, shoulder),
            ],
            -half_w, half_w, cloth, axis="y",
        ),
        Ellipsoid(
            np.array([seat + lean + 0.08, 0.0, height - 0.13]), np.array([0.12, 0.09, 0.13]), 0.0, skin
        ),
    ]  # fmt: skip
    reach = front - 0.1
    for side, pedal in ((-1.0, 0.12), (1.0, 0.36)):
        y0, y1 = sorted((side * 0.05, side * 0.19))
        leg = [(0.0, pedal), (0.14, pedal), (seat + 0.16, saddle), (seat - 0.02, saddle)]
        solids.append(prism(leg, y0, y1, trousers, axis="y"))
        y0, y1 = sorted((side * (half_w - 0.02), side * (half_w + 0.06)))
        arm = [
            (reach, 1.0),
            (seat + lean + 0.08, shoulder),
            (seat + lean - 0.02, shoulder - 0.1),
            (reach - 0.06, 0.95),
        ]
        solids.append(prism(arm, y0, y1, cloth, axis="y"))
    return solids
