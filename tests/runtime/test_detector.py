"""The runtime: a batch equals its single frames, and a bad frame has its own error."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from serve import archive
from serve.compare.detections import Tolerances, compare
from serve.errors import ArchiveError, InferenceFailed, OutOfMemory, SelfTestError, ServeError, UnknownOption
from serve.protocol.frames import Frame
from serve.protocol.json_bodies import encode_json
from serve.protocol.options import FrameOptions
from serve.runtime import Detector, device_for, load_detector
from serve.runtime import detector as detector_module
from serve.runtime.fusion import find_fusable, fuse
from serve.runtime.selftest import self_test
from serve.settings import Limits
from serve.verify.report import comparison_table

EXACT = Tolerances(box_m=1e-4, score=1e-5)


def frame(points: np.ndarray, **options) -> Frame:
    return Frame(points, FrameOptions(**options))


def cloud(street: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Sample n points of a street, repeated with jitter if it has fewer."""
    rng = np.random.default_rng(seed)
    points = (
        street[rng.integers(0, len(street), n)].copy()
        if n > len(street)
        else street[rng.permutation(len(street))[:n]]
    )
    points[:, :3] += rng.normal(0, 0.02, (n, 3)).astype(np.float32)
    return points


def test_detector_finds_the_cars_of_the_sample(detector, street):
    (answer,) = detector.run([frame(street, score_thr=0.3)])
    assert answer["names"].count("Car") >= 2
    assert answer["box_type_3d"] == "LiDAR" and answer["bboxes_3d"].shape[1] == 7
    assert answer["units"]["origin"] == "bottom centre" and answer["model"] == {
        "name": "second",
        "version": "1.0",
    }


@pytest.mark.parametrize(
    "sizes",
    [
        [17_000],
        [17_000, 0],
        [0, 17_000],
        [1, 120_000, 0, 5_000],
        [0, 0],
        [60_000, 17_000, 100, 0, 9_000, 33_000, 1, 120_000],
    ],
)
def test_batch_equals_single_frames(detector, street, sizes):
    frames = [frame(cloud(street, n, seed)) for seed, n in enumerate(sizes)]
    for single, together in zip(frames, detector.run(frames), strict=True):
        (alone,) = detector.run([single])
        found = compare(alone, together, EXACT)
        assert found.ok, comparison_table(found)


def test_point_clouds_of_one_call_form_one_batch(detector, street, monkeypatch):
    sizes = []
    forward = detector.forward
    monkeypatch.setattr(
        detector, "forward", lambda samples: (sizes.append(len(samples)), forward(samples))[1]
    )
    detector.run([frame(street), frame(street[:0]), frame(street[::2])])
    assert sizes == [2]  # the empty frame never reaches the network


@pytest.mark.parametrize(
    "points", [np.zeros((0, 4)), np.full((50, 4), 500.0), np.full((3, 4), [10, 0, 90, 0])]
)
def test_frame_without_points_in_range_has_no_boxes(detector, points):
    (answer,) = detector.run([frame(points.astype(np.float32))])
    assert answer["bboxes_3d"].shape == (0, 7) and answer["names"] == [] and answer["classes"]


def test_same_frame_gives_the_same_bytes(detector, street):
    first, second = (encode_json(detector.run([frame(street)])[0]) for _ in range(2))
    assert first == second


def test_options_filter_detections(detector, street):
    everything, above, three = detector.run(
        [frame(street), frame(street, score_thr=0.5), frame(street, max_detections=3)]
    )
    scores = everything["scores_3d"]
    assert (np.diff(scores) <= 0).all()
    assert len(above["names"]) == (scores >= 0.5).sum() == len(above["bboxes_3d"])
    np.testing.assert_array_equal(three["scores_3d"], scores[:3])


def test_classes_and_fields_are_selected(detector, street):
    (everything,) = detector.run([frame(street)])
    name = everything["names"][0]
    options = {"classes": (name,), "class_thr": ((name, 0.3),), "fields": ("names", "scores_3d")}
    (some,) = detector.run([frame(street, **options)])
    kept = [
        k for k, each in enumerate(everything["names"]) if each == name and everything["scores_3d"][k] >= 0.3
    ]
    assert list(some) == ["names", "scores_3d"] and some["names"] == [name] * len(kept) != []
    np.testing.assert_array_equal(some["scores_3d"], everything["scores_3d"][kept])


def test_class_that_the_model_lacks_is_refused_before_it_computes(detector, street):
    with pytest.raises(UnknownOption, match="unicorn"):
        detector.decode(street.tobytes(), FrameOptions(classes=("unicorn",)), Limits())


def test_run_does_not_modify_the_callers_points(detector, street):
    mine = street.copy()
    detector.run([frame(mine)])
    np.testing.assert_array_equal(mine, street)


class FailingNetwork:
    """Proxy of a network that fails on demand, like a full device or a broken frame."""

    def __init__(self, network: nn.Module, failure) -> None:
        self._network, self._mood = network, failure

    def __getattr__(self, name):
        return getattr(self._network, name)

    def test_step(self, data):
        self._mood(data)
        return self._network.test_step(data)


@pytest.fixture
def failing_detector(detector):
    """Replace the detector's network by a proxy that fails on demand."""
    calm = detector.network

    def give(failure):
        detector.network = FailingNetwork(calm, failure)
        return detector

    yield give
    detector.network = calm


def test_failing_frame_does_not_affect_the_others(failing_detector, street, caplog):
    def failure(data):
        if any(float(points[0, 3]) == 0.625 for points in data["inputs"]["points"]):
            raise RuntimeError("no")

    bad = street.copy()
    bad[:, 3] = 0.625
    outcomes = failing_detector(failure).run([frame(street), frame(bad), frame(street)])
    assert isinstance(outcomes[1], InferenceFailed) and "RuntimeError" in str(outcomes[1])
    assert len(outcomes[0]["names"]) == len(outcomes[2]["names"]) > 0


