"""URIs: parse and check paths and URIs, reject secrets in them, redact them for messages.

    data/000008.bin, /data/000008.bin, file:///data/000008.bin     a local file
    https://host/path                                              a web URL
    s3://bucket/key, cluster:s3://bucket/key                       an object; petrel:// and ceph:// mean the same
    lmdb:///data/frames.lmdb#key                                   a value of an LMDB database
    ffrecord:///data/packed.ffr#velodyne/000008.bin                a file packed into an FFRecord file

Keys of buckets and names after ``#`` are literal (no %-escapes), as with the AWS command line and mmengine.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit, urlunsplit

from serve.errors import UriError

__all__ = ["Location", "Scheme", "is_remote", "map_path", "parse", "redact_url"]

Scheme = Literal["file", "http", "s3", "lmdb", "ffrecord"]

_OBJECT = re.compile(r"(?:([A-Za-z0-9][A-Za-z0-9._-]*):)?(?:s3|petrel|ceph)://(.*)", re.DOTALL)
# Wider than Amazon's rule: Ceph and old buckets have capitals and underscores.
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_NO_SECRETS = (
    "the URI contains a user name or password; remove it and use `aws configure`, the environment or the machine's "
    "role"
)


@dataclass(frozen=True)
class Location:
    """Parsed URI.

    Attributes:
        scheme: ``file``, ``http`` (https too), ``s3``, ``lmdb`` or ``ffrecord``.
        path: a file's path, a whole web URL, or an object's key (empty for the bucket itself).
        bucket: bucket of an object; empty for other schemes.
        cluster: petrel's name of the cluster in front of ``:s3://``; empty for the default one.
        member: LMDB key or packed name after ``#``; empty for the container itself.
    """

    scheme: Scheme
    path: str
    bucket: str = ""
    cluster: str = ""
    member: str = ""

    def __str__(self) -> str:
        """URI for messages: query strings of web URLs are redacted."""
        if self.scheme == "file":
            return self.path
        if self.scheme == "http":
            return redact_url(self.path)
        if self.scheme == "s3":
            cluster = f"{self.cluster}:" if self.cluster else ""
            return f"{cluster}s3://{self.bucket}/{self.path}"
        member = f"#{self.member}" if self.member else ""
        return f"{self.scheme}://{self.path}{member}"

    @property
    def name(self) -> str:
        """Last part of the path, the file name of a local copy (empty for a bucket or folder)."""
        whole = urlsplit(self.path).path if self.scheme == "http" else self.member or self.path
        return unquote(whole).rsplit("/", 1)[-1] if self.scheme == "http" else whole.rsplit("/", 1)[-1]

    def join(self, name: str) -> Location:
        """Object or file of that name below this bucket, folder of a bucket, or local folder."""
        path = f"{self.path.rstrip('/')}/{name}" if self.path else name
        return Location(self.scheme, path, self.bucket, self.cluster)


def is_remote(uri: str | Path) -> bool:
    """Whether this is a URI (``…://``) rather than a plain path."""
    return isinstance(uri, str) and "://" in uri


def parse(uri: str | Path) -> Location:
    """Parse a URI or path.

    Raises:
        UriError: unsupported, incomplete, or with a user name or password (which the message does not repeat).
    """
    text = str(uri)
    if not text or any(ord(letter) < 32 or ord(letter) == 127 for letter in text):
        raise UriError("the URI is empty or contains control characters")
    if not is_remote(text):
        return Location("file", text)
    if found := _OBJECT.fullmatch(text):
        return _parse_object(found.group(1) or "", found.group(2))
    scheme = match.group(1).lower() if (match := _SCHEME.match(text)) else ""
    rest = text.partition("://")[2]
    if scheme in ("http", "https"):
        return _parse_web(text)
    if scheme == "file":
        host, slash, path = rest.partition("/")
        if host not in ("", "localhost") or not slash:
            raise UriError("the file URI names a host; write file:///data/000008.bin, with three slashes")
        return Location("file", "/" + unquote(path))
    if scheme in ("lmdb", "ffrecord"):
        path, _, member = rest.partition("#")
        if not path:
            raise UriError(f"{scheme}:// names no file; write {scheme}:///path/of/file#name")
        return Location("lmdb" if scheme == "lmdb" else "ffrecord", path, member=member)
    raise UriError(
        f"scheme '{scheme or 'unknown'}' is not supported; use file, http, https, s3, lmdb or ffrecord"
    )


def _parse_object(cluster: str, rest: str) -> Location:
    bucket, _, key = rest.partition("/")
    if "@" in bucket or ":" in bucket:
        raise UriError(_NO_SECRETS)
    if not _BUCKET.fullmatch(bucket) or ".." in bucket:
        raise UriError(f"'{bucket}' is not a bucket name; write s3://bucket/key")
    if any(part in (".", "..") for part in key.split("/")):
        raise UriError("the key contains '.' or '..' as a folder; write the key as it is listed")
    return Location("s3", key, bucket, cluster)


def _parse_web(text: str) -> Location:
    try:
        parts = urlsplit(text)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise UriError("the web URL is malformed; write https://host/path") from None
    if "@" in parts.netloc:
        raise UriError(_NO_SECRETS)
    if not host:
        raise UriError("the web URL names no host; write https://host/path")
    return Location("http", text)


def map_path(path: str | Path, mapping: Mapping[str, str] | None) -> str:
    """Replace the longest prefix of `path` that is a key of `mapping` (mmengine's ``path_mapping``).

    The comparison is literal except for a leading ``./``, which is ignored. Backslashes become slashes, since
    Windows joins paths with them.
    """
    text = str(path).replace("\\", "/")
    bare = _strip_dot(text)
    best = max(
        (prefix for prefix in mapping or {} if bare.startswith(_strip_dot(prefix))), key=len, default=None
    )
    if best is None or mapping is None:
        return text
    return mapping[best] + bare[len(_strip_dot(best)) :]


def _strip_dot(path: str) -> str:
    while path.startswith("./"):
        path = path[2:].lstrip("/")
    return path


def redact_url(url: str) -> str:
    """URL without user name, password, query and fragment, for messages and logs."""
    parts = urlsplit(url)
    host = parts.netloc.rsplit("@", 1)[-1]
    return urlunsplit((parts.scheme, host, parts.path, "…" if parts.query else "", ""))
