"""Folders packed into one FFRecord file, in the format of ``ffrecord.pack_folder`` and ``PackedFolder``.

All files are samples, depth first, children by name. A last sample is the table of contents: the nine bytes
``piouhjgbr`` and a pickle of nested ``OrderedDict``, name → index of the sample for a file and name → table for a
folder. Before it is unpickled its opcodes are counted: a pickle can ask for many times its own size in memory, by an
opcode per empty list or by one large number of a memo entry. The unpickler allows ``OrderedDict``, str and int only.
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
_MAX_DEPTH = 200
_MAX_FOLDERS = 1_000_000


class PackedFolder:
    """Packed folder; paths are relative to it, ``""`` and ``.`` are the folder itself."""

    def __init__(self, files: str | Path | Sequence[str | Path], *, check: bool = True) -> None:
        """Open a packed folder; arguments and errors as `serve.storage.ffrecord.Reader`."""
        self._reader = Reader(files, check=check)
        self._contents: OrderedDict[str, Any] = _read_contents(self._reader)

    def __len__(self) -> int:
        """Count the files."""
        return len(self._reader) - 1

    def read(self, name: str | Path) -> memoryview:
        """Read a file.

        Raises:
            ObjectNotFound: no such file, or a folder.
            StorageError: the file is damaged.
        """
        return self._reader.read(self._index(name))

    def read_batch(self, names: Sequence[str | Path]) -> list[memoryview]:
        """Read several files, in the given order; errors as `read`."""
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
        """List the names below a folder, relative to it, each folder before its content.

        Raises:
            ObjectNotFound: no such folder.
        """
        found = self._find(name)
        if not isinstance(found, OrderedDict):
            hint = ", only a file of that name" if isinstance(found, int) else ""
            raise ObjectNotFound(f"folder '{name}' not found in {self._reader.paths[0].name}{hint}")
        return [
            path
            for path, is_file in _walk(found, recursive)
            if (is_file and list_file) or (not is_file and list_dir)
        ]

    def close(self) -> None:
        """Close the files."""
        self._reader.close()

    def _index(self, name: str | Path) -> int:
        found = self._find(name)
        if not isinstance(found, int):
            hint = "" if found is None else ", only a folder of that name"
            raise ObjectNotFound(f"file '{name}' not found in {self._reader.paths[0].name}{hint}")
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
    """Unpickler that rejects every class but ``OrderedDict``; str, int and dict need no class."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        raise StorageError(f"the table of contents names {module}.{name}; it is not a packed folder")


# Opcodes of a table in any protocol, by what follows them (`pickletools.opcodes`): a number of bytes, lines of text, or
# a length of some bytes and as many bytes.
_FIXED = {
    **{pickle.PROTO[0]: 1, pickle.FRAME[0]: 8, pickle.BINPUT[0]: 1, pickle.LONG_BINPUT[0]: 4, pickle.MEMOIZE[0]: 0},
    **{pickle.BINGET[0]: 1, pickle.LONG_BINGET[0]: 4, pickle.BININT[0]: 4, pickle.BININT1[0]: 1, pickle.BININT2[0]: 2},
    **{pickle.MARK[0]: 0, pickle.TUPLE[0]: 0, pickle.EMPTY_TUPLE[0]: 0, pickle.REDUCE[0]: 0, pickle.SETITEM[0]: 0},
    **{pickle.SETITEMS[0]: 0, pickle.STACK_GLOBAL[0]: 0, pickle.STOP[0]: 0},
    **{pickle.TUPLE1[0]: 0, pickle.TUPLE2[0]: 0, pickle.TUPLE3[0]: 0},
}  # fmt: skip
_LINES = {
    **{pickle.GLOBAL[0]: 2, pickle.PUT[0]: 1, pickle.GET[0]: 1, pickle.UNICODE[0]: 1, pickle.INT[0]: 1},
    pickle.LONG[0]: 1,
}
_LENGTHS = {
    pickle.SHORT_BINUNICODE[0]: 1,
    pickle.BINUNICODE[0]: 4,
    pickle.BINUNICODE8[0]: 8,
    pickle.LONG1[0]: 1,
}
_TUPLES = frozenset({pickle.TUPLE1[0], pickle.TUPLE2[0], pickle.TUPLE3[0]})
_TEXTS = frozenset(
    {pickle.SHORT_BINUNICODE[0], pickle.BINUNICODE[0], pickle.BINUNICODE8[0], pickle.UNICODE[0]}
)
_PUTS = frozenset({pickle.PUT[0], pickle.BINPUT[0], pickle.LONG_BINPUT[0], pickle.MEMOIZE[0]})
_ENDS_OF_MARKS = frozenset({pickle.TUPLE[0], pickle.SETITEMS[0]})
# Texts, tuples and memo entries beside names and tables, such as "collections".
_BESIDE = 8