def test_out_of_memory_batch_is_halved(failing_detector, street):
    seen = []

    def failure(data):
        seen.append(len(data["inputs"]["points"]))
        if seen[-1] > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    outcomes = failing_detector(failure).run([frame(street)] * 5)
    assert all(isinstance(outcome, dict) for outcome in outcomes)
    assert seen == [5, 2, 3, 1, 2]


def test_out_of_memory_frame_raises_out_of_memory(failing_detector, street):
    def failure(data):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    outcomes = failing_detector(failure).run([frame(street)] * 2)
    assert all(isinstance(outcome, OutOfMemory) and outcome.status == 507 for outcome in outcomes)


def test_failing_pipeline_affects_its_frame_only(detector, street, caplog):
    outcomes = detector.run([frame(street), frame(np.zeros((3, 3), dtype=np.float32)), frame(street)])
    assert isinstance(outcomes[1], InferenceFailed)
    assert outcomes[0]["names"] == outcomes[2]["names"] != []


@pytest.mark.parametrize("seam", ["prepare", "_is_empty", "select"])
@pytest.mark.parametrize("kind", [TypeError, RecursionError, ArchiveError, StopIteration, MemoryError])
def test_whatever_is_raised_for_a_frame_is_its_outcome(detector, street, monkeypatch, caplog, seam, kind):
    owner = detector_module if seam == "select" else detector
    real, calls = getattr(owner, seam), []

    def fail_at_the_second(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise kind("poison")
        return real(*arguments)

    monkeypatch.setattr(owner, seam, fail_at_the_second)
    first, second, third = detector.run([frame(street)] * 3)
    assert first["names"] == third["names"] != [] and isinstance(second, ServeError)
    assert isinstance(second, OutOfMemory) == (kind is MemoryError)


def test_run_does_not_modify_the_config(detector, street):
    before = copy.deepcopy(detector.network.cfg.to_dict())
    detector.run([frame(street)])
    assert detector.network.cfg.to_dict() == before


def test_device_for_maps_gpu_ids(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device_for(None) == torch.device("cpu")
    assert device_for(1) == device_for("1") == torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_for(0) == torch.device("cpu")


class Tangled(nn.Module):
    """Network with attributes in another order than calls, a norm without a convolution, and one of a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.bn_b, self.bn_a = nn.BatchNorm2d(6), nn.BatchNorm2d(4)
        self.conv_a = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.up = nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2)
        self.loose, self.summed = nn.BatchNorm2d(3), nn.BatchNorm2d(6)
        self.conv_c = nn.Conv2d(6, 6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn_b(self.up(self.bn_a(self.conv_a(self.loose(x))).relu()))
        return self.summed(self.conv_c(y) + y)


def test_only_observed_conv_norm_pairs_are_fused():
    torch.manual_seed(0)
    network = Tangled().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = network(x)
        pairs = find_fusable(network, lambda: network(x))
        assert pairs == (("conv_a", "bn_a"), ("up", "bn_b"))
        fuse(network, pairs)
        torch.testing.assert_close(network(x), expected, atol=1e-5, rtol=1e-5)
    assert isinstance(network.bn_a, nn.Identity) and isinstance(network.summed, nn.BatchNorm2d)


def test_fused_demo_model_equals_the_unfused_one(demo_archive, detector, street):
    from serve.runtime.model import build_network, load_state_dict_strict

    assert len(demo_archive.metadata.inference.fold_batch_norm) >= 10
    from safetensors.torch import load_file

    plain = build_network(demo_archive.config(), demo_archive.metadata.classes)
    load_state_dict_strict(plain, load_file(demo_archive.weights))
    reference = Detector(plain, demo_archive.config(), demo_archive.metadata, torch.device("cpu"))
    found = compare(reference.run([frame(street)])[0], detector.run([frame(street)])[0], EXACT)
    assert found.ok, comparison_table(found)


def test_self_test_passes_on_the_golden_frame(demo_archive, detector):
    assert self_test(detector, demo_archive) > 0


def test_self_test_fails_for_changed_weights(demo_archive):
    import torch

    changed = load_detector(demo_archive, torch.device("cpu"))
    (layer,) = changed.network.bbox_head.conv_reg.layers
    layer.weight[:] *= 1.05
    with pytest.raises(SelfTestError, match="second"):
        self_test(changed, demo_archive)


def test_archive_with_code_requires_trust(tmp_path, demo_archive):
    from dataclasses import replace

    (tmp_path / "weights").write_bytes(demo_archive.weights.read_bytes())
    witness = tmp_path / "executed"
    archive.write(
        tmp_path / "second.mar",
        replace(demo_archive.metadata, files={}),
        config={**demo_archive.config(), "custom_imports": {"imports": ["archived_module"]}},
        weights=tmp_path / "weights",
        golden_frame=demo_archive.golden_frame(),
        golden_expected=demo_archive.golden_expected(),
        code={"archived_module.py": f"open({str(witness)!r}, 'w').close()".encode()},
    )
    opened = archive.extract(tmp_path / "second.mar", tmp_path / "opened")
    with pytest.raises(ArchiveError, match="TRUST_ARCHIVE_CODE"):
        load_detector(opened, torch.device("cpu"))
    assert not witness.exists()
    load_detector(opened, torch.device("cpu"), trust_code=True)
    assert witness.exists()


def test_decode_uses_the_models_load_dim(detector, street):
    decoded = detector.decode(street.tobytes(), FrameOptions(), Limits())
    np.testing.assert_array_equal(decoded.data, street)
