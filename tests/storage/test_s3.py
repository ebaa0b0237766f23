"""Objects over the real protocol: there and back, listed, and everything that a network can do to them."""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
from pathlib import Path

import pytest

from serve import storage
from serve.errors import AccessDenied, ObjectNotFound, StorageError, UriError
from serve.storage import Cache, s3
from tests.storage.conftest import ENDPOINT

LARGE = os.urandom(20 << 20)  # three ranges


@pytest.mark.parametrize("body", [b"", b"x", LARGE], ids=["empty", "small", "large"])
def test_object_round_trips(bucket, tmp_path, cache, body):
    uri = f"s3://{bucket}/some folder/ä#?%2F.bin"
    storage.write_bytes(uri, body)
    assert storage.read_bytes(uri) == body
    copy = storage.local_path(uri, cache=cache)
    assert copy.read_bytes() == body and copy.name == "ä#?%2F.bin"
    assert storage.local_path(uri, cache=cache) == copy
    (tmp_path / "up").write_bytes(body)
    storage.upload(tmp_path / "up", f"s3://{bucket}/up")
    assert storage.read_bytes(f"s3://{bucket}/up") == body


def test_list_and_exists_agree_with_the_bucket(bucket):
    for name in ("a/1.bin", "a/2.bin", "a/deep/3.bin", "b.txt"):
        storage.write_bytes(f"s3://{bucket}/{name}", name.encode())
    assert storage.exists(f"s3://{bucket}/a/1.bin") and storage.exists(f"s3://{bucket}/a")
    assert storage.exists(f"s3://{bucket}") and storage.exists(f"s3://{bucket}/a/deep/")
    assert not storage.exists(f"s3://{bucket}/a/1") and not storage.exists(f"s3://{bucket}-none/a")
    assert storage.list_files(f"s3://{bucket}/a/", (".bin",)) == [f"s3://{bucket}/a/{n}.bin" for n in (1, 2)]
    store = s3.connect()
    flat = [(one.name, one.is_folder) for one in store.list(storage.parse(f"s3://{bucket}"))]
    assert sorted(flat) == [("a", True), ("b.txt", False)]
    deep = {one.name: one.is_folder for one in store.list(storage.parse(f"s3://{bucket}"), recursive=True)}
    assert deep == {
        "a": True, "a/1.bin": False, "a/2.bin": False, "a/deep": True, "a/deep/3.bin": False, "b.txt": False,
    }  # fmt: skip
    store.remove(storage.parse(f"s3://{bucket}/b.txt"))
    assert not storage.exists(f"s3://{bucket}/b.txt")


def test_changed_object_gets_a_new_cache_entry(bucket, cache):
    uri = f"s3://{bucket}/x.bin"
    storage.write_bytes(uri, b"old")
    old = storage.local_path(uri, cache=cache)
    storage.write_bytes(uri, b"new")
    new = storage.local_path(uri, cache=cache)
    assert (old.read_bytes(), new.read_bytes()) == (b"old", b"new")


def test_uploaded_object_is_checked_against_its_hash(bucket, cache, tmp_path):
    uri = f"s3://{bucket}/x.bin"
    client = s3.connect().client
    client.put_object(Bucket=bucket, Key="x.bin", Body=b"altered", Metadata={"sha256": "0" * 64})
    with pytest.raises(StorageError, match="sha256"):
        storage.local_path(uri, cache=cache)
    storage.write_bytes(uri, b"right")
    with pytest.raises(StorageError, match="abcd"):
        storage.local_path(uri, sha256="abcd", cache=cache)
    assert not [p for p in cache.folder.rglob("*") if p.is_file()]
    assert storage.local_path(uri, sha256=s3.connect().head(storage.parse(uri)).sha256, cache=cache).is_file()


@pytest.mark.parametrize(
    ("call", "kind", "says"),
    [
        (lambda b: storage.read_bytes(f"s3://{b}/none"), ObjectNotFound, "/none"),
        (lambda b: storage.local_path(f"s3://{b}/none", Cache(Path("unused"), 0)), ObjectNotFound, "/none"),
        (lambda b: storage.read_bytes(f"s3://{b}-none/x"), ObjectNotFound, "bucket-.*-none"),
        (lambda b: storage.write_bytes(f"s3://{b}-none/x", b""), ObjectNotFound, "bucket-.*-none"),
        (lambda b: storage.list_files(f"s3://{b}-none"), ObjectNotFound, "bucket-.*-none"),
        (lambda b: storage.read_bytes(f"s3://{b}/folder/"), UriError, "not an object"),
        (lambda b: storage.read_bytes(f"s3://{b}"), UriError, "not an object"),
        (lambda b: storage.upload(Path("none"), f"s3://{b}/x"), StorageError, "cannot be read"),
        (
            lambda b: storage.read_bytes(f"nowhere:s3://{b}/x"),
            StorageError,
            r"'nowhere'.*petreloss\.conf",
        ),
    ],
)
def test_missing_objects_and_buckets_raise(bucket, call, kind, says):
    with pytest.raises(kind, match=says):
        call(bucket)


