"""Shares of the traffic that other versions of a model get: canaries, which answer it, and shadows, which do not.

Shares are texts such as ``second:2.0=0.05``, given by options or by a file that is read again when it changes.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from serve.errors import SettingsError

__all__ = ["EvenChoice", "Rollout", "Shares", "parse_shares", "read_rollout_file"]

# Model → version → share of the model's traffic.
Shares = Mapping[str, Mapping[str, float]]

_ENTRY = re.compile(r"(?P<model>[^\s=]+):(?P<version>[^\s:=]+)=(?P<share>[0-9.eE+-]+)")
_EXAMPLE = "MODEL:VERSION=SHARE with a share from 0 to 1, such as second:2.0=0.05"
_MAX_FILE_BYTES = 64 * 1024
_GOLDEN = (5**0.5 - 1) / 2
_NONE: Mapping[str, float] = MappingProxyType({})

logger = logging.getLogger(__name__)


class EvenChoice:
    """Numbers from 0 to 1, one after the other, that are spread evenly over any stretch of them.

    Multiples of the golden ratio, without their whole parts: of n numbers in a row, close to n × s lie below a share
    s, also of every k-th number. So each camera of a rig that sends them in turns gets the same share, which a choice
    of every n-th frame does not give.
    """

    def __init__(self, name: str) -> None:
        """Start where the name says: the same each time, and elsewhere for another name."""
        self._point = zlib.crc32(name.encode()) / (1 << 32)

    def __call__(self) -> float:
        """Return the next number."""
        self._point = (self._point + _GOLDEN) % 1.0
        return self._point


def parse_shares(texts: Sequence[str], *, divided: bool) -> Shares:
    """Parse shares.

    Args:
        texts: one text for each version.
        divided: whether the shares of a model divide its traffic, and so must not add up to more than 1.

    Raises:
        ValueError: a text is not of that form, a version occurs twice, or the shares add up to more than 1.
    """
    shares: dict[str, dict[str, float]] = {}
    for text in texts:
        matched = _ENTRY.fullmatch(text)
        try:
            share = float(matched["share"]) if matched else -1.0
        except ValueError:
            share = -1.0
        if matched is None or not 0 <= share <= 1:
            raise ValueError(f"must be {_EXAMPLE}")
        versions = shares.setdefault(matched["model"], {})
        if matched["version"] in versions:
            raise ValueError(f"must name version {matched['version']} of {matched['model']} once")
        versions[matched["version"]] = share
    for model, versions in shares.items():
        # Of decimals: 0.7 + 0.2 + 0.1 is more than 1 in binary.
        if divided and sum(versions.values()) > 1 + 1e-9:
            raise ValueError(f"must give the versions of {model} shares that add up to 1 at most")
    return shares


def read_rollout_file(path: Path) -> tuple[Shares, Shares]:
    """Read a file of shares: the word ``canary`` or ``shadow`` and a share in each line, ``#`` before comments.

    Returns:
        The shares of canaries and of shadows.

    Raises:
        SettingsError: the file cannot be read, or a line is wrong.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_FILE_BYTES + 1)
        lines = raw.decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"rollout_file {path}: {getattr(error, 'strerror', None) or error}") from None
    if len(raw) > _MAX_FILE_BYTES:
        raise SettingsError(f"rollout_file {path} has more than {_MAX_FILE_BYTES} bytes")
    found: dict[str, list[str]] = {"canary": [], "shadow": []}
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) != 2 or words[0] not in found:
            raise SettingsError(
                f"rollout_file {path}, line {number}: must be canary or shadow, a blank and {_EXAMPLE}, got {line!r}"
            )
        try:
            parse_shares([words[1]], divided=False)
        except ValueError as error:
            raise SettingsError(f"rollout_file {path}, line {number}: {error}, got {words[1]!r}") from None
        found[words[0]].append(words[1])
    try:
        return parse_shares(found["canary"], divided=True), parse_shares(found["shadow"], divided=False)
    except ValueError as error:
        raise SettingsError(f"rollout_file {path} {error}") from None


@dataclass
class Rollout:
    """The shares in force.

    Attributes:
        canary: shares of the requests that name no version, answered by another version than the default.
        shadow: shares of the frames that another version gets as well.
        file: where they are read from; None if they do not change.
        is_file_valid: whether the file could be read when it was last looked at; if not, the former shares hold.
    """

    canary: Shares = field(default_factory=dict)
    shadow: Shares = field(default_factory=dict)
    file: Path | None = None
    is_file_valid: bool = True
    _seen: tuple[int, int, int] | None = None
    _missing: frozenset[str] = frozenset()

    @classmethod
    def of(cls, canary: Sequence[str], shadow: Sequence[str], file: Path | None) -> Rollout:
        """Take the shares from a file if there is one, else from texts.

        Raises:
            SettingsError: the file cannot be read, or holds something else.
        """
        if file is None:
            return cls(parse_shares(canary, divided=True), parse_shares(shadow, divided=False))
        seen = _state_of(file)
        found = read_rollout_file(file)
        return cls(*found, file=file, _seen=seen)

    def canary_of(self, model: str) -> Mapping[str, float]:
        """Return the shares of a model's canaries, by version."""
        return self.canary.get(model, _NONE)

    def shadow_of(self, model: str) -> Mapping[str, float]:
        """Return the shares of a model's shadows, by version."""
        return self.shadow.get(model, _NONE)

    def count_shadows(self) -> int:
        """Return the number of versions that get frames as shadows, of all models; at least 1."""
        return max(1, sum(share > 0 for shares in self.shadow.values() for share in shares.values()))

    def report_missing(self, registered: Collection[tuple[str, str]]) -> None:
        """Log the shares without effect, once: of a version that is not among those that are registered."""
        missing = frozenset(
            f"{kind} {model}:{version}"
            for kind, shares in (("canary", self.canary), ("shadow", self.shadow))
            for model, versions in shares.items()
            for version, share in versions.items()
            if share and (model, version) not in registered
        )
        if missing - self._missing:
            logger.warning(
                "these shares have no effect, because no such version is registered: %s; registered: %s",
                ", ".join(sorted(missing)),
                ", ".join(sorted(":".join(each) for each in registered)) or "none",
            )
        self._missing = missing

    async def reload(self) -> None:
        """Read the file again if it has changed; a file that is wrong leaves the shares as they are."""
        if self.file is not None:
            await asyncio.to_thread(self._reload, self.file)

    def _reload(self, file: Path) -> None:
        seen = _state_of(file)
        if seen == self._seen:
            return
        self._seen = seen
        try:
            self.canary, self.shadow = read_rollout_file(file)
        except SettingsError as error:
            self.is_file_valid = False
            logger.error("the shares of canaries and shadows stay as they are: %s", error)
        else:
            self.is_file_valid = True
            logger.info(
                "shares of canaries: %s; of shadows: %s", self.canary or "none", self.shadow or "none"
            )


def _state_of(file: Path) -> tuple[int, int, int] | None:
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
