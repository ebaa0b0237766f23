"""Read endpoints and keys of clusters from a petrel configuration (``~/petreloss.conf``).

The configuration is an INI file with a section per cluster; `DEFAULT` may name the ``default_cluster``. The keys
``endpoint_url`` or ``host_base`` (host and port, with or without http://) and ``access_key`` with ``secret_key`` are
read; all others belong to the closed SDK. Missing keys fall back to the usual AWS configuration.
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
    """Endpoint and keys of a cluster; the keys are hidden in the ``repr``."""

    endpoint: str | None = None
    access_key: str | None = field(default=None, repr=False)
    secret_key: str | None = field(default=None, repr=False)


def find_cluster(name: str, conf: Path | None = None) -> Cluster:
    """Find a cluster by name, "" for the default one; empty without a configuration file.

    Args:
        name: prefix of ``:s3://``.
        conf: the configuration, which must exist; ``~/petreloss.conf``, if it exists, when None.

    Raises:
        StorageError: the file cannot be read, or has no such cluster.
        AccessDenied: one of the two keys is missing.
    """
    path = (conf or PETREL_CONF).expanduser()
    if not path.is_file():
        if name or conf is not None:
            missing = f"cluster '{name}'" if name else "the petrel configuration"
            raise StorageError(f"{missing} not found: {path} does not exist")
        return Cluster()
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    try:
        parser.read_string(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, configparser.Error) as error:
        # The error's text may quote a line that contains a key.
        raise StorageError(
            f"{path} is not a readable petrel configuration ({type(error).__name__})"
        ) from None
    name = name or parser.defaults().get("default_cluster", "")
    if not name:
        return Cluster()
    if not parser.has_section(name):
        known = ", ".join(parser.sections()) or "none"
        raise StorageError(f"cluster '{name}' not found in {path}; available: {known}")
    section = parser[name]
    endpoint = section.get("endpoint_url") or section.get("host_base") or None
    if endpoint and "://" not in endpoint:
        endpoint = f"http://{endpoint}"
    if endpoint and "@" in endpoint:
        raise StorageError(f"the endpoint of cluster '{name}' in {path} contains a user name; remove it")
    access_key, secret_key = section.get("access_key") or None, section.get("secret_key") or None
    if (access_key is None) != (secret_key is None):
        raise AccessDenied(f"cluster '{name}' in {path} needs both access_key and secret_key, or neither")
    return Cluster(endpoint, access_key, secret_key)