@pytest.mark.skipif(bool(ENDPOINT), reason="a server of one's own knows its credentials from elsewhere")
def test_missing_credentials_raise_access_denied(s3_endpoint, monkeypatch, cache):
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    for call in (storage.read_bytes, lambda uri: storage.local_path(uri, cache), storage.exists):
        with pytest.raises(AccessDenied, match="aws configure"):
            call("s3://bucket/x")
    with pytest.raises(AccessDenied, match="aws configure"):
        storage.write_bytes("s3://bucket/x", b"")


def test_missing_profile_raises_access_denied(account, monkeypatch):
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(AccessDenied):
        storage.read_bytes("s3://bucket/x")


@pytest.mark.skipif(bool(ENDPOINT), reason="writes keys of its own")
def test_aws_configure_credentials_are_used(bucket, account, nobody, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name)
    (nobody / ".aws").mkdir()
    (nobody / ".aws/credentials").write_text(
        "[default]\naws_access_key_id = AK\naws_secret_access_key = SK\n"
    )
    (nobody / ".aws/config").write_text(f"[default]\nregion = us-east-1\nendpoint_url = {account}\n")
    s3._CONNECTED.clear()
    storage.write_bytes(f"s3://{bucket}/x", b"1")
    assert storage.read_bytes(f"s3://{bucket}/x") == b"1"


# --- petrel's clusters ---


@pytest.fixture
def petrel(nobody, account, bucket, monkeypatch):
    """Clusters in ~/petreloss.conf, and nothing in the environment; the default one is not there to be reached."""
    text = (
        "# petrel\n[DEFAULT]\nenable_mc = False\ndefault_cluster = near\n"
        f"[near]\nboto = True\naccess_key = AKIANEAR\nsecret_key = petrel%secret\n"
        f"host_base = {account.split('//')[1]}\n"
        f"[far]\naccess_key = AKIAFAR\nsecret_key = far-secret\nendpoint_url = {account}\n"
        "[half]\naccess_key = AKIAHALF\n"
    )
    (nobody / "petreloss.conf").write_text(text)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    s3._CONNECTED.clear()
    yield bucket
    monkeypatch.undo()


@pytest.mark.skipif(bool(ENDPOINT), reason="writes keys of its own")
def test_petrel_clusters_are_found_by_name_and_default(petrel):
    storage.write_bytes(f"far:s3://{petrel}/x", b"from afar")
    assert storage.read_bytes(f"s3://{petrel}/x") == b"from afar"
    assert storage.read_bytes(f"near:petrel://{petrel}/x") == b"from afar"
    with pytest.raises(StorageError, match=r"'gone'.*near, far, half"):
        storage.read_bytes(f"gone:s3://{petrel}/x")
    with pytest.raises(AccessDenied, match="secret_key"):
        storage.read_bytes(f"half:s3://{petrel}/x")
    s3.connect("near").remove(storage.parse(f"s3://{petrel}/x"))


@pytest.mark.parametrize("text", ["no section = secret-key", "[a]\nsecret-key without equals", "\xff\xfe"])
def test_unreadable_petrel_file_raises_without_quoting_it(nobody, text):
    (nobody / "petreloss.conf").write_bytes(text.encode("latin-1"))
    with pytest.raises(StorageError) as caught:
        storage.read_bytes("s3://bucket/x")
    assert "secret-key" not in str(caught.value)


