"""Objects in S3 and compatible stores (Ceph's radosgw, MinIO), through boto3.

boto3's managed transfers read and write: large objects in parallel ranges, every range but the first bound to the
object's ETag, so that an object that changes meanwhile raises an error instead of being mixed. Requests are retried
with backoff (botocore's standard mode). Uploaded objects carry their sha256 as metadata, which downloads check.

Credentials and endpoints come from boto3's usual sources (``aws configure``, the environment, the machine's role) and
from petrel's configuration (`serve.storage.clusters`), never from a URI. All exceptions of botocore are mapped here,
without their text.
"""

from __future__ import annotations

import contextlib
import email.utils
import hashlib
import io
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from serve.errors import AccessDenied, ObjectNotFound, StorageError, UriError
from serve.storage.clusters import find_cluster
from serve.storage.hashes import sha256_of
from serve.storage.uri import Location
from serve.storage.view_reader import ViewReader

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

__all__ = ["S3", "ListEntry", "ObjectInfo", "Options", "connect"]

_PART_BYTES = 8 << 20
_PAGE_KEYS = 1000  # the most that S3 lists at once
_SHOW_PROGRESS_FROM = 32 << 20
_HASH = "sha256"
_DENIED = frozenset(
    {"AccessDenied", "AllAccessDisabled", "403", "Forbidden", "InvalidAccessKeyId", "SignatureDoesNotMatch"}
)
_EXPIRED = frozenset({"ExpiredToken", "InvalidToken", "TokenRefreshRequired", "RequestTimeTooSkewed"})
_UNMET = frozenset({"PreconditionFailed", "412", "ConditionalRequestConflict", "409"})
_NO_CONDITIONS = frozenset({"NotImplemented", "501"})
_MISSING = frozenset({"NoSuchKey", "404", "NotFound", "NoSuchVersion"})


@dataclass(frozen=True)
class Options:
    """Timeouts and retries.

    Attributes:
        connect_timeout_s: seconds to wait for a connection.
        read_timeout_s: seconds without a byte after which an attempt fails.
        attempts: attempts per request, the first included; the same number again for every range whose body is
            interrupted or does not start in time.
        parallel: ranges in parallel.
    """

    connect_timeout_s: float = 10.0
    read_timeout_s: float = 20.0
    attempts: int = 3
    parallel: int = 10


@dataclass(frozen=True)
class ObjectInfo:
    """Size in bytes, ETag (as quoted by the server) and, if recorded, sha256 of an object.

    `age_s` is the time since it was written, by the server's clock; None if the server does not say.
    """

    size: int
    etag: str
    sha256: str | None
    age_s: float | None = None


@dataclass(frozen=True)
class ListEntry:
    """Entry of a listing: name relative to the listed folder, whether it is a folder, size in bytes."""

    name: str
    is_folder: bool
    size: int = 0


