"""Folders packed into one FFRecord file, as ``ffrecord.pack_folder`` and ``PackedFolder`` have them.

All files are samples, depth first, children by name; one more sample at the end is the table of contents: the
nine bytes ``piouhjgbr`` and a pickle of nested ``OrderedDict``, name → index of the sample for a file and
name → table for a folder. That pickle is read with nothing allowed but ``OrderedDict``, str and int.

Does not know where packed files come from or what is in them.
"""

from __future__ import annotations

import io
import os
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from serve.errors import ObjectNotFound, StorageError
from serve.storage.ffrecord import Reader, Writer

__all__ = ["MAGIC", "PackedFolder", "pack_folder"]

MAGIC = b"piouhjgbr"
_DEEPEST = 200
_MOST_FOLDERS = 1_000_000


class PackedFolder:
    """A packed folder, looked at like a folder. Paths are relative to it; ``""`` and ``.`` are the folder itself."""

    def __init__(self, files: str | Path | Sequence[str | Path], *, check: bool = True) -> None:
        """Open a packed folder; arguments and errors as `serve.storage.ffrecord.Reader`."""
        self._reader = Reader(files, check=check)
        self._contents: OrderedDict[str, Any] = _contents(self._reader)

    def __len__(self) -> int:
        """Number of files."""
        return len(self._reader) - 1

    def read(self, name: str | Path) -> memoryview:
        """The content of a file.

        Raises:
            ObjectNotFound: no such file.
            StorageError: it is a folder, or damaged.
        """
        return self._reader.read(self._index(name))

    def read_batch(self, names: Sequence[str | Path]) -> list[memoryview]:
        """The contents of several files, in the order asked for; errors as `read`."""
        return self._reader.read_batch([self._index(name) for name in names])

    def exists(self, name: str | Path) -> bool:
        """Whether there is a file or folder of that name."""
        return self._find(name) is not None

    def is_file(self, name: str | Path) -> bool:
        """Whether there is a file of that name."""
        return isinstance(self._find(name), int)

    def is_dir(self, name: str | Path) -> bool:
        """Whether there is a folder of that name."""
        return isinstance(self._find(name), OrderedDict)

    def list(
        self,
        name: str | Path = "",
        *,
        list_file: bool = True,
        list_dir: bool = True,
        recursive: bool = False,
    ) -> list[str]:
        """Names below a folder, relative to it, a folder before what is in it.

        Raises:
            ObjectNotFound: no such folder.
        """
        found = self._find(name)
        if not isinstance(found, OrderedDict):
            what = "a file, not a folder" if isinstance(found, int) else "not there"
            raise ObjectNotFound(f"{name} is {what} in {self._reader.paths[0].name}")
        return [
            path
            for path, is_file in _walk(found, recursive)
            if (is_file and list_file) or (not is_file and list_dir)
        ]

    def close(self) -> None:
        """Let go of the files."""
        self._reader.close()

    def _index(self, name: str | Path) -> int:
        found = self._find(name)
        if not isinstance(found, int):
            what = "has no file" if found is None else "has a folder, not a file, of the name"
            raise ObjectNotFound(f"{self._reader.paths[0].name} {what} {name}")
        return found

    def _find(self, name: str | Path) -> Any:
        found: Any = self._contents
        for part in PurePosixPath(name).parts:
            found = found.get(part) if isinstance(found, OrderedDict) else None
            if found is None:
                return None
        return found


def _walk(contents: OrderedDict[str, Any], recursive: bool) -> Iterator[tuple[str, bool]]:
    for name, child in contents.items():
        yield name, isinstance(child, int)
        if recursive and isinstance(child, OrderedDict):
            for below, is_file in _walk(child, recursive):
                yield f"{name}/{below}", is_file


