"""Lock of a destination: one run at a time writes into a folder or below a prefix.

A folder has a lock of the operating system, which ends with the process. A bucket has an object, which its owner
renews; it is created and renewed under a condition (``If-None-Match: *``, ``If-Match``), so that of two runs one gets
it. A run that was killed leaves its object; it is taken over when it was not renewed for a while, or at once if the
process is known to be gone.
"""

from __future__ import annotations

import os
import secrets
import socket
import sys
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import orjson

from serve import storage
from serve.bulk.destination import Destination
from serve.bulk.retry import repeat
from serve.errors import ObjectNotFound, StorageError
from serve.storage import s3
from serve.storage.lock import hold_lock

__all__ = ["BucketLock", "hold_destination"]

_TARGET = "bulk.json"
_RENEW_S = 20.0
_STALE_S = 90.0
_LOOK_S = 3.0
_SETTLE_S = 2.0
# A server that stalls must not keep a renewal so long that the lock is stale before the next one.
_OPTIONS = s3.Options(connect_timeout_s=5.0, read_timeout_s=10.0, attempts=2)


def hold_destination(destination: Destination, stack: ExitStack) -> BucketLock | None:
    """Wait for the lock of a destination and hold it until the stack is left.

    Returns:
        The lock of a bucket, which can be lost; None for a folder.

    Raises:
        StorageError: the destination cannot be written.
    """
    if not destination.is_local:
        return stack.enter_context(BucketLock(destination.uri(f"{_TARGET}.lock")))
    target = destination.folder / _TARGET
    stack.enter_context(
        hold_lock(target, waiting=lambda: _say(f"another run writes into {destination.where}; waiting"))
    )
    return None


class BucketLock:
    """Lock at an ``s3://`` URI; a context manager that waits for it.

    Args:
        uri: of the object.
    """

    def __init__(self, uri: str) -> None:
        self._where = storage.parse(uri)
        self._store = s3.connect(self._where.cluster, options=_OPTIONS)
        self._owner = {"token": secrets.token_hex(8), **_this_process()}
        self._renewals = 0
        self._etag = ""
        self._is_conditional = True
        self._lost = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lock", daemon=True)

    def check(self) -> None:
        """Make sure that no other run has the lock.

        Raises:
            StorageError: it was not renewed in time, and another run has taken it.
        """
        if self._lost:
            raise StorageError(
                f"{self._where} is another run's now, or was removed: a run that does not renew it for {_STALE_S:g} s "
                "loses it; let one run at a time write there"
            )

    def __enter__(self) -> Self:
        """Wait until the lock is free or given up, and take it."""
        is_shown = False
        while not repeat(self._take):
            holder = repeat(self._holder)
            if holder is None:
                continue
            if not is_shown:
                _say(
                    f"{self._where}: another run ({holder.get('host')}, process {holder.get('process')}) writes there; "
                    f"waiting until it ends, or until it has been silent for {_STALE_S:g} s"
                )
                is_shown = True
            time.sleep(_LOOK_S)
        self._find_out_conditions()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the object, if it is still this run's."""
        self._ended.set()
        self._thread.join()
        with suppress(StorageError):  # it is taken over when it is stale
            if self._is_own():
                self._store.remove(self._where)

    def _take(self) -> bool:
        """Create the object, or replace the one of a run that is gone."""
        if self._renewals and self._is_own():
            return True
        try:
            found = self._store.head(self._where)
        except ObjectNotFound:
            return self._claim("")
        return self._is_given_up(found) and self._claim(found.etag)

    def _is_given_up(self, found: s3.ObjectInfo) -> bool:
        if found.age_s is not None and found.age_s >= _STALE_S:
            return True
        holder = self._holder() or {}
        here = _this_process()
        is_here = all(holder.get(name) == here[name] for name in ("boot", "namespace")) and here["boot"]
        return bool(is_here) and not _is_alive(holder.get("process"))

    def _holder(self, version: s3.ObjectInfo | None = None) -> dict[str, Any] | None:
        try:
            found = orjson.loads(self._store.read(self._where, info=version))
        except ObjectNotFound:
            return None
        except orjson.JSONDecodeError:
            return {}
        return found if isinstance(found, dict) else {}

    def _is_own(self) -> bool:
        """Whether the object is this run's, also if the answer to the request that wrote it was lost."""
        try:
            found = self._store.head(self._where)
        except ObjectNotFound:
            return False
        if found.etag != self._etag:
            if (self._holder(found) or {}).get("token") != self._owner["token"]:
                return False
            self._etag = found.etag
        return True

    def _claim(self, etag: str) -> bool:
        """Write as `_write`; a request that was repeated, as its answer was lost, is refused and has written."""
        return self._write(etag) or self._is_own()

    def _write(self, etag: str) -> bool:
        """Write the object if it is as it was seen; returns whether it was."""
        self._renewals += 1
        content = orjson.dumps({**self._owner, "renewals": self._renewals})
        written = self._store.write_if(self._where, content, etag)
        if written is not None:
            self._etag = written
        return written is not None

    def _find_out_conditions(self) -> None:
        """Create the object once more, which has to fail; if it does not, wait for a run that has done the same."""
        if not repeat(lambda: self._write("")):
            return
        self._is_conditional = False
        _say(
            f"the server of {self._where} knows no conditional writes; runs that are begun there at the same moment do "
            "not notice each other"
        )
        time.sleep(_SETTLE_S)
        if not repeat(self._is_own):
            self._lost = True
            self.check()

    def _keep(self) -> None:
        pause_s = _RENEW_S
        while not self._ended.wait(pause_s):
            pause_s = _RENEW_S
            try:
                # Looked at before, for a server without conditions.
                self._lost = not (self._is_own() and self._claim(self._etag))
            except StorageError:
                pause_s = _LOOK_S
            if self._lost:
                return


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _this_process() -> dict[str, Any]:
    """Identify this process; boot and namespace say whether its number means anything to another one."""
    boot = namespace = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
    return {"host": socket.gethostname(), "process": os.getpid(), "boot": boot, "namespace": namespace}


def _is_alive(process: Any) -> bool:
    if not isinstance(process, int) or process <= 0:
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
