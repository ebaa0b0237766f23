"""Recordings as sources: bags of ROS 1 and 2, and MCAP files, message by message.

`rosbags` and `mcap` are optional: ``pip install 'mmdet3d-serve[recordings]'``. Messages are read in the order in which
they were recorded, one at a time; their header's time is that of the frame.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

from serve.errors import MissingPackage, SettingsError, UndecodableFrame
from serve.predict.frames import Clip, Frame, Image, Moment, encode_pixels
from serve.protocol.frame_spec import Modality
from serve.ros import messages

__all__ = ["Recording", "check_not_recording", "is_recording", "open_recording"]

_INSTALL = "recordings need {package}, which is not installed: pip install 'mmdet3d-serve[recordings]'"
T = TypeVar("T")
_NANOSECOND = Fraction(1, 10**9)
_MOST_BYTES = 1 << 30  # of one record of a file
_CLOUDS = (messages.POINT_CLOUD,)
_IMAGES = (messages.IMAGE, messages.COMPRESSED_IMAGE)
_SUFFIXES = (".bag", ".mcap", ".db3")


@dataclass(frozen=True)
class _Topic:
    """A topic of a recording: its message type with ``/msg/``, and the number of its messages if that is known."""

    name: str
    kind: str
    count: int | None


@dataclass(frozen=True)
class Recording:
    """Frames of one topic, each time it is iterated from the start.

    Attributes:
        path: file or folder.
        clip: what the frames are part of.
        topic: their topic.
        count: number of messages, if the file says so.
        etag: changes when the file does.
    """

    path: Path
    clip: Clip
    topic: _Topic
    etag: str

    @property
    def count(self) -> int | None:
        """Number of messages of the topic; None if the file does not say."""
        return self.topic.count

    def __iter__(self) -> Iterator[Frame]:
        """Read message by message."""
        with _errors_mapped(self.path):
            for index, (recorded_ns, message) in enumerate(_opened(self.path).messages(self.topic)):
                yield self._frame(index, recorded_ns, message)

    def _frame(self, index: int, recorded_ns: int, load: Callable[[], Any]) -> Frame:
        message = lru_cache(1)(load)  # parsed once
        try:
            time_ns = messages.stamp_ns(message()) or recorded_ns
        except UndecodableFrame:  # which reading the frame raises again, for this frame alone
            time_ns = recorded_ns
        name = f"{self.path.name}#{index:06d}"
        moment = Moment(time_ns, _NANOSECOND)
        pixels: Callable[[], Image] | None = None
        if self.topic.kind == messages.POINT_CLOUD:
            read = partial(_of, messages.cloud_bytes, message)
        elif self.topic.kind == messages.COMPRESSED_IMAGE:
            read = partial(_of, messages.compressed_bytes, message)
        else:
            pixels = partial(_of, messages.pixels, message)
            read = partial(_of, encode_pixels, pixels)
        stem = f"{self.clip.name}.{index:06d}"
        return Frame(name, stem, self.clip, read, etag=self.etag, pixels=pixels, moment=moment)


def _of(make: Callable[[Any], T], content: Callable[[], Any]) -> T:
    return make(content())


def is_recording(path: Path) -> bool:
    """Whether a path names a bag or an MCAP file."""
    if path.is_dir():
        return (path / "metadata.yaml").is_file() and any(
            file.suffix in (".db3", ".mcap", ".zstd") for file in path.iterdir()
        )
    return path.suffix.lower() in _SUFFIXES and path.is_file()


def check_not_recording(path: Path) -> None:
    """Refuse what is named like a recording, and is none that is read, by what to do about it.

    Raises:
        UndecodableFrame: a bag that was not closed, a compressed file, or a folder of recordings.
    """
    name = path.name.lower()
    if name.endswith(".bag.active"):
        raise UndecodableFrame(
            f"{path} is a bag that was not closed; `rosbag reindex` repairs it, after which it is renamed to .bag"
        )
    if name.endswith(tuple(f"{suffix}.zstd" for suffix in _SUFFIXES)) and path.is_file():
        raise UndecodableFrame(
            f"{path} is a compressed file of a recording; give its folder with metadata.yaml, or `zstd -d` it"
        )
    if path.is_dir():
        files = sorted(path.iterdir())
        found = [file.name for file in files if file.suffix.lower() in _SUFFIXES]
        # Frames of several parts are folders.
        if found and all(file.suffix.lower() in (*_SUFFIXES, ".yaml") for file in files):
            raise UndecodableFrame(
                f"{path} has recordings and no metadata.yaml that joins them: {', '.join(found[:5])}; name one of "
                "them, or let `ros2 bag reindex` write it"
            )


def open_recording(path: Path, modality: Modality | None, topic: str | None = None) -> Recording:
    """Choose the topic of a recording.

    Args:
        path: ``.bag``, ``.mcap``, ``.db3`` or the folder of a ROS 2 bag.
        modality: what the model takes; None for what is there.
        topic: name of the topic; None if there is one that fits.

    Raises:
        SettingsError: no such topic, or several fit; the message names those there are.
        UndecodableFrame: the file is damaged, or the model takes frames of several parts.
        MissingPackage: the package that reads it is not installed.
    """
    if modality in ("lidar", "depth"):
        wanted: tuple[str, ...] = _CLOUDS
    elif modality in ("image", None):
        wanted = _IMAGES if modality else (*_CLOUDS, *_IMAGES)
    else:
        raise UndecodableFrame(
            f"{path} is a recording, and the model takes {modality} frames of several parts; those of point clouds or "
            "of single images are read from recordings"
        )
    if path.suffix.lower() == ".db3":  # its folder says what is in it
        path = path.parent
        if not is_recording(path):
            raise UndecodableFrame(
                f"{path} lacks the metadata.yaml that a .db3 belongs to; `ros2 bag reindex` writes it"
            )
    if path.suffix.lower() == ".bag" != path.suffix:
        raise UndecodableFrame(f"{path} must be named with .bag in small letters; rename it")
    with _errors_mapped(path):
        topics = _opened(path).topics()
    fitting = [each for each in topics if each.kind in wanted]
    kinds = " or ".join(kind.rpartition("/")[2] for kind in wanted)
    if topic is not None:
        chosen = next((each for each in topics if each.name == topic), None)
        if chosen is None:
            raise SettingsError(f"{path} has no topic {topic}; it has {_listed(topics)}")
        if chosen not in fitting:
            raise SettingsError(
                f"topic {topic} of {path} has messages of {chosen.kind}, and the model takes {kinds}; the topics are "
                f"{_listed(topics)}"
            )
    elif len(fitting) != 1:
        found = f"{len(fitting)} topics" if fitting else "no topic"
        raise SettingsError(
            f"{path} has {found} of {kinds}{'; choose one with --topic' if fitting else ''}: it has {_listed(topics)}"
        )
    else:
        (chosen,) = fitting
    status = path.stat()
    return Recording(path, Clip(path.stem), chosen, f"{status.st_size:x}-{status.st_mtime_ns:x}")


def _listed(topics: list[_Topic]) -> str:
    return ", ".join(f"{each.name} ({each.kind})" for each in topics[:20]) or "no topic at all"


def _opened(path: Path) -> _Bag | _Mcap:
    return _Mcap(path) if path.suffix.lower() == ".mcap" else _Bag(path)


class _Bag:
    """A bag of ROS 1 or 2, through `rosbags`."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @contextmanager
    def _reader(self) -> Iterator[Any]:
        try:
            from rosbags.highlevel import AnyReader
            from rosbags.typesys import Stores, get_typestore
        except ImportError as error:
            raise MissingPackage(_INSTALL.format(package="rosbags")) from error
        with AnyReader([self._path], default_typestore=get_typestore(Stores.LATEST)) as reader:
            yield reader

    def topics(self) -> list[_Topic]:
        with self._reader() as reader:
            return [
                _Topic(name, str(info.msgtype or ""), int(info.msgcount))
                for name, info in sorted(reader.topics.items())
            ]

    def messages(self, topic: _Topic) -> Iterator[tuple[int, Callable[[], Any]]]:
        with self._reader() as reader:
            connections = [each for each in reader.connections if each.topic == topic.name]
            for connection, recorded_ns, raw in reader.messages(connections=connections):
                yield recorded_ns, partial(_parse, reader.deserialize, bytes(raw), connection.msgtype)


