"""The examples of docs/client.md, run one by one against a gateway."""

from __future__ import annotations

import re
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.gateway.conftest import backend, background, start_gateway, torchserve
from tests.gateway.fake_torchserve import FUSION, IMAGES, SWEEPS, FakeModel
from tests.gateway.running import eventually

__all__ = ["backend", "background", "start_gateway", "torchserve"]  # fixtures

PAGE = Path(__file__).parents[2] / "docs" / "client.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
KITTI = """P2: 721.5 0 609.6 0 0 721.5 172.9 0 0 0 1 0
R0_rect: 1 0 0 0 1 0 0 0 1
Tr_velo_to_cam: 0 -1 0 0 0 0 -1 -0.08 1 0 0 -0.27
"""
IMAGE_ANSWER = (
    b'{"bboxes": [[1, 2, 3, 5]], "scores": [0.5], "labels": [0], "names": ["Car"], "classes": ["Car"]}'
)


def is_png(frame: bytes | dict[str, bytes]) -> bool:
    return isinstance(frame, bytes) and frame.startswith(b"\x89PNG")


def test_page_has_examples() -> None:
    assert len(EXAMPLES) >= 7


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example_runs(number: int, start_gateway, torchserve, tmp_path, monkeypatch, capsys) -> None:
    from tests.gateway import fake_torchserve

    usual = fake_torchserve.answer_for
    monkeypatch.setattr(
        fake_torchserve,
        "answer_for",
        lambda frame, options: IMAGE_ANSWER if is_png(frame) else usual(frame, options),
    )
    torchserve.models |= {
        "faster-rcnn": {"1.0": FakeModel(dict(IMAGES))},
        "mvxnet": {"1.0": FakeModel(dict(FUSION))},
        "centerpoint": {"1.0": FakeModel(dict(SWEEPS))},
    }
    gateway = start_gateway(api_keys=("secret",) if "secret" in EXAMPLES[number] else ())
    eventually(lambda: gateway.client.get("/health/ready").status_code == 200)
    monkeypatch.chdir(tmp_path)
    cloud = np.random.default_rng(1).normal(size=(50, 4)).astype(np.float32).tobytes()
    (tmp_path / "clouds").mkdir()
    for name in ("frame.bin", "clouds/1.bin", "clouds/2.bin"):
        (tmp_path / name).write_bytes(cloud)
    cv2.imwrite("000000000139.png", np.zeros((8, 8, 3), np.uint8))
    (tmp_path / "calib.txt").write_text(KITTI)
    found = {"__name__": "__main__"}
    exec(compile(EXAMPLES[number].replace("127.0.0.1:8000", gateway.url), f"{PAGE}:{number}", "exec"), found)
    printed = capsys.readouterr().out
    assert bool(printed) == ("print(" in EXAMPLES[number])
    if "coco" in found:
        assert found["coco"][0]["image_id"] == 139 and found["picture"].startswith(b"\x89PNG")
