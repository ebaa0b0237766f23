"""The guard over the building of a network leaves Python's imports alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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