class S3:
    """One cluster. Thread-safe; a forked process opens its own connection (see `connect`)."""

    def __init__(self, cluster: str = "", conf: Path | None = None, options: Options | None = None) -> None:
        """Create the client without sending anything.

        Raises:
            StorageError: the cluster is not configured.
        """
        import boto3
        from boto3.s3.transfer import TransferConfig, create_transfer_manager
        from botocore.config import Config

        self.options = options or _DEFAULT
        known = find_cluster(cluster, conf)
        config = Config(
            connect_timeout=self.options.connect_timeout_s,
            read_timeout=self.options.read_timeout_s,
            retries={"mode": "standard", "total_max_attempts": self.options.attempts},
            max_pool_connections=self.options.parallel + 2,
            # Many S3-compatible servers do not support trailing checksums.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            user_agent_extra="mmdet3d-serve",
            # Self-hosted servers rarely have a DNS name per bucket.
            s3={"addressing_style": "path"} if known.endpoint else None,
        )
        with _map_errors(Location("s3", "", "", cluster)):
            self.client: S3Client = boto3.session.Session().client(
                "s3",
                endpoint_url=known.endpoint,
                aws_access_key_id=known.access_key,
                aws_secret_access_key=known.secret_key,
                config=config,
            )
        transfer = TransferConfig(
            multipart_threshold=_PART_BYTES,
            multipart_chunksize=_PART_BYTES,
            max_concurrency=self.options.parallel,
            num_download_attempts=self.options.attempts,
            # Larger chunks than boto3's default are written faster; the queue is bounded for slow disks.
            io_chunksize=1 << 20,
            max_io_queue=64,
        )
        self._transfers = create_transfer_manager(self.client, transfer)

    @property
    def endpoint(self) -> str:
        """URL of the server."""
        return self.client.meta.endpoint_url

    def read(self, where: Location, *, info: ObjectInfo | None = None) -> bytes:
        """Read a whole object; with `info` from `head`, exactly that version of it.

        Raises:
            ObjectNotFound: no such object or bucket.
            AccessDenied: credentials are missing or insufficient.
            StorageError: unreachable, interrupted too often, or changed meanwhile.
        """
        buffer = io.BytesIO()
        self.download(where, buffer, info=info, progress=False)
        return buffer.getvalue()

    def download(
        self, where: Location, file: IO[bytes], *, info: ObjectInfo | None = None, progress: bool = True
    ) -> None:
        """Write the object into a seekable file.

        Args:
            where: the object.
            file: open for writing, empty.
            info: from `head`; the download fails if the object has changed since.
            progress: show a progress bar on standard error for large objects if that is a terminal.

        Raises:
            StorageError: as `read`; the content of `file` is then undefined.
        """
        _require_key(where)
        subscribers: list[Any] = [_bind_version(info)] if info else []
        with _map_errors(where), _progress_bar(where, info.size if info and progress else 0) as on_progress:
            future = self._transfers.download(
                where.bucket, where.path, file, subscribers=[*subscribers, on_progress]
            )
            future.result()
        if info and (got := file.seek(0, os.SEEK_END)) != info.size:
            raise StorageError(f"{where} has {info.size} bytes, received {got}; try again")

    def head(self, where: Location) -> ObjectInfo:
        """Read size, ETag and hash of an object.

        Raises:
            ObjectNotFound: no such object or bucket.
            StorageError: as `read`.
        """
        _require_key(where)
        with _map_errors(where):
            found = self.client.head_object(Bucket=where.bucket, Key=where.path)
        sha256 = found.get("Metadata", {}).get(_HASH)
        return ObjectInfo(found["ContentLength"], found.get("ETag", ""), sha256, _age(found))

    def is_file(self, where: Location) -> bool:
        """Whether the object exists; raises `AccessDenied` if that may not be known."""
        if not where.path or where.path.endswith("/"):
            return False
        try:
            self.head(where)
        except ObjectNotFound:
            return False
        return True

    def is_folder(self, where: Location) -> bool:
        """Whether any object has this prefix (for a bare bucket: whether it exists)."""
        prefix = _as_folder(where.path)
        try:
            with _map_errors(where):
                found = self.client.list_objects_v2(Bucket=where.bucket, Prefix=prefix, MaxKeys=1)
        except ObjectNotFound:
            return False
        return bool(found.get("KeyCount")) or not prefix

    def list(self, where: Location, *, recursive: bool = False) -> Iterator[ListEntry]:
        """List a bucket or prefix by name; a folder comes before its first object.

        Raises:
            ObjectNotFound: no such bucket. A prefix without objects yields nothing.
        """
        prefix = _as_folder(where.path)
        seen: set[str] = set()
        arguments: dict[str, Any] = {} if recursive else {"Delimiter": "/"}
        pages = self.client.get_paginator("list_objects_v2").paginate(
            Bucket=where.bucket, Prefix=prefix, **arguments
        )
        with _map_errors(where):
            for page in pages:
                for common in page.get("CommonPrefixes", ()):
                    yield ListEntry(common["Prefix"][len(prefix) :].rstrip("/"), True)
                for entry in page.get("Contents", ()):
                    name = entry["Key"][len(prefix) :]
                    for folder in _folders_of(name):
                        if folder not in seen:
                            seen.add(folder)
                            yield ListEntry(folder, True)
                    if name and not name.endswith("/"):
                        yield ListEntry(name, False, entry["Size"])

    def keys(self, where: Location, *, after: str = "") -> Iterator[str]:
        """Names of the objects below a bucket or prefix, in the server's order, at any depth; no page is kept.

        Args:
            where: the bucket or prefix.
            after: the name that the first one comes after.

        Raises:
            ObjectNotFound: no such bucket. A prefix without objects yields nothing.
        """
        prefix = _as_folder(where.path)
        start: dict[str, Any] = {"StartAfter": prefix + after} if after else {}
        pages = self.client.get_paginator("list_objects_v2").paginate(
            Bucket=where.bucket, Prefix=prefix, PaginationConfig={"PageSize": _PAGE_KEYS}, **start
        )
        with _map_errors(where):
            for page in pages:
                for entry in page.get("Contents", ()):
                    if not entry["Key"].endswith("/"):
                        yield entry["Key"][len(prefix) :]

    def write(self, where: Location, data: bytes | bytearray | memoryview) -> None:
        """Create or replace an object, atomically; the data must not change meanwhile.

        Raises:
            StorageError: as `read`.
        """
        _require_key(where)
        self._upload(where, cast(IO[bytes], ViewReader(data)), hashlib.sha256(data).hexdigest(), 0)

    def write_if(self, where: Location, data: bytes, etag: str) -> str | None:
        """Create a small object, or replace the version of it that has an ETag; returns the ETag that it has now.

        A server that knows no conditional writes replaces whatever is there.

        Args:
            where: the object.
            data: its content.
            etag: of the version that is replaced; empty to create the object.

        Returns:
            None if the object exists, or is not that version.

        Raises:
            StorageError: as `read`.
        """
        _require_key(where)
        put = partial(self.client.put_object, Bucket=where.bucket, Key=where.path, Body=data)
        with _map_errors(where):
            try:
                return (put(IfMatch=etag) if etag else put(IfNoneMatch="*"))["ETag"]
            except self.client.exceptions.ClientError as error:
                code = str(error.response.get("Error", {}).get("Code", ""))
                if code in _UNMET or (etag and code in _MISSING):
                    return None
                if code not in _NO_CONDITIONS:
                    raise
            return put()["ETag"]

    def upload(self, path: Path, where: Location, *, progress: bool = True) -> str:
        """Create or replace an object from a file, large ones in parallel parts; returns its sha256.

        Raises:
            StorageError: as `read`, or the file cannot be read.
        """
        _require_key(where)
        try:
            sha256, size = sha256_of(path), path.stat().st_size
        except OSError as error:
            raise StorageError(f"{path} cannot be read: {error.strerror}") from error
        self._upload(where, str(path), sha256, size if progress else 0)
        return sha256

    def _upload(self, where: Location, source: str | IO[bytes], sha256: str, size: int) -> None:
        with _map_errors(where), _progress_bar(where, size) as on_progress:
            self._transfers.upload(
                source,
                where.bucket,
                where.path,
                extra_args={"Metadata": {_HASH: sha256}},
                subscribers=[on_progress],
            ).result()

    def remove(self, where: Location) -> None:
        """Remove an object; a missing object is not an error, as in S3."""
        _require_key(where)
        with _map_errors(where):
            self.client.delete_object(Bucket=where.bucket, Key=where.path)


