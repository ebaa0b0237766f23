"""Storage benchmark: large S3 reads against boto3, random FFRecord reads against pread, and packing.

The sides alternate by round in one process. The object comes from `tools.bench.range_server` on loopback, everything
else from the page cache. Network latency and cold disks are out of scope: all sides would wait for the same thing.
"""

from __future__ import annotations

import io
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from serve.errors import SetupError
from serve.storage import Cache, parse, s3
from serve.storage.ffrecord import Reader, Writer

__all__ = ["Packing", "StorageBenchmark", "run"]

FRAME_BYTES = 300_000
FRAMES = 3000  # larger than the CPU caches
PACKED_BYTES = 30_000
# Dummy: the server on loopback does not check them.
_CREDENTIALS: Mapping[str, Any] = {
    "aws_access_key_id": "benchmark",
    "aws_secret_access_key": "benchmark",
    "region_name": "us-east-1",
}
_WHERE = parse("s3://bucket/object")
_PACK = """
import resource, sys, time
from pathlib import Path
from serve.storage.packed_folder import pack_folder
pack_folder(Path(sys.argv[1]) / "one", Path(sys.argv[2]))  # imports and first pages are paid for
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
started = time.perf_counter()
pack_folder(Path(sys.argv[1]) / "many", Path(sys.argv[2]))
print(time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@dataclass(frozen=True)
class Packing:
    """Packing of files of 30 kB: seconds, and growth of peak memory in MB (10^6 bytes)."""

    files: int
    seconds: float
    memory_mb: float


@dataclass(frozen=True)
class StorageBenchmark:
    """Medians over the rounds.

    Attributes:
        object_mb: size of the object, MB of 10^6 bytes.
        rounds: counted rounds.
        cores: CPU cores of this process.
        read_s: seconds per object, by side.
        frames_us: microseconds per random frame of 300 kB, by side.
        packing: one entry per number of files.
    """

    object_mb: int
    rounds: int
    cores: int
    read_s: Mapping[str, float]
    frames_us: Mapping[str, float]
    packing: tuple[Packing, ...]

    def table(self) -> str:
        """Format tables of all three measurements with ratios."""
        lines = [
            f"{self.object_mb} MB over S3 on loopback, {self.cores} CPU cores, median of {self.rounds} rounds",
            f"{'':<52}{'s':>8}{'MB/s':>8}{'ratio':>8}",
        ]
        for side, seconds in self.read_s.items():
            against = self._best("to memory" if "memory" in side else "to a file")
            lines.append(
                f"{side:<52}{seconds:>8.2f}{self.object_mb / seconds:>8.0f}{against / seconds:>8.2f}"
            )
        lines += ["", f"random frames of 300 kB out of {FRAMES}", f"{'':<52}{'µs':>8}{'GB/s':>8}{'ratio':>8}"]
        for side, micros in self.frames_us.items():
            speed = FRAME_BYTES / micros / 1e3
            lines.append(f"{side:<52}{micros:>8.1f}{speed:>8.2f}{self.frames_us['pread'] / micros:>8.2f}")
        lines += ["", "packing files of 30 kB", f"{'files':<52}{'s':>8}{'µs/file':>8}{'MB more':>8}"]
        for one in self.packing:
            lines.append(
                f"{one.files:<52}{one.seconds:>8.2f}{one.seconds / one.files * 1e6:>8.0f}{one.memory_mb:>8.1f}"
            )
        return "\n".join(lines)

    def _best(self, sink: str) -> float:
        """Return the seconds of boto3's faster configuration, default or tuned."""
        return min(seconds for side, seconds in self.read_s.items() if side.startswith(f"boto3, {sink}"))

    def json_line(self) -> str:
        """Format all fields as one line of JSON."""
        return json.dumps(asdict(self))


def run(
    *, object_bytes: int = 10**9, rounds: int = 5, pack_counts: Sequence[int] = (1000, 3000, 10_000)
) -> StorageBenchmark:
    """Measure reads, random frames and packing.

    Args:
        object_bytes: size of the object; needs twice that on disk.
        rounds: counted rounds, after one warm-up round.
        pack_counts: numbers of files to pack.

    Raises:
        SetupError: a process of the benchmark failed.
    """
    steps = (rounds + 1) * (len(_SIDES) + 3) + len(pack_counts)
    bar: tqdm[Any]
    with (
        tempfile.TemporaryDirectory(prefix="mmdet3d-serve-bench-") as folder,
        tqdm(total=steps, unit="step", file=sys.stderr, disable=None) as bar,
    ):
        root = Path(folder)
        return StorageBenchmark(
            object_mb=object_bytes // 10**6,
            rounds=rounds,
            cores=len(os.sched_getaffinity(0)),
            read_s=_reads(root, object_bytes, rounds, bar.update),
            frames_us=_frames(root, rounds, bar.update),
            packing=tuple(_packs(root, pack_counts, bar.update)),
        )


# --- objects ---


@dataclass(frozen=True)
class _Side:
    client: Any
    store: s3.S3
    folder: Path


def _boto3_to_memory(side: _Side, io_chunksize: int = 256 << 10) -> int:
    from boto3.s3.transfer import TransferConfig

    buffer = io.BytesIO()
    side.client.download_fileobj("bucket", "object", buffer, Config=TransferConfig(io_chunksize=io_chunksize))
    return len(buffer.getvalue())


def _boto3_to_file(side: _Side, io_chunksize: int = 256 << 10) -> int:
    from boto3.s3.transfer import TransferConfig

    side.client.download_file(
        "bucket", "object", str(side.folder / "copy"), Config=TransferConfig(io_chunksize=io_chunksize)
    )
    return (side.folder / "copy").stat().st_size


