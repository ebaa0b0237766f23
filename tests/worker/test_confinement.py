"""A confined process writes only where it must, whatever library does the writing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ALLOWED = "allowed"

WAYS = {
    "open": "open(folder + '/a', 'w')",
    "append": "open(old, 'a')",
    "truncate": "import os; os.truncate(old, 0)",
    "mkdir": "import os; os.mkdir(folder + '/a')",
    "symlink": "import os; os.symlink('/etc', folder + '/a')",
    "rename": "import os; os.rename(old, folder + '/other/old')",
    "opencv": "import cv2, numpy; assert cv2.imwrite(folder + '/a.png', numpy.zeros((2, 2, 3), 'uint8'))",
    "torch": "import torch; torch.save({'a': torch.zeros(1)}, folder + '/a.pt')",
    "lmdb": "import lmdb; lmdb.open(folder + '/db')",
    "child": "import subprocess, sys; subprocess.run(['touch', folder + '/a'], check=True)",
    "thread": "import threading; t = threading.Thread(target=lambda: open(folder + '/a', 'w')); t.start(); t.join(); "
    "import os; os.stat(folder + '/a')",
}


def run(folder: Path, way: str, allowed: Path) -> int:
    """Run one way of writing in a confined process; returns its exit code."""
    code = (
        "import sys; from pathlib import Path; from serve.worker.confinement import confine_writes; "
        f"folder = {str(folder)!r}; old = folder + '/old'; "
        f"assert confine_writes([Path({str(allowed)!r}), Path('/dev'), Path('/nowhere')]); {way}"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode


@pytest.fixture
def folder(tmp_path):
    (tmp_path / ALLOWED).mkdir()
    for place in (tmp_path, tmp_path / ALLOWED):
        (place / "old").write_text("old")
        (place / "other").mkdir()
    return tmp_path


@pytest.fixture(scope="module", autouse=True)
def _landlock():
    code = "from serve.worker.confinement import confine_writes; raise SystemExit(not confine_writes([]))"
    if subprocess.run([sys.executable, "-c", code], check=False).returncode:
        pytest.skip("the kernel has no Landlock")


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_confined_process_writes_only_beneath_what_is_allowed(folder, way):
    before = sorted(folder.iterdir())
    assert run(folder, way, folder / ALLOWED) != 0
    assert sorted(folder.iterdir()) == before
    assert (folder / "old").read_text() == "old"
    assert run(folder / ALLOWED, way, folder / ALLOWED) == 0


HANDLER = """
import sys
from types import SimpleNamespace
from serve.errors import ServeError
from serve.protocol.worker import Batch, EncodedFrame
from serve.worker.handler import DetectionHandler

class Writing(DetectionHandler):
    def prepare_process(self, context):
        pass

    def load(self, context):
        self.prepare_thread()

    def decode(self, frame):
        open(sys.argv[1] + "/decoded", "w")
        return frame

    def infer(self, frames):
        open(sys.argv[1] + "/inferred", "w")
        return [{} for _ in frames]

handler = Writing()
handler.initialize(SimpleNamespace(model_name="writing"))
(outcome,), _ = handler.answer(Batch([EncodedFrame(b"frame")]))
raise SystemExit(isinstance(outcome, ServeError))
"""


@pytest.mark.parametrize(("confine", "wrote"), [("1", []), ("0", ["decoded", "inferred"])])
def test_handler_writes_while_it_decodes_or_infers_only_if_it_is_not_confined(tmp_path, confine, wrote):
    environment = {**os.environ, "MMDET3D_SERVE_CONFINE": confine}
    ended = subprocess.run([sys.executable, "-c", HANDLER, str(tmp_path)], env=environment, check=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == wrote
    assert ended.returncode == (0 if wrote else 1)
