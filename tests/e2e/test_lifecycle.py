"""The commands of docs/lifecycle.md, in order, from made data to evaluated endpoints."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import accept_ctrl_c, pick_free_ports
from tests.docs.test_links import fenced

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "lifecycle.md"
PROGRAM = "mmdet3d-serve "
MINUTES = 60


def commands() -> list[str]:
    lines = [line for block in fenced(PAGE.read_text(), "console") for line in block.splitlines()]
    assert all(line.startswith(f"$ {PROGRAM}") for line in lines)
    return [line.removeprefix(f"$ {PROGRAM}") for line in lines]


class Life:
    """A folder in which the commands run; the server on ports of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port, *others = pick_free_ports(4)
        self.ports = ["--gateway-port", str(self.port)]
        for name, port in zip(("inference", "management", "metrics"), others, strict=True):
            self.ports += [f"--{name}-port", str(port)]
        self.server: subprocess.Popen[str] | None = None

    def run(self, command: str) -> str:
        words = [sys.executable, "-m", "serve", *command.split()]
        if command.startswith("serve "):
            self.start([*words, *self.ports])
            return ""
        if command.startswith("evaluate "):
            words += ["--url", f"127.0.0.1:{self.port}"]
        ran = subprocess.run(
            words,
            cwd=self.folder,
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=20 * MINUTES,
        )
        assert ran.returncode == 0, f"{command}\n{ran.stdout[-2000:]}{ran.stderr[-3000:]}"
        return ran.stdout

    def start(self, words: list[str]) -> None:
        self.server = subprocess.Popen(
            words, cwd=self.folder, env=self.environment(), stdout=subprocess.PIPE, text=True,
            preexec_fn=accept_ctrl_c,
        )  # fmt: skip
        assert self.server.stdout is not None
        for line in self.server.stdout:
            if line.startswith("Ctrl-C"):
                return
        pytest.fail(f"the server ended with {self.server.wait()}")

    def stop(self) -> None:
        if self.server is not None:
            self.server.send_signal(signal.SIGINT)
            self.server.communicate(timeout=MINUTES)

    def environment(self) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.mark.soak
@pytest.mark.torchserve
@pytest.mark.timeout(60 * MINUTES)
def test_the_commands_of_the_page_lead_from_data_to_an_evaluated_endpoint(tmp_path):
    life = Life(tmp_path)
    shown = {}
    try:
        for command in commands():
            shown[command] = life.run(command)
    finally:
        life.stop()
    evaluations = [
        json.loads(out.splitlines()[-1]) for command, out in shown.items() if command.startswith("evaluate")
    ]
    assert all(out.startswith("class ") for command, out in shown.items() if command.startswith("evaluate"))
    shapes, streets = evaluations
    assert shapes["largest_difference"] <= 0.1 and streets["largest_difference"] <= 0.1
    assert shapes["figures"]["all"]["bbox mAP"]["served"] > 25
    assert streets["figures"]["Car"]["3D AP40 moderate strict"]["served"] > 50
    # Upstream's own program on the same checkpoint and data.
    (tested,) = (out for command, out in shown.items() if command.startswith("test "))
    native = float(re.findall(r"coco/bbox_mAP: (\d\.\d+)", tested)[-1])
    assert shapes["figures"]["all"]["bbox mAP"]["native"] == pytest.approx(100 * native)


def test_the_page_has_all_steps():
    names = [command.split()[0] for command in commands()]
    assert list(dict.fromkeys(names)) == ["sample-data", "train", "test", "archive", "serve", "evaluate"]
