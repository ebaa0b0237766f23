"""Process that proves an archive: it loads the archive as a worker does, with nothing of the converter's.

`serve.convert.proof` starts it in an empty folder with a worker's environment. It imports what every worker imports,
waits for one line of JSON on standard input, loads the archive with the handler that a server would call, runs the
golden frame once more for its cost, and answers with one line of JSON on standard output.

Code that is packed in the archive may read what it finds on this machine and a server lacks. So files are noted that
it opens by itself and that are neither in the archive nor in the environment.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import sysconfig
import time
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

from serve import ops
from serve.settings.environment import variable_set

__all__ = ["main"]

# Files below these folders are the machine's, not a person's.
_SYSTEM_FOLDERS = ("/dev", "/proc", "/sys", "/etc", "/usr", "/lib", "/lib64", "/opt/cuda", "/run")


def main() -> int:
    """Prove one archive; returns 0 if an answer was written, whatever it says."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what imported code prints is no answer
    package = sys.argv[1]
    ops.install()
    handler = importlib.import_module(f"handlers.{package}_handler")
    importlib.import_module("serve.runtime")
    for name in ("models", "datasets.transforms", "structures"):
        importlib.import_module(f"{package}.{name}")
    line = sys.stdin.readline()
    if not line:
        return 0  # the conversion failed, and there is nothing to prove
    request = json.loads(line)
    with open(os.devnull, encoding="utf-8") as nothing:
        os.dup2(nothing.fileno(), 0)  # no code of an archive waits for input
    try:
        with variable_set("MMDET3D_SERVE_TRUST_ARCHIVE_CODE", str(int(request["trust_code"]))):
            answer = _prove(handler, Path(request["root"]), request["gpu_id"])
    except Exception as error:  # whatever code of an archive raises
        answer = {"error": type(error).__name__, "message": str(error)}
    print(json.dumps(answer), file=answers, flush=True)
    return 0


def _prove(module: Any, root: Path, gpu_id: int | None) -> dict[str, Any]:
    from serve.runtime.selftest import run_golden_frame
    from serve.worker.handler import DetectionHandler

    opened = OpenedFiles(root)
    if (root / "code").is_dir():
        sys.addaudithook(opened.note)
    (kind,) = (
        found
        for found in vars(module).values()
        if isinstance(found, type) and issubclass(found, DetectionHandler) and found is not DetectionHandler
    )
    handler = kind()
    handler.initialize(SimpleNamespace(system_properties={"model_dir": str(root), "gpu_id": gpu_id}))
    from serve.archive import open_directory

    frame = open_directory(root).golden_frame()
    started = time.perf_counter()
    handler.run_in_engine(lambda: run_golden_frame(handler.detector, frame))
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "device": str(handler.detector.device),
        "memory_bytes": _peak_memory(),
        "device_memory_bytes": _peak_device_memory(handler.detector.device),
        "opened": sorted(opened.outside),
    }


class OpenedFiles:
    """Audit hook that notes files which code of an archive opens outside of the archive and the environment."""

    def __init__(self, root: Path) -> None:
        """Watch the code of the archive that is unpacked in `root`."""
        self.outside: set[str] = set()
        self._code = str((root / "code").resolve())
        keys = ("stdlib", "platstdlib", "purelib", "platlib", "data")
        known = [str(root.resolve()), sys.prefix, sys.base_prefix, *map(sysconfig.get_path, keys)]
        known.append(str(Path(__file__).resolve().parents[2]))
        self._known = tuple(os.path.realpath(path) for path in known)

    def note(self, event: str, details: tuple[Any, ...]) -> None:
        """Note the file if `event` is the opening of one for reading."""
        if event != "open" or not isinstance(details[0], str | bytes | os.PathLike):
            return
        path, mode = os.path.realpath(os.fsdecode(details[0])), details[1]
        if (isinstance(mode, str) and set(mode) & set("wax")) or not os.path.isfile(path):
            return
        if self._is_below(path, self._known) or self._is_below(path, _SYSTEM_FOLDERS):
            return
        if self._opened_by_code(sys._getframe(1)):
            self.outside.add(path)

    @staticmethod
    def _is_below(path: str, folders: tuple[str, ...]) -> bool:
        return any(path == folder or path.startswith(folder.rstrip("/") + "/") for folder in folders)

    def _opened_by_code(self, frame: FrameType | None) -> bool:
        """Whether code of the archive called for it; not if it only imported a module that opens files."""
        while frame is not None:
            file = frame.f_code.co_filename
            if file.startswith("<frozen importlib"):
                return False
            if file.startswith(self._code):
                return True
            frame = frame.f_back
        return False


def _peak_memory() -> int:
    """Largest resident memory of this process so far, bytes."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def _peak_device_memory(device: Any) -> int | None:
    """Largest memory of the device that torch has taken, bytes; None on a CPU."""
    import torch

    return int(torch.cuda.max_memory_reserved(device)) if device.type == "cuda" else None


if __name__ == "__main__":
    raise SystemExit(main())
