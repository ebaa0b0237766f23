"""File by which a worker tells the supervisor why it did not load its model.

TorchServe passes on what a worker prints, but loses it when the worker ends at once, and an end by a signal prints
nothing. So a worker keeps a file beside its socket while it loads, puts the exception into it, and removes it when it
is ready.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from serve.errors import ServeError

__all__ = ["read_start_failure", "record_start"]

_MAX_REASON_CHARS = 2000
_MAX_FILE_BYTES = 64 << 10
_KILLED = (
    "its worker was ended from outside while it loaded the model: out of memory, or a crash of native code"
)


@contextlib.contextmanager
def record_start(folder: Path | None, model: str) -> Iterator[None]:
    """Keep a record in `folder` while the block loads `model`; without a folder do nothing."""
    if folder is None:
        yield
        return
    path = folder / f"start-{os.getpid()}.json"
    _write(path, model, None)
    try:
        yield
    except BaseException as error:  # SystemExit as well, by which code of an archive may end the worker
        text = str(error) if isinstance(error, ServeError) else f"{type(error).__name__}: {error}"
        _write(path, model, text[:_MAX_REASON_CHARS])
        raise
    path.unlink(missing_ok=True)


def _write(path: Path, model: str, reason: str | None) -> None:
    with contextlib.suppress(OSError):  # a full disk must not hide the reason from the log
        path.write_text(json.dumps({"model": model, "pid": os.getpid(), "reason": reason}))


def read_start_failure(folder: Path, model: str) -> str | None:
    """Find why the last worker of `model` that ended while it loaded did so; None if there was none."""
    reasons: list[tuple[float, str]] = []
    killed = False
    for path in folder.glob("start-*.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            if path.stat().st_size > _MAX_FILE_BYTES:
                continue
            record = json.loads(path.read_bytes())
            if record["model"] != model:
                continue
            if record["reason"] is not None:
                reasons.append((path.stat().st_mtime, str(record["reason"])))
            elif not _is_running(int(record["pid"])):
                killed = True
    if reasons:
        return max(reasons)[1]
    return _KILLED if killed else None


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    # A zombie, ended and not yet reaped, exists, too.
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return True
