"""Sources of frames: files, folders, patterns, videos, cameras, streams, buckets and packed files.

    open_source("street.jpg", "image")                       one image
    open_source("clouds/", "lidar")                          the clouds of a folder; `*.bin` and `**/*.pcd` too
    open_source("drive.mp4", "image")                        the frames of a video
    open_source("0", "image")                                camera 0
    open_source("rtsp://camera/stream", "image")             a stream
    open_source("drive.bag", "lidar")                        a topic of a recording: ROS 1 and 2, MCAP
    open_source("s3://bucket/frames", "lidar")               a prefix of a bucket, `ffrecord:///packed.ffr#velodyne`
    open_source("frames.txt", "lidar")                       what a manifest lists; `.jsonl` too, also in a bucket

A source is listed at once and read frame by frame: memory does not grow with its length.
"""

from __future__ import annotations

import fnmatch
import glob
import re
from collections import Counter
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath

from serve import storage
from serve.errors import ObjectNotFound, SettingsError, UndecodableFrame
from serve.predict import video
from serve.predict.frames import Clip, Frame, read_path
from serve.predict.manifests import Manifest, is_manifest, read_manifest
from serve.predict.recordings import check_not_recording, is_recording, open_recording
from serve.predict.stems import hashed, stems_of
from serve.protocol.batch import Body
from serve.protocol.frame_spec import Modality
from serve.settings import Settings
from serve.verify.endpoint import FRAME_MARKERS, find_frames
from serve.verify.frame_source import list_frame_files
from serve.verify.reference import FRAME_SUFFIXES

__all__ = ["Source", "check_exists", "frame_at", "of_manifest", "open_source"]

_STREAMS = ("rtsp://", "rtsps://", "rtmp://", "udp://", "tcp://", "srt://")
_WILD = frozenset("*?[")
_PICKLES = (".pkl", ".pickle")
_COMPRESSED = re.compile(r"\.(txt|jsonl)\.(gz|bz2|xz|zst)$", re.IGNORECASE)
_IMAGES, _CLOUDS = FRAME_SUFFIXES["image"], FRAME_SUFFIXES["points"]


@dataclass(frozen=True)
class Source:
    """Frames in order.

    Attributes:
        what: the source as it was named.
        count: number of frames; None if it is known at the end only.
        live: a camera or stream, which cannot be read again.
        clips: the sequences that its frames belong to.
    """

    what: str
    count: int | None
    live: bool
    clips: tuple[Clip, ...]
    _parts: tuple[Iterable[Frame], ...]

    def __iter__(self) -> Generator[Frame]:
        """Yield the frames; those of a video are decoded on the way."""
        for part in self._parts:
            yield from part


