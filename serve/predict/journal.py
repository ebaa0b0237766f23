"""Record of a run in its output folder: what is finished is not computed again after Ctrl-C, a crash or a kill.

    run.json                 model and options of the run; predictions of another run are not mixed with it
    predictions.jsonl        one line per frame, in the order in which frames were finished
    .predictions.jsonl.part  the same while the run is not finished

A line is ``{"frame": name, "etag": …, "answer": {…}}`` or ``{"frame": …, "error": {"code": …, "message": …}}``; `etag`
stands for size and time of change of the file. Lines are appended whole. One that a kill cut short, and those of frames
that failed or changed, are left out when the run goes on.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Self

import orjson

from serve.errors import BadRequest
from serve.predict.frames import Frame, Prediction
from serve.storage import write_bytes
from serve.storage.cache import map_disk_errors

__all__ = ["LINES", "Journal", "line_of"]

RUN, LINES = "run.json", "predictions.jsonl"
_PART = f".{LINES}.part"


def line_of(prediction: Prediction) -> bytes:
    """Encode a prediction as one line, with the answer's own bytes."""
    head = _head(prediction.frame)
    if prediction.error is None:
        return head + b',"answer":' + prediction.encoded + b"}\n"
    failure = orjson.dumps(orjson.loads(prediction.encoded)["error"])
    return head + b',"error":' + failure + b"}\n"


def _head(frame: Frame) -> bytes:
    named = {"frame": frame.name, "etag": frame.etag} if frame.etag else {"frame": frame.name}
    return orjson.dumps(named)[:-1]


class Journal:
    """The record of one run, open for appending; a context manager.

    Args:
        folder: output folder, created if missing.
        run: what has to be equal for predictions to belong to the same run.
        outputs: what files made of the predictions depend on besides.
        overwrite: forget a former run.
    """

    def __init__(
        self, folder: Path, run: Mapping[str, Any], outputs: Mapping[str, Any], *, overwrite: bool = False
    ) -> None:
        """Open the record, or go on with the one of a former run.

        Raises:
            BadRequest: the folder has the predictions of another run, or one is being written.
            StorageError: the folder cannot be written.
        """
        self.folder, self._final, self._part = folder, folder / LINES, folder / _PART
        self.same_outputs = True
        self._former: dict[str, tuple[int, int]] = {}
        self._kept: set[int] = set()
        with map_disk_errors(str(folder)):
            folder.mkdir(parents=True, exist_ok=True)
            self._check_run({"predictions": run, "outputs": outputs}, overwrite)
            if self._final.exists():
                os.replace(self._final, self._part)
            self._file: BinaryIO = self._part.open("ab", buffering=0)
            self._reader: BinaryIO = self._part.open("rb")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise BadRequest(
                f"another run is writing into {folder}; wait for it, or choose another --out"
            ) from None
        self._begin = self._index()

    def __enter__(self) -> Self:
        """Append within the block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the files; the record stays."""
        self.close()

    def close(self) -> None:
        """Close the files; the record stays."""
        self._file.close()
        self._reader.close()

    def __len__(self) -> int:
        """Return the number of frames that former runs finished."""
        return len(self._former)

    def is_empty(self) -> bool:
        """Return whether nothing is recorded."""
        return os.fstat(self._file.fileno()).st_size == 0

    def find(self, frame: Frame) -> Prediction | None:
        """Return the prediction of a frame that a former run finished; None if there is none, or the file changed."""
        if frame.name not in self._former:
            return None
        at, length = self._former[frame.name]
        line = os.pread(self._reader.fileno(), length, at)
        head = _head(frame) + b',"answer":'
        if not line.startswith(head):
            return None
        self._kept.add(at)
        encoded = line[len(head) : -2]
        return Prediction(frame, encoded, orjson.loads(encoded), is_new=False)

    def append(self, prediction: Prediction) -> None:
        """Record a prediction; the line is in the file, whole, when this returns.

        It takes the place of the one that a former run recorded for the frame.
        """
        self._kept.discard(self._former.get(prediction.frame.name, (-1, 0))[0])
        line = line_of(prediction)
        end = os.fstat(self._file.fileno()).st_size
        with map_disk_errors(str(self._part)):
            try:
                if self._file.write(line) != len(line):
                    raise OSError(28, "No space left on device")
            except BaseException:
                os.truncate(self._file.fileno(), end)
                raise

    def lines(self) -> Iterator[dict[str, Any]]:
        """Read the record of this run: predictions of former runs that still count, and those of this one."""
        for _, line in self._raw_lines():
            yield orjson.loads(line)

    def finish(self) -> Path:
        """Give the record its name; returns its path."""
        with map_disk_errors(str(self._part)):
            if len(self._kept) < sum(1 for _ in self._all_lines(self._begin)):
                handle, scratch = tempfile.mkstemp(dir=self.folder, prefix=f".{LINES}.", suffix=".new")
                try:
                    with os.fdopen(handle, "wb") as file:
                        file.writelines(line for _, line in self._raw_lines())
                    os.chmod(scratch, 0o644)
                    os.replace(scratch, self._part)
                except BaseException:
                    Path(scratch).unlink(missing_ok=True)
                    raise
            os.replace(self._part, self._final)
        return self._final

    def _check_run(self, run: Mapping[str, Mapping[str, Any]], overwrite: bool) -> None:
        path = self.folder / RUN
        if overwrite:
            for former in (self._final, self._part):
                former.unlink(missing_ok=True)
        elif path.is_file() and any(
            file.exists() and file.stat().st_size for file in (self._final, self._part)
        ):
            self._compare(path, orjson.loads(orjson.dumps(run)))
        elif self._final.exists():
            raise BadRequest(
                f"{self._final} exists and no {RUN} beside it; choose another --out, or replace it with --overwrite"
            )
        write_bytes(path, orjson.dumps(run, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))

    def _compare(self, path: Path, run: Mapping[str, Any]) -> None:
        """Compare with the run that began to write into the folder."""
        try:
            former = orjson.loads(path.read_bytes())
            own, others = run["predictions"], former["predictions"]
            self.same_outputs = bool(run["outputs"] == former["outputs"])
        except (ValueError, KeyError, TypeError):
            raise BadRequest(
                f"{path} is damaged; choose another --out, or replace it with --overwrite"
            ) from None
        if own != others:
            changed = [key for key in {**others, **own} if own.get(key) != others.get(key)]
            listed = "; ".join(f"{key} {others.get(key)!r}, now {own.get(key)!r}" for key in changed)
            raise BadRequest(
                f"{self.folder} has predictions of another run ({listed}); choose another --out, or replace them with "
                "--overwrite"
            )

    def _index(self) -> int:
        """Find the answers of former runs; returns where this one begins."""
        end = 0
        for at, line in self._all_lines(None):
            end = at + len(line)
            try:
                entry = orjson.loads(line)
                if "answer" in entry:
                    self._former[entry["frame"]] = (at, len(line))
            except (ValueError, KeyError, TypeError):
                continue
        os.truncate(self._part, end)
        return end

    def _all_lines(self, before: int | None) -> Iterator[tuple[int, bytes]]:
        """Whole lines with their positions, up to `before`."""
        at = 0
        with self._part.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n") or (before is not None and at >= before):
                    return
                yield at, line
                at += len(line)

    def _raw_lines(self) -> Iterator[tuple[int, bytes]]:
        return ((at, line) for at, line in self._all_lines(None) if at >= self._begin or at in self._kept)