def _check_opcodes(data: bytes, files: int) -> None:
    """Check that a pickle makes no more objects than a table of `files` files needs; linear, without making any.

    Raises:
        StorageError: it does, or has an opcode that no table has.
        IndexError: it is cut.
    """
    at = marks = tables = texts = puts = tuples = 0
    reduce, mark, stop = pickle.REDUCE[0], pickle.MARK[0], pickle.STOP[0]
    while (opcode := data[at]) != stop:
        start = at + 1
        if (length := _FIXED.get(opcode)) is not None:
            at = start + length
        elif (length := _LENGTHS.get(opcode)) is not None:
            at = start + length + int.from_bytes(data[start : start + length], "little")
        elif (length := _LINES.get(opcode)) is not None:
            at = start
            for _ in range(length):
                at = data.index(b"\n", at) + 1
        else:
            raise StorageError(f"the table of contents is malformed (opcode {opcode:#04x}); pack it again")
        if opcode in _TEXTS:
            texts += 1
        elif opcode in _PUTS:
            if opcode != pickle.MEMOIZE[0]:
                entry = data[start:at]
                number = int(entry) if opcode == pickle.PUT[0] else int.from_bytes(entry, "little")
                if number > puts:  # the unpickler makes room for all numbers up to it
                    raise StorageError("the table of contents is malformed; pack it again")
            puts += 1
        elif opcode == reduce:
            tables += 1
        elif opcode in _TUPLES:
            tuples += 1
        elif opcode == mark:
            marks += 1
        elif opcode in _ENDS_OF_MARKS:
            marks -= 1
        if marks > 2 * _MAX_DEPTH + _BESIDE or tables > _MAX_FOLDERS or tuples > _BESIDE:
            raise StorageError("the table of contents is malformed; pack it again")
        if texts > files + tables + _BESIDE or puts > 2 * (texts + tables) + _BESIDE:
            raise StorageError("the table of contents is malformed; pack it again")


def _read_contents(reader: Reader) -> OrderedDict[str, Any]:
    path = reader.paths[-1]
    last = reader.read(len(reader) - 1) if len(reader) else memoryview(b"")
    if bytes(last[: len(MAGIC)]) != MAGIC:
        raise StorageError(f"{path} is an FFRecord file, but not a packed folder; pack it with pack_folder")
    table = bytes(last[len(MAGIC) :])
    try:
        _check_opcodes(table, len(reader) - 1)
        contents = _OnlyTables(io.BytesIO(table)).load()
        count = _count_files(contents, len(reader) - 1, 0, [len(reader) + _MAX_FOLDERS])
    except StorageError as error:
        raise StorageError(f"{path}: {error}") from None
    except Exception as error:  # a damaged pickle can raise any exception
        raise StorageError(f"{path} has a damaged table of contents ({type(error).__name__})") from error
    if count != len(reader) - 1:
        raise StorageError(f"{path} lists {count} files but holds {len(reader) - 1}; pack it again")
    return contents  # type: ignore[no-any-return]


def _count_files(contents: Any, files: int, depth: int, left: list[int]) -> int:
    """Count the files in a table, which must map names to indices or further tables and nothing else.

    `left` counts down over all tables, because a pickle can refer to one table many times.
    """
    left[0] -= len(contents) if type(contents) is OrderedDict else 0
    if type(contents) is not OrderedDict or depth > _MAX_DEPTH or left[0] < 0:
        raise StorageError("the table of contents is malformed; pack it again")
    count = 0
    for name, child in contents.items():
        if type(name) is not str:
            raise StorageError("the table of contents has a name that is not text; pack it again")
        if type(child) is int:
            if not 0 <= child < files:
                raise StorageError(f"the table of contents gives '{name}' the index {child} of {files} files")
            count += 1
        else:
            count += _count_files(child, files, depth + 1, left)
    return count


def pack_folder(
    folder: str | Path,
    out: str | Path,
    *,
    progress: Callable[[int, int], None] | None = None,
    require_files: bool = False,
) -> int:
    """Pack a folder with all its subfolders into one file, atomically; returns the number of files.

    Links are followed. An error or Ctrl-C leaves nothing.

    Args:
        folder: the folder to pack.
        out: the file to write (``.ffr``), outside of `folder`.
        progress: called with (files packed, files in total) after each file.
        require_files: raise if there is no file, rather than write a packed folder without any.

    Raises:
        StorageError: not a folder, a loop of links, an entry that is not a file, or a failing disk.
    """
    root, out = Path(folder), Path(out)
    if not root.is_dir():
        raise ObjectNotFound(f"folder {root} does not exist")
    if out.resolve().is_relative_to(root.resolve()):
        raise StorageError(f"{out} is inside {root}; choose a path outside of the packed folder")
    contents: OrderedDict[str, Any] = OrderedDict()
    paths: list[str] = []
    _list_folder(root, "", contents, paths, {root.resolve()})
    if require_files and not paths:
        raise ObjectNotFound(f"folder {root} has no files to pack; name the folder with the frames")
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


def _list_folder(
    root: Path, below: str, contents: OrderedDict[str, Any], paths: list[str], parents: set[Path]
) -> None:
    """Fill the table of one folder and the list of files, children by name."""
    if below.count("/") >= _MAX_DEPTH:
        raise StorageError(f"{root / below} is nested deeper than {_MAX_DEPTH} folders")
    try:
        children = sorted(os.scandir(root / below), key=lambda child: child.name)
    except OSError as error:
        raise StorageError(f"{root / below} cannot be listed: {error.strerror}") from error
    for child in children:
        name = f"{below}{child.name}"
        if child.is_dir():
            real = Path(child.path).resolve()
            if real in parents:
                raise StorageError(f"{root / name} links to a folder that contains it; remove the link")
            contents[child.name] = OrderedDict()
            _list_folder(root, f"{name}/", contents[child.name], paths, parents | {real})
        elif child.is_file():
            contents[child.name] = len(paths)
            paths.append(name)
        else:
            raise StorageError(f"{root / name} is neither a file nor a folder; remove it")
