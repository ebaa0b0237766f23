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
                time.sleep(rng.uniform(0.5, 2.5))
                with suppress(psutil.NoSuchProcess):
                    children = [
                        child
                        for child in psutil.Process(process.pid).children()
                        if "resource_tracker" not in " ".join(child.cmdline())
                    ]
                    if children and rng.random() < 0.6:
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
