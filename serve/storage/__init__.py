"""Where configs, checkpoints and frames live: disks, web servers, buckets, LMDB and FFRecord files.

    read_bytes(uri)                 all bytes
    local_path(uri, sha256=…)       the path of the file, or of a checked copy in the cache
    write_bytes(uri, data)          make or replace it
    upload(path, uri)               the same from a file
    exists(uri), list_files(uri)

Addresses are `serve.storage.uri`'s. mmengine's own functions learn the same backends from
`serve.storage.backends`. Knows nothing about models, requests or servers; importing it imports no client library.
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
