"""Storage of configs, checkpoints and frames: disks, web servers, buckets, LMDB and FFRecord files.

    read_bytes(uri)                     all bytes
    local_path(uri, cache, sha256=…)    path of the file, or of a checked copy in the cache
    write_bytes(uri, data)              create or replace
    upload(path, uri)                   the same from a file
    exists(uri), list_files(uri)

`serve.storage.uri` defines the URIs, `serve.storage.backends` registers the same backends with mmengine. Importing
this package imports no client library.
"""

from __future__ import annotations

from serve.storage.access import exists, list_files, local_path, read_bytes, upload, write_bytes
from serve.storage.cache import Cache
from serve.storage.uri import Location, is_remote, map_path, parse

__all__ = [
    "Cache",
    "Location",
    "exists",
    "is_remote",
    "list_files",
    "local_path",
    "map_path",
    "parse",
    "read_bytes",
    "upload",
    "write_bytes",
]
