"""The processes that prove archives in these tests behave as those that the conversion starts."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from serve.convert import proof
from serve.settings.environment import child_environment
from tests.gateway.running import eventually


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., Any]:
    def start() -> Any:
        environment = child_environment(inherit_path=False)
        with (tmp_path / "log").open("wb") as log:
            return proof.start_process("mmdet", tmp_path, environment, log)

    return start


def test_forked_process_runs_in_the_folder_of_the_request_and_answers(start, tmp_path):
    with start() as process:
        facts = Path(f"/proc/{process.pid}")
        assert b"tests.fork_server" in (facts / "cmdline").read_bytes()
        assert os.getpgid(process.pid) != os.getpgrp()  # Ctrl-C at a terminal does not reach the server
        assert eventually(lambda: (facts / "cwd").resolve() == tmp_path)
        process.stdin.write(json.dumps({"root": "nowhere", "gpu_id": None, "trust_code": False}) + "\n")
        process.stdin.flush()
        assert "error" in json.loads(process.stdout.readline())
        assert process.wait() == os.EX_OK


def test_forked_process_that_is_killed_has_the_status_of_one(start):
    with start() as process:
        process.kill()
        assert process.stdout.readline() == ""
        assert process.wait() == -signal.SIGKILL
        process.kill()  # as the conversion does at its end


def test_forked_process_ends_without_a_request_when_nobody_sends_one(start):
    with start() as process:
        process.stdin.close()
        assert process.wait() == os.EX_OK
