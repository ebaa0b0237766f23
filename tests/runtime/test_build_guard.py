"""The guard over the building of a network leaves Python's imports and tracebacks alone."""

from __future__ import annotations

import ast
import io
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from serve.errors import ArchiveError
from serve.runtime.build_guard import BuildGuard

PROGRAM = """
import sys
from serve.runtime.build_guard import BuildGuard
assert "colorsys" not in sys.modules
guard = BuildGuard(None, {}, refuse=False)
with guard, guard:
    import colorsys
    assert sys.dont_write_bytecode
assert not sys.dont_write_bytecode
print(guard.refusal)
"""


def test_a_module_without_bytecode_is_imported_and_none_is_written(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(tmp_path), "PYTHONDONTWRITEBYTECODE": ""}
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "None"
    written = {path.name.partition(".")[0] for path in tmp_path.rglob("*.pyc")}
    assert "build_guard" in written and "colorsys" not in written


def test_a_log_that_cannot_be_written_is_no_refusal(capsys: pytest.CaptureFixture[str]) -> None:
    closed = io.StringIO()
    closed.close()
    logger = logging.Logger("of a framework")
    logger.addHandler(logging.StreamHandler(closed))
    guard = BuildGuard(None, {})
    with guard:
        logger.warning("its stream is gone, and logging prints a traceback")
    assert guard.refusal is None
    assert "ValueError" in capsys.readouterr().err


def test_a_syntax_tree_is_read_and_not_compiled() -> None:
    guard = BuildGuard(None, {})
    with pytest.raises(ArchiveError), guard:
        tree = ast.parse("print()")
        assert guard.refusal is None
        compile(tree, "config", "exec")
    assert "'compile'" in str(guard.refusal)
