"""`serve.verify.reference` and `tools/deployment/test_torchserver.py`, on a real socket.

The served side is scripted; the native side is mmdet3d's SECOND (the demo's config) and mmdet's Faster R-CNN with
random weights.
"""

from __future__ import annotations

import importlib.util
import json
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from serve import errors
from serve.cli import run
from serve.verify.endpoint import find_frames
from serve.verify.reference import ReferenceModel, filter_by_score
from serve.verify.reference_loading import load_reference
from tests.verify.scripted import Answer, FakeTorchServe

ROOT = Path(__file__).resolve().parents[2]
SECOND = str(ROOT / "serve" / "assets" / "second_demo.py")
ANOTHER_SECOND = "hv_second_secfpn_6x8_80e_kitti-3d-3class"  # its name before 1.0; the zoo knows today's
FASTER_RCNN = "faster-rcnn_r50_fpn_1x_coco"


# The native side


def _random_weights(config: str, path: Path) -> Path:
    from serve import ops, zoo
    from serve.convert import configured_classes, resolve_config
    from serve.convert.random_weights import write_random_checkpoint

    ops.install()
    parsed = resolve_config(zoo.resolve(config).config_path).config
    write_random_checkpoint(parsed, tuple(configured_classes(parsed)), path)
    return path


@pytest.fixture(scope="module")
def second_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _random_weights(SECOND, tmp_path_factory.mktemp("second") / "second.pth")


@pytest.fixture(scope="module")
def second(second_checkpoint: Path) -> ReferenceModel:
    return load_reference(SECOND, second_checkpoint, "cpu")


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from serve.synthetic.scenes import sample_frame

    path = tmp_path_factory.mktemp("cloud") / "frame.bin"
    path.write_bytes(sample_frame())
    return path


@pytest.fixture(scope="module")
def detected(second: ReferenceModel, cloud: Path) -> dict[str, Any]:
    return second.detect(cloud)


def test_reference_second_detects_with_names_in_the_lidar_frame(
    second: ReferenceModel, detected: dict[str, Any]
) -> None:
    assert (second.modality, second.box_type_3d, second.load_dim) == ("lidar", "LiDAR", 4)
    assert second.notes == ()
    found = detected
    assert len(found["scores_3d"]) > 3
    assert {len(box) for box in found["bboxes_3d"]} == {7}
    assert found["names"] == [second.classes[label] for label in found["labels_3d"]]
    assert found["box_type_3d"] == "LiDAR"
    json.dumps(found, allow_nan=False)
    best = filter_by_score(found, max(found["scores_3d"]))
    assert len(best["scores_3d"]) == len(best["bboxes_3d"]) == len(best["names"]) >= 1


def test_npy_point_clouds_are_read_without_their_header(
    second: ReferenceModel, cloud: Path, detected: dict[str, Any], tmp_path: Path
) -> None:
    copy = tmp_path / "frame.npy"
    np.save(copy, np.fromfile(cloud, np.float32).reshape(-1, 4))
    assert second.detect(copy) == detected


@pytest.mark.parametrize(
    ("name", "body", "sentence"),
    [
        ("short.bin", b"\x00" * 18, "18 bytes"),
        ("empty.bin", b"", "empty"),
        ("bad.npy", b"\x93NUMPY", r"bad\.npy"),
        ("frame.txt", b"1 2 3", r"frame\.txt"),
        ("gone.bin", None, r"gone\.bin"),
    ],
)
def test_unreadable_point_clouds_are_rejected(
    second: ReferenceModel, tmp_path: Path, name: str, body: bytes | None, sentence: str
) -> None:
    if body is not None:
        (tmp_path / name).write_bytes(body)
    with pytest.raises(errors.UndecodableFrame, match=sentence):
        second.detect(tmp_path / name)


def test_checkpoint_of_another_network_is_rejected(
    second_checkpoint: Path, tmp_path: Path, cloud: Path
) -> None:
    with pytest.raises(errors.CheckpointError, match=r"\.pth"):
        load_reference(SECOND, tmp_path / "none.pth", "cpu")
    with pytest.raises(errors.CheckpointError):
        load_reference(ANOTHER_SECOND, second_checkpoint, "cpu")
    with pytest.raises(errors.ModelLookupError):
        load_reference("no-such-model", second_checkpoint, "cpu")
    with pytest.raises(errors.SetupError):
        load_reference(SECOND, second_checkpoint, "quantum")


def test_spconv_2_kernels_are_permuted_to_mmcv_layout(
    second_checkpoint: Path, cloud: Path, detected: dict[str, Any], tmp_path: Path
) -> None:
    """What OpenMMLab publishes for 1.x; mmdet3d without spconv refuses it shape by shape."""
    import torch

    saved = torch.load(second_checkpoint, weights_only=True)
    turned = {k: v.permute(4, 0, 1, 2, 3) if v.dim() == 5 else v for k, v in saved["state_dict"].items()}
    torch.save({**saved, "state_dict": turned}, tmp_path / "spconv2.pth")
    native = load_reference(SECOND, tmp_path / "spconv2.pth", "cpu")
    assert len(native.notes) == 1 and "sparse kernels" in native.notes[0]
    assert native.detect(cloud) == detected


