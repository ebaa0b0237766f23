"""What a camera beside the LiDAR sees of a synthetic scene: ray casting, sunlight and shadows.

The pinhole camera of `serve.synthetic.raycast` (KITTI's left colour camera: 1242 x 375 px, focal length 721.5 px),
0.27 m before and 0.08 m below the LiDAR. For images in the documentation; no model sees these images. Colours
are invented: a scene knows reflectivities of a laser only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from serve.synthetic.layout import Layout, draw_layout
from serve.synthetic.raycast import MAX_RANGE, Ground
from serve.synthetic.shapes import Array, Material, Polytope, Solid

__all__ = [
    "CENTRE_U",
    "CENTRE_V",
    "FOCAL",
    "HEIGHT",
    "LIDAR_TO_IMAGE",
    "ORIGIN",
    "WIDTH",
    "render",
    "render_seed",
]

WIDTH, HEIGHT = 1242, 375
FOCAL, CENTRE_U, CENTRE_V = 721.5, 609.6, 172.9
ORIGIN = np.array([0.27, 0.0, -0.08])  # of the camera in the LiDAR's frame, metres
#: (4, 4): LiDAR coordinates (x forward, y left, z up; m) to (u * depth, v * depth, depth, 1).
LIDAR_TO_IMAGE = np.array(
    [
        [CENTRE_U, -FOCAL, 0.0, -CENTRE_U * ORIGIN[0]],
        [CENTRE_V, 0.0, -FOCAL, -CENTRE_V * ORIGIN[0] + FOCAL * ORIGIN[2]],
        [1.0, 0.0, 0.0, -ORIGIN[0]],
        [0.0, 0.0, 0.0, 1.0],
    ]
)

_SUN = np.array([-0.42, 0.62, 0.66]) / math.sqrt(0.42**2 + 0.62**2 + 0.66**2)
_SUNLIGHT, _SKYLIGHT, _BOUNCE = np.array([1.50, 1.36, 1.12]), np.array([0.26, 0.32, 0.44]), 0.10
_ZENITH, _HORIZON = np.array([0.16, 0.36, 0.74]), np.array([0.66, 0.78, 0.92])
_HAZE_M = 380.0  # distance at which 63 % of a colour is haze
_ASPHALT, _PAVING = np.array([0.115, 0.118, 0.125]), np.array([0.30, 0.28, 0.25])
_PAINTS = np.array(
    [
        (0.78, 0.79, 0.80),
        (0.10, 0.20, 0.42),
        (0.52, 0.09, 0.08),
        (0.14, 0.15, 0.17),
        (0.70, 0.50, 0.12),
        (0.10, 0.34, 0.32),
    ]
)
_CLOTHES = np.array(
    [
        (0.62, 0.20, 0.14),
        (0.14, 0.30, 0.52),
        (0.72, 0.62, 0.28),
        (0.20, 0.42, 0.26),
        (0.50, 0.30, 0.52),
        (0.80, 0.78, 0.74),
    ]
)
_SKIN = np.array([0.66, 0.46, 0.36])


@dataclass(slots=True)
class _Surface:
    """What each pixel (rows, columns) sees: distance along the ray (m), albedo RGB, normal, shine in [0, 1]."""

    distance: Array
    albedo: Array
    normal: Array
    shine: Array


def render(layout: Layout, supersampling: int = 2) -> NDArray[np.uint8]:
    """Render a scene from the camera, ``supersampling``² rays per pixel.

    Returns:
        (375, 1242, 3) uint8, BGR; the same for the same scene.
    """
    rays = _rays(supersampling)
    surface = _ground(layout.ground, rays)
    items = [(item.solids, item.label, index) for index, item in enumerate(layout.objects)]
    items += [(solids, -1, index) for index, solids in enumerate(layout.clutter)]
    for solids, label, index in items:
        for solid in solids:
            _cover(surface, rays, solid, _albedo(solid.material, label, index))
    lit = _sunlit(surface, rays, [solid for solids, *_ in items for solid in solids])
    colour = _shade(surface, rays, lit)
    small = cv2.resize(colour.astype(np.float32), (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA)
    # Exposure, then sRGB's curve.
    encoded = 255 * np.clip(1 - np.exp(-1.5 * small), 0, 1) ** (1 / 2.2)
    return np.ascontiguousarray(encoded[..., ::-1].round().astype(np.uint8))


def render_seed(seed: int) -> NDArray[np.uint8]:
    """`render` of the scene that `serve.synthetic.scenes.generate_scene` makes from the same seed."""
    return render(draw_layout(np.random.Generator(np.random.PCG64(seed))))


def _rays(supersampling: int) -> Array:
    """Directions (rows, columns, 3) of unit length through the subpixels."""
    u = (np.arange(WIDTH * supersampling) + 0.5) / supersampling - 0.5
    v = (np.arange(HEIGHT * supersampling) + 0.5) / supersampling - 0.5
    left, up = np.meshgrid((CENTRE_U - u) / FOCAL, (CENTRE_V - v) / FOCAL)
    rays = np.stack([np.ones_like(left), left, up], axis=-1)
    return np.asarray(rays / np.linalg.norm(rays, axis=-1, keepdims=True))


def _ground(ground: Ground, rays: Array) -> _Surface:
    """Render the scene without objects; the sky is infinitely far.

    As in `serve.synthetic.raycast`: along a column of pixels the running maximum of the ground's slope is monotone, so
    the first crossing of every ray is one sorted search.
    """
    slope = rays[..., 1:] / rays[..., :1]
    reach = np.concatenate([np.arange(2.0, 30.0, 0.1), np.arange(30.0, 6 * MAX_RANGE, 1.0)])
    distance = np.full(rays.shape[:2], np.inf)
    for column in range(rays.shape[1]):
        height = ground.height(ORIGIN[0] + reach, ORIGIN[1] + slope[0, column, 0] * reach)
        rise = np.maximum.accumulate((height - ORIGIN[2]) / reach)
        up = slope[:, column, 1]
        k = np.searchsorted(rise, up)
        hit = (k > 0) & (k < len(reach))
        i = k[hit]
        part = (up[hit] - rise[i - 1]) / np.maximum(rise[i] - rise[i - 1], 1e-12)
        along = reach[i - 1] + part * (reach[i] - reach[i - 1])
        distance[hit, column] = along / rays[hit, column, 0]
    safe = np.where(np.isfinite(distance), distance, 0.0)
    spot = ORIGIN + rays * safe[..., None]
    paved = ground.beside_road(spot[..., 0], spot[..., 1])[..., None]
    grain = _noise(spot, 0.05) * np.exp(-safe / 8) + _noise(spot, 0.6) * np.exp(-safe / 60) - 0.5
    slabs = (np.minimum(np.mod(spot[..., 0], 1.2), np.mod(spot[..., 1], 1.2)) < 0.03) * np.exp(-safe / 14)
    albedo = _ASPHALT * (1 + 0.35 * grain[..., None]) * (1 - paved)
    albedo = albedo + _PAVING * (1 + 0.15 * grain[..., None] - 0.3 * slabs[..., None]) * paved
    normal = np.zeros_like(rays)
    normal[..., 2] = 1.0
    return _Surface(distance, np.asarray(albedo), normal, np.zeros(distance.shape))


def _albedo(material: Material, label: int, index: int) -> tuple[Array, float]:
    """Colour and shine of a material; ``label`` is a row of `serve.synthetic.layout.CLASSES`, -1 for clutter."""
    bright = material.reflectivity
    if material.depth > 0:
        return np.array([0.17, 0.30, 0.09]) * (0.7 + bright) * (1.0 + 0.25 * ((index * 7) % 3 - 1)), 0.0
    if bright <= 0.06 and material.drop >= 0.3:
        return np.array([0.035, 0.045, 0.055]), 0.55  # glass
    if bright <= 0.1 and label >= 0:
        return np.array([0.035, 0.035, 0.038]), 0.0  # rubber
    if bright >= 0.9:
        return np.array([0.85, 0.85, 0.80]), 0.0  # number plates, signs
    if label == 2:
        return _PAINTS[index % len(_PAINTS)], 0.16
    if label >= 0:
        if bright == 0.35 and material.drop == 0.05:
            return _SKIN, 0.0
        tint = _CLOTHES[index % len(_CLOTHES)]
        dark = material.drop >= 0.04  # trousers
        return (np.array([0.10, 0.12, 0.18]) * (0.6 + bright) if dark else tint), 0.0
    stone = np.array([(0.52, 0.45, 0.36), (0.50, 0.32, 0.24), (0.56, 0.54, 0.50), (0.42, 0.44, 0.46)])
    return stone[index % len(stone)] * (0.65 + bright), 0.0


def _cover(surface: _Surface, rays: Array, solid: Solid, look: tuple[Array, float]) -> None:
    """Draw one solid where it is nearer than what is there."""
    window = _window(solid, *surface.distance.shape)
    if window is None:
        return
    part = rays[window]
    enter, leave, normal = _hit(solid, np.broadcast_to(ORIGIN, part.shape), part)
    albedo = np.broadcast_to(look[0], part.shape)
    spot = ORIGIN + part * np.where(np.isfinite(enter), enter, 0.0)[..., None]
    if solid.material.depth > 0:  # leaves: ragged at the rim, mottled inside
        leaf, twig, branch = (_noise(spot, size) for size in (0.05, 0.14, 0.5))
        chord = np.where(np.isfinite(enter), leave - enter, 0.0)
        ragged = (0.42 * leaf + 0.5 * twig + 0.42 * branch) * float(np.ptp(_outer_points(solid)[:, 2])) / 2
        enter = np.where(chord > ragged, enter, np.inf)
        albedo = albedo * (0.15 + 0.7 * leaf + 0.7 * twig + 0.4 * branch)[..., None]
        bump = np.stack([_noise(spot + shift, 0.11) - 0.5 for shift in (11.0, 23.0, 37.0)], axis=-1)
        normal = normal + 1.6 * bump
        normal = normal / np.maximum(np.linalg.norm(normal, axis=-1, keepdims=True), 1e-9)
    nearer = enter < surface.distance[window]
    surface.distance[window][nearer] = enter[nearer]
    surface.albedo[window][nearer] = albedo[nearer]
    surface.normal[window][nearer] = normal[nearer]
    surface.shine[window][nearer] = look[1]


def _outer_points(solid: Solid) -> Array:
    """Points (K, 3) whose convex hull holds the solid."""
    if isinstance(solid, Polytope):
        return solid.vertices
    signs = np.array([(i, j, k) for i in (-1, 1) for j in (-1, 1) for k in (-1, 1)], np.float64)
    return np.asarray(solid.centre + signs * float(solid.radii.max()))


def _window(solid: Solid, rows: int, columns: int) -> tuple[slice, slice] | None:
    """Rows and columns that may see the solid, None if it is behind the camera or outside the image."""
    points = _outer_points(solid) - ORIGIN
    if (points[:, 0] <= 0.1).all():
        return None
    if (points[:, 0] <= 0.1).any():
        return slice(0, rows), slice(0, columns)
    u = (CENTRE_U - FOCAL * points[:, 1] / points[:, 0] + 0.5) * columns / WIDTH
    v = (CENTRE_V - FOCAL * points[:, 2] / points[:, 0] + 0.5) * rows / HEIGHT
    top, bottom = max(0, math.floor(v.min()) - 1), min(rows, math.ceil(v.max()) + 1)
    left, right = max(0, math.floor(u.min()) - 1), min(columns, math.ceil(u.max()) + 1)
    return (slice(top, bottom), slice(left, right)) if top < bottom and left < right else None


def _hit(solid: Solid, origin: Array, direction: Array) -> tuple[Array, Array, Array]:
    """Where rays (..., 3) enter and leave a solid (m; enter is inf where missed), and the normal at entry."""
    if isinstance(solid, Polytope):
        rate = direction @ solid.normals.T
        room = solid.offsets - origin @ solid.normals.T
        with np.errstate(divide="ignore", invalid="ignore"):
            crossing = room / rate
        entering = np.where(rate < 0, crossing, -np.inf)
        face = entering.argmax(axis=-1)
        enter = np.take_along_axis(entering, face[..., None], axis=-1)[..., 0]
        leave = np.where(rate > 0, crossing, np.inf).min(axis=-1)
        outside = ((rate == 0) & (room < 0)).any(axis=-1)
        missed = (enter >= leave) | (enter <= 0) | outside
        return np.where(missed, np.inf, enter), leave, solid.normals[face]
    cosine, sine = math.cos(solid.yaw), math.sin(solid.yaw)
    turn = np.array([[cosine, sine, 0.0], [-sine, cosine, 0.0], [0.0, 0.0, 1.0]])
    d, c = (direction @ turn.T) / solid.radii, ((solid.centre - origin) @ turn.T) / solid.radii
    a, b = (d * d).sum(axis=-1), (d * c).sum(axis=-1)
    root = b * b - a * ((c * c).sum(axis=-1) - 1.0)
    meets = root > 0
    root = np.sqrt(np.where(meets, root, 0.0))
    enter, leave = (b - root) / a, (b + root) / a
    normal = ((d * enter[..., None] - c) / solid.radii) @ turn
    normal = normal / np.maximum(np.linalg.norm(normal, axis=-1, keepdims=True), 1e-9)
    return np.where(meets & (enter > 0), enter, np.inf), leave, normal


def _sunlit(surface: _Surface, rays: Array, solids: list[Solid]) -> Array:
    """Share of the sun's light that reaches what each pixel sees, (rows, columns) in [0, 1]."""
    lit = np.ones(surface.distance.shape)
    seen = np.flatnonzero(np.isfinite(surface.distance) & (surface.distance < 2 * MAX_RANGE))
    distance = surface.distance.ravel()[seen, None]
    spot = ORIGIN + rays.reshape(-1, 3)[seen] * distance + surface.normal.reshape(-1, 3)[seen] * 0.02
    # Two axes across the sun's direction: a solid can shade only what lies in its outline there.
    across = np.linalg.svd(_SUN[None])[2][1:]
    flat = spot @ across.T
    share = np.ones(len(seen))
    for solid in solids:
        outline = _outer_points(solid) @ across.T
        low, high = outline.min(axis=0), outline.max(axis=0)
        near = np.flatnonzero(((flat >= low) & (flat <= high)).all(axis=1))
        if not near.size:
            continue
        enter, leave, _ = _hit(solid, spot[near], np.broadcast_to(_SUN, (len(near), 3)))
        passes: Any = 0.0  # of the light, by ray or of all
        if solid.material.depth > 0:
            thick = np.where(np.isfinite(enter), leave - enter, 0.0)
            passes = np.exp(-2.5 * thick * (0.3 + _noise(spot[near], 0.3)))
        elif solid.material.drop >= 0.3:
            passes = 0.55
        share[near] *= np.where(np.isfinite(enter), passes, 1.0)
    lit.ravel()[seen] = share
    return lit


