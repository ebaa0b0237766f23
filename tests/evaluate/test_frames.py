"""Parts of a frame are what the data set's files hold, for the zoo's own KITTI configs on made data."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from serve import zoo
from serve.evaluate.data_set import data_settings, open_data_set, upstream_session
from serve.evaluate.frames import read_frames
from serve.protocol.calibration import parse_calibration
from serve.synthetic.camera import HEIGHT, WIDTH
from serve.synthetic.kitti import write_kitti


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("kitti") / "data"
    write_kitti(path, train=1, val=1)
    (path / "training" / "image_2").mkdir()
    picture = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    cv2.imwrite(str(path / "training" / "image_2" / "000001.png"), picture)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "files"),
    [
        ("second_hv_secfpn_8xb6-80e_kitti-3d-3class", {"points": "velodyne/000001.bin"}),
        (
            "mvxnet_fpn_dv_second_secfpn_8xb2-80e_kitti-3d-3class",
            {"points": "velodyne/000001.bin", "image": "image_2/000001.png"},
        ),
    ],
)
def test_parts_of_a_frame_are_the_files_of_the_data_set(config, files, folder):
    options = {
        "test_dataloader.dataset.data_root": f"{folder}/",
        "test_evaluator.ann_file": str(folder / "kitti_infos_val.pkl"),
    }
    data = open_data_set(data_settings(zoo.resolve(config).config_path, options))
    with upstream_session("mmdet3d"):
        (frame,) = read_frames(data)
    assert set(frame.parts) == set(data.settings.spec.parts)
    for part, file in files.items():
        assert frame.parts[part] == (folder / "training" / file).read_bytes()
    if "calibration" in frame.parts:
        matrices = parse_calibration(frame.parts["calibration"], data.settings.spec.calibration)
        assert matrices["lidar2img"].shape == (4, 4)