_DEFAULT = Options()
_CONNECTED: dict[tuple[Any, ...], S3] = {}
_CONNECTING = threading.Lock()


def connect(cluster: str = "", conf: Path | None = None, options: Options | None = None) -> S3:
    """Return the `S3` of a cluster, created once per process."""
    key = (os.getpid(), cluster, conf, options)
    with _CONNECTING:
        if key not in _CONNECTED:
            _CONNECTED[key] = S3(cluster, conf, options)
        return _CONNECTED[key]


def _age(answer: Any) -> float | None:
    try:
        now = email.utils.parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
        return float((now - answer["LastModified"]).total_seconds())
    except (KeyError, TypeError, ValueError):
        return None


def _require_key(where: Location) -> None:
    if not where.path or where.path.endswith("/"):
        raise UriError(f"{where} is a bucket or folder, not an object; write s3://bucket/key")


def _as_folder(key: str) -> str:
    return f"{key.rstrip('/')}/" if key.strip("/") else ""


def _folders_of(name: str) -> Iterator[str]:
    parts = name.split("/")[:-1]
    for depth in range(1, len(parts) + 1):
        yield "/".join(parts[:depth])


def _bind_version(info: ObjectInfo) -> Any:
    """Bind a download to a version of the object: s3transfer sends If-Match with every range."""
    from s3transfer.subscribers import BaseSubscriber

    class Version(BaseSubscriber):
        def on_queued(self, future: Any, **_: Any) -> None:
            future.meta.provide_transfer_size(info.size)
            future.meta.provide_object_etag(info.etag)

    return Version()