def test_reference_takes_checkpoints_that_a_conversion_takes(
    second_checkpoint: Path, cloud: Path, detected: dict[str, Any], tmp_path: Path
) -> None:
    """Objects of other types, no meta, and missing weights: with the option that a conversion wants, too."""
    import torch

    saved = torch.load(second_checkpoint, weights_only=True)
    path = tmp_path / "objects.pth"
    torch.save({**saved, "hook_msgs": {"rng": np.random.RandomState(0)}}, path)
    with pytest.raises(errors.CheckpointError, match="--trust-checkpoint"):
        load_reference(SECOND, path, "cpu")
    assert load_reference(SECOND, path, "cpu", trust_checkpoint=True).detect(cloud) == detected
    torch.save(saved["state_dict"], tmp_path / "bare.pth")
    bare = load_reference(SECOND, tmp_path / "bare.pth", "cpu", classes=("a", "b", "c"))
    assert bare.classes == ("a", "b", "c") and set(bare.detect(cloud)["names"]) <= {"a", "b", "c"}
    with pytest.raises(errors.ArchiveError, match="--classes"):
        load_reference(SECOND, tmp_path / "bare.pth", "cpu", classes=("a", "b"))


def test_reference_with_missing_weights_is_the_conversions(tmp_path: Path, second_checkpoint: Path) -> None:
    import torch

    from serve.convert.checkpoint import load_checkpoint
    from serve.convert.config import resolve_config
    from serve.convert.legacy_weights import adapt_and_load
    from serve.runtime.model import build_network

    saved = torch.load(second_checkpoint, weights_only=True)
    del saved["state_dict"]["bbox_head.conv_cls.weight"]
    torch.save(saved, tmp_path / "partial.pth")
    with pytest.raises(errors.CheckpointError, match="--allow-partial"):
        load_reference(SECOND, tmp_path / "partial.pth", "cpu")
    native = load_reference(SECOND, tmp_path / "partial.pth", "cpu", allow_partial=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build_network(resolve_config(Path(SECOND)).config, native.classes)
    adapt_and_load(network, load_checkpoint(tmp_path / "partial.pth"), allow_partial=True)
    converted = network.state_dict()
    for name, weight in native.module.state_dict().items():
        assert torch.equal(weight, converted[name]), name


def test_point_clouds_of_other_formats_are_read_as_a_server_reads_them(
    second: ReferenceModel, cloud: Path, detected: dict[str, Any], tmp_path: Path
) -> None:
    points = np.fromfile(cloud, np.float32).reshape(-1, 4)
    head = "VERSION 0.7\nFIELDS x y z intensity\nSIZE 4 4 4 4\nTYPE F F F F\nCOUNT 1 1 1 1\n"
    head += f"WIDTH {len(points)}\nHEIGHT 1\nVIEWPOINT 0 0 0 1 0 0 0\nPOINTS {len(points)}\nDATA binary\n"
    (tmp_path / "frame.pcd").write_bytes(head.encode() + points.tobytes())
    np.savez(tmp_path / "frame.npz", points)
    for name in ("frame.pcd", "frame.npz"):
        assert second.detect(tmp_path / name) == detected
    assert len(find_frames(tmp_path, "lidar")) == 2


def test_a_variant_differs_by_rounding_and_leaves_the_model_unchanged(
    second: ReferenceModel, cloud: Path, detected: dict[str, Any]
) -> None:
    from serve.compare.detections import compare

    changed = second.detect(cloud, variant=1)
    assert changed != detected and compare(detected, changed).ok
    assert changed == second.detect(cloud, variant=1)
    assert second.detect(cloud) == detected


@pytest.mark.parametrize("part", ["middle_encoder", "backbone", "bbox_head"])
def test_a_weight_altered_by_one_per_cent_is_a_mismatch(
    second: ReferenceModel, cloud: Path, detected: dict[str, Any], part: str
) -> None:
    import torch

    from serve.compare.detections import compare
    from serve.compare.ties import confirm_ties

    weight = next(w for name, w in second.module.named_parameters() if name.startswith(part) and w.dim() > 1)
    former = weight.detach().clone()
    variants = [second.detect(cloud, variant) for variant in (1, 2)]
    try:
        with torch.no_grad():
            weight.mul_(1.01)
        altered = second.detect(cloud)
    finally:
        with torch.no_grad():
            weight.copy_(former)
    assert not confirm_ties(compare(detected, altered), detected, altered, variants).ok


@pytest.fixture(scope="module")
def faster_rcnn(tmp_path_factory: pytest.TempPathFactory) -> ReferenceModel:
    path = _random_weights(FASTER_RCNN, tmp_path_factory.mktemp("faster") / "faster.pth")
    return load_reference(FASTER_RCNN, path, "cpu")


def test_models_of_both_packages_run_in_one_process(
    second: ReferenceModel, faster_rcnn: ReferenceModel, cloud: Path
) -> None:
    """mmengine looks names up in the scope of whichever model was loaded last."""
    assert second.detect(cloud)["scores_3d"]


def test_reference_faster_rcnn_detects_in_an_image(faster_rcnn: ReferenceModel, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (120, 160, 3), np.uint8)
    path = tmp_path / "image.png"
    cv2.imwrite(str(path), noise)
    found = faster_rcnn.detect(path)
    assert (faster_rcnn.modality, faster_rcnn.box_type_3d, len(faster_rcnn.classes)) == ("image", None, 80)
    assert len(found["scores"]) > 0
    edge = 1e-3  # px: mmdet clips to the picture as the network saw it, and scales back afterwards
    assert all(
        0 <= x1 <= x2 <= 160 + edge and 0 <= y1 <= y2 <= 120 + edge for x1, y1, x2, y2 in found["bboxes"]
    )
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(errors.UndecodableFrame):
        faster_rcnn.detect(path)


# The tool


@pytest.fixture(scope="module")
def main() -> Callable[[list[str]], int]:
    path = ROOT / "tools" / "deployment" / "test_torchserver.py"
    spec = importlib.util.spec_from_file_location("test_torchserver_tool_main", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda argv: run(module.main, argv)


def serving(native: ReferenceModel, found: Mapping[str, Any], **more: Any) -> Answer:
    def answer(body: bytes, options: Mapping[str, str]) -> dict[str, Any]:
        return {
            **filter_by_score(found, float(options["score_thr"])),
            "classes": list(native.classes),
            **more,
        }

    return answer


def test_verify_command_returns_0_for_equal_predictions(
    main: Callable[[list[str]], int],
    server: FakeTorchServe,
    second: ReferenceModel,
    second_checkpoint: Path,
    cloud: Path,
    detected: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server.answer = serving(second, detected)
    arguments = [str(cloud), SECOND, str(second_checkpoint), "second", "--inference-addr", server.address]
    more = ["--device", "cpu", "--score-thr", "0.1", "--draw", str(tmp_path / "drawn")]
    assert main(arguments + more) == 0
    out = capsys.readouterr().out
    assert "match: 1 of 1 frames agree" in out and "largest deviation over all: box 0.0e+00 m" in out
    assert len(list((tmp_path / "drawn").iterdir())) == 2


def test_verify_command_returns_1_for_a_deviation_beyond_tolerance(
    main: Callable[[list[str]], int],
    server: FakeTorchServe,
    second: ReferenceModel,
    second_checkpoint: Path,
    cloud: Path,
    detected: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    same = serving(second, detected)

    def shifted(body: bytes, options: Mapping[str, str]) -> Mapping[str, Any]:
        answer = json.loads(json.dumps(same(body, options)))
        answer["bboxes_3d"][2][0] += 0.01
        return answer

    server.answer = shifted
    arguments = [str(cloud.parent), SECOND, str(second_checkpoint), "second", "--score-thr", "0.1"]
    arguments += ["--inference-addr", server.address, "--device", "cpu"]
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert "FAIL" in captured.out and "box 1.0e-02 m" in captured.out
    assert main([*arguments, "--box-tolerance", "0.02"]) == 0


def test_verify_command_returns_2_with_one_error_line(
    main: Callable[[list[str]], int],
    server: FakeTorchServe,
    second: ReferenceModel,
    second_checkpoint: Path,
    cloud: Path,
    detected: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def ends_with(detail: str, *more: str, img: Path = cloud, checkpoint: Path = second_checkpoint) -> None:
        arguments = [str(img), SECOND, str(checkpoint), "second", "--device", "cpu"]
        assert main([*arguments, "--inference-addr", server.address, *more]) == 2
        captured = capsys.readouterr()
        *stages, error = captured.err.splitlines()
        assert error.startswith("error: ") and all(line.startswith("[") for line in stages)
        assert detail in error
        assert captured.out == ""

    def refused(body: bytes, options: Mapping[str, str]) -> Mapping[str, Any]:
        raise errors.ModelNotFound("no model 'second' is loaded")

    server.answer = serving(second, detected, classes=["Dog"])
    ends_with("Dog")
    server.answer = refused
    ends_with("no model 'second' is loaded")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        ends_with(address, "--inference-addr", address)
    ends_with("none.bin", img=tmp_path / "none.bin")
    ends_with("none.pth", checkpoint=tmp_path / "none.pth")
    ends_with("host:port", "--inference-addr", "ftp://x")
    ends_with("token file", "--token-file", str(tmp_path / "none"))


def test_verify_help_names_arguments_and_units(
    main: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    for word in (
        "IMAGE_FILE",
        "CONFIG_FILE",
        "CHECKPOINT_FILE",
        "MODEL_NAME",
        "--inference-addr",
        "--device",
    ):
        assert word in out
    for word in ("--score-thr", "metres", "pixels", "radians", "seconds"):
        assert word in out
