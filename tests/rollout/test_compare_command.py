"""``mmdet3d-serve compare``: two versions on the same frames, through servers and in process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serve.cli import compare
from serve.convert import Conversion, convert
from serve.errors import ModelNotFound, ServeError, SettingsError
from tests.conftest import DEMO_CHECKPOINT, DEMO_CONFIG
from tests.gateway.conftest import RunningGateway, backend, background, start_gateway, torchserve
from tests.gateway.fake_torchserve import IMAGES, FakeModel, FakeTorchServe
from tests.predict.conftest import turned

__all__ = ["backend", "background", "start_gateway", "torchserve", "turned"]


@pytest.fixture
def clouds(tmp_path: Path, turned: Callable[[int], bytes]) -> Path:
    folder = tmp_path / "velodyne"
    folder.mkdir()
    for k in range(3):
        (folder / f"scan.{k:06d}.bin").write_bytes(turned(k))
    return folder


@pytest.fixture(scope="session")
def altered_mar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The demo SECOND, which hardly finds pedestrians any more, and whose boxes are longer."""
    import torch

    folder = tmp_path_factory.mktemp("altered")
    checkpoint = torch.load(DEMO_CHECKPOINT, weights_only=True)
    checkpoint["state_dict"]["bbox_head.conv_cls.bias"].view(-1, 3)[:, 0] -= 3.0
    torch.save(checkpoint, folder / "altered.pth")
    yield convert(Conversion(DEMO_CONFIG, folder / "altered.pth", folder, "second")).path


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, dict[str, Any], str]:
    code = compare.main([str(each) for each in arguments])
    printed = capsys.readouterr()
    found: dict[str, Any] = json.loads(printed.out.splitlines()[-1])["compare"]
    return code, found, printed.err


@pytest.mark.slow
def test_a_version_that_lost_a_class_is_caught_and_its_worst_frames_are_drawn(
    demo_mar: Path,
    altered_mar: Path,
    clouds: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    code, found, said = run(
        capsys, demo_mar, altered_mar, clouds, "--out", out, "--worst", 2, "--device", "cpu"
    )
    assert code == 1 and found["frames"] == 3
    assert found["by_class"]["Pedestrian"]["lost"] > 0 == found["by_class"]["Car"]["lost"]
    assert found["beyond_limits"] and all(each in said for each in found["beyond_limits"])
    assert len(list((out / "worst").glob("*.png"))) == 2
    lines = [json.loads(line) for line in (out / "frames.jsonl").read_text().splitlines()]
    assert [each["frame"] for each in lines] == [f"scan.{k:06d}.bin" for k in range(3)]
    assert sum(len(each["changes"]) for each in lines) == found["all"]["lost"]
    assert json.loads((out / "comparison.json").read_text())["compare"] == found

    code, found, _ = run(capsys, demo_mar, demo_mar, clouds, "--device", "cpu", "--out", out)
    assert code == 0 and found["all"]["matched"] > 0 and not found["beyond_limits"]
    assert not list((out / "worst").glob("*.png"))


def test_two_served_versions_are_compared(
    start_gateway: Callable[..., RunningGateway],
    torchserve: FakeTorchServe,
    clouds: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    torchserve.models["second"]["2.0"] = FakeModel(default=False)
    address = f"{start_gateway().url}/predictions/second"
    code, found, _ = run(capsys, address, f"{address}/2.0", clouds, "--score-thr", 0, "--batch-size", 2)
    assert code in (0, 3) and found["frames"] == 3
    with pytest.raises(ModelNotFound):
        compare.main([address, f"{address}/7.0", str(clouds)])


def test_frames_without_detections_prove_nothing(
    start_gateway: Callable[..., RunningGateway], clouds: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    address = f"{start_gateway().url}/predictions/second"
    code, found, said = run(capsys, address, address, clouds, "--score-thr", 1)
    assert (code, found["all"]["matched"]) == (3, 0) and said


def test_a_frame_that_only_the_second_version_fails_on_is_beyond_the_limit(
    start_gateway: Callable[..., RunningGateway], clouds: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = (clouds / "scan.000001.bin").stat().st_size
    cloud = np.fromfile(clouds / "scan.000001.bin", np.float32).reshape(-1, 4)
    np.concatenate([cloud, cloud]).tofile(clouds / "scan.000001.bin")
    roomy, tight = start_gateway(), start_gateway(max_frame_bytes=size + 16)
    code, found, _ = run(
        capsys, f"{roomy.url}/predictions/second", f"{tight.url}/predictions/second", clouds, "--score-thr", 0
    )
    assert code == 1 and found["failed"] == {"before": 0, "after": 1, "both": 0} and found["frames"] == 2


def test_models_of_other_frames_are_an_error_and_leave_no_former_result(
    start_gateway: Callable[..., RunningGateway], torchserve: FakeTorchServe, clouds: Path, tmp_path: Path
) -> None:
    torchserve.models["second"]["2.0"] = FakeModel(default=False, spec=IMAGES)
    address = f"{start_gateway().url}/predictions/second"
    (tmp_path / "comparison.json").write_text("{}")
    with pytest.raises(SettingsError):
        compare.main([address, f"{address}/2.0", str(clouds), "--out", str(tmp_path)])
    assert not (tmp_path / "comparison.json").exists()


def test_frames_that_both_versions_fail_on_prove_nothing(
    start_gateway: Callable[..., RunningGateway], clouds: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    address = f"{start_gateway(max_frame_bytes=16).url}/predictions/second"
    code, found, _ = run(capsys, address, address, clouds)
    assert (code, found["frames"], found["failed"]["both"]) == (3, 0, 3)


def test_no_password_of_an_address_is_shown(capsys: pytest.CaptureFixture[str], clouds: Path) -> None:
    with pytest.raises(ServeError) as refused:
        address = "http://user:secret@127.0.0.1:9/predictions/second"
        compare.main([address, address, str(clouds)])
    printed = capsys.readouterr()
    assert "secret" not in str(refused.value) + printed.out + printed.err


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:8000", "http://127.0.0.1:8000/second", "https://x/models"]
)
def test_an_address_that_names_no_model_is_an_error(address: str, clouds: Path) -> None:
    with pytest.raises(SettingsError):
        compare.main([address, address, str(clouds)])
