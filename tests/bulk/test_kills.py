"""Twenty thousand frames in bulk, with the run and its processes killed at random moments."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.bulk.test_run import names
from tests.conftest import ROOT
from tests.gateway.running import eventually

FRAMES = 20_000
KILLS = 30
RUN = """
import sys
from pathlib import Path
from tests.bulk import fake
from tests.bulk.test_run import run
summary = run(Path(sys.argv[1]), Path(sys.argv[2]), open_model=fake.open_slow, part_frames=200)
print(summary.counts.frames, summary.computed)
"""


def computing(run: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes that a run has for its parts."""
    with suppress(psutil.NoSuchProcess):
        children = psutil.Process(run.pid).children()
        return [each for each in children if "resource_tracker" not in " ".join(each.cmdline())]
    return []


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_no_frame_is_lost_and_none_comes_twice(tmp_path: Path) -> None:
    source, out = tmp_path / "frames", tmp_path / "out"
    source.mkdir()
    for k in range(FRAMES):
        (source / f"{k:05d}.bin").write_bytes(b"bad" if k % 997 == 0 else b"%d" % k)
    rng = random.Random(7)
    kills = {"run": 0, "process": 0}
    command = [sys.executable, "-c", RUN, str(source), str(out)]
    while True:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
        ) as process:
            while sum(kills.values()) < KILLS and process.poll() is None:
                if rng.random() < 0.9:  # else also while it begins
                    eventually(lambda: process.poll() is not None or computing(process), 60)
                time.sleep(rng.uniform(0.1, 2.5))
                if (children := computing(process)) and rng.random() < 0.6:
                    with suppress(psutil.NoSuchProcess):
                        rng.choice(children).kill()
                        kills["process"] += 1
                    continue
                process.kill()
                kills["run"] += 1
            printed = process.communicate()[0]
        if process.returncode == 0:
            break
    found = names(out)
    print(
        f"{FRAMES} frames, {kills} kills: {len(found)} lines, {len(set(found))} frames; last run: {printed.strip()}"
    )
    assert found == [f"{k:05d}.bin" for k in range(FRAMES)]
    counts = json.loads((out / "summary.json").read_text())
    assert counts["failed"] == {"undecodable_frame": len(range(0, FRAMES, 997))}
    assert kills["run"] and kills["process"]
