"""Find a model by its name: zoo index, aliases, former names, where configs come from."""

from serve.zoo.index import (
    PACKAGES,
    Zoo,
    ZooEntry,
    installed_roots,
    list_models,
    package_of_config,
    resolve,
    weights_of,
)

__all__ = [
    "PACKAGES",
    "Zoo",
    "ZooEntry",
    "installed_roots",
    "list_models",
    "package_of_config",
    "resolve",
    "weights_of",
]
