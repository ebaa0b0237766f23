"""Clusters of a petrel configuration (``~/petreloss.conf``): their endpoints and keys.

The file is an INI file with a section per cluster; `DEFAULT` may name the ``default_cluster``. Of a section
are read ``endpoint_url`` or ``host_base`` (host and port, with or without http://) and ``access_key`` with
``secret_key``; everything else is for the closed SDK. Keys that are not there are left to the usual AWS places.

Does not talk to anybody.
"""

from __future__ import annotations

import configparser
from dataclasses import dataclass, field
from pathlib import Path

from serve.errors import AccessDenied, StorageError

__all__ = ["PETREL_CONF", "Cluster", "find_cluster"]

PETREL_CONF = Path("~/petreloss.conf")


@dataclass(frozen=True)
class Cluster:
    """Where a cluster is and who we are there; the keys never show in a ``repr``."""

    endpoint: str | None = None
    access_key: str | None = field(default=None, repr=False)
    secret_key: str | None = field(default=None, repr=False)


def find_cluster(name: str, conf: Path | None = None) -> Cluster:
    """The cluster of that name, or for "" the default one; AWS's own settings alone where no file names any.

    Args:
        name: as written in front of ``:s3://``.
        conf: the configuration, ``~/petreloss.conf`` when None. One that is named must be there.

    Raises:
        StorageError: the file cannot be read, or names no such cluster.
        AccessDenied: one of the two keys is missing.
    """
    path = (conf or PETREL_CONF).expanduser()
    if not path.is_file():
        if name or conf is not None:
            wanted = f"cluster '{name}'" if name else "the petrel configuration"
            raise StorageError(f"there is no {path}, which should describe {wanted}")
        return Cluster()
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    try:
        parser.read_string(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, configparser.Error) as error:
        # Not the error's own text: it may quote a line with a key in it.
        raise StorageError(f"{path} is no readable petrel configuration ({type(error).__name__})") from None
    name = name or parser.defaults().get("default_cluster", "")
    if not name:
        return Cluster()
    if not parser.has_section(name):
        known = ", ".join(parser.sections()) or "none"
        raise StorageError(f"{path} describes no cluster '{name}'; it knows {known}")
    section = parser[name]
    endpoint = section.get("endpoint_url") or section.get("host_base") or None
    if endpoint and "://" not in endpoint:
        endpoint = f"http://{endpoint}"
    if endpoint and "@" in endpoint:
        raise StorageError(f"the endpoint of cluster '{name}' in {path} must not hold a user name")
    access_key, secret_key = section.get("access_key") or None, section.get("secret_key") or None
    if (access_key is None) != (secret_key is None):
        raise AccessDenied(f"cluster '{name}' in {path} needs both access_key and secret_key, or neither")
    return Cluster(endpoint, access_key, secret_key)
