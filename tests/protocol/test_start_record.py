"""Why a worker did not load its model, told by a file: also where nothing was printed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from serve.errors import ArchiveError
from serve.protocol.start_record import read_start_failure, record_start

CHILD = """
import os, sys
from pathlib import Path
from serve.protocol.start_record import record_start
with record_start(Path(sys.argv[1]), "second"):
    {act}
"""


def start(folder, act: str) -> None:
    subprocess.run(
        [sys.executable, "-c", CHILD.format(act=act), str(folder)], check=False, stderr=subprocess.DEVNULL
    )


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        ("from serve.errors import ArchiveError; raise ArchiveError('it is refused')", "it is refused"),
        ("raise RuntimeError('\\n'.join('ab'))", "RuntimeError: a\nb"),
        ("sys.exit('by code of the archive')", "SystemExit: by code of the archive"),
        ("raise MemoryError", "MemoryError: "),
    ],
)
def test_exception_that_ends_the_start_is_the_reason(tmp_path, act, reason):
    start(tmp_path, act)
    assert read_start_failure(tmp_path, "second") == reason
    assert read_start_failure(tmp_path, "another") is None


@pytest.mark.parametrize("act", ["os.kill(os.getpid(), 9)", "os.abort()", "os._exit(3)"])
def test_worker_that_is_killed_has_a_reason(tmp_path, act):
    start(tmp_path, act)
    assert "out of memory" in str(read_start_failure(tmp_path, "second"))


def test_worker_that_loads_or_has_loaded_has_none(tmp_path):
    with record_start(tmp_path, "second"):
        assert read_start_failure(tmp_path, "second") is None
    assert not list(tmp_path.iterdir())
    with record_start(None, "second"):
        pass


def test_reason_is_bounded_and_a_damaged_record_is_left_out(tmp_path):
    with pytest.raises(ArchiveError), record_start(tmp_path, "second"):
        raise ArchiveError("x" * 100_000)
    assert len(str(read_start_failure(tmp_path, "second"))) == 2000
    (tmp_path / f"start-{os.getpid()}.json").write_bytes(b"[")
    assert read_start_failure(tmp_path, "second") is None
