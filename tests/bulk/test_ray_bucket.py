"""Runs on a Ray cluster from and to a bucket, with the archive in it: the results of the local engine, also resumed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest

from serve import storage
from serve.bulk.processes import LocalEngine
from serve.bulk.ray_engine import RayEngine
from serve.storage import s3
from tests.bulk.on_ray import WARNINGS, cluster_of, command, kill, run
from tests.gateway.running import eventually
from tests.storage import servers

pytestmark = WARNINGS
BUCKET = "s3://frames"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes that have the address and keys of a bucket in their environment."""
    patch = pytest.MonkeyPatch()
    with servers.moto() as endpoint:
        for name, value in (
            ("AWS_ENDPOINT_URL", endpoint),
            ("AWS_ACCESS_KEY_ID", "x"),
            ("AWS_SECRET_ACCESS_KEY", "y"),
            ("AWS_DEFAULT_REGION", "us-east-1"),
        ):
            patch.setenv(name, value)
        s3._CONNECTED.clear()
        boto3.client("s3").create_bucket(Bucket="frames")
        with cluster_of(2) as started:
            yield started
    s3._CONNECTED.clear()
    patch.undo()


def parts(out: str) -> dict[str, bytes]:
    return {
        each.removeprefix(f"{out}/"): storage.read_bytes(each) for each in storage.list_files(f"{out}/parts")
    }


def test_a_killed_run_goes_on_to_the_results_of_the_local_engine(cluster: Any, tmp_path: Path) -> None:
    gate, archive = tmp_path / "gate", tmp_path / "model.mar"
    archive.write_bytes(b"an archive")
    bodies = {k: b"x" * k for k in range(1, 12)}
    bodies |= {3: b"bad", 6: b"gate %b" % str(gate).encode(), 10: b"deadly"}
    for k, body in bodies.items():
        storage.write_bytes(f"{BUCKET}/drive/{k:04d}.bin", body)
    source, out = f"{BUCKET}/drive", f"{BUCKET}/ray"
    with command(source, out, archive, cluster.address) as process:
        eventually(gate.with_suffix(".reached").exists, 90)
        kill(process)
    before = parts(out)
    assert "parts/00000001.jsonl" not in before
    assert storage.read_bytes(f"{out}/model.mar") == b"an archive"
    gate.touch()
    summary = run(source, out, RayEngine(cluster.address), archive)
    finished = b"".join(body for name, body in before.items() if name.endswith(".jsonl"))
    assert (summary.counts.frames, summary.computed) == (11, 11 - len(finished.splitlines()))
    assert summary.counts.failed == {"undecodable_frame": 1, "inference_failed": 1}

    run(source, f"{BUCKET}/local", LocalEngine(("cpu",), 1), archive)
    found = parts(out)
    assert found == parts(f"{BUCKET}/local") and {name: found[name] for name in before} == before
    assert len(found) == 8


def test_the_archive_is_fetched_from_the_bucket_that_has_it(cluster: Any, tmp_path: Path) -> None:
    archive = tmp_path / "model.mar"
    archive.write_bytes(b"an archive")
    storage.write_bytes(f"{BUCKET}/models/a.mar", b"an archive")
    storage.write_bytes(f"{BUCKET}/one/0001.bin", b"1")
    engine = RayEngine(cluster.address, archive_uri=f"{BUCKET}/models/a.mar")
    assert run(f"{BUCKET}/one", f"{BUCKET}/out", engine, archive).counts.frames == 1
    assert not storage.exists(f"{BUCKET}/out/model.mar")
