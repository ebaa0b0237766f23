"""Data that `sample-data` does not write: raw KITTI for the converter of info files, and a video.

All functions write into the working folder, which `tools.seed_rows.work_folder` has prepared.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["raw_kitti", "video"]


def _picture(path: Path) -> Any:
    """(height, width, 3) uint8, BGR."""
    import cv2

    found = cv2.imread(str(path))
    assert found is not None, path
    return found


def raw_kitti() -> None:
    """Copy the made KITTI data without the files that create_data writes, with pictures and four splits."""
    import cv2

    shutil.rmtree("raw", ignore_errors=True)
    for name in ("velodyne", "calib", "label_2"):
        shutil.copytree(Path("kitti/training", name), Path("raw/training", name))
        Path("raw/testing", name).mkdir(parents=True)
    pictures = Path("raw/training/image_2")
    pictures.mkdir()
    stems = sorted(path.stem for path in Path("raw/training/velodyne").glob("*.bin"))
    for stem in stems:
        cv2.imwrite(str(pictures / f"{stem}.png"), np.zeros((375, 1242, 3), np.uint8))
    first = stems[0]
    Path("raw/testing/image_2").mkdir()
    for name, suffix in (("velodyne", "bin"), ("calib", "txt"), ("image_2", "png")):
        shutil.copyfile(f"raw/training/{name}/{first}.{suffix}", f"raw/testing/{name}/{first}.{suffix}")
    shutil.copytree("kitti/ImageSets", "raw/ImageSets")
    Path("raw/ImageSets/trainval.txt").write_text("\n".join(stems) + "\n")
    Path("raw/ImageSets/test.txt").write_text(first + "\n")


def video() -> None:
    """Write the validation pictures of ``coco`` as ``video.mp4``."""
    import cv2

    pictures = [_picture(path) for path in sorted(Path("coco/val2017").glob("*.jpg"))]
    height, width = pictures[0].shape[:2]
    writer = cv2.VideoWriter("video.mp4", cv2.VideoWriter.fourcc(*"mp4v"), 5, (width, height))
    for picture in pictures:
        writer.write(cv2.resize(picture, (width, height)))
    writer.release()