def open_source(
    source: str | Path,
    modality: Modality | None = None,
    *,
    cache: storage.Cache | None = None,
    topic: str | None = None,
) -> Source:
    """List the frames that `source` names.

    Args:
        source: path, pattern, number of a camera, or URI.
        modality: kind of frames to select in a folder; None selects by what is there.
        cache: for videos in a bucket, which are copied before they are read.
        topic: of a recording; None if there is one that fits.

    Raises:
        SettingsError: a topic that the recording lacks, or one for a source without topics.
        UndecodableFrame: nothing there, or nothing that such a model reads.
        StorageError: a URI cannot be read.
        MissingPackage: a video, without PyAV.
    """
    text = str(source)
    local = Path(text).expanduser()
    if is_recording(local):
        recording = open_recording(local, modality, topic)
        return Source(text, recording.count, False, (recording.clip,), (recording,))
    check_not_recording(local)
    if topic is not None:
        raise SettingsError(f"{text} is no recording (.bag, .mcap, folder of a ROS 2 bag); leave out --topic")
    if is_manifest(text):
        return of_manifest(read_manifest(text), etags=True)
    if local.suffix.lower() in _PICKLES:
        raise UndecodableFrame(
            f"{text} is a pickle, as a data set's info files are, and reading one can run code; list its frames in a "
            "manifest, one path a line"
        )
    if _COMPRESSED.search(text):
        raise UndecodableFrame(
            f"{text} is a compressed manifest; unpack it, or pass it to `mmdet3d-serve bulk -` on standard input"
        )
    if text.isdecimal() and not Path(text).exists():
        return _of_videos(text, [video.camera(int(text))], modality)
    if text.startswith(_STREAMS) or (
        text.startswith(("http://", "https://")) and _suffix(text) not in _known()
    ):
        return _of_videos(text, [video.stream(text)], modality)
    if storage.is_remote(text) and storage.parse(text).scheme != "file":
        return _of_uri(text, modality, cache)
    path = Path(storage.parse(text).path).expanduser()
    if path.suffix.lower() == ".ffr" and path.is_file():
        return _of_uri(f"ffrecord://{path.absolute()}", modality, cache)
    if not path.exists() and _WILD & set(text):
        return _of_pattern(text, modality)
    if path.is_file() and path.suffix.lower() in video.SUFFIXES:
        return _of_videos(text, [video.file(path)], modality)
    if path.is_dir() and modality in (None, "image") and (videos := _videos_in(path)):
        return _of_videos(text, [video.file(file) for file in videos], modality)
    found = find_frames(path, modality or _modality_at(path))
    root = path if path.is_dir() and found != [path] else path.parent
    return _of_paths(text, found, root)


def check_exists(source: str | Path) -> None:
    """Check a local path before a model is loaded for it; the others are left to `open_source`.

    Raises:
        UndecodableFrame: there is no such file or folder.
    """
    text = str(source)
    if text.isdecimal() or text.startswith((*_STREAMS, "http://", "https://")) or _WILD & set(text):
        return
    if storage.is_remote(text) and storage.parse(text).scheme != "file":
        return
    if not Path(text).expanduser().exists() and not Path(storage.parse(text).path).expanduser().exists():
        raise UndecodableFrame(f"file or folder {text} does not exist; check the path")


def _of_videos(text: str, readers: Sequence[video.Reader], modality: Modality | None) -> Source:
    if modality not in (None, "image"):
        raise UndecodableFrame(f"{text} has images, and the model takes {modality} frames; give it those")
    counts = [reader.count for reader in readers]
    count = None if None in counts else sum(number for number in counts if number is not None)
    clips = tuple(reader.clip for reader in readers)
    return Source(text, count, any(clip.live for clip in clips), clips, tuple(readers))


def of_manifest(manifest: Manifest, *, etags: bool = False) -> Source:
    """Return the frames that a manifest lists.

    Args:
        manifest: the manifest.
        etags: give frames of this machine theirs, for which each file is looked at.
    """
    clip = Clip(_bare(manifest.what.rsplit("/", 1)[-1]))
    return Source(manifest.what, manifest.count, False, (clip,), (_Listed(manifest, clip, etags),))


@dataclass(frozen=True)
class _Listed:
    """Frames of a manifest."""

    manifest: Manifest
    clip: Clip
    etags: bool

    def __iter__(self) -> Generator[Frame]:
        for name, stem, origin in self.manifest:
            frame = frame_at(name, stem, origin, self.clip)
            if self.etags and frame.path is not None and frame.path.exists():
                frame = replace(frame, etag=_etag(frame.path))
            yield frame


def _of_paths(text: str, paths: Sequence[Path], root: Path) -> Source:
    names = [path.relative_to(root).as_posix() for path in paths]
    clip = Clip(root.resolve().name if len(paths) > 1 else _bare(names[0]))
    stems = stems_of(names)
    frames = tuple(
        Frame(name, stem, clip, partial(read_path, path), path, _etag(path), origin=str(path.absolute()))
        for name, stem, path in zip(names, stems, paths, strict=True)
    )
    return Source(text, len(frames), False, (clip,), (frames,))


