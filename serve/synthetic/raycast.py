"""A spinning 64-beam LiDAR seen from its own origin: rays, ground and solids in, points out.

The sensor is modelled on the Velodyne HDL-64E of the KITTI recordings (Geiger et al., *Vision meets
Robotics: The KITTI Dataset*, IJRR 2013): 32 beams from +2 to -8.33 degrees, 32 from -8.83 to -24.33
degrees, about 0.17 degrees between shots at 10 Hz, mounted 1.73 m above the road. As in KITTI's "reduced"
clouds only what a forward camera (1242 x 375 px, focal length 721.5 px) would see is kept. Frame: x
forward, y left, z up, metres, origin in the sensor.

Does not know: labels or boxes; beam divergence, multiple returns, the sensor's motion during a turn, the
offsets of single lasers within the housing (each beam merely starts at a fixed small azimuth offset).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from serve.synthetic.shapes import Array, Polytope, Solid

__all__ = ["CAMERA_HALF_ANGLE", "MAX_RANGE", "SENSOR_HEIGHT", "Ground", "Returns", "cast", "in_camera"]

SENSOR_HEIGHT = 1.73  # metres above the road
MAX_RANGE = 80.0  # metres
CAMERA_HALF_ANGLE = math.radians(40.8)  # horizontal half field of view that is cast
_AZIMUTH_STEP = math.radians(0.1728)
_RANGE_NOISE = 0.02  # metres, one sigma
_FOCAL, _CENTRE_U, _CENTRE_V, _WIDTH, _HEIGHT = 721.5, 609.6, 172.9, 1242.0, 375.0  # pixels
_CAMERA_FORWARD, _CAMERA_DOWN = 0.27, 0.08  # metres from LiDAR to camera
_LOWEST_ELEVATION = math.radians(-16.4)  # beams below never enter the camera's view
_FINEST_GRID = np.concatenate([np.arange(3.0, 20.0, 0.25), np.arange(20.0, MAX_RANGE + 2.0, 1.0)])


@dataclass(frozen=True, slots=True)
class Ground:
    """Height field ``z(x, y)``: a sloped plane, three gentle waves, and raised pavements beside a road.

    Args:
        slope: (2,) rise per metre along x and y.
        waves: (3, 4) rows of (amplitude m, wave vector x and y in rad/m, phase rad).
        road: (offset of the road's axis to the left in m, yaw in rad, half width in m).
        kerb: height of the pavement above the road in m.
        reflectivity: (road, pavement) intensity at normal incidence.
    """

    slope: Array
    waves: Array
    road: tuple[float, float, float]
    kerb: float
    reflectivity: tuple[float, float]

    def beside_road(self, x: Array, y: Array) -> Array:
        """0 on the road, 1 on the pavement, a ramp of 0.2 m between."""
        offset, yaw, half_width = self.road
        across = np.abs(-math.sin(yaw) * x + math.cos(yaw) * (y - offset))
        ramp: Array = np.clip((across - half_width) / 0.2, 0.0, 1.0)
        return ramp

    def height(self, x: Array, y: Array) -> Array:
        """Z of the ground at (x, y) in the sensor frame, metres (broadcasts)."""
        z = -SENSOR_HEIGHT + self.slope[0] * x + self.slope[1] * y + self.kerb * self.beside_road(x, y)
        for amplitude, kx, ky, phase in self.waves:
            # Flat at the sensor, so that its mounting height stays what it is.
            z = z + amplitude * (np.sin(kx * x + ky * y + phase) - math.sin(phase))
        return np.asarray(z, dtype=np.float64)


@dataclass(frozen=True, slots=True)
class Returns:
    """What came back.

    ``points`` (N, 4) float64 x, y, z (m), intensity [0, 1]; ``source`` (N,) index of the object, -1 ground.
    """

    points: Array
    source: NDArray[np.int64]


@lru_cache(maxsize=1)
def _rays() -> tuple[Array, Array, Array]:
    """Elevation (B,), azimuth (B, C), unit directions (B, C, 3) of shots that can enter the view."""
    upper = np.radians(2.0 - np.arange(32) * (10.33 / 31))
    lower = np.radians(-8.83 - np.arange(32) * 0.5)
    elevation = np.concatenate([upper, lower])
    offset = ((np.arange(64) * 37) % 64 / 64.0 - 0.5) * _AZIMUTH_STEP
    keep = elevation > _LOWEST_ELEVATION
    elevation, offset = elevation[keep], offset[keep]
    columns = np.arange(-CAMERA_HALF_ANGLE, CAMERA_HALF_ANGLE, _AZIMUTH_STEP)
    azimuth = columns[None, :] + offset[:, None]
    direction = np.stack(
        [
            np.cos(elevation)[:, None] * np.cos(azimuth),
            np.cos(elevation)[:, None] * np.sin(azimuth),
            np.broadcast_to(np.sin(elevation)[:, None], azimuth.shape),
        ],
        axis=-1,
    )
    for array in (elevation, azimuth, direction):
        array.setflags(write=False)
    return elevation, azimuth, direction


def in_camera(points: Array) -> NDArray[np.bool_]:
    """Which points (N, >=3) a forward camera in KITTI's place would see, (N,) bool."""
    ahead = points[:, 0] - _CAMERA_FORWARD
    safe = np.maximum(ahead, 1e-6)
    u = _CENTRE_U - _FOCAL * points[:, 1] / safe
    v = _CENTRE_V - _FOCAL * (points[:, 2] + _CAMERA_DOWN) / safe
    seen: NDArray[np.bool_] = (ahead > 0.5) & (u >= 0) & (u < _WIDTH) & (v >= 0) & (v < _HEIGHT)
    return seen


def _ground_range(ground: Ground, elevation: Array, azimuth: Array) -> Array:
    """Slant range (B, C) at which each ray first meets the ground, inf where it never does.

    Along each column the ground is sampled at growing distances; the running maximum of the elevation angle
    under which it is seen is monotone, so the first crossing of every beam is one sorted search.
    """
    column = azimuth.mean(axis=0)
    reach = _FINEST_GRID
    x, y = np.cos(column)[:, None] * reach, np.sin(column)[:, None] * reach
    tangent = np.maximum.accumulate(ground.height(x, y) / reach, axis=1)  # (C, R)
    wanted = np.tan(elevation)
    out = np.full(azimuth.shape, np.inf)
    for c in range(tangent.shape[0]):
        row = tangent[c]
        index = np.searchsorted(row, wanted)
        hit = (index > 0) & (index < len(row))
        i = index[hit]
        span = np.maximum(row[i] - row[i - 1], 1e-12)
        flat = reach[i - 1] + (wanted[hit] - row[i - 1]) / span * (reach[i] - reach[i - 1])
        out[hit, c] = flat / np.cos(elevation[hit])
    return out


def _polytope_hit(solid: Polytope, direction: Array) -> tuple[Array, Array, Array]:
    """Entry range (inf where missed), exit range and |cos| of incidence for rays (..., 3) from the origin."""
    rate = direction @ solid.normals.T
    with np.errstate(divide="ignore", invalid="ignore"):
        crossing = solid.offsets / rate
    entering = np.where(rate < 0, crossing, -np.inf)
    face = entering.argmax(axis=-1)
    enter = np.take_along_axis(entering, face[..., None], axis=-1)[..., 0]
    leave = np.where(rate > 0, crossing, np.inf).min(axis=-1)
    outside = ((rate == 0) & (solid.offsets < 0)).any(axis=-1)
    miss = (enter >= leave) | (enter <= 0) | outside
    cosine = np.abs(np.take_along_axis(rate, face[..., None], axis=-1)[..., 0])
    return np.where(miss, np.inf, enter), leave, cosine


def _window(solid: Solid, azimuth: Array) -> slice | None:
    """Find the columns whose rays can hit the solid, or None."""
    if isinstance(solid, Polytope):
        angle = np.arctan2(solid.vertices[:, 1], solid.vertices[:, 0])
        low, high = float(angle.min()), float(angle.max())
        if high - low > math.pi:  # straddles the cut behind the sensor: look everywhere
            return slice(0, azimuth.shape[1])
    else:
        distance = float(np.hypot(solid.centre[0], solid.centre[1]))
        wide = math.asin(min(1.0, float(solid.radii.max()) / max(distance, 1e-6)))
        middle = math.atan2(solid.centre[1], solid.centre[0])
        low, high = middle - wide, middle + wide
    first = math.floor((low + CAMERA_HALF_ANGLE) / _AZIMUTH_STEP) - 1
    last = math.ceil((high + CAMERA_HALF_ANGLE) / _AZIMUTH_STEP) + 2
    first, last = max(first, 0), min(last, azimuth.shape[1])
    return slice(first, last) if first < last else None


def _ellipsoid_hit(centre: Array, radii: Array, yaw: float, direction: Array) -> tuple[Array, Array, Array]:
    """As `_polytope_hit`, for an ellipsoid."""
    cos, sin = math.cos(yaw), math.sin(yaw)
    turn = np.array([[cos, sin, 0.0], [-sin, cos, 0.0], [0.0, 0.0, 1.0]])
    d = (direction @ turn.T) / radii
    c = (turn @ centre) / radii
    a, b = (d * d).sum(axis=-1), d @ c
    root = b * b - a * (c @ c - 1.0)
    hit = root > 0
    root = np.sqrt(np.where(hit, root, 0.0))
    enter, leave = (b - root) / a, (b + root) / a
    normal = (d * enter[..., None] - c) / radii
    cosine = np.abs((normal * (direction @ turn.T)).sum(axis=-1)) / np.maximum(
        np.linalg.norm(normal, axis=-1), 1e-9
    )
    return np.where(hit & (enter > 0), enter, np.inf), leave, cosine


def cast(ground: Ground, objects: list[list[Solid]], rng: np.random.Generator) -> Returns:
    """One sweep over ground and objects (solids in the sensor frame), cropped to the camera's view.

    Deterministic in the state of ``rng``. Points are rounded to millimetres and intensities to hundredths as
    KITTI's are, so that last-bit differences between platforms' sine and cosine rarely show.
    """
    elevation, azimuth, direction = _rays()
    nearest = _ground_range(ground, elevation, azimuth)
    spot = np.where(np.isfinite(nearest), nearest, 0.0)
    paved = ground.beside_road(spot * direction[..., 0], spot * direction[..., 1])
    bright = ground.reflectivity[0] * (1 - paved) + ground.reflectivity[1] * paved
    # Grazing road answers weakly and, far away, not at all.
    lost = np.clip((nearest - 22.0) / 45.0, 0.04, 0.92)
    source = np.full(azimuth.shape, -1, dtype=np.int64)
    for index, solids in enumerate(objects):
        for solid in solids:
            columns = _window(solid, azimuth)
            if columns is None:
                continue
            rays = direction[:, columns]
            if isinstance(solid, Polytope):
                enter, leave, cosine = _polytope_hit(solid, rays)
            else:
                enter, leave, cosine = _ellipsoid_hit(solid.centre, solid.radii, solid.yaw, rays)
            material = solid.material
            if material.depth > 0:
                enter = enter + rng.exponential(material.depth, enter.shape)
                enter = np.where(enter < leave, enter, np.inf)
            closer = enter < nearest[:, columns]
            if not closer.any():
                continue
            nearest[:, columns][closer] = enter[closer]
            source[:, columns][closer] = index
            bright[:, columns][closer] = (material.reflectivity * (0.45 + 0.55 * cosine))[closer]
            lost[:, columns][closer] = material.drop
    far = np.clip((nearest - 45.0) / 80.0, 0.0, 1.0)
    kept = np.isfinite(nearest) & (nearest < MAX_RANGE)
    kept &= rng.random(nearest.shape) >= np.maximum(lost, far) + 0.01
    noisy = nearest[kept] + rng.normal(0.0, _RANGE_NOISE, int(kept.sum()))
    intensity = np.clip(
        bright[kept] * rng.normal(1.0, 0.12, noisy.shape) + rng.normal(0.0, 0.015, noisy.shape), 0, 0.99
    )
    points = np.column_stack([direction[kept] * noisy[:, None], intensity])
    points[:, :3] = np.round(points[:, :3], 3)
    points[:, 3] = np.round(points[:, 3], 2)
    seen = in_camera(points)
    return Returns(points[seen], source[kept][seen])
