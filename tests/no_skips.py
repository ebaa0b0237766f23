"""The option ``--no-skips``: what would be skipped fails.

For environments that were made for the tests that run in them (`make test-extras`): there a missing package or program
is a mistake of the environment, and a run that skips everything would show nothing.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, TypeVar

import pytest

Report = TypeVar("Report", pytest.CollectReport, pytest.TestReport)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-skips", action="store_true", help="fail what would be skipped (make test-extras)")


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    return _fail_skipped((yield), collector.config)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    return _fail_skipped((yield), item.config)


def _fail_skipped(report: Report, config: pytest.Config) -> Report:
    """Turn a report of a skip into one of a failure; a test that is expected to fail stays as it is."""
    if report.skipped and not hasattr(report, "wasxfail") and config.getoption("no_skips"):
        place: Any = report.longrepr  # path, line, reason
        report.outcome, report.longrepr = "failed", f"{place[0]}:{place[1]}: {place[2]}"
    return report