class _Mcap:
    """An MCAP file with messages of ROS 1 or 2, through `mcap`, and rosbags' definitions of their types.

    A file with an index is read by it, in the order of time. One without (written so, or cut short) is read from its
    start, in the order in which it was written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def topics(self) -> list[_Topic]:
        try:
            from mcap.reader import SeekingReader
        except ImportError as error:
            raise MissingPackage(_INSTALL.format(package="mcap")) from error
        with self._path.open("rb") as file:
            summary = _summary(SeekingReader(file, record_size_limit=_MOST_BYTES))
        if summary is None or not summary.channels:
            return self._topics_from_start()
        counts = summary.statistics.channel_message_counts if summary.statistics else None
        return _merged(
            _mcap_topic(channel, summary.schemas, None if counts is None else counts.get(channel.id, 0))
            for channel in summary.channels.values()
        )

    def _topics_from_start(self) -> list[_Topic]:
        """Find the topics by reading the whole file; those before its end if it was cut short."""
        from mcap.records import Channel, Schema
        from mcap.stream_reader import StreamReader

        schemas: dict[int, Any] = {}
        channels: dict[int, Any] = {}
        with self._path.open("rb") as file:
            try:
                for record in StreamReader(file, record_size_limit=_MOST_BYTES).records:
                    if isinstance(record, Schema):
                        schemas[record.id] = record
                    elif isinstance(record, Channel):
                        channels[record.id] = record
            except (
                Exception
            ):  # as `_errors_mapped`; reading the messages raises it again, after those before the cut
                if not channels:
                    raise
        return _merged(_mcap_topic(channel, schemas, None) for channel in channels.values())

    def messages(self, topic: _Topic) -> Iterator[tuple[int, Callable[[], Any]]]:
        from mcap.reader import NonSeekingReader, SeekingReader

        try:
            from rosbags.typesys import Stores, get_typestore
        except ImportError as error:
            raise MissingPackage(_INSTALL.format(package="rosbags")) from error
        types = {"cdr": get_typestore(Stores.LATEST), "ros1": get_typestore(Stores.ROS1_NOETIC)}
        limits = {"validate_crcs": True, "record_size_limit": _MOST_BYTES}
        with self._path.open("rb") as file:
            reader: Any = SeekingReader(file, **limits)
            summary = _summary(reader)
            if summary is not None and summary.channels and summary.chunk_indexes:
                found = reader.iter_messages(topics=[topic.name])
            else:  # in the order of time, mcap would hold the whole file
                file.seek(0)
                found = NonSeekingReader(file, **limits).iter_messages([topic.name], log_time_order=False)
            for _, channel, message in found:
                store = types[channel.message_encoding]
                load = store.deserialize_cdr if channel.message_encoding == "cdr" else store.deserialize_ros1
                yield message.log_time, partial(_parse, load, message.data, topic.kind)


def _summary(reader: Any) -> Any:
    """Return the summary of an MCAP file; None without one, or if the file ends before it."""
    try:
        return reader.get_summary()
    except Exception:  # what is at the end of a file that was cut short is read as a record
        return None


def _mcap_topic(channel: Any, schemas: Mapping[int, Any], count: int | None) -> _Topic:
    schema = schemas.get(channel.schema_id)
    kind = _with_msg(schema.name) if schema else ""
    if channel.message_encoding not in ("cdr", "ros1"):
        kind = f"{kind} in {channel.message_encoding}"
    return _Topic(channel.topic, kind, count)


def _merged(topics: Iterable[_Topic]) -> list[_Topic]:
    """Make one of the channels of a topic: each publisher has its own."""
    found: dict[str, _Topic] = {}
    for each in topics:
        if (other := found.get(each.name)) is not None:
            count = None if None in (each.count, other.count) else (each.count or 0) + (other.count or 0)
            kind = each.kind if each.kind == other.kind else f"{other.kind} and {each.kind}"
            each = _Topic(each.name, kind, count)
        found[each.name] = each
    return sorted(found.values(), key=lambda each: each.name)


def _parse(deserialize: Callable[[bytes, str], Any], raw: bytes, kind: str) -> Any:
    try:
        return deserialize(raw, kind)
    except Exception as error:  # of struct, numpy and the packages, of bytes that are no such message
        raise UndecodableFrame(
            f"{len(raw)} bytes are no message of {kind} ({type(error).__name__}: {error})"
        ) from error


def _with_msg(name: str) -> str:
    """Return a type's name as ROS 2 writes it: ROS 1 leaves ``msg`` out. One of another system stays as it is."""
    package, _, kind = name.partition("/")
    return f"{package}/msg/{kind}" if kind and "/" not in kind else name


@contextmanager
def _errors_mapped(path: Path) -> Iterator[None]:
    """Map what the two packages raise of damaged files."""
    try:
        yield
    except (MissingPackage, SettingsError, UndecodableFrame, GeneratorExit):
        raise
    except Exception as error:  # they raise their own, and those of struct, sqlite, zstd and lz4
        raise UndecodableFrame(
            f"{path} cannot be read on ({type(error).__name__}: {error}); is the recording complete?"
        ) from error
