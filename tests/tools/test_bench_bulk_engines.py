"""The comparison of bulk's engines: its arithmetic, its tables, and the page that it writes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from serve.errors import SettingsError
from tools.bench import bulk_engines
from tools.bench.bulk import EngineTiming
from tools.bench.commands import bulk
from tools.bench.engine_report import EngineReport, MemoryUse
from tools.bench.pages import markers

MIB = 1 << 20


def use(frames: int, command: float, driver: float | None, beside: float) -> MemoryUse:
    return MemoryUse(frames, 35.4, command, driver, driver, beside, 9876.0)


def report(name: str = "sleep") -> EngineReport:
    slow, fast = EngineTiming(90.0, 9.0, 11.0, 2.0, 22.0), EngineTiming(110.0, 7.0, 9.0, 4.0, 20.0)
    local = EngineTiming(100.0, 1.0, 2.0, 0.5, 12.0)
    memory = {
        "local": [use(1000, 80.0, None, 80.0), use(1000 + MIB, 81.0, None, 82.0)],
        "ray": [use(1000, 80.0, 200.0, 700.0), use(1000 + MIB, 81.0, 270.0, 800.0)],
    }
    pairs = [
        {"local": local, "ray": slow},
        {"ray": fast, "local": local},
        {"local": local, "ray": slow},
    ]
    return EngineReport(name, "work", "2 cores", "2026-01-31", pairs, memory)


def test_timing_counts_frames_between_the_last_model_and_the_last_part() -> None:
    timing = EngineTiming.of(100, begun=10.0, ready=14.0, parts=[15.0, 18.0, 24.0], ended=25.5)
    assert timing == EngineTiming(rate=10.0, start_s=4.0, first_part_s=5.0, end_s=1.5, whole_s=15.5)


def test_ratio_is_the_median_of_the_pairs_ratios_to_the_local_engine() -> None:
    assert report().ratios() == {"local": 1.0, "ray": pytest.approx(0.9)}
    assert report().medians()["ray"] == EngineTiming(90.0, 9.0, 11.0, 2.0, 22.0)


def test_growth_is_bytes_of_memory_for_each_further_frame() -> None:
    assert report().growth("ray") == {"command": 1.0, "driver": 70.0, "driver_pss": 70.0, "beside_pss": 100.0}
    assert report().growth("local") == {"command": 1.0, "beside_pss": 2.0}


def test_growth_of_one_number_of_frames_is_unknown() -> None:
    alone = EngineReport("sleep", "work", "2 cores", "2026-01-31", report().pairs, {"ray": [use(9, 1, 1, 1)]})
    assert alone.growth("ray") == alone.growth("local") == {}
    assert not any("growth" in line for line in alone.conclusions())


def test_table_has_a_row_for_each_run_in_the_order_in_which_they_ran() -> None:
    rows = [line.split(" | ") for line in report().markdown().splitlines() if line.startswith("| ")]
    runs = [(row[0], row[1], row[3]) for row in rows if row[0] in ("| 1", "| 2", "| 3")]
    assert runs == [
        ("| 1", "local", "1.000"),
        ("| 1", "ray", "0.900"),
        ("| 2", "ray", "1.100"),
        ("| 2", "local", "1.000"),
        ("| 3", "local", "1.000"),
        ("| 3", "ray", "0.900"),
    ]
    assert "| ray | 1,049,576 | 35.4 | 81 | 270 | 270 | 800 | 9876 |" in report().markdown()
    assert "| local | 1,000 | 35.4 | 80 | – | – | 80 | 9876 |" in report().markdown()


def test_line_of_json_has_all_figures() -> None:
    found = json.loads(report().json_line())["bulk_engines"]
    assert found["pairs"][1]["ray"]["rate"] == 110.0 and found["growth_bytes"]["ray"]["driver"] == 70.0


def test_page_gets_the_part_of_the_archive_and_keeps_the_others(tmp_path: Path) -> None:
    page = tmp_path / "bulk.md"
    parts = ["\n".join([markers(name)[0], f"old {name}", markers(name)[1]]) for name in ("sleep", "second")]
    page.write_text("\n".join(parts) + "\n")
    report("second").write_page(page)
    text = page.read_text()
    assert "old sleep" in text and "old second" not in text and report("second").markdown() in text
    with pytest.raises(ValueError, match="other"):
        report("other").write_page(page)
    assert page.read_text() == text


@pytest.mark.parametrize(
    ("frames", "archive"),
    [("4", "sleep"), ("128", "unknown.mar")],
    ids=["too few frames", "no part of the page"],
)
def test_what_cannot_be_measured_or_written_is_refused_before_anything_runs(
    frames: str, archive: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compare(*_: object) -> None:
        raise AssertionError("it ran")

    monkeypatch.setattr(bulk_engines, "compare_engines", compare)
    monkeypatch.setattr("serve.archive.verify", lambda path: SimpleNamespace(modality="lidar"))
    frame = tmp_path / "frame.bin"
    frame.touch()
    with pytest.raises(SettingsError):
        bulk.main(
            [
                archive,
                str(frame),
                "--engines",
                "local,ray",
                "--processes",
                "1",
                "--frames",
                frames,
                "--write-docs",
            ]
        )


@pytest.mark.parametrize("engines", ["ray", "local,local", "local,spark", ""])
def test_engines_that_cannot_be_compared_are_refused(
    engines: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        bulk.main(["sleep", "frame.bin", "--engines", engines])
    assert ended.value.code == 2 and "local,ray" in capsys.readouterr().err


def test_page_of_the_repository_has_the_parts_that_its_page_names() -> None:
    text = bulk.PAGE.read_text()
    assert all(marker in text for name in ("sleep", "second") for marker in markers(name))
