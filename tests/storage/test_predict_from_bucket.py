"""``predict`` of frames in a bucket by a real TorchServe: on its port, through the gateway, stopped and gone on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve import storage
from serve.cli.main import main
from serve.synthetic.scenes import generate_scene, held_out_seed
from tests.conftest import ROOT, accept_ctrl_c, pick_free_ports

pytestmark = [pytest.mark.torchserve, pytest.mark.timeout(300)]
FRAMES = 4


@pytest.fixture
def addresses(demo_mar: Path, tmp_path: Path) -> Iterator[dict[str, str]]:
    """A server of the demonstration SECOND, as a user starts it: addresses of the gateway and of TorchServe."""
    gateway, inference, management, metrics = pick_free_ports(4)
    ports = ["--gateway-port", gateway, "--inference-port", inference]
    ports += ["--management-port", management, "--metrics-port", metrics]
    words = [
        sys.executable,
        "-m",
        "serve",
        "serve",
        "--store",
        demo_mar.parent,
        "--models",
        "second=second.mar",
    ]
    with subprocess.Popen(
        [str(word) for word in (*words, *ports)], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, preexec_fn=accept_ctrl_c,
    ) as server:  # fmt: skip
        try:
            assert server.stdout is not None
            assert any(line.startswith("Ctrl-C") for line in server.stdout)
            yield {
                "gateway": f"http://127.0.0.1:{gateway}",
                "torchserve": f"http://127.0.0.1:{inference}",
            }
        finally:
            server.send_signal(signal.SIGINT)
            server.communicate(timeout=60)


@pytest.fixture
def frames(bucket: str) -> str:
    for index in range(FRAMES):
        storage.write_bytes(
            f"s3://{bucket}/drive/{index:03d}.bin", generate_scene(held_out_seed(index)).to_bytes()
        )
    return f"s3://{bucket}/drive"


def answers(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "json").iterdir())}


def test_a_bucket_gives_the_same_answers_in_process_and_on_both_ports(
    addresses: dict[str, str], frames: str, demo_mar: Path, tmp_path: Path
) -> None:
    assert (
        main(["predict", frames, "--model", str(demo_mar), "--device", "cpu", "--out", str(tmp_path / "own")])
        == 0
    )
    for name, url in addresses.items():
        assert (
            main(["predict", frames, "--model", "second", "--url", url, "--out", str(tmp_path / name)]) == 0
        )
    own, gateway, torchserve = (answers(tmp_path / name) for name in ("own", "gateway", "torchserve"))
    assert len(own) == FRAMES and all(json.loads(body)["bboxes_3d"] for body in own.values())
    assert gateway == torchserve
    assert [json.loads(body) for body in own.values()] == [json.loads(body) for body in gateway.values()]


def test_a_run_that_ctrl_c_stopped_goes_on_where_it_was(
    addresses: dict[str, str], frames: str, tmp_path: Path
) -> None:
    words = ["predict", frames, "--model", "second", "--url", addresses["gateway"]]
    assert main([*words, "--out", str(tmp_path / "whole")]) == 0
    run = [sys.executable, "-c", STOPPING, *words, "--out", str(tmp_path / "stopped")]
    stopped = subprocess.run(
        run, cwd=ROOT, capture_output=True, text=True, timeout=120, preexec_fn=accept_ctrl_c
    )
    assert stopped.returncode == 130, stopped.stderr[-2000:]
    recorded = (tmp_path / "stopped" / ".predictions.jsonl.part").read_text().splitlines()
    assert 0 < len(recorded) < FRAMES
    assert main([*words, "--out", str(tmp_path / "stopped")]) == 0
    assert answers(tmp_path / "stopped") == answers(tmp_path / "whole")


# The command, which presses Ctrl-C itself when the second frame is recorded.
STOPPING = """
import os, signal, sys
from serve.predict import journal
append = journal.Journal.append
seen = []
def appended(self, *args, **named):
    append(self, *args, **named)
    seen.append(1)
    if len(seen) == 2:
        os.kill(os.getpid(), signal.SIGINT)
journal.Journal.append = appended
from serve.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