def _of_pattern(text: str, modality: Modality | None) -> Source:
    paths = [Path(found) for found in sorted(glob.glob(text, recursive=True))]
    videos = [path for path in paths if path.suffix.lower() in video.SUFFIXES]
    if videos and len(videos) == len(paths):
        return _of_videos(text, [video.file(path) for path in videos], modality)
    kinds = _kinds(modality)
    chosen = [path for path in paths if _is_frame(path, modality, kinds)]
    if not chosen:
        has = f"{len(paths)} files, but none with {', '.join(kinds)}" if paths else "no file"
        raise UndecodableFrame(f"{text} matches {has}; check the pattern, and keep it in quotes")
    folders = [path.parent for path in chosen]
    root = next(
        parent
        for parent in (folders[0], *folders[0].parents)
        if all(f.is_relative_to(parent) for f in folders)
    )
    return _of_paths(text, chosen, root)


def _of_uri(text: str, modality: Modality | None, cache: storage.Cache | None) -> Source:
    where = storage.parse(text)
    suffix = _suffix(where.name)
    if suffix in video.SUFFIXES:
        if cache is None:
            settings = Settings.from_environment()
            cache = storage.Cache(settings.cache_dir, settings.cache_max_bytes)
        return _of_videos(
            text, [video.file(storage.local_path(text, cache), name=_bare(where.name))], modality
        )
    if suffix in (*_IMAGES, *_CLOUDS) and not _WILD & set(where.name):
        return _of_uris(text, [text])
    folder, pattern = text, ""
    if where.name and _WILD & set(where.name):
        folder, pattern = text[: -len(where.name)].rstrip("#/"), where.name
    found = list_frame_files(storage.parse(folder))
    if any(path.name in FRAME_MARKERS for path in found.values()):
        return _of_parts(text, found)
    listed = [uri for uri, path in found.items() if not pattern or fnmatch.fnmatchcase(path.name, pattern)]
    names = {storage.parse(uri).name for uri in listed}
    kinds = _kinds(modality, [_suffix(name) for name in names])
    if chosen := [uri for uri in listed if uri.lower().endswith(kinds)]:
        return _of_uris(text, chosen)
    hint = ""
    if where.scheme == "ffrecord":
        from serve.storage.access import open_packed_folder

        folders = open_packed_folder(where.path).list(where.member, list_file=False)
        inside = f"{where.member}/" if where.member else ""
        hint = "".join(
            f"; it has the folder ffrecord://{where.path}#{inside}{name}" for name in list(folders)[:3]
        )
    raise UndecodableFrame(f"{where} has no frame ({', '.join(kinds)}){hint}")


def _of_uris(text: str, uris: Sequence[str]) -> Source:
    names = _names(uris)
    clip = Clip(_bare(names[0] if len(uris) == 1 else _last_name(text)))
    frames = tuple(
        frame_at(name, stem, uri, clip) for name, stem, uri in zip(names, stems_of(names), uris, strict=True)
    )
    return Source(text, len(frames), False, (clip,), (frames,))


def _names(uris: Sequence[str]) -> list[str]:
    """Names of frames: of the files, and with their folders of values of a database that are called the same."""
    places = [storage.parse(uri) for uri in uris]
    counts = Counter(where.name for where in places)
    names = [where.name if counts[where.name] == 1 else _inside(where) for where in places]
    counts = Counter(names)
    return [
        name if counts[name] == 1 else hashed(name, where.member)
        for name, where in zip(names, places, strict=True)
    ]


def _inside(where: storage.Location) -> str:
    """Path of a file in what contains it, which leads nowhere else."""
    parts = (where.member or where.path).split("/")
    return "/".join(part for part in parts if part not in ("", ".", ".."))


def _of_parts(text: str, files: Mapping[str, PurePosixPath]) -> Source:
    """Frames of several parts: a folder each, or one frame if the parts are in the folder itself."""
    own = _last_name(text)
    parts: dict[str, dict[str, str]] = {}
    for uri, path in files.items():
        parts.setdefault(path.parent.name or own, {})[path.stem] = uri
    clip = Clip(own)
    names = sorted(parts)
    stems = stems_of(names, are_folders=True)
    frames = tuple(frame_at(name, stem, parts[name], clip) for name, stem in zip(names, stems, strict=True))
    return Source(text, len(frames), False, (clip,), (frames,))


