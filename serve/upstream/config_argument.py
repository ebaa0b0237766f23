"""Configs as upstream's programs get them: names of the zoo, former names and paths, URIs, configs of 2.x and 0.x."""

from __future__ import annotations

import pprint
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from serve import zoo
from serve.upstream.legacy_data import is_legacy_file, modernize_whole
from serve.zoo.config_source import local_config

__all__ = ["config_file"]


@contextmanager
def config_file(named: str, *, training: bool = False) -> Iterator[str]:
    """Yield the path of a config that upstream's programs can read.

    Args:
        named: name of the zoo, path of a config, or URI. A config of mmdet 2.x or mmdet3d 0.x is converted into a
            temporary file of the same name; what was converted is printed.
        training: convert the training of an old config too.

    Raises:
        ModelLookupError: neither a file nor a name of the zoo.
        ArchiveError: an old config that cannot be converted.
    """
    with local_config(named) as local:
        path = Path(local).expanduser()
        if not path.is_file():
            entry = zoo.resolve(local)
            path = entry.config_path
            print(f"note: {named} is {entry.package}'s {entry.name}", file=sys.stderr)
        if path.suffix != ".py" or not is_legacy_file(path):
            yield str(path)
            return
        converted, notes = modernize_whole(path, training=training)
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
        with tempfile.TemporaryDirectory(prefix="mmdet3d-serve-config-") as folder:
            copy = Path(folder, path.name)
            copy.write_text(_as_python(converted), encoding="utf-8")
            yield str(copy)


def _as_python(config: Mapping[str, Any]) -> str:
    return "".join(f"{name} = {pprint.pformat(value, sort_dicts=False)}\n" for name, value in config.items())
