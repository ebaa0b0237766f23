"""Frames named by a request: only what the list allows, only so much, only so long, and nobody's private network."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import threading

import lmdb
import pytest

from serve.errors import (
    BadRequest,
    ClientError,
    DeadlineExceeded,
    FrameTooLarge,
    NotReady,
    ReferenceNotFound,
    ReferenceRefused,
    SettingsError,
)
from serve.storage import references, s3, write_bytes
from serve.storage.packed_folder import pack_folder
from serve.storage.references import ReferenceLimits, References
from tests.storage.conftest import ENDPOINT

OWN = ReferenceLimits(private_hosts=True, timeout_s=20)


def fetch(allowed, uri, limits: ReferenceLimits = OWN):
    async def once():
        async with References(allowed, limits) as resolver:
            return await resolver.fetch(uri)

    return asyncio.run(once())


def test_references_are_off_without_prefixes():
    resolver = References([])
    with pytest.raises(ReferenceRefused):
        resolver.check("s3://bucket/000008.bin")
    resolver.close()


@pytest.mark.parametrize(
    ("prefix", "uri"),
    [
        ("s3://bucket", "s3://bucket/000008.bin"),
        ("s3://bucket/", "s3://bucket/000008.bin"),
        ("s3://bucket/frames", "s3://bucket/frames/a/8.bin"),
        ("s3://bucket/frames/", "petrel://bucket/frames/8.bin"),
        ("far:s3://bucket", "far:s3://bucket/8.bin"),
        ("https://host/a/", "HTTPS://HOST:443/a/8.bin?version=2"),
        ("http://host", "http://host./8.bin"),
        ("https://host/a b", "https://host/a%20b/8.bin"),
        ("ffrecord:///data/p.ffr", "ffrecord:///data/p.ffr#velodyne/8.bin"),
        ("ffrecord:///data/p.ffr#velodyne", "ffrecord:///data/p.ffr#velodyne/8.bin"),
        ("lmdb:///data/f.lmdb", "lmdb:///data/f.lmdb#8.bin"),
    ],
)
def test_uri_with_an_allowed_prefix_passes(prefix, uri):
    resolver = References([prefix])
    resolver.check(uri)
    resolver.close()


@pytest.mark.parametrize(
    "uri",
    [
        "s3://bucket-evil/8.bin",
        "s3://bucket/frames-evil/8.bin",
        "s3://bucket/frames",
        "s3://bucket/Frames/8.bin",
        "s3://BUCKET/frames/8.bin",
        "s3://bucket//frames/8.bin",
        "s3://bucket/%66rames/8.bin",
        "s3://bucket/8.bin",
        "other:s3://bucket/frames/8.bin",
        "https://host.evil.com/a/8.bin",
        "https://hostevil/a/8.bin",
        "https://evil.com/host/a/8.bin",
        "https://host:8443/a/8.bin",
        "http://host/a/8.bin",
        "https://host/ab/8.bin",
        "https://host/a/../b/8.bin",
        "https://host/a/%2e%2e/b/8.bin",
        "https://host/a/..%2fb/8.bin",
        "https://host/a/%252e%252e/b",
        "https://host/a\\..\\b",
        "https://host//a/8.bin",
        "https://host/a/8.bin#fragment",
        "ffrecord:///data/p.ffr.evil#velodyne/8.bin",
        "ffrecord:///data/p.ffr#other/8.bin",
        "ffrecord:///data/p.ffr#velodyne/../other/8.bin",
        "ffrecord:///data/../data/p.ffr#velodyne/8.bin",
        "lmdb:///data/p.ffr#velodyne/8.bin",
        "/etc/passwd",
        "etc/passwd",
        "file:///etc/passwd",
    ],
)
def test_uri_without_an_allowed_prefix_is_rejected_before_sending(uri):
    resolver = References(
        ["s3://bucket/frames/x", "s3://bucket/frames/8", "https://host/a", "ffrecord:///data/p.ffr#velodyne"]
    )
    with pytest.raises(ReferenceRefused):
        resolver.check(uri)
    resolver.close()


@pytest.mark.parametrize(
    "uri",
    [
        None,
        7,
        ["s3://bucket/x"],
        "s3://" + "x" * 3000,
        "",
        "s3://key:secret@bucket/x",
        "https://user:secret@host/x",
        "https://host@evil.com/x",
        "s3://bucket/../x",
        "s3://bucket/a\0b",
        "gopher://host/x",
        "http://[::1",
    ],
)
def test_malformed_uri_is_a_bad_request(uri):
    resolver = References(["s3://bucket", "https://host"])
    with pytest.raises(BadRequest) as caught:
        resolver.check(uri)
    assert "secret" not in str(caught.value)
    resolver.close()


@pytest.mark.parametrize("prefix", ["/data", "file:///data", "s3://", "https://host/a/../b", "nonsense://x"])
def test_invalid_prefix_raises_settings_error(prefix):
    with pytest.raises(SettingsError, match="prefix"):
        References([prefix])


# --- buckets and containers ---


def test_frame_is_read_from_allowed_buckets_only(bucket):
    write_bytes(f"s3://{bucket}/000008.bin", b"frame")
    assert fetch([f"s3://{bucket}"], f"s3://{bucket}/000008.bin") == b"frame"
    with pytest.raises(ReferenceRefused):
        fetch(["s3://another"], f"s3://{bucket}/000008.bin")


@pytest.mark.parametrize("key", ["none.bin", "folder/", ""])
def test_missing_object_raises_reference_not_found(bucket, key):
    with pytest.raises(ReferenceNotFound):
        fetch([f"s3://{bucket}"], f"s3://{bucket}/{key}")


def test_oversized_frame_is_rejected_before_reading(bucket, proxy):
    write_bytes(f"s3://{bucket}/large.bin", bytes(10_000))
    proxy.seen.clear()
    with pytest.raises(FrameTooLarge, match="9999"):
        fetch([f"s3://{bucket}"], f"s3://{bucket}/large.bin", ReferenceLimits(max_bytes=9999))
    assert [method for method, _, _ in proxy.seen] == ["HEAD"]
    assert (
        len(fetch([f"s3://{bucket}"], f"s3://{bucket}/large.bin", ReferenceLimits(max_bytes=10_000)))
        == 10_000
    )


def test_slow_bucket_exceeds_the_deadline_without_blocking_others(bucket, proxy):
    write_bytes(f"s3://{bucket}/slow.bin", bytes(100_000))
    write_bytes(f"s3://{bucket}/fast.bin", b"fast")
    proxy.spoil = lambda method, path, headers: "stall" if method == "GET" and "slow" in path else None

    async def both():
        async with References([f"s3://{bucket}"], ReferenceLimits(timeout_s=2)) as resolver:
            names = ("slow", "fast")
            return await asyncio.gather(
                *(resolver.fetch(f"s3://{bucket}/{name}.bin") for name in names), return_exceptions=True
            )

    slow, fast = asyncio.run(both())
    assert isinstance(slow, DeadlineExceeded) and fast == b"fast"
    proxy.released.set()


@pytest.mark.parametrize("fault", [500, 403])
def test_failing_or_denying_store_raises_not_ready(bucket, proxy, fault):
    write_bytes(f"s3://{bucket}/x.bin", b"x")
    proxy.spoil = lambda method, path, headers: fault
    with pytest.raises(NotReady) as caught:
        fetch([f"s3://{bucket}"], f"s3://{bucket}/x.bin")
    assert not isinstance(caught.value, ClientError)
    proxy.spoil = lambda method, path, headers: None


@pytest.mark.skipif(bool(ENDPOINT), reason="a server of one's own knows its credentials from elsewhere")
def test_missing_credentials_raise_not_ready(s3_endpoint, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    with pytest.raises(NotReady, match="permission"):
        fetch(["s3://bucket"], "s3://bucket/x.bin")


def test_references_read_packed_files_and_databases(tmp_path):
    (tmp_path / "in/velodyne").mkdir(parents=True)
    (tmp_path / "in/velodyne/8.bin").write_bytes(b"packed")
    pack_folder(tmp_path / "in", tmp_path / "p.ffr")
    with lmdb.open(str(tmp_path / "f.lmdb")) as database, database.begin(write=True) as transaction:
        transaction.put(b"8.bin", b"value")
    for uri, body in (
        (f"ffrecord://{tmp_path}/p.ffr#velodyne/8.bin", b"packed"),
        (f"lmdb://{tmp_path}/f.lmdb#8.bin", b"value"),
    ):
        assert fetch([uri.partition("#")[0]], uri) == body
        with pytest.raises(ReferenceNotFound):
            fetch([uri.partition("#")[0]], uri.replace("8.bin", "9.bin"))
        with pytest.raises(FrameTooLarge):
            fetch([uri.partition("#")[0]], uri, ReferenceLimits(max_bytes=4))


# --- web addresses ---


def redirecting(target: str, status: int = 302):
    def answer(handler):
        handler.send_response(status)
        handler.send_header("Location", target)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return answer


def test_web_frame_is_read_through_redirects(site):
    site.files["frames/8.bin"] = b"frame"
    site.answers["frames/moved"] = redirecting("/frames/8.bin")
    site.answers["frames/twice"] = redirecting(site.url("frames/moved"), 307)
    for name in ("8.bin", "moved", "twice"):
        assert fetch([site.url("frames/")], site.url(f"frames/{name}")) == b"frame"
    with pytest.raises(ReferenceNotFound):
        fetch([site.url("frames/")], site.url("frames/none"))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_private_networks_are_rejected_without_connecting(site, host):
    site.files["8.bin"] = b"frame"
    with pytest.raises(ReferenceRefused, match="private"):
        fetch([site.url("", host)], site.url("8.bin", host), ReferenceLimits())
    assert site.seen == []


def test_redirect_outside_the_prefixes_is_rejected(site):
    site.files["secret/x"] = b"secret"
    site.answers["frames/out"] = redirecting(site.url("secret/x"))
    site.answers["frames/file"] = redirecting("file:///etc/passwd")
    site.answers["frames/loop"] = redirecting(site.url("frames/loop"))
    for name in ("out", "file"):
        with pytest.raises(ReferenceRefused, match="redirects"):
            fetch([site.url("frames/")], site.url(f"frames/{name}"))
    with pytest.raises(ReferenceRefused, match="3"):
        fetch([site.url("frames/")], site.url("frames/loop"))


def test_redirect_to_a_private_network_is_rejected(site, monkeypatch):
    """The second host is allowed by name and resolves to loopback; the check is made for every hop."""
    site.files["frames/8.bin"] = b"private"
    site.answers["frames/out"] = redirecting(site.url("frames/8.bin", "localhost"))
    resolved = []

    def public_unless_localhost(address: str) -> bool:
        resolved.append(address)
        return len(resolved) == 1  # the first hop counts as public: nothing public can be reached from a test

    monkeypatch.setattr(references, "is_public", public_unless_localhost)
    allowed = [site.url("frames/"), site.url("frames/", "localhost")]
    with pytest.raises(ReferenceRefused, match="private"):
        fetch(allowed, site.url("frames/out"), ReferenceLimits())
    assert len(resolved) >= 2 and len(site.seen) == 1


def test_connection_uses_the_checked_address(site, monkeypatch):
    """A name that resolves differently the second time (DNS rebinding) is resolved only once."""
    site.files["8.bin"] = b"frame"
    answers = ["127.0.0.1", "192.0.2.1"]
    asked = []

    async def rebinding(self, host, port, **_):
        asked.append(host)
        return [(0, 0, 0, "", (answers[len(asked) - 1], port))]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", rebinding)
    assert fetch([site.url("", "rebinding.example")], site.url("8.bin", "rebinding.example")) == b"frame"
    assert asked[0] == "rebinding.example" and asked.count("rebinding.example") == 1
    assert site.seen == [("GET", f"rebinding.example:{site.port}")]


def test_body_over_the_limit_is_rejected_with_or_without_length(site):
    sent = []

    def endless(handler):
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        while True:
            handler.wfile.write(b"10000\r\n" + bytes(0x10000) + b"\r\n")
            sent.append(0x10000)

    site.answers["endless"] = endless
    site.files["large"] = bytes(100_001)
    for name in ("endless", "large"):
        with pytest.raises(FrameTooLarge):
            fetch([site.url("")], site.url(name), ReferenceLimits(max_bytes=100_000, private_hosts=True))
    assert sum(sent) < 50 << 20


def test_silent_or_interrupted_web_server_raises(site, free_ports):
    gate = threading.Event()

    def stall(handler):
        gate.wait(30)
        handler.close_connection = True

    def cut(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", "100")
        handler.end_headers()
        handler.wfile.write(b"half")
        handler.close_connection = True

    site.answers["stall"], site.answers["cut"] = stall, cut
    site.answers["500"] = lambda handler: handler.send_error(500)
    site.answers["zip"] = lambda handler: (
        handler.send_response(200), handler.send_header("Content-Encoding", "gzip"), handler.end_headers(),
        setattr(handler, "close_connection", True),
    )  # fmt: skip
    with pytest.raises(DeadlineExceeded):
        fetch([site.url("")], site.url("stall"), ReferenceLimits(timeout_s=0.3, private_hosts=True))
    gate.set()
    for name in ("cut", "500", "zip"):
        with pytest.raises(NotReady, match="try again"):
            fetch([site.url("")], site.url(name))
    nowhere = f"http://127.0.0.1:{free_ports(1)[0]}"
    with pytest.raises(NotReady, match="try again"):
        fetch([nowhere], f"{nowhere}/x")


def test_tls_uses_the_host_name_for_sni_and_certificate():
    """What the server is asked for is what its certificate is checked against."""
    asked = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.sni_callback = lambda connection, name, _: asked.append(name)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def greet() -> None:
            connection, _ = server.accept()
            # There is no certificate to show; the greeting has been read by then.
            with connection, contextlib.suppress(ssl.SSLError, ConnectionError):
                context.wrap_socket(connection, server_side=True)

        thread = threading.Thread(target=greet)
        thread.start()
        place = f"https://localhost:{server.getsockname()[1]}"
        with pytest.raises(NotReady):
            fetch([place], f"{place}/x")
        thread.join()
    assert asked == ["localhost"]


def test_connections_to_buckets_are_reused(bucket):
    write_bytes(f"s3://{bucket}/x.bin", b"x")
    before = len(s3._CONNECTED)
    for _ in range(3):
        fetch([f"s3://{bucket}"], f"s3://{bucket}/x.bin")
    assert len(s3._CONNECTED) == before + 1
