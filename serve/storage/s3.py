"""Objects in S3 and what speaks its protocol (Ceph's radosgw, MinIO), through boto3.

Reading and writing are boto3's own managed transfers: large objects in parallel ranges, every range but the
first bound to the object's ETag, so that an object that changes meanwhile is an error and never a mixture.
Requests are retried with growing pauses (botocore's standard mode). What we write carries its sha256 as
metadata, and whoever reads it through a cache or to a file is held to it.

Credentials and endpoints come from where boto3 looks for them (``aws configure``, the environment, the
machine's role) and from petrel's configuration (`serve.storage.clusters`), never from an address. This is the
one seam to botocore: its exceptions end here, and none of their text is passed on.

Does not know the cache, mmengine or other kinds of storage.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from serve.errors import AccessDenied, ObjectNotFound, StorageError, UriError
from serve.storage.clusters import find_cluster
from serve.storage.download import sha256_of
from serve.storage.uri import Location

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

__all__ = ["S3", "ListEntry", "ObjectInfo", "Options", "connect"]

_PART_BYTES = 8 << 20
_SHOW_PROGRESS_FROM = 32 << 20
_HASH = "sha256"
_DENIED = frozenset(
    {"AccessDenied", "AllAccessDisabled", "403", "Forbidden", "InvalidAccessKeyId", "SignatureDoesNotMatch"}
)
_EXPIRED = frozenset({"ExpiredToken", "InvalidToken", "TokenRefreshRequired", "RequestTimeTooSkewed"})
_MISSING = frozenset({"NoSuchKey", "404", "NotFound", "NoSuchVersion"})


@dataclass(frozen=True)
class Options:
    """How patient to be.

    Attributes:
        connect_timeout_s: seconds to wait for a connection.
        read_timeout_s: seconds without a byte after which an attempt is given up.
        attempts: of every request, the first one included; and again of every range whose body breaks off or
            does not begin in time.
        parallel: ranges at once.
    """

    connect_timeout_s: float = 10.0
    read_timeout_s: float = 20.0
    attempts: int = 3
    parallel: int = 10


@dataclass(frozen=True)
class ObjectInfo:
    """What a bucket says of an object: bytes, ETag (as quoted by the server), and the sha256 if we wrote it."""

    size: int
    etag: str
    sha256: str | None


@dataclass(frozen=True)
class ListEntry:
    """One line of a listing: the name below the folder listed, whether it is a folder, and bytes."""

    name: str
    is_folder: bool
    size: int = 0


class S3:
    """One cluster. Safe for several threads; a forked process connects anew (see `connect`)."""

    def __init__(self, cluster: str = "", conf: Path | None = None, options: Options | None = None) -> None:
        """Prepare; nothing is sent yet.

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
            # Trailing checksums are newer than many servers that speak S3.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            user_agent_extra="mmdet3d-serve",
            # Servers of one's own rarely have a DNS name per bucket.
            s3={"addressing_style": "path"} if known.endpoint else None,
        )
        with _told(Location("s3", "", "", cluster)):
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
            # Larger pieces than boto3's own are written faster; fewer of them may wait for a slow disk.
            io_chunksize=1 << 20,
            max_io_queue=64,
        )
        self._transfers = create_transfer_manager(self.client, transfer)

    @property
    def endpoint(self) -> str:
        """The address requests go to."""
        return self.client.meta.endpoint_url

    # --- reading ---

    def read(self, where: Location, *, info: ObjectInfo | None = None) -> bytes:
        """The whole object; with `info` from `head`, that version of it or an error.

        Raises:
            ObjectNotFound: no such object or bucket.
            AccessDenied: no credentials, or they do not allow it.
            StorageError: unreachable, broken off too often, or changed meanwhile.
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
            info: from `head`; the download then fails when the object is another one by now.
            progress: show a bar on standard error where that is a terminal and the object is large.

        Raises:
            StorageError: as `read`; what `file` holds then is of no use.
        """
        _require_key(where)
        subscribers: list[Any] = [_known(info)] if info else []
        with _told(where), _bar(where, info.size if info and progress else 0) as on_progress:
            future = self._transfers.download(
                where.bucket, where.path, file, subscribers=[*subscribers, on_progress]
            )
            future.result()
        if info and (got := file.seek(0, os.SEEK_END)) != info.size:
            raise StorageError(f"{got} bytes of {where} arrived where {info.size} were announced; try again")

    def head(self, where: Location) -> ObjectInfo:
        """Size, ETag and hash of an object.

        Raises:
            ObjectNotFound: no such object or bucket.
            StorageError: as `read`.
        """
        _require_key(where)
        with _told(where):
            found = self.client.head_object(Bucket=where.bucket, Key=where.path)
        return ObjectInfo(found["ContentLength"], found.get("ETag", ""), found.get("Metadata", {}).get(_HASH))

    def is_file(self, where: Location) -> bool:
        """Whether there is such an object. Not allowed to look is an error, not a no."""
        if not where.path or where.path.endswith("/"):
            return False
        try:
            self.head(where)
        except ObjectNotFound:
            return False
        return True

    def is_folder(self, where: Location) -> bool:
        """Whether any object lies below this prefix (for a bare bucket: whether it is there)."""
        prefix = _as_folder(where.path)
        try:
            with _told(where):
                found = self.client.list_objects_v2(Bucket=where.bucket, Prefix=prefix, MaxKeys=1)
        except ObjectNotFound:
            return False
        return bool(found.get("KeyCount")) or not prefix

    def list(self, where: Location, *, recursive: bool = False) -> Iterator[ListEntry]:
        """What lies in a bucket or below a prefix, by name; folders first seen where their first object is.

        Raises:
            ObjectNotFound: no such bucket. A prefix with nothing below it lists nothing.
        """
        prefix = _as_folder(where.path)
        seen: set[str] = set()
        arguments: dict[str, Any] = {} if recursive else {"Delimiter": "/"}
        pages = self.client.get_paginator("list_objects_v2").paginate(
            Bucket=where.bucket, Prefix=prefix, **arguments
        )
        with _told(where):
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

    # --- writing ---

    def write(self, where: Location, data: bytes) -> None:
        """Make (or replace) an object; readers see the old or the new one, never a part.

        Raises:
            StorageError: as `read`.
        """
        _require_key(where)
        self._upload(where, io.BytesIO(data), hashlib.sha256(data).hexdigest(), 0)

    def upload(self, path: Path, where: Location, *, progress: bool = True) -> str:
        """Make (or replace) an object from a file, large ones in parallel parts; returns its sha256.

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
        with _told(where), _bar(where, size) as on_progress:
            self._transfers.upload(
                source,
                where.bucket,
                where.path,
                extra_args={"Metadata": {_HASH: sha256}},
                subscribers=[on_progress],
            ).result()

    def remove(self, where: Location) -> None:
        """Remove an object; one that is not there is no error, as S3 has it."""
        _require_key(where)
        with _told(where):
            self.client.delete_object(Bucket=where.bucket, Key=where.path)


_DEFAULT = Options()
_CONNECTED: dict[tuple[Any, ...], S3] = {}
_CONNECTING = threading.Lock()


def connect(cluster: str = "", conf: Path | None = None, options: Options | None = None) -> S3:
    """The `S3` of a cluster, made once per process and kept."""
    key = (os.getpid(), cluster, conf, options)
    with _CONNECTING:
        if key not in _CONNECTED:
            _CONNECTED[key] = S3(cluster, conf, options)
        return _CONNECTED[key]


def _require_key(where: Location) -> None:
    if not where.path or where.path.endswith("/"):
        raise UriError(f"{where} is a bucket or folder, not an object; write s3://bucket/key")


def _as_folder(key: str) -> str:
    return f"{key.rstrip('/')}/" if key.strip("/") else ""


def _folders_of(name: str) -> Iterator[str]:
    parts = name.split("/")[:-1]
    for depth in range(1, len(parts) + 1):
        yield "/".join(parts[:depth])


def _known(info: ObjectInfo) -> Any:
    """Bind a download to the version that was looked at (s3transfer then sends If-Match with every range)."""
    from s3transfer.subscribers import BaseSubscriber

    class Known(BaseSubscriber):
        def on_queued(self, future: Any, **_: Any) -> None:
            future.meta.provide_transfer_size(info.size)
            future.meta.provide_object_etag(info.etag)

    return Known()


@contextlib.contextmanager
def _bar(where: Location, size: int) -> Iterator[Any]:
    """Something that s3transfer tells of progress; shows a bar when `size` is worth one."""
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
def _told(where: Location) -> Iterator[None]:
    """Turn what botocore, boto3 and s3transfer raise into sentences of ours."""
    from boto3.exceptions import Boto3Error
    from botocore import exceptions as its
    from s3transfer.exceptions import RetriesExceededError, S3DownloadFailedError

    try:
        yield
    except its.ClientError as error:
        raise _answered(error, where) from error
    except (its.NoCredentialsError, its.PartialCredentialsError, its.CredentialRetrievalError) as error:
        raise AccessDenied(
            f"there are no credentials for {where}; run `aws configure`, set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or give the machine a role"
        ) from error
    except (its.ProfileNotFound, its.ConfigParseError) as error:
        raise AccessDenied(
            f"the AWS configuration cannot be used for {where} ({type(error).__name__})"
        ) from error
    except (its.ParamValidationError, its.InvalidEndpointDiscoveryConfigurationError) as error:
        raise UriError(f"{where} is no address that S3 can take") from error
    except S3DownloadFailedError as error:
        raise StorageError(f"{where} was changed while it was read; try again") from error
    except RetriesExceededError as error:
        why = type(error.last_exception).__name__
        raise StorageError(f"{where} broke off again and again ({why}); try again later") from error
    except (its.EndpointConnectionError, its.ConnectTimeoutError, its.ProxyConnectionError) as error:
        raise StorageError(
            f"the server of {where} cannot be reached; check the endpoint (AWS_ENDPOINT_URL, petreloss.conf)"
        ) from error
    except (its.ReadTimeoutError, its.HTTPClientError) as error:
        raise StorageError(f"the server of {where} stopped answering ({type(error).__name__})") from error
    except (its.BotoCoreError, Boto3Error) as error:
        raise StorageError(f"{where} failed ({type(error).__name__})") from error


def _answered(error: Any, where: Location) -> StorageError:
    """The sentence for an error the server answered with."""
    code = str(error.response.get("Error", {}).get("Code", ""))
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if code == "NoSuchBucket":
        return ObjectNotFound(f"there is no bucket {where.bucket}; check the name and the endpoint")
    if code in _MISSING:
        return ObjectNotFound(f"there is no {where}; list the bucket to see what is there")
    if code in _EXPIRED:
        return AccessDenied(f"the credentials for {where} have expired ({code}); renew them")
    if code in _DENIED or status in (401, 403):
        return AccessDenied(f"these credentials do not allow {where} ({code}); ask for access or use others")
    if code in ("PreconditionFailed", "412"):
        return StorageError(f"{where} was changed while it was read; try again")
    return StorageError(
        f"the server answered {code or 'an error'} (HTTP {status}) for {where}; try again later"
    )