def _ours_to_memory(side: _Side) -> int:
    return len(side.store.read(_WHERE))


def _ours_to_file(side: _Side) -> int:
    with (side.folder / "copy").open("w+b") as file:
        side.store.download(_WHERE, file, info=side.store.head(_WHERE), progress=False)
    return (side.folder / "copy").stat().st_size


def _ours_to_cache(side: _Side) -> int:
    def fill(file: IO[bytes]) -> None:
        side.store.download(_WHERE, file, info=side.store.head(_WHERE), progress=False)

    return Cache(side.folder, 0).get("object", "copy", fill).stat().st_size


_SIDES: Mapping[str, Callable[[_Side], int]] = {
    "boto3, to memory": _boto3_to_memory,
    "boto3, to memory, pieces of 1 MiB": partial(_boto3_to_memory, io_chunksize=1 << 20),
    "read, to memory": _ours_to_memory,
    "boto3, to a file": _boto3_to_file,
    "boto3, to a file, pieces of 1 MiB": partial(_boto3_to_file, io_chunksize=1 << 20),
    "download, to a file": _ours_to_file,
    "into the cache (local_path), hashed too": _ours_to_cache,
}


def _reads(root: Path, size: int, rounds: int, done: Callable[[], object]) -> dict[str, float]:
    import boto3

    source = root / "object"
    with source.open("wb") as file:
        left = size
        while left > 0:
            file.write(random.Random(left).randbytes(min(left, 16 << 20)))
            left -= 16 << 20
    found: dict[str, list[float]] = {side: [] for side in _SIDES}
    with _serve(source) as endpoint, _connect(endpoint) as store:
        client = boto3.session.Session().client("s3", endpoint_url=endpoint, **_CREDENTIALS)
        for number in range(rounds + 1):
            for side, read in _SIDES.items():
                with tempfile.TemporaryDirectory(dir=root) as folder:
                    started = time.perf_counter()
                    got = read(_Side(client, store, Path(folder)))
                    seconds = time.perf_counter() - started
                if got != size:
                    raise SetupError(f"{side} read {got} of {size} bytes")
                if number:
                    found[side].append(seconds)
                done()
    source.unlink()
    return {side: statistics.median(times) for side, times in found.items()}


@contextmanager
def _serve(source: Path) -> Iterator[str]:
    server = subprocess.Popen(
        [sys.executable, "-m", "tools.bench.range_server", str(source)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdin is not None and server.stdout is not None
    try:
        port = server.stdout.readline().strip()
        if not port:
            raise SetupError("the benchmark's S3 server did not start; see its output above")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.stdin.close()
        server.wait(30)
        server.stdout.close()


@contextmanager
def _connect(endpoint: str) -> Iterator[s3.S3]:
    """Connect our client, with a petrel configuration of its own."""
    with tempfile.TemporaryDirectory() as folder:
        conf = Path(folder, "petreloss.conf")
        conf.write_text(
            f"[DEFAULT]\ndefault_cluster = here\n[here]\nendpoint_url = {endpoint}\n"
            "access_key = benchmark\nsecret_key = benchmark\n"
        )
        yield s3.S3(conf=conf)


# --- frames ---


def _frames(root: Path, rounds: int, done: Callable[[], object]) -> dict[str, float]:
    path = root / "frames.ffr"
    with Writer(path, FRAMES) as writer:
        for index in range(FRAMES):
            writer.add(random.Random(index).randbytes(FRAME_BYTES))
    order = random.Random(0).choices(range(FRAMES), k=FRAMES)
    first = path.stat().st_size - FRAMES * FRAME_BYTES
    handle = os.open(path, os.O_RDONLY)
    try:
        with Reader(path) as reader:
            sides: dict[str, Callable[[int], object]] = {
                "pread": lambda i: os.pread(handle, FRAME_BYTES, first + i * FRAME_BYTES),
                "Reader.read, checksum compared": reader.read,
                "Reader.read, checksum compared, copied to bytes": lambda i: bytes(reader.read(i)),
            }
            found: dict[str, list[float]] = {side: [] for side in sides}
            for number in range(rounds + 1):
                for side, read in sides.items():
                    started = time.perf_counter()
                    for index in order:
                        read(index)
                    if number:
                        found[side].append((time.perf_counter() - started) / len(order) * 1e6)
                    done()
    finally:
        os.close(handle)
    path.unlink()
    return {side: statistics.median(times) for side, times in found.items()}


# --- packing ---


def _packs(root: Path, counts: Sequence[int], done: Callable[[], object]) -> Iterator[Packing]:
    body = random.Random(0).randbytes(PACKED_BYTES)
    for count in counts:
        with tempfile.TemporaryDirectory(dir=root) as folder:
            for name, files in (("one", 1), ("many", count)):
                for index in range(files):
                    place = Path(folder, name, f"{index // 1000:03d}")
                    place.mkdir(parents=True, exist_ok=True)
                    (place / f"{index:06d}.bin").write_bytes(body)
            ran = subprocess.run(
                [sys.executable, "-c", _PACK, folder, str(Path(folder, "out.ffr"))],
                capture_output=True,
                text=True,
            )
            if ran.returncode:
                raise SetupError(f"packing failed: {ran.stderr[-300:]}")
            seconds, kilobytes = ran.stdout.split()
            yield Packing(count, float(seconds), float(kilobytes) * 1024 / 1e6)
        done()
