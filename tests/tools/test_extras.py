"""`make test-extras`: no test of an optional package is without a row, and no row skips its tests."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAKEFILE = (ROOT / "Makefile").read_text()
ROWS = {
    name: [path for pattern in patterns.split() for path in sorted(ROOT.glob(pattern)) or [ROOT / pattern]]
    for name, patterns in re.findall(r"^test-([\w-]+): EXTRA := (.+?) #: ", MAKEFILE, re.MULTILINE)
}


def optional_modules(path: Path) -> set[str]:
    """Modules without which a test of this file is skipped, by itself or by a module of the tests that it imports."""
    text = path.read_text()
    found: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr == "importorskip" and isinstance(node.args[0], ast.Constant):
                found.add(node.args[0].value)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tests."):
            imported = ROOT / f"{node.module.replace('.', '/')}.py"
            found |= optional_modules(imported) if imported.is_file() else set()
    return found


def test_every_row_has_a_lock_and_tests_and_is_run_by_default():
    (default,) = re.findall(r"^EXTRAS \?= (.+)$", MAKEFILE, re.MULTILINE)
    assert set(default.split()) == set(ROWS)
    for name, paths in ROWS.items():
        assert (ROOT / "requirements" / f"{name}.lock").is_file(), name
        assert all(path.exists() for path in paths), name


def test_every_test_of_a_package_that_the_environment_lacks_is_in_a_row():
    in_rows = [path for paths in ROWS.values() for path in paths]
    without = {}
    for path in (ROOT / "tests").rglob("test_*.py"):
        lacked = {
            name
            for name in optional_modules(path)
            if importlib.util.find_spec(name.partition(".")[0]) is None
        }
        if lacked and not any(path.is_relative_to(row) for row in in_rows):
            without[str(path.relative_to(ROOT))] = lacked
    assert not without


def test_what_is_skipped_fails_under_no_skips(tmp_path):
    (tmp_path / "test_module.py").write_text("import pytest\npytest.importorskip('missing_package')\n")
    (tmp_path / "test_browser.py").write_text(
        "import pytest\n"
        "def test_one(): pytest.skip('no browser')\n"
        "@pytest.mark.xfail\n"
        "def test_expected(): assert False\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "tests.no_skips", "--no-skips", "-p", "no:cacheprovider"]
    ran = subprocess.run(
        [*command, "--continue-on-collection-errors", "--rootdir", tmp_path, "-c", "/dev/null", tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert "1 failed, 1 xfailed, 1 error" in ran.stdout
    assert "missing_package" in ran.stdout
    assert "no browser" in ran.stdout


@pytest.mark.parametrize(("retry", "fails", "runs"), [("", 1, 1), ("1", 1, 2), ("1", 2, 2), ("1", 0, 1)])
def test_what_failed_in_a_row_is_tried_once_more_if_asked_for(tmp_path, retry, fails, runs):
    python = tmp_path / ".venv-parquet" / "bin" / "python"  # fails so many times
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\necho "$@" >> calls\ntest $(wc -l < calls) -gt {fails}\n')
    python.chmod(0o755)
    command = ["make", "-f", ROOT / "Makefile", "--old-file=.venv-parquet/.stamp", "test-parquet"]
    ran = subprocess.run(
        [*command, f"RETRY={retry}"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (ran.returncode == 0) is (fails < runs), ran.stdout + ran.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [("--last-failed" in call, "tests/bulk/test_formats.py" in call) for call in calls] == [
        (False, True),
        (True, True),
    ][:runs]
