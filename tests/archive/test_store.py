"""Archives in a bucket: published, fetched, checked, and the commands for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from serve import archive, storage
from serve.archive import Metadata
from serve.archive import store as model_store
from serve.cli import fetch as fetch_command
from serve.cli import pack as pack_command
from serve.errors import ArchiveError, ObjectNotFound, StorageError, UriError
from serve.storage import s3
from serve.storage.packed_folder import PackedFolder

ROOT = Path(__file__).parents[2]


def made(folder: Path, name: str, weights: bytes = b"weights") -> Path:
    """A small, whole archive of ours (nothing that could be served)."""
    (folder / "w").write_bytes(weights)
    metadata = Metadata(
        name=name, version="1.0", modality="lidar", package="mmdet3d", classes=("Car",), box_type_3d="LiDAR",
        load_dim=4, color_type=None, golden_frame="golden/frame.bin", source={},
    )  # fmt: skip
    path = folder / f"{name}.mar"
    archive.write(
        path, metadata, config={}, weights=folder / "w", golden_frame=b"", golden_expected={}, force=True
    )
    return path


@pytest.fixture
def store(bucket, tmp_path) -> str:
    place = f"s3://{bucket}/models"
    for name in ("second", "pointpillars"):
        model_store.publish(made(tmp_path, name), place)
    return place


def test_published_archive_is_fetched_with_its_hash(store, tmp_path, capsys):
    assert fetch_command.main(["--from", store, "--to", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    for name in ("second", "pointpillars"):
        assert (tmp_path / f"out/{name}.mar").read_bytes() == (tmp_path / f"{name}.mar").read_bytes()
        assert f"{name}.mar (fetched" in told
    before = (tmp_path / "out/second.mar").stat().st_mtime_ns
    assert (
        fetch_command.main(["--from", store + "/", "--to", str(tmp_path / "out"), "--models", "second"]) == 0
    )
    assert "unchanged" in capsys.readouterr().out
    assert (tmp_path / "out/second.mar").stat().st_mtime_ns == before
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["pointpillars.mar", "second.mar"]


def test_newer_archive_replaces_the_old_one(store, tmp_path):
    model_store.fetch(store, tmp_path / "out", ["second"])
    with pytest.raises(ArchiveError, match="--force"):
        model_store.publish(made(tmp_path, "second", b"newer"), store)
    model_store.publish(tmp_path / "second.mar", store, force=True)
    (fetched,) = model_store.fetch(store, tmp_path / "out", ["second.mar"])
    assert not fetched.already_present and fetched.path.read_bytes() == (tmp_path / "second.mar").read_bytes()


def put(store: str, name: str, body: bytes, **metadata: str) -> None:
    where = storage.parse(f"{store}/{name}")
    s3.connect().client.put_object(Bucket=where.bucket, Key=where.path, Body=body, Metadata=metadata)


@pytest.mark.parametrize(
    ("spoil", "error", "says"),
    [
        (lambda body: (body, {"sha256": "0" * 64}), StorageError, "was altered"),
        (lambda body: (body[:-100] + b"x" + body[-99:], {}), ArchiveError, "archive"),
        (lambda body: (body[: len(body) // 2], {}), ArchiveError, "not a readable archive"),
        (lambda body: (b"no archive", {}), ArchiveError, "not a readable archive"),
    ],
)
def test_altered_archive_is_rejected_and_the_old_one_kept(store, tmp_path, spoil, error, says):
    model_store.fetch(store, tmp_path / "out", ["second"])
    before = (tmp_path / "out/second.mar").read_bytes()
    body, metadata = spoil(made(tmp_path, "second", b"newer").read_bytes())
    put(store, "second.mar", body, **metadata)
    with pytest.raises(error, match=says):
        model_store.fetch(store, tmp_path / "out", ["second"])
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["second.mar"]
    assert (tmp_path / "out/second.mar").read_bytes() == before


def test_archive_without_store_hash_is_checked_by_its_own_hashes_with_a_note(store, tmp_path, capsys):
    put(store, "third.mar", made(tmp_path, "third").read_bytes())
    assert fetch_command.main(["--from", store, "--to", str(tmp_path / "out"), "--models", "third"]) == 0
    assert "no sha256 for third.mar" in capsys.readouterr().err


def test_archive_under_another_name_is_rejected(store, tmp_path):
    put(store, "other.mar", made(tmp_path, "second").read_bytes())
    with pytest.raises(ArchiveError, match=r"second\.mar"):
        model_store.fetch(store, tmp_path / "out", ["other"])


def test_missing_objects_and_buckets_raise(store, bucket, tmp_path):
    with pytest.raises(ObjectNotFound, match=r"/none\.mar"):
        model_store.fetch(store, tmp_path / "out", ["none"])
    with pytest.raises(ObjectNotFound, match="make archive"):
        model_store.fetch(f"s3://{bucket}/empty", tmp_path / "out")
    for place in ("folder", "https://host/models"):
        with pytest.raises(UriError, match="s3://"):
            model_store.fetch(place, tmp_path / "out")


def run(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "serve", *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ,
    )


def test_fetch_command_fills_the_model_store(store, tmp_path):
    done = run("fetch", "--from", store, "--to", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/second.mar").is_file() and "AKIA" not in done.stdout + done.stderr
    done = run("fetch", "--from", f"{store}-none", "--to", tmp_path / "out")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_pack_command_packs_a_folder(tmp_path, capsys):
    (tmp_path / "in/velodyne").mkdir(parents=True)
    (tmp_path / "in/velodyne/8.bin").write_bytes(b"frame")
    out = tmp_path / "p.ffr"
    assert pack_command.main([str(tmp_path / "in"), str(out)]) == 0
    assert "packed 1 files" in capsys.readouterr().out
    assert storage.read_bytes(f"ffrecord://{out}#velodyne/8.bin") == b"frame"
    packed = PackedFolder(out)
    assert packed.list(recursive=True) == ["velodyne", "velodyne/8.bin"]
    packed.close()
    with pytest.raises(SystemExit):
        pack_command.main([str(tmp_path / "in"), str(out)])
    assert "--force" in capsys.readouterr().err
    assert pack_command.main([str(tmp_path / "in"), str(out), "--force"]) == 0
    done = run("pack", tmp_path / "none", tmp_path / "q.ffr")
    assert done.returncode == 2 and "none" in done.stderr and not (tmp_path / "q.ffr").exists()
