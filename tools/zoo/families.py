"""List the families of the installed model zoos, one per folder of configs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from serve import zoo

__all__ = ["Family", "families"]


@dataclass(frozen=True)
class Family:
    """One folder of configs.

    Attributes:
        package: ``mmdet`` or ``mmdet3d``.
        name: of the folder.
        configs: its configs by name; empty where the wheel has none.
    """

    package: str
    name: str
    configs: tuple[Path, ...]

    @property
    def key(self) -> str:
        """Package and name, as in ``mmdet/atss``."""
        return f"{self.package}/{self.name}"


def families(roots: Mapping[str, Path] | None = None) -> list[Family]:
    """List all families, mmdet3d's first, each package's by name.

    Args:
        roots: package name → its ``.mim`` folder; None for the installed packages.
    """
    found = []
    for package, root in (zoo.installed_roots() if roots is None else roots).items():
        for folder in sorted((root / "configs").iterdir()):
            if folder.is_dir() and not folder.name.startswith(("_", ".")):
                configs = tuple(path for path in sorted(folder.glob("*.py")) if not path.stem.startswith("_"))
                found.append(Family(package, folder.name, configs))
    return found
