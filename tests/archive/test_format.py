"""Archives: the same bytes every time, and no way to slip something in."""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve import __version__, archive
from serve.archive import InferenceOptions, Metadata, config_json
from serve.errors import ArchiveError, ArchiveVersionError

METADATA = Metadata(
    name="second",
    version="1.0",
    modality="lidar",
    package="mmdet3d",
    classes=("Car", "Cyclist"),
    box_type_3d="LiDAR",
    load_dim=4,
    color_type=None,
    golden_frame="golden/frame.bin",
    source={"config": "c.py"},
    inference=InferenceOptions((("a.conv", "a.bn"),), True, "off"),
)
CONFIG = {"model": {"type": "VoxelNet", "scale": (1, 2.5)}, "test_dataloader": {}}


def write(folder: Path, metadata: Metadata = METADATA, **changes) -> Path:
    weights = folder / "weights"
    weights.write_bytes(b"weights")
    arguments = {
        "config": CONFIG,
        "weights": weights,
        "golden_frame": b"frame",
        "golden_expected": {"scores": np.array([0.5], dtype=np.float32)},
        **changes,
    }
    archive.write(folder / "second.mar", metadata, **arguments)
    return folder / "second.mar"


def rewrite(path: Path, change) -> Path:
    """Write the zip anew with `change` applied to its {name: bytes}."""
    with zipfile.ZipFile(path) as old:
        entries = {name: old.read(name) for name in old.namelist()}
    change(entries)
    with zipfile.ZipFile(path, "w") as new:
        for name, data in entries.items():
            new.writestr(name, data)
    return path


def test_archive_round_trips(tmp_path):
    path = write(tmp_path, extra={"notes.txt": b"hello"}, code={"mine/__init__.py": b""})
    metadata = archive.verify(path)
    opened = archive.extract(path, tmp_path / "opened")
    assert opened.metadata == metadata
    assert (metadata.name, metadata.classes, metadata.inference) == (
        "second",
        METADATA.classes,
        METADATA.inference,
    )
    assert opened.config() == CONFIG and isinstance(opened.config()["model"]["scale"], tuple)
    assert opened.golden_frame() == b"frame" and opened.golden_expected() == {"scores": [0.5]}
    assert opened.weights.read_bytes() == b"weights"
    assert opened.code is not None and (tmp_path / "opened/extra/notes.txt").read_bytes() == b"hello"


def test_equal_contents_give_equal_bytes(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    first = write(tmp_path / "one", extra={"b": b"1", "a": b"2"})
    second = write(tmp_path / "two", extra={"a": b"2", "b": b"1"})
    assert hashlib.sha256(first.read_bytes()).digest() == hashlib.sha256(second.read_bytes()).digest()


def test_manifest_names_model_and_handler(tmp_path):
    with zipfile.ZipFile(write(tmp_path)) as opened:
        model = json.loads(opened.read("MAR-INF/MANIFEST.json"))["model"]
    assert model == {"modelName": "second", "modelVersion": "1.0", "handler": "handlers.mmdet3d_handler"}


def test_existing_archive_is_replaced_only_with_force(tmp_path):
    before = write(tmp_path).read_bytes()
    with pytest.raises(ArchiveError, match="--force"):
        write(tmp_path, golden_frame=b"other")
    assert (tmp_path / "second.mar").read_bytes() == before
    write(tmp_path, golden_frame=b"other", force=True)
    assert (tmp_path / "second.mar").read_bytes() != before


def test_failed_write_leaves_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        write(tmp_path, extra={"gone": tmp_path / "missing"})
    assert [p.name for p in tmp_path.iterdir()] == ["weights"]


@pytest.mark.parametrize("name", ["../evil", "a b", "", ".hidden", "x" * 200, "a/b"])
def test_invalid_name_or_version_is_rejected(tmp_path, name):
    from dataclasses import replace

    with pytest.raises(ArchiveError):
        write(tmp_path, replace(METADATA, name=name))


@pytest.mark.parametrize(
    "entry", ["weights.safetensors", "config.json", "golden/frame.bin", "golden/expected.json"]
)
def test_altered_entry_is_rejected_by_name(tmp_path, entry):
    path = rewrite(write(tmp_path), lambda entries: entries.update({entry: entries[entry] + b" "}))
    with pytest.raises(ArchiveError, match=f"{entry} was altered"):
        archive.verify(path)
    with pytest.raises(ArchiveError, match=f"{entry} was altered"):
        archive.extract(path, tmp_path / "opened")


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/cron.d/x",
        "/etc/x",
        "a/../../x",
        "handlers/mmdet3d_handler.py",
        "torch.py",
        "extra/../torch.py",
    ],
)
def test_entry_outside_the_archive_folder_is_rejected(tmp_path, name):
    path = rewrite(write(tmp_path), lambda entries: entries.update({name: b"import os"}))
    with pytest.raises(ArchiveError, match="entry"):
        archive.extract(path, tmp_path / "opened")
    assert not (tmp_path / "opened").exists()