def _shade(surface: _Surface, rays: Array, lit: Array) -> Array:
    """Linear RGB (rows, columns, 3): sun, sky, light from the ground, reflected sky, haze."""
    normal = surface.normal
    sun = np.clip(normal @ _SUN, 0, 1) * lit
    open_sky = 0.5 + 0.5 * normal[..., 2]
    light = sun[..., None] * _SUNLIGHT + open_sky[..., None] * _SKYLIGHT + (1 - open_sky)[..., None] * _BOUNCE
    colour = surface.albedo * light
    mirrored = rays - 2 * (rays * normal).sum(axis=-1, keepdims=True) * normal
    grazing = 1 - np.abs((rays * normal).sum(axis=-1))
    reflection = np.clip(surface.shine * (0.35 + 0.65 * grazing**3), 0, 1)[..., None]
    colour = colour * (1 - reflection) + _sky(mirrored) * reflection * (mirrored[..., 2:] > -0.05)
    haze = np.where(np.isfinite(surface.distance), np.exp(-surface.distance / _HAZE_M), 0.0)[..., None]
    colour = colour * haze + _sky(rays) * (1 - haze)
    return np.asarray(colour)


def _sky(direction: Array) -> Array:
    up = np.clip(direction[..., 2:], 0, 1) ** 0.6
    return np.asarray(_HORIZON * (1 - up) + _ZENITH * up)


def _noise(points: Array, size_m: float) -> Array:
    """Value noise in [0, 1] of points (..., 3): random on a lattice of ``size_m`` metres, smooth between."""
    place = points / size_m
    cell = np.floor(place)
    part = place - cell
    part = part * part * (3 - 2 * part)
    base = cell.astype(np.int64)
    total = np.zeros(points.shape[:-1])
    for corner in np.ndindex(2, 2, 2):
        x, y, z = (base[..., k] + corner[k] for k in range(3))
        mixed = (x * 73_856_093) ^ (y * 19_349_663) ^ (z * 83_492_791)
        mixed = (mixed ^ (mixed >> 13)) * 1_274_126_177
        value = ((mixed ^ (mixed >> 16)) & 0xFFFF) / 0xFFFF
        weight = np.prod([part[..., k] if corner[k] else 1 - part[..., k] for k in range(3)], axis=0)
        total += value * weight
    return total
