"""Frames of a data set as the parts that a server takes: the files behind an entry, read through its storage.

An entry has the members that mmdet's and mmdet3d's data sets document: ``img_path``; ``lidar_points``; ``images`` with
``cam2img``, ``lidar2cam`` and ``lidar2img`` of each camera.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from serve.convert.blame import describe
from serve.errors import DataSetError
from serve.evaluate.data_set import DataSet, DataSettings
from serve.protocol.calibration import MATRICES

__all__ = ["DataFrame", "read_frames"]


@dataclass(frozen=True)
class DataFrame:
    """One frame of a data set.

    Attributes:
        name: path of its first file, for messages.
        parts: bytes of each part, as a client sends them.
        sample: upstream's data sample with the annotations and without predictions.
        inputs: what upstream's pipeline made of it, for `test_step`.
    """

    name: str
    parts: dict[str, bytes]
    sample: Any
    inputs: dict[str, Any]


def read_frames(data: DataSet) -> Iterator[DataFrame]:
    """Read the frames to evaluate, in order, and run the data set's pipeline on each.

    Raises:
        DataSetError: a file is missing or unreadable, or a part of the frame is not in the data set.
    """
    for index in range(data.size):
        entry = data.dataset.get_data_info(index)
        name = _name_of(entry)
        try:
            parts = _Entry(entry, data.settings).parts()
            prepared = data.dataset[index]
        except DataSetError:
            raise
        except FileNotFoundError as error:
            raise DataSetError(
                f"frame {index} of the data set: {error.filename or name} does not exist; this data set has another "
                "layout than the config, or is incomplete"
            ) from error
        except Exception as error:
            raise DataSetError(f"frame {index} of the data set, {name}: {describe(error)}") from error
        yield DataFrame(name, parts, prepared["data_samples"], prepared["inputs"])


class _Entry:
    """Entry of a data set, from which the parts of its frame are read."""

    def __init__(self, entry: Mapping[str, Any], settings: DataSettings) -> None:
        self._entry = entry
        self._spec = settings.spec
        self._data_set = settings.data_set
        self._backend = settings.backend

    def parts(self) -> dict[str, bytes]:
        parts: dict[str, bytes] = {}
        if self._spec.has_points:
            parts["points"] = self._read(self._member("lidar_points", "lidar_path"))
            parts |= self._sweeps()
        for camera in self._spec.cameras:
            parts[f"image.{camera}"] = self._read(self._member("images", camera, "img_path"))
        if "image" in self._spec.parts:
            parts["image"] = self._read(self._image())
        if self._spec.calibration:
            parts["calibration"] = json.dumps(self._calibration()).encode()
        return parts

    def _sweeps(self) -> dict[str, bytes]:
        """Return the sweeps before the key frame with their times and poses, the latest ones that the model takes."""
        listed = self._entry.get("lidar_sweeps")
        if self._spec.sweeps is None or not listed:
            return {}
        chosen = listed[: self._spec.sweeps.number]
        poses = [
            {
                "time_lag_s": self._entry["timestamp"] - sweep["timestamp"],
                "lidar2sensor": np.asarray(sweep["lidar_points"]["lidar2sensor"]).tolist(),
            }
            for sweep in chosen
        ]
        clouds = {
            f"sweep.{k}": self._read(sweep["lidar_points"]["lidar_path"]) for k, sweep in enumerate(chosen)
        }
        return {"sweeps": json.dumps(poses).encode(), **clouds}

    def _image(self) -> str:
        """Return the path of the image, of an entry of its own or of its camera."""
        if "img_path" in self._entry or "images" not in self._entry:
            return str(self._member("img_path"))
        return str(self._member("images", self._camera(), "img_path"))

    def _camera(self) -> str:
        """Return the name of the camera of a frame with one image."""
        images = self._member("images")
        camera = self._data_set.get("default_cam_key") or next(
            (name for name, image in images.items() if isinstance(image, Mapping) and "img_path" in image),
            None,
        )
        if camera not in images:
            raise DataSetError(f"the data set's entries have no camera {camera}")
        return str(camera)

    def _calibration(self) -> dict[str, Any]:
        images = self._member("images")
        if self._spec.cameras:
            return {camera: _matrices(images[camera]) for camera in self._spec.cameras}
        return _matrices(images[self._camera()])

    def _member(self, *names: str) -> Any:
        found: Any = self._entry
        for name in names:
            if not isinstance(found, Mapping) or name not in found:
                raise DataSetError(
                    f"the model takes {', '.join(self._spec.parts)}, but the data set's entries have no "
                    f"{'.'.join(names)}; this data set is for another kind of model"
                )
            found = found[name]
        return found

    def _read(self, path: str) -> bytes:
        from mmengine.fileio import get

        return bytes(get(path, backend_args=self._backend))


def _matrices(image: Mapping[str, Any]) -> dict[str, Any]:
    return {name: np.asarray(image[name]).tolist() for name in MATRICES if image.get(name) is not None}


def _name_of(entry: Mapping[str, Any]) -> str:
    points = entry.get("lidar_points")
    path = points.get("lidar_path") if isinstance(points, Mapping) else None
    return str(path or entry.get("img_path") or entry.get("sample_idx"))
