"""Bulk runs from and to a bucket: the same results as on disk, one per frame after a kill, errors as records."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
from collections import Counter
from io import BytesIO
from pathlib import Path
from typing import Any

from serve import storage
from serve.bulk.formats import Outputs
from serve.storage import s3
from tests.bulk import fake
from tests.bulk.test_run import run
from tests.conftest import ROOT
from tests.gateway.running import eventually
from tests.predict.test_kitti import KITTI

KITTI_FORMAT = Outputs(("jsonl", "kitti"), image_size=(1242, 375))


def put(bucket: str, files: dict[str, bytes]) -> None:
    for name, body in files.items():
        storage.write_bytes(f"s3://{bucket}/{name}", body)


def objects(uri: str) -> dict[str, bytes]:
    return {
        each.removeprefix(f"{uri}/"): storage.read_bytes(each)
        for each in storage.list_files(uri, recursive=True)
    }


def lines(uri: str) -> list[dict[str, Any]]:
    found = [
        body
        for name, body in sorted(objects(uri).items())
        if name.endswith(".jsonl") and name != "manifest.jsonl"
    ]
    return [json.loads(line) for body in found for line in body.splitlines()]


def drive(count: int) -> dict[str, bytes]:
    files = {f"drive/velodyne/{k:06d}.bin": b"x" * k for k in range(1, count)}
    return files | {f"drive/calib/{k:06d}.txt": KITTI.encode() for k in range(1, count)}


def test_a_bucket_has_the_files_of_a_folder(bucket: str, tmp_path: Path) -> None:
    put(bucket, drive(6))
    for name, body in drive(6).items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)
    out = f"s3://{bucket}/results"
    options: Any = {"open_model": fake.open_lidar, "engine": fake.OneProcess(), "outputs": KITTI_FORMAT}
    run(f"s3://{bucket}/drive/velodyne", out, **options)
    run(tmp_path / "drive" / "velodyne", tmp_path / "out", **options)
    on_disk = {
        str(path.relative_to(tmp_path / "out")): path.read_bytes() for path in (tmp_path / "out").rglob("*.*")
    }
    in_bucket = objects(out)
    assert in_bucket.keys() == on_disk.keys()
    for name in in_bucket.keys() - {"manifest.jsonl", "bulk.json"}:  # which say where the frames are
        assert in_bucket[name] == on_disk[name], name
    with tarfile.open(fileobj=BytesIO(in_bucket["kitti/00000000.tar"])) as file:
        assert file.getnames() == ["000001.txt", "000002.txt", "000003.txt"]


def test_a_killed_run_has_one_result_per_frame_in_the_end(bucket: str, tmp_path: Path) -> None:
    gate, out = tmp_path / "gate", f"s3://{bucket}/results"
    put(bucket, drive(9))
    put(bucket, {"drive/velodyne/000004.bin": b"gate %b" % str(gate).encode()})
    source = f"s3://{bucket}/drive/velodyne"
    script = (
        "from tests.bulk import fake; from tests.bulk.test_run import run; "
        "from tests.storage.test_bulk_in_bucket import KITTI_FORMAT; "
        f"run({source!r}, {out!r}, outputs=KITTI_FORMAT, open_model=fake.open_lidar)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env=environment) as process:
        eventually(
            lambda: (tmp_path / "gate.reached").exists() and storage.exists(f"{out}/kitti/00000000.tar"), 60
        )
        process.send_signal(signal.SIGKILL)
    before = objects(out)
    del before["bulk.json.lock"]  # which is taken over
    assert "parts/00000001.jsonl" not in before and "kitti/00000001.tar" not in before
    gate.touch()
    summary = run(source, out, outputs=KITTI_FORMAT, open_model=fake.open_lidar, engine=fake.OneProcess())
    assert summary.counts.frames == 8 and summary.computed <= 5
    assert [each["frame"] for each in lines(out)] == [f"{k:06d}.bin" for k in range(1, 9)]
    after = objects(out)
    assert {name: after[name] for name in before} == before and "bulk.json.lock" not in after
    assert sum(name.startswith("kitti/") for name in after) == 3


def test_what_a_manifest_in_a_bucket_names_is_answered_or_recorded(bucket: str, tmp_path: Path) -> None:
    put(bucket, {"drive/1.bin": b"1", "drive/parts/points.bin": b"22", "drive/parts/calibration.json": b"{}"})
    put(bucket, {"drive/flat/points.bin": b"1"})
    listed = f"drive/1.bin\ns3://{bucket}/drive/gone.bin\n{tmp_path}/local.bin\ndrive/parts/\ndrive/none/\ndrive/flat\n"
    put(bucket, {"frames.txt": listed.encode()})
    (tmp_path / "local.bin").write_bytes(b"333")
    out = f"s3://{bucket}/results"
    run(
        f"s3://{bucket}/frames.txt", out, open_model=fake.open_lidar, engine=fake.OneProcess(), part_frames=10
    )
    found = {
        each["frame"]: each.get("error", {}).get("code") or len(each["answer"]["names"])
        for each in lines(out)
    }
    below = f"{bucket}/drive"
    assert found == {
        f"{below}/1.bin": 1,
        f"{below}/gone.bin": "object_not_found",
        f"{tmp_path}/local.bin".lstrip("/"): 3,
        f"{below}/parts": 4,
        f"{below}/flat": "object_not_found",
        f"{below}/none": "object_not_found",
    }


def test_a_key_that_vanishes_after_it_was_listed_is_a_record(bucket: str, tmp_path: Path) -> None:
    put(bucket, drive(4))
    gone = storage.parse(f"s3://{bucket}/drive/velodyne/000002.bin")

    class Vanishing(fake.OneProcess):
        def compute(self, *args: Any) -> Any:
            s3.connect().remove(gone)
            yield from super().compute(*args)

    out = f"s3://{bucket}/results"
    summary = run(f"s3://{bucket}/drive/velodyne", out, open_model=fake.open_lidar, engine=Vanishing())
    assert summary.counts.failed == Counter(object_not_found=1)
    assert len(lines(out)) == 3
