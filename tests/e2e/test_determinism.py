"""The same frame gives the same bytes on every run with as many threads, and the same detections with any number."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import orjson
import pytest

from serve import convert, ops, zoo
from serve.compare.detections import compare
from serve.convert import golden

ops.install()

ROOT = Path(__file__).resolve().parents[2]
THREADS = (1, 2, 4)
RUNS = 2
# More threads than cores that wait for one another by spinning would take all day.
ENVIRONMENT = {**os.environ, "OMP_WAIT_POLICY": "passive"}
# Opens an archive and prints, for each number of threads, the answers of two runs on its golden frame.
PROGRAM = """
import sys
from pathlib import Path
import orjson, torch
from serve import archive, ops
ops.install()
from serve.runtime import load_detector
from serve.protocol.json_bodies import encode_json
from serve.protocol.options import FrameOptions
from serve.settings import Limits
opened = archive.extract(Path(sys.argv[1]), Path(sys.argv[2]))
detector = load_detector(opened, torch.device("cpu"))
body = Path(sys.argv[3]).read_bytes()
for threads in map(int, sys.argv[4:]):
    torch.set_num_threads(threads)
    for _ in range(2):
        (outcome,) = detector.run([detector.decode(body, FrameOptions(), Limits())])
        if isinstance(outcome, Exception):
            raise outcome
        print(threads, encode_json(outcome).decode())
"""


def second(folder: Path, demo_mar: Path) -> tuple[Path, bytes]:
    from serve.synthetic.scenes import sample_frame

    return demo_mar, sample_frame()


def image_detector(folder: Path, demo_mar: Path) -> tuple[Path, bytes]:
    from serve.convert.random_weights import write_random_checkpoint
    from serve.runtime.pipeline import frame_spec

    config = zoo.resolve("yolox_tiny_8xb8-300e_coco").config_path
    resolved = convert.resolve_config(config).config
    checkpoint = folder / "random.pth"
    write_random_checkpoint(resolved, tuple(convert.configured_classes(resolved)), checkpoint)
    made = convert.convert(convert.Conversion(config, checkpoint, folder, "image"))
    ((_, body),) = golden.golden_frame(frame_spec(resolved)).values()
    return made.path, body


@pytest.fixture(scope="module", params=[second, image_detector], ids=lambda make: make.__name__)
def answers(request, demo_mar, tmp_path_factory) -> dict[int, list[bytes]]:
    """Per number of threads the answers of two runs in each of two processes."""
    folder = tmp_path_factory.mktemp("model")
    mar, body = request.param(folder, demo_mar)
    frame = folder / "frame"
    frame.write_bytes(body)
    found: dict[int, list[bytes]] = {threads: [] for threads in THREADS}
    for process in range(2):
        ran = subprocess.run(
            [sys.executable, "-c", PROGRAM, mar, folder / f"opened{process}", frame, *map(str, THREADS)],
            cwd=ROOT, env=ENVIRONMENT, capture_output=True, check=False,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr.decode()[-2000:]
        for line in ran.stdout.splitlines():
            threads, _, answer = line.partition(b" ")
            found[int(threads)].append(answer)
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_runs_with_equal_threads_give_equal_bytes(answers):
    for threads, told in answers.items():
        assert len(told) == 2 * RUNS
        assert len(set(told)) == 1, f"{threads} threads: runs differ"
    first = orjson.loads(answers[1][0])
    assert len(first.get("labels", first.get("labels_3d"))) > 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_runs_with_any_threads_give_equal_detections_within_rounding(answers):
    one: dict[str, Any] = orjson.loads(answers[1][0])
    for threads in THREADS[1:]:
        result = compare(one, orjson.loads(answers[threads][0]))
        assert result.ok, f"1 and {threads} threads: {result.verdict()}"