def frame_at(name: str, stem: str, origin: str | Mapping[str, str], clip: Clip) -> Frame:
    """Make a frame of what `Frame.origin` says; no file is touched.

    Args:
        name: see `Frame`.
        stem: see `Frame`.
        origin: path of a file or folder, URI (of a folder with a slash at the end), or path or URI of each part.
        clip: see `Frame`.
    """
    if not isinstance(origin, str):
        return Frame(name, stem, clip, partial(_read_parts, origin), origin=origin)
    if storage.is_remote(origin):
        read = partial(_read_folder, origin) if origin.endswith("/") else partial(storage.read_bytes, origin)
        return Frame(name, stem, clip, read, origin=origin)
    return Frame(name, stem, clip, partial(read_path, Path(origin)), Path(origin), origin=origin)


def _read_parts(uris: Mapping[str, str]) -> Body:
    return {part: storage.read_bytes(uri) for part, uri in uris.items()}


def _read_folder(uri: str) -> Body:
    """Read the parts of a frame in a folder of a bucket."""
    if not (files := storage.list_files(uri)):
        raise ObjectNotFound(f"{uri} has no part of a frame")
    return {PurePosixPath(storage.parse(each).name).stem: storage.read_bytes(each) for each in files}


def _last_name(text: str) -> str:
    where = storage.parse(text)
    return (where.member or where.path or where.bucket).rstrip("/").rsplit("/", 1)[-1] or "frames"


def _modality_at(path: Path) -> Modality:
    """Guess what a model takes that is only known by name, from the frames it is to get."""
    if path.is_file():
        return "image" if path.suffix.lower() in _IMAGES else "lidar"
    if path.is_dir():
        if any(path.glob("calibration.json")) or any(path.glob("*/calibration.json")):
            return "fusion"  # of several parts, whichever they are
        images, clouds = _has_frames(path, _IMAGES), _has_frames(path, _CLOUDS)
        if images and clouds:
            raise UndecodableFrame(
                f"{path} has images and point clouds, and this server does not describe its models; name the frames "
                f"by a pattern ('{path}/*.bin'), or ask the gateway (port 8000)"
            )
        return "image" if images else "lidar"
    return "lidar"


def _videos_in(folder: Path) -> list[Path]:
    """Videos of a folder without images."""
    if _has_frames(folder, _IMAGES):
        return []
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in video.SUFFIXES)


def _has_frames(folder: Path, suffixes: Sequence[str]) -> bool:
    return any(file.suffix.lower() in suffixes for file in folder.iterdir())


def _is_frame(path: Path, modality: Modality | None, kinds: tuple[str, ...]) -> bool:
    if path.is_dir():
        return (path / "calibration.json").is_file() or (path / "sweeps.json").is_file()
    return path.suffix.lower() in kinds and modality in (None, "lidar", "depth", "image")


def _kinds(modality: Modality | None, present: Sequence[str] = ()) -> tuple[str, ...]:
    if modality is None:
        return _IMAGES if any(suffix in _IMAGES for suffix in present) else (*_CLOUDS, *_IMAGES)
    return _IMAGES if modality in ("image", "mono3d", "multiview") else _CLOUDS


def _known() -> tuple[str, ...]:
    return (*_IMAGES, *_CLOUDS, *video.SUFFIXES)


def _suffix(name: str) -> str:
    return Path(name.partition("?")[0]).suffix.lower()


def _bare(name: str) -> str:
    return Path(name).stem or "frames"


def _etag(path: Path) -> str:
    """Size and time of change of a file, or of all files of a frame of several parts."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    found = [file.stat() for file in files if file.is_file()]
    return f"{sum(each.st_size for each in found):x}-{max((each.st_mtime_ns for each in found), default=0):x}"
