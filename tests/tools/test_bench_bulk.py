"""The benchmark of bulk runs: both sides at the rate of a model of known cost, and memory that stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.bench.bulk import SLEEP, Setting, bulk_rate, runtime_rate
from tools.bench.commands import bulk_memory


@pytest.mark.soak
def test_both_sides_reach_the_rate_of_a_sleeping_model(tmp_path: Path) -> None:
    frame = tmp_path / "frame.bin"
    frame.write_bytes(bytes(1600))
    setting = Setting(SLEEP, frame, "lidar", 512, 16, 128, 2, 1, "cpu")
    alone, bulk = runtime_rate(setting), bulk_rate(setting)
    ideal = 2 * 16 / (0.020 + 16 * 0.002)
    assert 0.8 * ideal < bulk.rate < ideal and 0.8 * ideal < alone.rate < ideal
    assert 0 < bulk.cpu_s < 0.002


@pytest.mark.soak
def test_memory_of_many_frames_is_that_of_few(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bulk_memory.main(["20000", "200000", "--out", str(tmp_path)]) == 0
    few, many = (
        [float(cell.replace(",", "")) for cell in line.split("|")[1:-1]]
        for line in capsys.readouterr().out.splitlines()[2:]
    )
    assert many[1] == 200_000 and many[2] < few[2] + 60 and many[3] < few[3] + 10
