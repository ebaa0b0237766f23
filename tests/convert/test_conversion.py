"""Conversion: reproducible, complete, and refusing what does not fit."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from serve import archive
from serve.convert import Conversion, convert
from serve.errors import ArchiveError, CheckpointError, SelfTestError
from tests.conftest import DEMO_CHECKPOINT, DEMO_CONFIG

pytestmark = pytest.mark.slow  # together: each converts a model


@pytest.fixture
def demo(tmp_path) -> Conversion:
    return Conversion(DEMO_CONFIG, DEMO_CHECKPOINT, tmp_path / "store", "second")


def changed_checkpoint(folder: Path, change) -> Path:
    checkpoint = torch.load(DEMO_CHECKPOINT, weights_only=True)
    change(checkpoint["state_dict"])
    torch.save(checkpoint, folder / "changed.pth")
    return folder / "changed.pth"


def test_converting_twice_writes_identical_archives(demo, demo_mar):
    again = convert(demo)
    assert hashlib.sha256(demo_mar.read_bytes()).hexdigest() == again.sha256
    assert again.path.read_bytes() == demo_mar.read_bytes()


def test_archive_metadata_records_model_and_source(demo_archive):
    metadata = demo_archive.metadata
    assert metadata.classes == ("Pedestrian", "Cyclist", "Car")
    assert (metadata.modality, metadata.box_type_3d, metadata.load_dim) == ("lidar", "LiDAR", 4)
    assert metadata.source["checkpoint_sha256"] == hashlib.sha256(DEMO_CHECKPOINT.read_bytes()).hexdigest()
    assert {"torch", "mmdet3d", "mmengine"} <= set(metadata.source)
    assert not any(str(Path.home()) in value for value in metadata.source.values())


def test_missing_weight_is_listed_and_stops_the_conversion(demo, tmp_path):
    checkpoint = changed_checkpoint(tmp_path, lambda state: state.pop("bbox_head.conv_cls.bias"))
    with pytest.raises(CheckpointError, match=r"bbox_head\.conv_cls\.bias"):
        convert(replace(demo, checkpoint=checkpoint))
    assert not list((tmp_path / "store").glob("*"))
    made = convert(replace(demo, checkpoint=checkpoint, allow_partial=True))
    assert any("conv_cls.bias" in note for note in made.notes)


def test_unexpected_weight_is_listed_and_stops_the_conversion(demo, tmp_path):
    checkpoint = changed_checkpoint(tmp_path, lambda state: state.update({"extra.weight": torch.zeros(1)}))
    with pytest.raises(CheckpointError, match=r"extra\.weight"):
        convert(replace(demo, checkpoint=checkpoint))


def test_existing_archive_is_kept_without_force(demo):
    first = convert(demo)
    with pytest.raises(ArchiveError, match="--force"):
        convert(demo)
    assert convert(replace(demo, force=True, model_version="2.0")).metadata.version == "2.0"
    assert first.path.exists()


def test_failed_proof_keeps_the_existing_archive(demo, monkeypatch):
    made = convert(demo)
    before = made.path.read_bytes()

    def disagree(*_, **__):
        raise SelfTestError("does not come out as recorded")

    monkeypatch.setattr("serve.convert.proof.ProofProcess.prove", disagree)
    with pytest.raises(SelfTestError):
        convert(replace(demo, force=True, model_version="2.0"))
    assert made.path.read_bytes() == before
    assert [path.name for path in made.path.parent.iterdir()] == ["second.mar"]


def test_extra_files_are_packed_and_missing_ones_rejected(demo, tmp_path):
    note = tmp_path / "note.txt"
    note.write_text("hello")
    made = convert(replace(demo, extra_files=[note]))
    assert "extra/note.txt" in made.metadata.files
    with pytest.raises(ArchiveError, match="gone"):
        convert(replace(demo, extra_files=[tmp_path / "gone"], force=True))


def test_custom_import_modules_are_packed(demo, tmp_path, monkeypatch):
    (tmp_path / "my_modules").mkdir()
    (tmp_path / "my_modules" / "__init__.py").write_text("LOADED = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = tmp_path / "custom.py"
    config.write_text(DEMO_CONFIG.read_text() + "\ncustom_imports = dict(imports=['my_modules'])\n")
    made = convert(replace(demo, config=config))
    assert "code/my_modules/__init__.py" in made.metadata.files
    assert not any("mmdet3d" in name for name in made.metadata.files)


def test_missing_broken_and_modelless_configs_are_rejected(demo, tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("model = dict(")
    no_model = tmp_path / "no_model.py"
    no_model.write_text("default_scope = 'mmdet3d'")
    for config in (tmp_path / "none.py", broken, no_model):
        with pytest.raises(ArchiveError, match=config.name):
            convert(replace(demo, config=config))


def test_user_golden_frame_is_recorded(demo, tmp_path, street):
    frame = tmp_path / "mine.bin"
    frame.write_bytes(street[::2].tobytes())
    made = convert(replace(demo, golden_frame=frame))
    opened = archive.extract(made.path, tmp_path / "opened")
    assert opened.golden_frame() == frame.read_bytes()
    assert not any("intensities" in note for note in made.notes)


def test_unusual_golden_frame_is_named_in_the_notes(demo, tmp_path, street):
    frame = tmp_path / "bright.bin"
    frame.write_bytes((street * np.array([1, 1, 1, 255], np.float32)).tobytes())
    made = convert(replace(demo, golden_frame=frame))
    assert any("0 to 1" in note for note in made.notes)


def test_conversion_reports_each_step(demo):
    steps: list[str] = []
    convert(replace(demo, report=steps.append))
    assert len(steps) == 7 and "config" in steps[1] and "proving" in steps[-1]
