"""Random street scenes: where the road runs and what stands on and beside it, before any laser is fired.

Two kinds of place: a street (traffic, parked rows, pavements, house fronts, trees) and an open square where
everything stands at random headings. Sizes are drawn around the KITTI means (car 3.9 x 1.6 x 1.56 m,
cyclist 1.76 x 0.6 x 1.73 m, pedestrian 0.8 x 0.6 x 1.73 m, length x width x height).

Does not know: rays, points, how much of an object is seen. Densities of people and cyclists are far above a
real street's, so that a small training set holds enough of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from serve.synthetic.raycast import CAMERA_HALF_ANGLE, SENSOR_HEIGHT, Ground
from serve.synthetic.shapes import (
    Ellipsoid,
    Material,
    Solid,
    box,
    car,
    cyclist,
    disc_outline,
    pedestrian,
    place,
    prism,
)

__all__ = ["CLASSES", "Layout", "Placed", "draw_layout"]

CLASSES = ("Pedestrian", "Cyclist", "Car")
_NEAREST, _FARTHEST = 5.0, 62.0  # metres from the sensor to object centres
_MARGIN = 0.03  # metres between an object's solids and its box, each side


@dataclass(frozen=True, slots=True)
class Placed:
    """One labelled object: ``box`` (x, y, z of the bottom centre, dx, dy, dz in m, yaw in rad) and solids."""

    label: int
    box: tuple[float, float, float, float, float, float, float]
    solids: list[Solid]


@dataclass(slots=True)
class Layout:
    """The ground, the labelled objects and the unlabelled clutter of one scene."""

    ground: Ground
    objects: list[Placed] = field(default_factory=list)
    clutter: list[list[Solid]] = field(default_factory=list)


class _Builder:
    """Draws one layout; remembers occupied discs so that nothing stands in anything else."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.discs: list[tuple[float, float, float]] = [(0.0, 0.0, 3.0)]
        self.road_yaw = float(rng.normal(0.0, 0.07))
        self.road_offset = float(rng.uniform(-2.5, 2.5))
        self.half_width = float(rng.uniform(4.5, 8.5))
        waves = np.column_stack(
            [
                rng.uniform(0.0, 0.05, 3),
                rng.uniform(-0.3, 0.3, 3),
                rng.uniform(-0.3, 0.3, 3),
                rng.uniform(0.0, 2 * math.pi, 3),
            ]
        )
        ground = Ground(
            slope=np.asarray(rng.normal(0.0, [0.005, 0.008])),
            waves=waves,
            road=(self.road_offset, self.road_yaw, self.half_width),
            kerb=float(rng.uniform(0.05, 0.16)),
            reflectivity=(float(rng.uniform(0.18, 0.36)), float(rng.uniform(0.25, 0.45))),
        )
        self.layout = Layout(ground)

    def at(self, along: float, across: float) -> tuple[float, float]:
        """Road coordinates (m along, m to the left of the axis) to sensor x, y."""
        cos, sin = math.cos(self.road_yaw), math.sin(self.road_yaw)
        return cos * along - sin * across, self.road_offset + sin * along + cos * across

    def z(self, x: float, y: float) -> float:
        return float(self.layout.ground.height(np.asarray(x), np.asarray(y)))

    def claim(self, x: float, y: float, length: float, width: float, yaw: float, gap: float = 0.25) -> bool:
        """Reserve the ground under a rectangle; False, and nothing reserved, where it is taken."""
        count = max(1, math.ceil(length / max(width, 0.3)))
        step = length / count
        radius = math.hypot(step, width) / 2
        new = []
        for i in range(count):
            offset = (i + 0.5) * step - length / 2
            new.append((x + math.cos(yaw) * offset, y + math.sin(yaw) * offset, radius))
        for ax, ay, ar in new:
            for bx, by, br in self.discs:
                if (ax - bx) ** 2 + (ay - by) ** 2 < (ar + br + gap) ** 2:
                    return False
        self.discs.extend(new)
        return True

    def add_object(self, label: int, x: float, y: float, yaw: float) -> bool:
        """Draw a size, and stand one object there if it is in view and the place is free."""
        rng = self.rng
        distance = math.hypot(x, y)
        if not _NEAREST < distance < _FARTHEST or abs(math.atan2(y, x)) > CAMERA_HALF_ANGLE - 0.02:
            return False
        if label == 2:
            scale = float(rng.normal(1.0, 0.05))
            size = (
                float(np.clip(3.95 * scale + rng.normal(0, 0.15), 3.2, 4.9)),
                float(np.clip(1.64 * scale + rng.normal(0, 0.05), 1.45, 1.95)),
                float(np.clip(1.54 + rng.normal(0, 0.08), 1.35, 1.85)),
            )
            shape = car
        elif label == 1:
            size = (
                float(rng.uniform(1.6, 1.9)),
                float(rng.uniform(0.5, 0.72)),
                float(rng.uniform(1.6, 1.85)),
            )
            shape = cyclist
        else:
            size = (
                float(rng.uniform(0.5, 1.05)),
                float(rng.uniform(0.5, 0.72)),
                float(rng.uniform(1.5, 1.92)),
            )
            shape = pedestrian
        if not self.claim(x, y, size[0], size[1], yaw, gap=0.35 if label == 2 else 0.15):
            return False
        z = self.z(x, y)
        inner = (size[0] - 2 * _MARGIN, size[1] - 2 * _MARGIN, size[2] - _MARGIN)
        solids = place(shape(*inner, rng), x, y, z, yaw)
        wrapped = math.atan2(math.sin(yaw), math.cos(yaw))
        self.layout.objects.append(Placed(label, (x, y, z, *size, wrapped), solids))
        return True

    def add_clutter(
        self, solids: list[Solid], x: float, y: float, yaw: float, size: tuple[float, float]
    ) -> bool:
        if not self.claim(x, y, size[0], size[1], yaw, gap=0.1):
            return False
        self.layout.clutter.append(place(solids, x, y, self.z(x, y), yaw))
        return True

    def heading(self, spread: float = 0.04) -> float:
        """Along the road, either way."""
        return self.road_yaw + math.pi * int(self.rng.integers(2)) + float(self.rng.normal(0, spread))

    def tree(self, x: float, y: float) -> None:
        rng = self.rng
        trunk, crown = float(rng.uniform(0.12, 0.3)), float(rng.uniform(1.2, 2.6))
        base = float(rng.uniform(1.8, 3.0))
        leaves = Material(float(rng.uniform(0.2, 0.5)), drop=0.1, depth=float(rng.uniform(0.5, 1.5)))
        self.add_clutter(
            [
                prism(disc_outline(0, 0, trunk), -0.2, base + crown, Material(0.3, drop=0.05)),
                Ellipsoid(np.array([0, 0, base + crown * 0.9]), np.array([crown, crown, crown]), 0.0, leaves),
            ],
            x, y, 0.0, (2 * trunk, 2 * trunk),
        )  # fmt: skip

    def bush(self, x: float, y: float) -> None:
        rng = self.rng
        size = rng.uniform([0.5, 0.4, 0.4], [2.5, 1.2, 1.3])
        leaves = Material(float(rng.uniform(0.2, 0.5)), drop=0.1, depth=float(rng.uniform(0.1, 0.5)))
        solids: list[Solid] = [Ellipsoid(np.array([0, 0, 0.5 * size[2]]), size, 0.0, leaves)]
        self.add_clutter(solids, x, y, self.heading(), (2 * float(size[0]), 2 * float(size[1])))

    def pole(self, x: float, y: float) -> None:
        rng = self.rng
        radius = float(rng.uniform(0.05, 0.14))
        solids: list[Solid] = [
            prism(disc_outline(0, 0, radius), -0.2, float(rng.uniform(1.0, 7.0)), Material(0.35))
        ]
        if rng.random() < 0.4:
            low = float(rng.uniform(1.9, 2.6))
            solids.append(box((-0.03, 0.0), (-0.35, 0.35), (low, low + 0.7), Material(0.98)))
        self.add_clutter(solids, x, y, self.road_yaw + math.pi, (2 * radius, 2 * radius))

    def crate(self, x: float, y: float) -> None:
        """Bins, cabinets, barriers, skips, lorries: cuboids, of no labelled size."""
        rng = self.rng
        sizes = (
            (0.6, 0.6, 1.1), (1.3, 1.0, 1.2), (1.1, 0.4, 1.5), (2.5, 0.4, 0.9), (1.9, 1.9, 2.3),
            (6.5, 2.5, 3.2), (8.5, 2.5, 3.4), (0.35, 0.35, 0.9), (3.0, 0.1, 1.0),
        )  # fmt: skip
        length, width, height = (
            float(v * rng.uniform(0.85, 1.2)) for v in sizes[int(rng.integers(len(sizes)))]
        )
        material = Material(float(rng.uniform(0.1, 0.7)), drop=0.03)
        solids: list[Solid] = [
            box(
                (-length / 2, length / 2),
                (-width / 2, width / 2),
                (-0.1 if height < 3 else 0.5, height),
                material,
            )
        ]
        self.add_clutter(solids, x, y, self.heading(0.1), (length, width))

    def walls(self, side: float, across: float) -> None:
        """Add a broken line of house fronts along the road, some set back, some with a step in them."""
        rng = self.rng
        along = float(rng.uniform(-2.0, 15.0))
        while along < 75.0:
            length = float(rng.uniform(5.0, 24.0))
            back = across + float(rng.choice([0.0, 0.0, rng.uniform(0.5, 5.0)]))
            height = float(
                rng.choice([rng.uniform(0.9, 2.2), rng.uniform(3.0, 10.0), rng.uniform(3.0, 10.0)])
            )
            x, y = self.at(along + length / 2, side * (back + 0.5))
            stone = Material(float(rng.uniform(0.15, 0.5)), drop=0.03)
            depth = 0.15 if height < 2.3 else 1.0
            solids: list[Solid] = [box((-length / 2, length / 2), (-depth, depth), (-1.0, height), stone)]
            if height > 3.0:
                for spot in np.arange(-length / 2 + 1.0, length / 2 - 1.5, float(rng.uniform(2.0, 4.0))):
                    window = Material(0.05, drop=0.7)
                    solids.append(box((spot, spot + 1.0), (-depth - 0.02, depth + 0.02), (1.0, 2.2), window))
            self.add_clutter(solids, x, y, self.road_yaw, (length, 2 * depth))
            along += length + float(rng.choice([0.3, rng.uniform(1.0, 12.0)]))

    def street(self) -> None:
        rng = self.rng
        half = self.half_width
        for side in (-1.0, 1.0):
            if rng.random() < 0.9:
                self.walls(side, half + float(rng.uniform(1.5, 7.0)))
            if rng.random() < 0.75:  # a parked row, alongside or head on
                head_on = rng.random() < 0.25
                along = float(rng.uniform(3.0, 12.0))
                while along < 60.0:
                    x, y = self.at(
                        along, side * (half - (2.2 if head_on else 1.1) + float(rng.normal(0, 0.1)))
                    )
                    if rng.random() < 0.7:
                        self.add_object(2, x, y, self.heading() + (math.pi / 2 if head_on else 0.0))
                    along += float(rng.uniform(2.6, 3.4) if head_on else rng.uniform(5.0, 7.5))
        for _ in range(int(rng.integers(1, 6))):  # traffic
            self.add_object(
                2,
                *self.at(float(rng.uniform(6, 60)), float(rng.uniform(-half + 2, half - 2))),
                self.heading(),
            )
        if rng.random() < 0.4:  # crossing traffic
            along = float(rng.uniform(12, 45))
            for across in rng.uniform(-18, 18, int(rng.integers(1, 4))):
                self.add_object(
                    2,
                    *self.at(along, float(across)),
                    self.road_yaw + math.pi * float(rng.choice([0.5, -0.5])),
                )
        for _ in range(int(rng.integers(1, 6))):
            across = float(rng.choice([-1, 1])) * float(rng.uniform(max(half - 2.5, 1.0), half + 2.0))
            self.add_object(1, *self.at(float(rng.uniform(5, 42)), across), self.heading(0.1))
        for _ in range(int(rng.integers(2, 10))):
            if rng.random() < 0.75:
                across = float(rng.choice([-1, 1])) * float(rng.uniform(half + 0.2, half + 4.0))
                yaw = self.heading(0.3)
            else:
                across, yaw = float(rng.uniform(-half, half)), float(rng.uniform(-math.pi, math.pi))
            self.add_object(0, *self.at(float(rng.uniform(5, 38)), across), yaw)

    def square(self) -> None:
        rng = self.rng
        for label, low, high, reach in ((2, 4, 14, 58.0), (1, 2, 7, 42.0), (0, 3, 11, 38.0)):
            for _ in range(int(rng.integers(low, high))):
                # Uniform in distance, hence denser near by.
                distance, angle = float(rng.uniform(5.5, reach)), float(rng.uniform(-0.68, 0.68))
                yaw = float(rng.uniform(-math.pi, math.pi))
                self.add_object(label, distance * math.cos(angle), distance * math.sin(angle), yaw)
        for side in (-1.0, 1.0):
            if rng.random() < 0.85:
                self.walls(side, float(rng.uniform(8.0, 24.0)))

    def furnish(self, street: bool) -> None:
        rng = self.rng
        for kind, low, high in (
            (self.tree, 1, 12),
            (self.bush, 1, 12),
            (self.pole, 2, 12),
            (self.crate, 1, 9),
        ):
            for _ in range(int(rng.integers(low, high))):
                along, side = 5.0 + 65.0 * float(rng.random()) ** 1.5, float(rng.choice([-1, 1]))
                if street:
                    across = side * (self.half_width + float(rng.uniform(0.0, 14.0)))
                else:
                    across = float(rng.uniform(-0.8, 0.8)) * along
                kind(*self.at(along, across))
        if rng.random() < 0.7:  # something closes the view
            x = float(rng.uniform(40, 75))
            stone = Material(float(rng.uniform(0.15, 0.5)), drop=0.05)
            length, height = float(rng.uniform(10, 50)), float(rng.uniform(2.0, 9.0))
            solids: list[Solid] = [box((-0.5, 0.5), (-length / 2, length / 2), (-2.0, height), stone)]
            y = float(rng.uniform(-20, 20))
            self.layout.clutter.append(
                place(solids, x, y, -SENSOR_HEIGHT, self.road_yaw + float(rng.normal(0, 0.2)))
            )


def draw_layout(rng: np.random.Generator) -> Layout:
    """One random scene; consumes ``rng``. Boxes are in the sensor frame, metres and radians in (-pi, pi]."""
    builder = _Builder(rng)
    street = bool(rng.random() < 0.65)
    if street:
        builder.street()
    else:
        builder.square()
    builder.furnish(street)
    return builder.layout
