"""Find a model by its name: zoo index, aliases, former names, where configs come from."""

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
