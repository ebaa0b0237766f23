"""`serve.storage.download` against a real HTTP server that misbehaves on demand."""

from __future__ import annotations

import errno
import hashlib
import http.server
import json
import logging
import multiprocessing
import shutil
import socket
import threading
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from serve.errors import DownloadError
from serve.storage import download
from serve.storage.download import cache_path, fetch
from serve.storage.hashes import hash_in_name, sha256_of

BODY = bytes(range(256)) * 12_000  # 3 MB: several pieces
DIGEST = hashlib.sha256(BODY).hexdigest()
GOOD = f"model_20200101-{DIGEST[:8]}.pth"


class Scripted(http.server.ThreadingHTTPServer):
    """Answers each request with the next act of a script, then (and by default) as a good server does."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.body = BODY
        self.etag: str | None = '"one"'
        self.acts: list[Callable[[Handler], None]] = []
        self.seen: list[dict[str, str]] = []
        self.gate = threading.Event()
        self.lock = threading.Lock()

    def url(self, name: str = GOOD) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/models/{name}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are what these tests are about."""


class Handler(http.server.BaseHTTPRequestHandler):
    server: Scripted
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        with self.server.lock:
            self.server.seen.append(
                {key.lower(): value for key, value in self.headers.items()} | {"": self.path}
            )
            act = self.server.acts.pop(0) if self.server.acts else well_behaved
        act(self)

    def log_message(self, *_: object) -> None:
        return

    def answer(self, status: int, body: bytes = b"", length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        if self.server.etag:
            self.send_header("ETag", self.server.etag)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()


def well_behaved(handler: Handler) -> None:
    body, asked = handler.server.body, handler.headers.get("Range")
    unchanged = handler.headers.get("If-Range") in (None, handler.server.etag)
    if asked is None or not unchanged:
        return handler.answer(200, body)
    start = int(asked.removeprefix("bytes=").rstrip("-"))
    if start >= len(body):
        return handler.answer(416, Content_Range=f"bytes */{len(body)}")
    handler.answer(206, body[start:], Content_Range=f"bytes {start}-{len(body) - 1}/{len(body)}")


def breaking_off_after(count: int) -> Callable[[Handler], None]:
    def act(handler: Handler) -> None:
        handler.answer(200, handler.server.body[:count], length=len(handler.server.body))
        handler.close_connection = True
        handler.connection.shutdown(socket.SHUT_RDWR)

    return act


def without_ranges(handler: Handler) -> None:
    handler.answer(200, handler.server.body)


def status(code: int, **headers: str) -> Callable[[Handler], None]:
    return lambda handler: handler.answer(code, b"no", **headers)


def silent(handler: Handler) -> None:
    handler.server.gate.wait(20)
    handler.close_connection = True


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scripted]:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    scripted = Scripted()
    thread = threading.Thread(target=scripted.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield scripted
    scripted.gate.set()
    scripted.shutdown()
    thread.join()
    scripted.server_close()


def get(server: Scripted, cache: Path, name: str = GOOD, **options: object) -> Path:
    settings: dict[str, object] = {"progress": False, "timeout_s": 5.0, "backoff_s": 0.0, **options}
    return fetch(server.url(name), cache, **settings)  # type: ignore[arg-type]


def names_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_download_leaves_only_the_file(server: Scripted, tmp_path: Path) -> None:
    path = get(server, tmp_path)
    assert path == tmp_path / GOOD == cache_path(server.url(), tmp_path)
    assert path.read_bytes() == BODY
    assert names_in(tmp_path) == [GOOD]


def test_cached_file_is_used_without_a_server(server: Scripted, tmp_path: Path) -> None:
    (tmp_path / GOOD).write_bytes(BODY)
    get(server, tmp_path)
    assert server.seen == []


def test_cached_file_with_wrong_hash_is_downloaded_again(
    server: Scripted, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / GOOD).write_bytes(BODY[:-1] + b"x")
    with caplog.at_level(logging.WARNING):
        assert get(server, tmp_path).read_bytes() == BODY
    assert "does not have the hash" in caplog.text


@pytest.mark.parametrize("count", [1, 1 << 20, len(BODY) - 1])
def test_interrupted_transfer_is_resumed(server: Scripted, tmp_path: Path, count: int) -> None:
    server.acts = [breaking_off_after(count)]
    assert get(server, tmp_path).read_bytes() == BODY
    assert server.seen[1]["if-range"] == '"one"'
    start = int(server.seen[1]["range"].removeprefix("bytes=").rstrip("-"))
    assert 0 < start <= count
    assert names_in(tmp_path) == [GOOD]


def test_later_run_resumes_the_part_of_an_earlier_one(server: Scripted, tmp_path: Path) -> None:
    server.acts = [breaking_off_after(2 << 20)]
    with pytest.raises(DownloadError, match=r"\d+ bytes|lost"):
        get(server, tmp_path, retries=0)
    assert names_in(tmp_path) == [f"{GOOD}.part", f"{GOOD}.part.json"]
    assert get(server, tmp_path).read_bytes() == BODY
    assert "range" in server.seen[1]


def test_server_without_ranges_restarts_the_transfer(server: Scripted, tmp_path: Path) -> None:
    server.acts = [breaking_off_after(1 << 20), without_ranges]
    assert get(server, tmp_path).read_bytes() == BODY


def test_changed_file_restarts_the_transfer(server: Scripted, tmp_path: Path) -> None:
    def changing(handler: Handler) -> None:
        breaking_off_after(1 << 20)(handler)
        server.body, server.etag = BODY[::-1], '"two"'

    server.acts = [changing]
    name = "weights.pth"  # no hash in the name: only the ETag can tell
    path = get(server, tmp_path, name)
    assert path.read_bytes() == BODY[::-1]
    assert "if-range" in server.seen[1]


def test_wrong_continuation_is_detected_by_the_hash(server: Scripted, tmp_path: Path) -> None:
    def careless(handler: Handler) -> None:
        start = int(handler.headers["Range"].removeprefix("bytes=").rstrip("-"))
        rest = BODY[::-1][start:]
        handler.answer(206, rest, Content_Range=f"bytes {start}-{len(BODY) - 1}/{len(BODY)}")

    server.acts = [breaking_off_after(1 << 20)]
    with pytest.raises(DownloadError):
        get(server, tmp_path, retries=0)
    server.acts = [careless]
    assert get(server, tmp_path).read_bytes() == BODY
    assert len(server.seen) == 3


@pytest.mark.parametrize("total", [len(BODY) - 1, len(BODY) + 1])
def test_resumed_response_of_another_length_restarts(server: Scripted, tmp_path: Path, total: int) -> None:
    def shifted(handler: Handler) -> None:
        start = int(handler.headers["Range"].removeprefix("bytes=").rstrip("-"))
        handler.answer(206, b"x" * (total - start), Content_Range=f"bytes {start}-{total - 1}/{total}")

    server.acts = [breaking_off_after(1 << 20), shifted]
    assert get(server, tmp_path).read_bytes() == BODY


def test_part_longer_than_the_file_restarts(server: Scripted, tmp_path: Path) -> None:
    server.acts = [breaking_off_after(2 << 20)]
    with pytest.raises(DownloadError):
        get(server, tmp_path, "weights.pth", retries=0)
    server.body = BODY[:1000]
    server.acts = [status(416)]
    assert get(server, tmp_path, "weights.pth").read_bytes() == BODY[:1000]


def test_part_of_another_url_is_not_used(server: Scripted, tmp_path: Path) -> None:
    (tmp_path / f"{GOOD}.part").write_bytes(b"something else")
    (tmp_path / f"{GOOD}.part.json").write_text(json.dumps({"url": "other", "etag": '"one"'}))
    assert get(server, tmp_path).read_bytes() == BODY
    assert "range" not in server.seen[0]


def test_file_shorter_than_announced_is_rejected(server: Scripted, tmp_path: Path) -> None:
    server.acts = [breaking_off_after(0)] * 3
    with pytest.raises(DownloadError, match=r"\d+ bytes|lost"):
        get(server, tmp_path, "weights.pth", retries=2)
    assert not list(tmp_path.rglob("weights.pth"))
    assert len(server.seen) == 3


def test_wrong_hash_leaves_no_file(server: Scripted, tmp_path: Path) -> None:
    server.body = BODY[:-1] + b"x"
    with pytest.raises(DownloadError, match=DIGEST[:8]):
        get(server, tmp_path)
    assert names_in(tmp_path) == []


def test_given_hash_is_checked_for_names_without_one(server: Scripted, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="sha256"):
        get(server, tmp_path, "weights.pth", sha256_prefix="00000000")
    assert get(server, tmp_path, "weights.pth", sha256_prefix=DIGEST[:8].upper()) == tmp_path / "weights.pth"


def test_hash_of_a_file_without_one_in_its_name_is_recorded(server: Scripted, tmp_path: Path) -> None:
    path = get(server, tmp_path, "weights.pth")
    assert path.parent.parent == tmp_path
    path.write_bytes(b"altered on the disk")
    assert get(server, tmp_path, "weights.pth").read_bytes() == BODY
    assert get(server, tmp_path, "weights.pth") == path
    assert len(server.seen) == 2


def test_server_errors_are_retried(server: Scripted, tmp_path: Path) -> None:
    server.acts = [status(500), status(503, Retry_After="0"), status(429)]
    assert get(server, tmp_path).read_bytes() == BODY
    assert len(server.seen) == 4


def test_persistent_server_error_raises_download_error(server: Scripted, tmp_path: Path) -> None:
    server.acts = [status(500)] * 5
    with pytest.raises(DownloadError, match=r"500; .* http://.*\.pth"):
        get(server, tmp_path, retries=2)
    assert len(server.seen) == 3


def test_progress_resets_the_retry_count(server: Scripted, tmp_path: Path) -> None:
    def a_megabyte_more(handler: Handler) -> None:
        start = int((handler.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        code = 206 if start else 200
        piece = BODY[start : start + (1 << 20) + 10]
        spread = f"bytes {start}-{len(BODY) - 1}/{len(BODY)}"
        handler.answer(code, piece, length=len(BODY) - start, Content_Range=spread)
        handler.close_connection = True
        handler.connection.shutdown(socket.SHUT_RDWR)

    server.acts = [a_megabyte_more] * 2
    assert get(server, tmp_path, retries=1).read_bytes() == BODY


def test_missing_file_is_not_retried(server: Scripted, tmp_path: Path) -> None:
    server.acts = [status(404)]
    with pytest.raises(DownloadError, match="404"):
        get(server, tmp_path)
    assert len(server.seen) == 1
    assert names_in(tmp_path) == []


def test_silent_server_times_out(server: Scripted, tmp_path: Path) -> None:
    server.acts = [silent, silent]
    with pytest.raises(DownloadError, match=r"0\.\d+ s"):
        get(server, tmp_path, timeout_s=0.1, retries=1)


def test_offline_error_names_url_and_target_path(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/{GOOD}"
        with pytest.raises(DownloadError) as caught:
            fetch(url, tmp_path, progress=False, backoff_s=0.0, timeout_s=2.0)
    assert url in str(caught.value) and str(tmp_path / GOOD) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_host_error_names_host_and_target_path(tmp_path: Path, server: Scripted) -> None:
    with pytest.raises(DownloadError, match=r"host\.invalid .*\.pth"):
        fetch(f"http://host.invalid/{GOOD}", tmp_path, progress=False, backoff_s=0.0, timeout_s=2.0)


def test_redirects_are_followed_up_to_a_limit(server: Scripted, tmp_path: Path) -> None:
    server.acts = [status(302, Location="/elsewhere")]
    assert get(server, tmp_path).read_bytes() == BODY
    server.acts = [status(302, Location="/again")] * 20
    with pytest.raises(DownloadError, match="redirect"):
        get(server, tmp_path, "weights.pth")
    server.acts = [status(302, Location="file:///etc/passwd")]
    with pytest.raises(DownloadError, match="redirect"):
        get(server, tmp_path, "weights.pth")


@pytest.mark.parametrize(
    "url", ["ftp://host/a.pth", "/etc/passwd", "file:///a.pth", "http:///a.pth", "http://h/", "s3://b/k"]
)
def test_only_http_urls_of_files_are_accepted(url: str, tmp_path: Path) -> None:
    with pytest.raises(DownloadError):
        fetch(url, tmp_path)
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("name", ["%2e%2e%2fescape.pth", "..%5cescape.pth", "a%00.pth", "a%0a.pth"])
def test_file_name_cannot_escape_the_cache(name: str, tmp_path: Path) -> None:
    try:
        path = cache_path(f"http://host/x/{name}", tmp_path)
    except DownloadError:
        return
    assert path.resolve().is_relative_to(tmp_path.resolve())


def test_secrets_in_a_url_stay_out_of_messages_and_files(
    server: Scripted, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.acts = [status(403)]
    url = server.url().replace("http://", "http://user:hunter2@") + "?X-Amz-Signature=hunter3"
    with caplog.at_level(logging.INFO, logger="serve"), pytest.raises(DownloadError) as caught:
        fetch(url, tmp_path, progress=False, backoff_s=0.0)
    server.acts = [breaking_off_after(1 << 20)]
    with pytest.raises(DownloadError):
        fetch(url, tmp_path, progress=False, retries=0)
    notes = (tmp_path / f"{GOOD}.part.json").read_text()
    assert "hunter" not in str(caught.value) + caplog.text + notes


def test_too_small_disk_is_rejected_before_writing(
    server: Scripted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 9, 1))
    with pytest.raises(DownloadError, match="disk full"):
        get(server, tmp_path)
    assert names_in(tmp_path) == []


def test_disk_that_fills_up_leaves_no_file(
    server: Scripted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = 0

    def write(file: object, piece: bytes) -> None:
        nonlocal written
        written += len(piece)
        if written > 1 << 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        file.write(piece)  # type: ignore[attr-defined]

    monkeypatch.setattr(download, "_write", write)
    with pytest.raises(DownloadError, match="disk full"):
        get(server, tmp_path)
    assert names_in(tmp_path) == []


def test_unwritable_cache_raises_download_error(server: Scripted, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(DownloadError):
        get(server, tmp_path / "file" / "cache")


def test_concurrent_threads_download_a_file_once(server: Scripted, tmp_path: Path) -> None:
    results: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: results.append(get(server, tmp_path).read_bytes())) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert results == [BODY] * 6
    assert len(server.seen) == 1
    assert names_in(tmp_path) == [GOOD]


def _fetch_elsewhere(url: str, cache: str) -> str:
    return sha256_of(fetch(url, Path(cache), progress=False, backoff_s=0.0))


def test_concurrent_processes_download_a_file_once(server: Scripted, tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        digests = pool.starmap(_fetch_elsewhere, [(server.url(), str(tmp_path))] * 2, chunksize=1)
        pool.close()
        pool.join()
    assert digests == [DIGEST] * 2
    assert len(server.seen) == 1
    assert names_in(tmp_path) == [GOOD]


def test_file_without_content_length_is_downloaded(server: Scripted, tmp_path: Path) -> None:
    def chunked(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for start in range(0, len(BODY), 1 << 18):
            piece = BODY[start : start + (1 << 18)]
            handler.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        handler.wfile.write(b"0\r\n\r\n")

    server.acts = [chunked]
    assert get(server, tmp_path).read_bytes() == BODY


def test_compressed_response_is_rejected(server: Scripted, tmp_path: Path) -> None:
    server.acts = [status(200, Content_Encoding="gzip")]
    with pytest.raises(DownloadError, match="compressed"):
        get(server, tmp_path)


def test_empty_file_is_downloaded(server: Scripted, tmp_path: Path) -> None:
    server.body = b""
    assert get(server, tmp_path, "empty.bin").read_bytes() == b""


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("https://host/a/second-b086d0a3.pth", "b086d0a3"),
        ("x_20200620_230238-393f000c.pth?sig=-00000000.pth", "393f000c"),
        ("x-01262257.pth", "01262257"),
        ("x_20211208_151344.pth", None),
        ("x-b086d0a3c.pth", None),
        ("x-B086D0A3.pth", None),
        ("plain.pth", None),
    ],
)
def test_hash_in_name_reads_the_file_name(name: str, expected: str | None) -> None:
    assert hash_in_name(name) == expected
