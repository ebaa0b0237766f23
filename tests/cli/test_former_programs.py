"""Upstream's demo and deployment scripts, by the names that its pages print."""

from __future__ import annotations

import importlib

import pytest

from serve.cli.former_programs import FORMER, run_former
from serve.cli.main import main
from serve.errors import SettingsError

FILES = "street.jpg faster.py faster.pth"
LINES = {
    f"demo/image_demo.py {FILES} --device cpu": "street.jpg --model faster.py --checkpoint faster.pth --device cpu",
    f"image_demo {FILES} --async-test": "street.jpg --model faster.py --checkpoint faster.pth --batch-size 4",
    "demo/image_demo.py street.jpg rtmdet-s --device cpu": "street.jpg --model rtmdet-s --device cpu",
    "demo/image_demo.py street.jpg rtmdet-s --weights w.pth --out-dir o --pred-score-thr 0.2": "street.jpg --model "
    "rtmdet-s --checkpoint w.pth --score-thr 0.2 --out o --format json,picture",
    f"demo/video_demo.py {FILES} --score-thr 0.5 --out r.mp4 --show --wait-time 1": "street.jpg --model faster.py "
    "--checkpoint faster.pth --score-thr 0.5 --out r.mp4",
    f"demo/video_gpuaccel_demo.py {FILES} --nvdecode --out r.mp4": "street.jpg --model faster.py --checkpoint "
    "faster.pth --out r.mp4",
    "demo/webcam_demo.py faster.py faster.pth --camera-id 1": "1 --model faster.py --checkpoint faster.pth",
    "demo/webcam_demo.py faster.py faster.pth": "0 --model faster.py --checkpoint faster.pth",
    "demo/pcd_demo.py a.bin second.py second.pth --out-dir o": "a.bin --model second.py --checkpoint second.pth --out "
    "o --format json,picture",
}


@pytest.mark.parametrize("line", LINES)
def test_a_demo_runs_predict_and_prints_its_line(line, monkeypatch, capsys):
    ran: list[list[str]] = []
    predict = importlib.import_module("serve.cli.predict")
    monkeypatch.setattr(predict, "main", lambda argv: ran.append(argv) or 0)
    assert main(["tools", *line.split()]) == 0
    assert ran == [LINES[line].split()]
    assert f"mmdet3d-serve predict {LINES[line]}" in capsys.readouterr().err


def test_deployment_scripts_take_their_arguments(monkeypatch):
    ran: list[object] = []
    archive, verify = (importlib.import_module(f"serve.cli.{name}") for name in ("archive", "verify"))
    monkeypatch.setattr(archive, "to_torchserve", lambda argv, package: ran.append((argv, package)) or 0)
    monkeypatch.setattr(verify, "main", lambda argv: ran.append(argv) or 0)
    words = ["c.py", "w.pth", "--output-folder", "store"]
    for script in ("mmdet3d2torchserve", "mmdet2torchserve", "test_torchserver"):
        assert run_former(f"tools/deployment/{script}.py", words) == 0
    assert ran == [(words, "mmdet3d"), (words, "mmdet"), words]


@pytest.mark.parametrize("name", sorted(FORMER))
def test_a_script_without_arguments_is_a_sentence(name, capsys):
    try:
        code = main(["tools", name])
    except SystemExit as ended:  # argparse
        code = int(ended.code or 0)
    assert code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_other_programs_are_none_of_these():
    assert run_former("tools/test.py", []) is None
    with pytest.raises(SettingsError, match="calibration"):
        run_former("mono_det_demo", ["a.png", "infos.pkl", "c.py"])
