"""Images of tasks: in the task itself, uploaded to Label Studio, in an allowed folder, or below an allowed prefix.

A task's data is what a stranger may have written, so an image is read only from where the operator has said: never from
a host that the request names.
"""

from __future__ import annotations

import asyncio
import base64
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from serve.errors import BadRequest, FrameTooLarge, ReferenceNotFound, ReferenceRefused, quote
from serve.labelling.options import LabelStudioOptions
from serve.protocol.image_size import image_size
from serve.protocol.orientation import read_orientation
from serve.storage.references import ReferenceLimits, References

__all__ = ["TaskImages", "shown_size"]

_UPLOADS = "/data/"
_LOCAL_FILES = "/data/local-files/"
_SIDEWAYS = (5, 6, 7, 8)


def shown_size(image: bytes) -> tuple[int, int]:
    """Return width and height as browsers show the image and models see it: turned by EXIF.

    Raises:
        UndecodableFrame: no image of a known format.
    """
    width, height = image_size(image)
    return (height, width) if read_orientation(image) in _SIDEWAYS else (width, height)


class TaskImages:
    """Reads images of tasks; belongs to one event loop."""

    def __init__(self, options: LabelStudioOptions) -> None:
        """Allow what `options` allow.

        Raises:
            SettingsError: a prefix is no URI.
        """
        self._options = options
        self._references = References(
            options.image_prefixes,
            ReferenceLimits(
                options.max_image_bytes, options.image_timeout_s, private_hosts=options.private_hosts
            ),
        )
        self._label_studio = (options.label_studio_url or "").rstrip("/")
        token = options.label_studio_token
        # The token goes to the one host of this prefix; a redirect to another is refused.
        self._uploads = References(
            (self._label_studio + _UPLOADS,) if self._label_studio else (),
            ReferenceLimits(options.max_image_bytes, options.image_timeout_s, private_hosts=True),
            headers={"Authorization": f"Token {token}"} if token else {},
        )

    def close(self) -> None:
        """Stop reading."""
        self._references.close()
        self._uploads.close()

    async def read(self, value: object) -> bytes:
        """Read the image that a task's data names.

        Raises:
            BadRequest: the data is no image.
            ReferenceRefused: images are not read from there.
            ReferenceNotFound: there is none.
            FrameTooLarge: it is larger than `max_image_bytes`.
            ServeError: as `References.fetch`.
        """
        if not isinstance(value, str):
            raise BadRequest(f"a task must name its image by a text, got {quote(value)}")
        if value.startswith("data:"):
            return self._decode(value)
        value = self._below_label_studio(value)
        if self._options.local_files is not None and (name := _local_name(value)) is not None:
            return await asyncio.to_thread(self._read_file, self._options.local_files, name)
        if value.startswith("/"):
            if not self._label_studio:
                raise ReferenceRefused(
                    f"the task names the uploaded image {quote(value)}; start this backend with --label-studio-url"
                )
            return await self._uploads.fetch(self._label_studio + value)
        if not self._options.image_prefixes:
            raise ReferenceRefused(
                f"the image {quote(value)} is not in its task, nor uploaded; start this backend with --image-prefixes"
            )
        return await self._references.fetch(value)

    def _below_label_studio(self, value: str) -> str:
        """Return an address at Label Studio as ``/data/…``: tasks also have it with host, and with a path before it."""
        for prefix in (self._label_studio, urlsplit(self._label_studio).path):
            if prefix and value.startswith(prefix + _UPLOADS):
                return value.removeprefix(prefix)
        return value

    def _decode(self, value: str) -> bytes:
        head, _, data = value.partition(",")
        if not head.endswith(";base64"):
            raise BadRequest("a data: URI must be base64")
        if len(data) > self._options.max_image_bytes * 4 // 3 + 4:
            raise FrameTooLarge(f"the image is larger than {self._options.max_image_bytes} bytes")
        try:
            return base64.b64decode(data, validate=True)
        except ValueError as error:  # binascii.Error, or letters beyond ASCII
            raise BadRequest(f"the data: URI is not base64: {error}") from None

    def _read_file(self, folder: Path, name: str) -> bytes:
        """Read a file below the folder, to which links may not lead out."""
        try:
            path = (folder / name.lstrip("/")).resolve(strict=True)
            is_inside = path.is_relative_to(folder.resolve(strict=True)) and path.is_file()
        except (OSError, ValueError):
            raise ReferenceNotFound(f"there is no image {quote(name)} in the folder of local files") from None
        if not is_inside:
            raise ReferenceRefused(f"{quote(name)} is not in the folder of local files")
        with path.open("rb") as file:
            content = file.read(self._options.max_image_bytes + 1)
        if len(content) > self._options.max_image_bytes:
            raise FrameTooLarge(f"the image is larger than {self._options.max_image_bytes} bytes")
        return content


def _local_name(value: str) -> str | None:
    """Return the name in an address of local files, whose host does not matter: the file is read here. None for others.

    Source: HumanSignal/label-studio, ``label_studio/io_storages/localfiles/models.py``.
    """
    try:
        parts = urlsplit(value)
    except ValueError:
        return None
    return (parse_qs(parts.query).get("d") or [""])[0] if parts.path.endswith(_LOCAL_FILES) else None