def test_keys_appear_in_no_log_and_no_error(bucket, proxy, caplog, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-very-secret-key")
    caplog.set_level(logging.DEBUG, logger="serve")
    storage.write_bytes(f"s3://{bucket}/x", b"1")
    proxy.spoil = lambda method, path, headers: 403
    with pytest.raises(StorageError) as caught:
        storage.read_bytes(f"s3://{bucket}/x")
    told = caplog.text + str(caught.value) + repr(s3.connect())
    assert "a-very-secret-key" not in told and "Signature" not in told
    proxy.spoil = lambda method, path, headers: None


# --- faults ---


def leftovers(cache: Cache) -> list[str]:
    return [path.name for path in cache.folder.rglob("*") if path.is_file()]


def test_interrupted_range_is_retried(bucket, proxy, cache):
    storage.write_bytes(f"s3://{bucket}/x", LARGE)
    broken = []

    def once(method, path, headers):
        if method == "GET" and headers.get("range") not in [None, *broken] and len(broken) < 2:
            broken.append(headers["range"])
            return "truncate"
        return None

    proxy.spoil = once
    assert storage.local_path(f"s3://{bucket}/x", cache=cache).read_bytes() == LARGE
    assert len(broken) == 2


def test_server_error_500_is_retried(bucket, proxy):
    storage.write_bytes(f"s3://{bucket}/x", b"1")
    answers = [500, None]
    proxy.spoil = lambda method, path, headers: answers.pop(0) if answers else None
    assert storage.read_bytes(f"s3://{bucket}/x") == b"1"


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (500, "HTTP 500"),
        (503, "HTTP 503"),
        (403, "403"),
        ("truncate", "IncompleteRead"),
        ("stall", "Timeout"),
        ("garble", "sha256"),
    ],
)
def test_persistent_fault_raises_and_leaves_no_file(bucket, proxy, cache, fault, says):
    storage.write_bytes(f"s3://{bucket}/x", LARGE)
    proxy.spoil = lambda method, path, headers: fault if method == "GET" else None
    with pytest.raises(StorageError, match=says):
        storage.local_path(f"s3://{bucket}/x", cache=cache)
    assert leftovers(cache) == []
    proxy.spoil = lambda method, path, headers: None
    proxy.released.set()
    assert storage.local_path(f"s3://{bucket}/x", cache=cache).read_bytes() == LARGE


@pytest.mark.parametrize("cached", [False, True])
def test_object_changed_between_ranges_raises(bucket, proxy, account, cache, cached):
    uri = f"s3://{bucket}/x"
    storage.write_bytes(uri, LARGE)
    beside = s3.connect().client  # made before the proxy learns to interfere
    changed = threading.Event()

    def change(method, path, headers):
        if method == "GET" and not changed.is_set() and not headers.get("range", "").startswith("bytes=0-"):
            changed.set()
            beside.put_object(Bucket=bucket, Key="x", Body=bytes(len(LARGE)))
        return None

    proxy.spoil = change
    with pytest.raises(StorageError, match="changed"):
        _ = storage.local_path(uri, cache) if cached else storage.read_bytes(uri)
    assert changed.is_set()


def test_object_changed_after_head_is_not_cached(bucket, proxy, cache):
    uri = f"s3://{bucket}/x"
    storage.write_bytes(uri, b"old")
    beside = s3.connect().client
    once = [True]

    def change(method, path, headers):
        if method == "GET" and once:
            once.clear()
            beside.put_object(Bucket=bucket, Key="x", Body=b"new")
        return None

    proxy.spoil = change
    with pytest.raises(StorageError, match="changed"):
        storage.local_path(uri, cache=cache)
    assert leftovers(cache) == []
    assert storage.local_path(uri, cache=cache).read_bytes() == b"new"


def test_rejected_upload_keeps_the_old_object(bucket, proxy, tmp_path):
    uri = f"s3://{bucket}/x"
    storage.write_bytes(uri, b"old")
    proxy.spoil = lambda method, path, headers: 500 if method in ("PUT", "POST") else None
    (tmp_path / "up").write_bytes(LARGE)
    with pytest.raises(StorageError, match="HTTP"):
        storage.upload(tmp_path / "up", uri)
    with pytest.raises(StorageError, match="HTTP"):
        storage.write_bytes(uri, b"new")
    proxy.spoil = lambda method, path, headers: None
    assert storage.read_bytes(uri) == b"old"


def test_unreachable_server_raises_storage_error(account, free_ports, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_ports(1)[0]}")
    monkeypatch.setattr(s3, "_DEFAULT", s3.Options(attempts=1))
    with pytest.raises(StorageError):
        storage.read_bytes("s3://bucket/x")


def _read(uri: str, into: multiprocessing.Queue) -> None:
    into.put(storage.read_bytes(uri))


def test_forked_process_opens_its_own_connection(bucket):
    uri = f"s3://{bucket}/x"
    storage.write_bytes(uri, b"1")
    answers = multiprocessing.get_context("fork").Queue()
    child = multiprocessing.get_context("fork").Process(target=_read, args=(uri, answers))
    child.start()
    assert answers.get(timeout=60) == storage.read_bytes(uri) == b"1"
    child.join()
    answers.close()
    answers.join_thread()
