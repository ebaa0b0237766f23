"""Find models by name: zoo index, aliases, former names, sources of configs."""

from serve.zoo.index import (
    PACKAGES,
    Zoo,
    ZooEntry,
    detect_package,
    installed_roots,
    list_models,
    require_weights_url,
    resolve,
)

__all__ = [
    "PACKAGES",
    "Zoo",
    "ZooEntry",
    "detect_package",
    "installed_roots",
    "list_models",
    "require_weights_url",
    "resolve",
]
