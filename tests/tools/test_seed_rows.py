"""The page of upstream's commands is what the rows and their results say."""

from __future__ import annotations

import json
import re

import pytest

from tools.seed_rows.__main__ import PAGE, RESULTS, page
from tools.seed_rows.rows import ROWS


def test_there_is_a_row_for_every_line() -> None:
    assert [row.number for row in ROWS] == list(range(1, 94))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: str(row.number))
def test_a_row_is_run_or_says_why_not(row) -> None:
    assert bool(row.check) != bool(row.reason)
    assert bool(row.check) == bool(row.expect)
    assert row.line and row.ours


def test_the_page_is_the_one_that_the_script_writes() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(json.loads(RESULTS.read_text()))


def test_no_row_that_was_run_has_failed() -> None:
    results = json.loads(RESULTS.read_text())
    assert [number for number, kept in results.items() if kept["result"] == "failed"] == []


def test_the_command_of_archives_gets_its_checkpoint_by_the_flag() -> None:
    commands = [found for row in ROWS for found in re.findall(r"mmdet3d-serve archive ([^`]+)`", row.ours)]
    assert commands and all(re.fullmatch(r"\S+( --\S+ \S+)*", command) for command in commands), commands
