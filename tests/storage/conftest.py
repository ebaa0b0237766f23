"""An S3 server with a fresh bucket per test, nobody's credentials, and a cache of its own.

``MMDET3D_SERVE_TEST_S3_ENDPOINT`` names another server to test against (Ceph's radosgw, MinIO); the credentials
are then those of the environment, and they must allow to make buckets.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve.storage import Cache, s3
from tests.storage import servers

# Taken out at once: our commands refuse settings that they do not know.
ENDPOINT = os.environ.pop("MMDET3D_SERVE_TEST_S3_ENDPOINT", None)


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    if ENDPOINT:
        yield ENDPOINT
        return
    with servers.moto() as endpoint:
        yield endpoint


@pytest.fixture(autouse=True)
def nobody(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """No configuration of the machine, no connection of an earlier test, a cache that is thrown away."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("MMDET3D_SERVE_CACHE_DIR", str(home / "cache"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in list(os.environ):
        if name.startswith("AWS_") and name != "AWS_EC2_METADATA_DISABLED" and not ENDPOINT:
            monkeypatch.delenv(name)
    s3._CONNECTED.clear()
    yield home
    s3._CONNECTED.clear()


@pytest.fixture
def account(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Credentials and endpoint in the environment, as `aws configure` would have them; gives the endpoint."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    if not ENDPOINT:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAOFTHETESTS")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret-of-the-tests")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    return s3_endpoint


@pytest.fixture
def bucket(account: str) -> Iterator[str]:
    """The name of a fresh bucket."""
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    yield from made_bucket(name)


def made_bucket(name: str) -> Iterator[str]:
    client = s3.connect().client
    client.create_bucket(Bucket=name)
    yield name
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=name):
        for entry in page.get("Contents", ()):
            client.delete_object(Bucket=name, Key=entry["Key"])
    client.delete_bucket(Bucket=name)


@pytest.fixture
def cache(nobody: Path) -> Cache:
    return Cache(nobody / "own-cache", 1 << 30)


@pytest.fixture
def proxy(account: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[servers.Proxy]:
    """Everything this test sends to S3 passes through here; patience is short."""
    with servers.proxy_to(account) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        monkeypatch.setattr(s3, "_DEFAULT", s3.Options(connect_timeout_s=2, read_timeout_s=0.5, attempts=2))
        s3._CONNECTED.clear()
        yield proxy


@pytest.fixture
def site() -> Iterator[servers.Web]:
    with servers.web() as site:
        yield site
