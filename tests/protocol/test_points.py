"""A .bin says nothing of itself: what it cannot be is noticed, what the client declares is believed."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pytest

from serve.errors import UndecodableFrame, UnknownOption
from serve.protocol.point_columns import PointLayout, parse_columns
from serve.protocol.points import decode_points
from serve.settings import Limits

SAMPLE = np.fromfile(Path(__file__).parents[2] / "serve" / "assets" / "sample.bin", "<f4").reshape(-1, 4)
SAMPLE = SAMPLE[: len(SAMPLE) // 60 * 60]  # a whole number of points of 3, 4, 5 and 6 numbers
LIDAR = PointLayout.default(4, is_depth=False)


def decode(array: np.ndarray, layout: PointLayout = LIDAR, **declared) -> np.ndarray:
    return decode_points(np.ascontiguousarray(array).tobytes(), layout, Limits(), **declared)


def wider(*more: np.ndarray) -> np.ndarray:
    return np.column_stack([SAMPLE, *more]).astype("<f4")


ZEROS = np.zeros(len(SAMPLE), "<f4")
RING = (np.arange(len(SAMPLE)) % 32).astype("<f4")


@pytest.mark.parametrize(
    ("array", "numbers"),
    [
        (wider(ZEROS), 5),
        (wider(RING), 5),
        (wider(SAMPLE[:, 0], SAMPLE[:, 1]), 6),
        (SAMPLE[:, :3], 3),
        (wider(*np.tile(ZEROS, (4, 1)), *SAMPLE[:, :4].T), 12),
    ],
    ids=["five, zeros", "five, rings", "six", "three", "twelve, as PCL's PointXYZINormal"],
)
def test_another_stride_is_refused_with_its_number(array, numbers):
    with pytest.raises(UndecodableFrame, match=f"points of {numbers} numbers"):
        decode(array)


def test_a_stride_that_divides_the_models_is_refused():
    with pytest.raises(UndecodableFrame, match="points of 3 numbers"):
        decode(SAMPLE[:, :3], PointLayout.default(6, is_depth=True))


def by_column() -> list[tuple[str, np.ndarray, PointLayout]]:
    """Clouds (N, C) of sensors, right but for the order in which their numbers are written."""
    rng = np.random.default_rng(0)
    nuscenes = wider(RING)
    nuscenes[:, 3] *= 255
    room = np.column_stack(
        [rng.uniform(-2, 2, (5000, 2)), rng.uniform(0, 3, 5000), rng.uniform(0, 255, (5000, 3))]
    )
    return [
        ("sample", SAMPLE, LIDAR),
        ("shuffled", SAMPLE[rng.permutation(len(SAMPLE))], LIDAR),
        ("no intensity", np.column_stack([SAMPLE[:, :3], ZEROS]), LIDAR),
        ("few points", SAMPLE[:: len(SAMPLE) // 200], LIDAR),
        ("x, y, z", SAMPLE[:, :3], PointLayout.default(3, is_depth=False)),
        ("nuScenes", nuscenes, PointLayout.default(5, is_depth=False)),
        ("room", room, PointLayout.default(6, is_depth=True)),
    ]


@pytest.mark.parametrize(("name", "array", "layout"), by_column(), ids=[name for name, *_ in by_column()])
def test_columns_one_after_another_are_refused(name, array, layout):
    planes = array.astype("<f4").T
    with pytest.raises(UndecodableFrame, match="columns one after another"):
        decode(planes, layout)
    declared = decode(planes, layout, load_dim=len(planes))
    assert declared.shape == array.shape


def test_intensities_behind_all_coordinates_are_refused():
    cloud = SAMPLE[:-1]  # of a number of points that three does not divide
    with pytest.raises(UndecodableFrame):
        decode(np.concatenate([cloud[:, :3].ravel(), cloud[:, 3]]))


@pytest.mark.parametrize("dtype", [">f4", "<f8", ">f8"])
def test_another_type_or_byte_order_is_refused(dtype):
    with pytest.raises(UndecodableFrame):
        decode(SAMPLE.astype(dtype))


@pytest.mark.parametrize("dtype", ["<f2", ">f2", "<i2", "<u2", "<i4", ">i4", "<i8", "<u4", "u1"])
@pytest.mark.parametrize("scale", [1, 100])
def test_numbers_of_another_kind_are_refused_as_such(dtype, scale):
    with pytest.raises(UndecodableFrame, match="does not look like float32"):
        decode(np.abs(SAMPLE * scale).astype(dtype))


def test_colours_packed_into_the_bits_of_a_float_are_refused():
    packed = (np.arange(len(SAMPLE)) % 0xFFFFFF).astype("<u4").view("<f4")
    with pytest.raises(UndecodableFrame, match="packed colours"):
        decode(np.column_stack([SAMPLE[:, :3], packed]))


def test_bytes_that_are_compressed_are_refused():
    with pytest.raises(UndecodableFrame, match="compressed"):
        decode(np.frombuffer(zlib.compress(SAMPLE.tobytes())[: len(SAMPLE) // 4 * 16], np.uint8))


def test_declared_columns_are_taken_by_name():
    shuffled = np.column_stack([RING, SAMPLE[:, ::-1]]).astype("<f4")
    assert np.array_equal(decode(shuffled, columns="ring,intensity,z,y,x"), SAMPLE)


def test_a_declared_constant_stands_for_a_column_that_is_not_there():
    points = decode(SAMPLE[:, :3], columns="x,y,z,intensity=0.25")
    assert np.array_equal(points[:, :3], SAMPLE[:, :3]) and (points[:, 3] == 0.25).all()


def test_a_client_that_declares_the_stride_is_believed():
    odd = wider(ZEROS)
    assert decode(odd, load_dim=4).shape == (len(odd) * 5 // 4, 4)


@pytest.mark.parametrize("text", ["x,y,z,x", "x y z", "x,y,z,=3", "x,y,z,i=one", "x,y,z," + "a" * 200])
def test_an_impossible_declaration_is_refused(text):
    with pytest.raises(UnknownOption):
        parse_columns(text)


def clouds() -> list[tuple[str, np.ndarray, PointLayout]]:
    """Point clouds of many kinds, all right as they are."""
    rng = np.random.default_rng(0)
    shuffled = SAMPLE[rng.permutation(len(SAMPLE))]
    nuscenes = wider(RING)
    nuscenes[:, 3] *= 255
    room = np.column_stack([rng.uniform(-2, 2, (5000, 3)), rng.uniform(0, 255, (5000, 3))]).astype("<f4")
    room_of_3 = PointLayout.default(3, is_depth=True)
    isotropic = rng.normal(0, 3, (3000, 3)) * rng.uniform(0.1, 9, (3000, 1))
    across = np.linspace(0, 60, 6000)
    surface = np.column_stack([np.sin(across), np.cos(across), across / 30])
    colours = np.column_stack([np.cos(across / 7), np.sin(across / 5), np.cos(across / 3)]) / 2 + 0.5
    waymo = wider(rng.uniform(0, 1, len(SAMPLE)), np.full(len(SAMPLE), 1.5e9))
    return [
        ("sample", SAMPLE, LIDAR),
        ("shuffled", shuffled, LIDAR),
        ("no intensity", np.column_stack([SAMPLE[:, :3], ZEROS]).astype("<f4"), LIDAR),
        ("nuScenes", nuscenes, PointLayout.default(5, is_depth=False)),
        ("room", room, PointLayout.default(6, is_depth=True)),
        (
            "a smooth surface with colours",
            np.column_stack([surface, colours]),
            PointLayout.default(6, is_depth=True),
        ),
        ("Waymo", waymo, PointLayout.default(6, is_depth=False)),
        ("uniform", rng.uniform(-50, 50, (3000, 4)).astype("<f4"), LIDAR),
        ("normal", rng.normal(0, 1, (3000, 3)).astype("<f4"), PointLayout.default(3, is_depth=True)),
        ("one point, repeated", np.tile(SAMPLE[:1], (3000, 1)), LIDAR),
        ("zeros", np.zeros((3000, 4), "<f4"), LIDAR),
        (
            "far and near",
            isotropic[np.argsort(np.linalg.norm(isotropic, axis=1))],
            room_of_3,
        ),
        ("two sensors", np.concatenate([isotropic, 9 * isotropic[:1400]]), room_of_3),
        ("by height", SAMPLE[np.argsort(SAMPLE[:, 2])], LIDAR),
        (
            "a wall",
            np.column_stack([np.full(3000, 9.0), np.linspace(-9, 9, 3000), np.zeros((3000, 2))]),
            LIDAR,
        ),
    ]


@pytest.mark.parametrize(("name", "array", "layout"), clouds(), ids=[name for name, *_ in clouds()])
def test_a_right_cloud_is_never_refused(name, array, layout):
    right = array.astype("<f4")
    assert np.array_equal(decode(right, layout), right)
