"""Parts of an archive, of which torch-model-archiver, TorchServe's own archiver, makes one that is served as well.

The parts are the archive's entries, without the manifest that the archiver writes itself, and one file more. The
archiver packs the file of the handler and names it in the manifest by its file name without ``.py``. The handlers are
modules of the installed package, and an archive must not hold files that can be imported. So the file is called
``handlers.mmdet3d_handler.py``: the manifest then names the installed module ``handlers.mmdet3d_handler``, and no
import finds the file, since a dot separates packages. Its content is fixed (`serve.archive.bounds.HANDLER_FILE`).
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from serve.archive.bounds import HANDLER_FILE, MANIFEST
from serve.archive.format import extract
from serve.archive.metadata import HANDLERS
from serve.errors import ArchiveError

__all__ = ["check_parts_folder", "write_parts"]


def check_parts_folder(folder: Path, name: str) -> None:
    """Check that parts of a model can be written into a folder, and that the archiver will not remove them.

    Raises:
        ArchiveError: it is not empty, or the archiver empties it first.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ArchiveError(f"{folder} is not an empty folder; choose another one for --parts")
    # It copies into this folder, which it removes before and afterwards.
    if folder.resolve() == Path(tempfile.gettempdir(), name).resolve():
        raise ArchiveError(
            f"torch-model-archiver removes {folder}, where it works itself; choose another folder for --parts"
        )


def write_parts(archive: Path, folder: Path) -> list[str]:
    """Unpack an archive into an empty folder for torch-model-archiver.

    Returns:
        Words of the command line that makes the archive, in the present folder.

    Raises:
        ArchiveError: the archive is corrupt or altered.
    """
    folder.mkdir(parents=True, exist_ok=True)
    metadata = extract(archive, folder).metadata
    (folder / MANIFEST).unlink()
    (folder / MANIFEST).parent.rmdir()
    handler = HANDLERS[metadata.package]
    (folder / f"{handler}.py").write_bytes(HANDLER_FILE)
    # Weights do not compress, hence zip-store.
    return [
        "torch-model-archiver", "--model-name", metadata.name, "--version", metadata.version,
        "--archive-format", "zip-store", "--handler", str(folder / handler), "--extra-files", f"{folder}/",
    ]  # fmt: skip