class _OnlyTables(pickle.Unpickler):
    """Refuses every class but ``OrderedDict``; str, int and dict need no class."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        raise StorageError(f"the table of contents asks for {module}.{name}; it is no packed folder of files")


def _contents(reader: Reader) -> OrderedDict[str, Any]:
    path = reader.paths[-1]
    last = reader.read(len(reader) - 1) if len(reader) else memoryview(b"")
    if bytes(last[: len(MAGIC)]) != MAGIC:
        raise StorageError(f"{path} holds samples, but is no packed folder; pack it with pack_folder")
    try:
        contents = _OnlyTables(io.BytesIO(last[len(MAGIC) :])).load()
        count = _checked(contents, len(reader) - 1, 0, [len(reader) + _MOST_FOLDERS])
    except StorageError as error:
        raise StorageError(f"{path}: {error}") from None
    except Exception as error:  # a damaged pickle raises nearly anything
        raise StorageError(f"{path} has a damaged table of contents ({type(error).__name__})") from error
    if count != len(reader) - 1:
        raise StorageError(f"{path} lists {count} files and holds {len(reader) - 1}; pack it again")
    return contents  # type: ignore[no-any-return]


def _checked(contents: Any, files: int, depth: int, left: list[int]) -> int:
    """The number of files in a table, which must be names → indices or further tables and nothing else.

    `left` counts down over all tables: a pickle may hold one table in a great many places.
    """
    left[0] -= len(contents) if type(contents) is OrderedDict else 0
    if type(contents) is not OrderedDict or depth > _DEEPEST or left[0] < 0:
        raise StorageError("the table of contents is no table of names")
    count = 0
    for name, child in contents.items():
        if type(name) is not str:
            raise StorageError("the table of contents has a name that is no text")
        if type(child) is int:
            if not 0 <= child < files:
                raise StorageError(f"the table of contents gives {name} the place {child} of {files}")
            count += 1
        else:
            count += _checked(child, files, depth + 1, left)
    return count


def pack_folder(
    folder: str | Path, out: str | Path, *, progress: Callable[[int, int], None] | None = None
) -> int:
    """Pack a folder with everything below it into one file, a piece at a time; returns the number of files.

    Links are followed. `out` appears when it is whole; an error or Ctrl-C leaves nothing.

    Args:
        folder: what to pack.
        out: the file to make (``.ffr``); must not lie inside `folder`.
        progress: told (files packed, files in all) after each file.

    Raises:
        StorageError: not a folder, a loop of links, something that is no file, or the disk refuses.
    """
    root, out = Path(folder), Path(out)
    if not root.is_dir():
        raise ObjectNotFound(f"there is no folder {root}")
    if out.resolve().is_relative_to(root.resolve()):
        raise StorageError(f"{out} lies inside {root}; pack to another place")
    contents: OrderedDict[str, Any] = OrderedDict()
    paths: list[str] = []
    _gather(root, "", contents, paths, {root.resolve()})
    with Writer(out, len(paths) + 1) as writer:
        for done, name in enumerate(paths, 1):
            try:
                with open(os.path.join(root, name), "rb", buffering=0) as file:
                    writer.add_file(file)
            except StorageError:
                raise
            except OSError as error:
                raise StorageError(f"{root / name} cannot be packed: {error.strerror}") from error
            if progress is not None:
                progress(done, len(paths))
        writer.add(MAGIC + pickle.dumps(contents, protocol=4))
    return len(paths)


def _gather(
    root: Path, below: str, contents: OrderedDict[str, Any], paths: list[str], above: set[Path]
) -> None:
    """Fill the table of one folder and the list of files, children by name."""
    if below.count("/") >= _DEEPEST:
        raise StorageError(f"{root / below} is nested too deep to pack")
    try:
        children = sorted(os.scandir(root / below), key=lambda child: child.name)
    except OSError as error:
        raise StorageError(f"{root / below} cannot be listed: {error.strerror}") from error
    for child in children:
        name = f"{below}{child.name}"
        if child.is_dir():
            real = Path(child.path).resolve()
            if real in above:
                raise StorageError(f"{root / name} links back to a folder that it is in")
            contents[child.name] = OrderedDict()
            _gather(root, f"{name}/", contents[child.name], paths, above | {real})
        elif child.is_file():
            contents[child.name] = len(paths)
            paths.append(name)
        else:
            raise StorageError(f"{root / name} is neither a file nor a folder; remove it or pack without it")