def test_undeclared_entry_is_rejected(tmp_path):
    path = rewrite(write(tmp_path), lambda entries: entries.update({"extra/undeclared": b""}))
    with pytest.raises(ArchiveError, match="extra/undeclared"):
        archive.verify(path)


def test_foreign_handler_in_the_manifest_is_rejected(tmp_path):
    def change(entries):
        manifest = json.loads(entries["MAR-INF/MANIFEST.json"])
        manifest["model"]["handler"] = "extra/evil.py"
        entries["MAR-INF/MANIFEST.json"] = json.dumps(manifest).encode()

    with pytest.raises(ArchiveError, match="evil"):
        archive.verify(rewrite(write(tmp_path), change))


def with_metadata(path: Path, **changes) -> Path:
    def change(entries):
        entries["model.json"] = json.dumps({**json.loads(entries["model.json"]), **changes}).encode()

    return rewrite(path, change)


@pytest.mark.parametrize("changes", [{"format": 2}, {"format": 0}])
def test_another_format_is_rejected_naming_both_formats(tmp_path, changes):
    path = with_metadata(write(tmp_path), **changes)
    with pytest.raises(ArchiveVersionError, match=__version__.replace(".", r"\.")) as rejected:
        archive.verify(path)
    assert f"format {changes['format']}" in str(rejected.value)


@pytest.mark.parametrize("version", ["0.1.0", "0.99.0", "9.0.0"])
def test_an_archive_of_another_version_in_the_same_format_is_accepted(tmp_path, version):
    assert archive.verify(with_metadata(write(tmp_path), serve_version=version)).serve_version == version


@pytest.mark.parametrize(
    "changes", [{"classes": 3}, {"surprise": 1}, {"inference": {"fold_batch_norm": [["a"]]}}]
)
def test_malformed_metadata_is_rejected(tmp_path, changes):
    with pytest.raises(ArchiveError, match=r"model\.json"):
        archive.verify(with_metadata(write(tmp_path), **changes))


def test_foreign_archive_is_rejected(tmp_path):
    path = tmp_path / "foreign.mar"
    with zipfile.ZipFile(path, "w") as foreign:
        foreign.writestr("MAR-INF/MANIFEST.json", "{}")
    with pytest.raises(ArchiveError, match=r"MANIFEST|model"):
        archive.verify(path)


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9])
def test_truncated_archive_is_rejected(tmp_path, keep):
    path = write(tmp_path)
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(ArchiveError):
        archive.verify(path)


def test_flipped_bit_is_detected(tmp_path):
    path = write(tmp_path)
    data = bytearray(path.read_bytes())
    data[data.find(b"weights\x50\x4b") if b"weights\x50\x4b" in data else data.rfind(b"weights")] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArchiveError):
        archive.verify(path)


def test_missing_file_of_an_unpacked_archive_is_named(tmp_path):
    opened = archive.extract(write(tmp_path), tmp_path / "opened")
    shutil.rmtree(opened.root / "golden")
    with pytest.raises(ArchiveError, match="golden/"):
        archive.open_directory(opened.root)


leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
)
configs = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=5), inner, max_size=3)
        | st.dictionaries(st.integers(0, 5), inner, max_size=3)
        | st.dictionaries(st.sampled_from(["__tuple__", "__dict__"]), inner, max_size=2)
    ),
    max_leaves=12,
)


@given(configs)
def test_config_round_trips_through_json(config):
    back = config_json.from_json(json.loads(json.dumps(config_json.to_json(config))))
    assert back == config and repr(back) == repr(config)


def test_config_value_that_is_not_data_is_rejected_by_path():
    with pytest.raises(ArchiveError, match=r"config\.model\.act\[1\]"):
        config_json.to_json({"model": {"act": [1, print]}})