@contextlib.contextmanager
def _progress_bar(where: Location, size: int) -> Iterator[Any]:
    """Yield a subscriber for s3transfer that shows a progress bar for large sizes (bytes)."""
    from s3transfer.subscribers import BaseSubscriber
    from tqdm import tqdm

    bar: tqdm[Any] = tqdm(
        total=size or None,
        unit="B",
        unit_scale=True,
        desc=where.name,
        leave=False,
        disable=None if size >= _SHOW_PROGRESS_FROM else True,
    )

    class Progress(BaseSubscriber):
        def on_progress(self, future: Any, bytes_transferred: int, **_: Any) -> None:
            bar.update(bytes_transferred)

    with bar:
        yield Progress()


@contextlib.contextmanager
def _map_errors(where: Location) -> Iterator[None]:
    """Map exceptions of botocore, boto3 and s3transfer inside the ``with`` block to `serve.errors`."""
    from boto3.exceptions import Boto3Error
    from botocore import exceptions as its
    from s3transfer.exceptions import RetriesExceededError, S3DownloadFailedError

    try:
        yield
    except its.ClientError as error:
        raise _map_client_error(error, where) from error
    except (its.NoCredentialsError, its.PartialCredentialsError, its.CredentialRetrievalError) as error:
        raise AccessDenied(
            f"no credentials for {where}; run `aws configure`, set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or give the machine a role"
        ) from error
    except (its.ProfileNotFound, its.ConfigParseError) as error:
        raise AccessDenied(
            f"the AWS configuration cannot be used for {where} ({type(error).__name__})"
        ) from error
    except (its.ParamValidationError, its.InvalidEndpointDiscoveryConfigurationError) as error:
        raise UriError(f"{where} is not a valid S3 URI") from error
    except S3DownloadFailedError as error:
        raise StorageError(f"{where} changed while it was read; try again") from error
    except RetriesExceededError as error:
        reason = type(error.last_exception).__name__
        raise StorageError(f"{where} was interrupted repeatedly ({reason}); try again later") from error
    except (its.EndpointConnectionError, its.ConnectTimeoutError, its.ProxyConnectionError) as error:
        raise StorageError(
            f"the server of {where} cannot be reached; check the endpoint (AWS_ENDPOINT_URL, petreloss.conf)"
        ) from error
    except (its.ReadTimeoutError, its.HTTPClientError) as error:
        raise StorageError(f"the server of {where} stopped responding ({type(error).__name__})") from error
    except (its.BotoCoreError, Boto3Error) as error:
        raise StorageError(f"{where} failed ({type(error).__name__})") from error


def _map_client_error(error: Any, where: Location) -> StorageError:
    """Map an error response of the server."""
    code = str(error.response.get("Error", {}).get("Code", ""))
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if code == "NoSuchBucket":
        return ObjectNotFound(f"bucket {where.bucket} does not exist; check the name and the endpoint")
    if code in _MISSING:
        return ObjectNotFound(f"{where} does not exist; list the bucket to see its objects")
    if code in _EXPIRED:
        return AccessDenied(f"the credentials for {where} have expired ({code}); renew them")
    if code in _DENIED or status in (401, 403):
        return AccessDenied(
            f"the credentials do not permit access to {where} ({code}); ask for access or use others"
        )
    if code in ("PreconditionFailed", "412"):
        return StorageError(f"{where} changed while it was read; try again")
    return StorageError(f"{where} failed with {code or 'an error'} (HTTP {status}); try again later")
