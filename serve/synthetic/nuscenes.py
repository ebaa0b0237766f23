"""Synthetic drives as a data set in the layout of nuScenes or Lyft Level 5, with the annotation files of mmdet3d.

Tables and fields are those of nuScenes' schema (H. Caesar et al., CVPR 2020, and its development kit), which Lyft's
data set shares (its development kit). Beside them lie what mmdet3d's ``create_data.py`` makes: ``*_infos_train.pkl``
and ``*_infos_val.pkl``, version 1.1. Scenes have the names of the splits of ``v1.0-mini``, so that the development kit
finds those of validation.

The vehicle stands. Its LiDAR looks along x, as the scenes do, where nuScenes' own looks along y; its tables hold the
rotation. The front camera is KITTI's of `serve.synthetic.camera`; the others have no pictures.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from serve.synthetic.camera import HEIGHT, WIDTH, render
from serve.synthetic.drives import Drive, Moment, drive, layout_at
from serve.synthetic.releases import (
    ATTRIBUTES,
    CAMERAS,
    INTRINSIC,
    LIDAR2EGO,
    LYFT,
    NUSCENES,
    TABLES,
    Array,
    Release,
    box_pose,
    camera_pose,
    cloud_of,
    ego_pose_row,
    links,
    quaternion,
    token_of,
    vehicle_pose,
)
from serve.synthetic.scenes import held_out_seed, training_seed

__all__ = ["LYFT", "NUSCENES", "write_drives"]

Table = list[dict[str, Any]]

_KEY_INTERVAL_S, _SWEEPS_PER_KEY = 0.5, 3  # a turn of the sensor every 1/6 s; of a real release every 1/20 s
_MOST_SWEEPS = 10
# By label of `serve.synthetic.layout.CLASSES`: attribute of objects that move, and of those that stand.
_ATTRIBUTE_OF = (
    ("pedestrian.moving", "pedestrian.standing"),
    ("cycle.with_rider", "cycle.with_rider"),
    ("vehicle.moving", "vehicle.parked"),
)


def write_drives(
    folder: Path,
    release: Release = NUSCENES,
    *,
    train: int,
    val: int,
    first: int = 0,
    images: bool = False,
    progress: Callable[[range], Iterable[int]] = iter,
) -> dict[str, int]:
    """Write a data set into an empty folder; the same files for the same arguments.

    Args:
        folder: root of the data set; made.
        release: which data set's layout.
        train: number of key frames of training.
        val: number of key frames of validation.
        first: first layout of either kind.
        images: render the front camera's image of every key frame, which takes seconds each.
        progress: wraps the numbers of the scenes, such as `tqdm.tqdm`.

    Returns:
        Number of annotated objects per class.
    """
    writer = _Writer(folder, release, images=images)
    plans = [
        (name, seed_of(first + k), count, split)
        for split, names, seed_of, total in (
            ("train", release.scenes[0], training_seed, train),
            ("val", release.scenes[1], held_out_seed, val),
        )
        for k, (name, count) in enumerate(zip(names, _shares(total, len(names)), strict=True))
        if count
    ]
    for index in progress(range(len(plans))):
        writer.add_scene(index, *plans[index])
    writer.finish([plan[0] for plan in plans if plan[3] == "train"], [p[0] for p in plans if p[3] == "val"])
    return writer.counts


def _shares(total: int, parts: int) -> list[int]:
    return [total // parts + (k < total % parts) for k in range(parts)]


class _Writer:
    """Writes files scene by scene, and collects the tables and annotation files."""

    def __init__(self, folder: Path, release: Release, *, images: bool) -> None:
        self._folder, self._release, self._images = folder, release, images
        self._files = folder / release.files
        for part in (release.lidar, release.sweeps, "maps", *(f"samples/{name}" for name in CAMERAS)):
            (self._files / part).mkdir(parents=True, exist_ok=True)
        (folder / release.tables).mkdir(parents=True, exist_ok=True)
        self.counts = {named: 0 for _, named in release.categories}
        self._tables: dict[str, Table] = {name: [] for name in TABLES}
        self._infos: dict[str, Table] = {"train": [], "val": []}
        self._add_constants()

    def add_scene(self, index: int, name: str, seed: int, keys: int, split: str) -> None:
        """Write the clouds of a scene with `keys` key frames, and its rows of the tables."""
        times = np.arange(1 - _SWEEPS_PER_KEY, (keys - 1) * _SWEEPS_PER_KEY + 1) * (
            _KEY_INTERVAL_S / _SWEEPS_PER_KEY
        )
        found = drive(seed, times.astype(np.float64))
        scene, log = token_of("scene", name), token_of("log", name)
        date = "2018-07-18"
        self._tables["log"].append(
            {"token": log, "logfile": name, "vehicle": "n000", "date_captured": date, "location": "synthetic"}
        )
        ego2global = vehicle_pose(index)
        samples = [token_of("sample", name, k) for k in range(keys)]
        self._tables["scene"].append(
            {
                "token": scene,
                "log_token": log,
                "nbr_samples": keys,
                "first_sample_token": samples[0],
                "last_sample_token": samples[-1],
                "name": name,
                "description": f"synthetic layout {seed}",
            }
        )
        for k, sample in enumerate(samples):
            moment = found.moments[(k + 1) * _SWEEPS_PER_KEY - 1]
            self._tables["sample"].append(
                {
                    "token": sample,
                    "timestamp": _time_us(index, moment),
                    "scene_token": scene,
                    **links(samples, k),
                }
            )
        calibrations = self._add_sensors(name)
        paths = self._add_clouds(index, name, found, samples, ego2global, calibrations["LIDAR_TOP"])
        self._add_annotations(name, found, samples, ego2global)
        for k, sample in enumerate(samples):
            turn = (k + 1) * _SWEEPS_PER_KEY - 1
            images = self._add_images(index, name, k, found, sample, calibrations)
            info = self._info(index, found, turn, sample, ego2global, paths, images)
            self._infos[split].append({"sample_idx": len(self._infos[split]), **info})

    def finish(self, train: Sequence[str], val: Sequence[str]) -> None:
        """Write the tables, the lists of scenes and the annotation files."""
        release = self._release
        logs = [row["token"] for row in self._tables["log"]]
        self._tables["map"] = [
            {
                "token": token_of("map"),
                "log_tokens": logs,
                "category": "semantic_prior",
                "filename": "maps/empty.png",
            }
        ]
        for name, table in self._tables.items():
            (self._folder / release.tables / f"{name}.json").write_text(json.dumps(table), encoding="utf-8")
        for split, names in (("train", train), ("val", val)):
            if release is LYFT:
                (self._folder / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
            content = {"metainfo": self._metainfo(), "data_list": self._infos[split]}
            with (self._folder / f"{release.name}_infos_{split}.pkl").open("wb") as stream:
                pickle.dump(content, stream, protocol=4)

    def _metainfo(self) -> dict[str, Any]:
        return {
            "categories": {name: label for label, name in enumerate(self._release.classes)},
            "dataset": self._release.name,
            "version": self._release.version,
            "info_version": "1.1",
        }

    def _add_constants(self) -> None:
        """Add the rows that no scene changes: categories, attributes, visibilities, sensors, one empty map."""
        tables = self._tables
        tables["category"] = [
            {"token": token_of("category", name), "name": name, "description": ""}
            for name, _ in self._release.categories
        ]
        tables["attribute"] = [
            {"token": token_of("attribute", name), "name": name, "description": ""} for name in ATTRIBUTES
        ]
        tables["visibility"] = [
            {"token": str(k + 1), "level": level, "description": ""}
            for k, level in enumerate(("v0-40", "v40-60", "v60-80", "v80-100"))
        ]
        tables["sensor"] = [
            {
                "token": token_of("sensor", channel),
                "channel": channel,
                "modality": "camera" if channel in CAMERAS else "lidar",
            }
            for channel in ("LIDAR_TOP", *CAMERAS)
        ]
        cv2.imwrite(str(self._files / "maps" / "empty.png"), np.zeros((16, 16), np.uint8))

    def _add_sensors(self, name: str) -> dict[str, str]:
        """Add the calibration of every sensor; returns their tokens by channel."""
        tokens = {}
        for channel in ("LIDAR_TOP", *CAMERAS):
            pose = LIDAR2EGO if channel == "LIDAR_TOP" else camera_pose(channel)
            tokens[channel] = token_of("calibrated_sensor", name, channel)
            self._tables["calibrated_sensor"].append(
                {
                    "token": tokens[channel],
                    "sensor_token": token_of("sensor", channel),
                    "translation": pose[:3, 3].tolist(),
                    "rotation": quaternion(pose),
                    "camera_intrinsic": INTRINSIC.tolist() if channel in CAMERAS else [],
                }
            )
        return tokens

    def _add_clouds(
        self, index: int, name: str, found: Drive, samples: Sequence[str], ego2global: Array, calibration: str
    ) -> list[str]:
        """Write the clouds of all turns; returns their paths below the folder of the files."""
        tokens = [token_of("sample_data", name, "LIDAR_TOP", turn) for turn in range(len(found.moments))]
        paths = []
        for turn, moment in enumerate(found.moments):
            is_key = (turn + 1) % _SWEEPS_PER_KEY == 0
            time = _time_us(index, moment)
            ending = ".pcd.bin" if self._release is NUSCENES else ".bin"
            folder = self._release.lidar if is_key else self._release.sweeps
            path = f"{folder}/{name}__LIDAR_TOP__{time}{ending}"
            (self._files / path).write_bytes(cloud_of(moment.points).tobytes())
            paths.append(path)
            self._tables["ego_pose"].append(ego_pose_row(tokens[turn], time, ego2global))
            self._tables["sample_data"].append(
                {
                    "token": tokens[turn],
                    "sample_token": samples[min(turn // _SWEEPS_PER_KEY, len(samples) - 1)],
                    "ego_pose_token": tokens[turn],
                    "calibrated_sensor_token": calibration,
                    "timestamp": time,
                    "fileformat": "pcd",
                    "is_key_frame": is_key,
                    "height": 0,
                    "width": 0,
                    "filename": path,
                    **links(tokens, turn),
                }
            )
        return paths

    def _add_images(
        self, index: int, name: str, key: int, found: Drive, sample: str, calibrations: dict[str, str]
    ) -> dict[str, Any]:
        """Add the cameras of a key frame; returns their members of mmdet3d's annotation file."""
        moment = found.moments[(key + 1) * _SWEEPS_PER_KEY - 1]
        time = _time_us(index, moment)
        if self._images:
            picture = render(layout_at(found, moment.time_s))
            cv2.imwrite(str(self._files / _image_path(name, "CAM_FRONT", time)), picture)
        members = {}
        for channel in CAMERAS:
            token, path = token_of("sample_data", name, channel, key), _image_path(name, channel, time)
            self._tables["ego_pose"].append(ego_pose_row(token, time, vehicle_pose(index)))
            self._tables["sample_data"].append(
                {
                    "token": token,
                    "sample_token": sample,
                    "ego_pose_token": token,
                    "calibrated_sensor_token": calibrations[channel],
                    "timestamp": time,
                    "fileformat": "jpg",
                    "is_key_frame": True,
                    "height": HEIGHT,
                    "width": WIDTH,
                    "filename": path,
                    "prev": "",
                    "next": "",
                }
            )
            cam2ego = camera_pose(channel)
            members[channel] = {
                "img_path": Path(path).name,
                "cam2img": INTRINSIC.tolist(),
                "cam2ego": cam2ego.tolist(),
                "lidar2cam": (np.linalg.inv(cam2ego) @ LIDAR2EGO).tolist(),
                "sample_data_token": token,
                "timestamp": time / 1e6,
            }
        return members

    def _add_annotations(self, name: str, found: Drive, samples: Sequence[str], ego2global: Array) -> None:
        """Add an instance per object, and its boxes in all key frames."""
        for row, label in enumerate(found.labels):
            category, named = self._release.categories[label]
            instance = token_of("instance", name, row)
            tokens = [token_of("sample_annotation", name, row, k) for k in range(len(samples))]
            self._tables["instance"].append(
                {
                    "token": instance,
                    "category_token": token_of("category", category),
                    "nbr_annotations": len(tokens),
                    "first_annotation_token": tokens[0],
                    "last_annotation_token": tokens[-1],
                }
            )
            stands = not found.velocities[row].any()
            for k, token in enumerate(tokens):
                moment = found.moments[(k + 1) * _SWEEPS_PER_KEY - 1]
                box = moment.boxes[row]
                pose = ego2global @ LIDAR2EGO @ box_pose(box)
                self.counts[named] += 1
                self._tables["sample_annotation"].append(
                    {
                        "token": token,
                        "sample_token": samples[k],
                        "instance_token": instance,
                        "visibility_token": "4",
                        "attribute_tokens": [token_of("attribute", _ATTRIBUTE_OF[label][stands])],
                        "translation": pose[:3, 3].tolist(),
                        "size": [box[4], box[3], box[5]],
                        "rotation": quaternion(pose),
                        "num_lidar_pts": int(moment.points_in_box[row]),
                        "num_radar_pts": 0,
                        **links(tokens, k),
                    }
                )

    def _info(
        self,
        index: int,
        found: Drive,
        turn: int,
        sample: str,
        ego2global: Array,
        paths: Sequence[str],
        images: dict[str, Any],
    ) -> dict[str, Any]:
        """Entry of a key frame in mmdet3d's annotation file."""
        moment = found.moments[turn]
        sweeps = [
            {
                "timestamp": _time_us(index, found.moments[k]) / 1e6,
                "ego2global": ego2global.tolist(),
                "lidar_points": {
                    "lidar_path": paths[k],
                    "lidar2ego": LIDAR2EGO.tolist(),
                    "lidar2sensor": np.eye(4).tolist(),
                },
            }
            for k in range(turn - 1, max(turn - 1 - _MOST_SWEEPS, -1), -1)
        ]
        return {
            "token": sample,
            "timestamp": _time_us(index, moment) / 1e6,
            "ego2global": ego2global.tolist(),
            "images": images,
            "lidar_points": {
                "num_pts_feats": self._release.columns,
                "lidar_path": Path(paths[turn]).name,
                "lidar2ego": LIDAR2EGO.tolist(),
            },
            "lidar_sweeps": sweeps,
            "instances": [self._instance(found, moment, row) for row in range(len(found.labels))],
            "cam_instances": {},
        }

    def _instance(self, found: Drive, moment: Moment, row: int) -> dict[str, Any]:
        label = self._release.classes.index(self._release.categories[found.labels[row]][1])
        x, y, z, dx, dy, dz, yaw = moment.boxes[row].tolist()
        seen = int(moment.points_in_box[row])
        return {
            "bbox_3d": [x, y, z + dz / 2, dx, dy, dz, yaw],
            "bbox_label": label,
            "bbox_label_3d": label,
            "velocity": found.velocities[row].tolist(),
            "num_lidar_pts": seen,
            "num_radar_pts": 0,
            "bbox_3d_isvalid": seen > 0,
        }


def _time_us(index: int, moment: Moment) -> int:
    """Time of a turn in a scene, microseconds; scenes are a minute apart."""
    return 1_500_000_000_000_000 + 60_000_000 * index + round(1e6 * (moment.time_s + 10))


def _image_path(name: str, channel: str, time: int) -> str:
    return f"samples/{channel}/{name}__{channel}__{time}.jpg"
