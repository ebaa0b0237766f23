"""The zoo sweep: families are found, trials end when they must, the page has a row for everything."""

from __future__ import annotations

import re
from dataclasses import replace
from multiprocessing import forkserver
from pathlib import Path

import pytest

from tools.zoo.families import Family, families
from tools.zoo.probe import ProbeResult
from tools.zoo.report import counts, page
from tools.zoo.sweep import Result, Sweep, load_results


@pytest.fixture(autouse=True)
def no_fork_server_is_left():
    yield
    # Python ends it with itself; the check for processes that tests leave behind comes before that.
    forkserver._forkserver._stop()


PAGE = Path(__file__).parents[2] / "docs" / "coverage.md"


def test_page_has_a_row_for_every_installed_family():
    text = PAGE.read_text()
    for package in ("mmdet", "mmdet3d"):
        section = text.partition(f"\n## {package}\n")[2].partition("\n## ")[0]
        rows = [
            line.split("|")[1].strip()
            for line in section.splitlines()
            if re.match(r"\| (?!family|---)", line)
        ]
        assert rows == [family.name for family in families() if family.package == package]


def test_families_equal_the_config_folders():
    by_package = {package: sum(f.package == package for f in families()) for package in ("mmdet", "mmdet3d")}
    assert by_package == {"mmdet": 114, "mmdet3d": 32}


def result(family, verdict, *, position=0, extra=False, **values) -> Result:
    return Result(family, position, extra, ProbeResult(f"config{position}", verdict, **values))


FAMILIES = [
    Family("mmdet", name, (Path("config0.py"), Path("config1.py"))) for name in ("a", "b", "c", "d", "e")
]
RESULTS = [
    result("mmdet/a", "works", modality="image", answers=5, deviation="1e-05 px"),
    result("mmdet/b", "needs package", packages=("mmpretrain",)),
    result("mmdet/b", "works", extra=True, answers=1, served=True),
    result("mmdet/c", "not a per-frame model", reason="it needs proposals"),
    result("mmdet/c", "works", position=1),
    result("mmdet/d", "not a per-frame model", reason="a tracker"),
    result("mmdet/e", "needs package", packages=("Detectron2",)),
]


def test_page_names_the_commits_of_its_rows():
    rows = [
        replace(each, commit="abc1234" if each.family in ("mmdet/a", "mmdet/b") else "") for each in RESULTS
    ]
    rows[-1] = replace(rows[-1], commit="def5678+")
    named = next(line for line in page(FAMILIES, rows, {"torch": "2"}).splitlines() if "`abc1234`" in line)
    assert "`abc1234` 2, not recorded 2, `def5678+` 1" in named


def test_row_reports_status_and_reason():
    rows = [line for line in page(FAMILIES, RESULTS, {"torch": "2"}).splitlines() if line.startswith("| ")][
        1:
    ]
    assert rows[0] == "| a | config0 | image | works |  | 5 | 1e-05 px |  |"
    assert "works with the zoo extra" in rows[1] and "| yes |" in rows[1]
    assert "| config1 |" in rows[2] and "it needs proposals" in rows[2] and "works" in rows[2]
    assert "not a per-frame model" in rows[3] and "a tracker" in rows[3]
    assert "needs Detectron2" in rows[4]
    assert "3 of 5 families are served" in counts(FAMILIES, RESULTS)[0]
    assert "3 of 4 (75 %)" in counts(FAMILIES, RESULTS)[0]


@pytest.mark.slow
def test_probes_over_the_limits_are_killed_and_results_recorded(tmp_path):
    """In one sweep, since starting its fork server takes most of the time."""
    configs = {
        "hangs": "while True: pass",
        "eats": "hoard = b'x' * (1600 << 20)\nwhile True: pass",
        "empty": "train_cfg = dict()",
        "fails": "raise RuntimeError('no such thing')",
    }
    wanted = []
    for name, text in configs.items():
        (tmp_path / f"{name}.py").write_text(text)
        wanted.append(Family("mmdet", name, (tmp_path / f"{name}.py",)))
    path = tmp_path / "cache" / "results.jsonl"
    seen = {}
    sweep = Sweep(path, extra=False, timeout_s=15, memory_mb=1500, jobs=2)
    sweep.run(wanted, lambda family, result: seen.update({family.name: result.probe}))
    assert "longer than the 15 s" in seen["hangs"].reason
    assert "more than the 1500 MiB" in seen["eats"].reason
    assert seen["empty"].status == "not a model"
    assert seen["fails"].status == "fails" and "no such thing" in seen["fails"].reason
    with path.open("a") as file:
        file.write('{"family": "mmdet/cut of')
    assert {result.family for result in load_results(path)} == {family.key for family in wanted}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sweep_writes_two_families_to_a_page(tmp_path, capsys):
    from tools.zoo.sweep_command import main as zoo_coverage

    arguments = ["--only", "mmdet/common", "--only", "mmdet/atss", "--results", str(tmp_path / "r.jsonl")]
    assert zoo_coverage([*arguments, "--page", str(tmp_path / "page.md")]) == 0
    rows = [
        line
        for line in (tmp_path / "page.md").read_text().splitlines()
        if line.startswith(("| atss", "| common"))
    ]
    assert "| works |" in rows[0] and "not a model" in rows[1]
    found = load_results(tmp_path / "r.jsonl")
    assert len(found) >= 2 and all(re.fullmatch(r"[0-9a-f]{7,40}\+?", each.commit) for each in found)
    assert zoo_coverage([*arguments, "--page", str(tmp_path / "again.md")]) == 0
    assert (tmp_path / "again.md").read_text() == (tmp_path / "page.md").read_text()


def verdicts(text: str) -> dict[str, str]:
    """Per family of a page the first word of what came of it."""
    rows = [line.split("|") for line in text.splitlines() if re.match(r"\| (?!family|---)", line)]
    return {row[1].strip(): row[4].strip().partition(",")[0] for row in rows}


# One per modality and kind of head; the whole zoo takes hours (`python -m tools.zoo sweep`).
SWEPT = ("centerpoint", "fcos3d", "mvxnet", "votenet", "pointnet2", "yolox", "detr", "solo", "panoptic_fpn")


@pytest.mark.soak
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_families_of_every_modality_have_the_committed_status(tmp_path):
    from tools.zoo.sweep_command import main as zoo_coverage

    only = [word for name in SWEPT for word in ("--only", name)]
    arguments = [*only, "--results", str(tmp_path / "r.jsonl"), "--page", str(tmp_path / "page.md")]
    assert zoo_coverage(arguments) == 0
    found = verdicts((tmp_path / "page.md").read_text())
    committed = verdicts(PAGE.read_text())
    assert {name: found[name] for name in SWEPT} == {name: committed[name] for name in SWEPT}
