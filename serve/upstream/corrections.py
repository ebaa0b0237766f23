"""Corrections of single functions of upstream's programs, applied between loading and running them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from serve.errors import DownloadError, SettingsError

__all__ = ["correct_download", "correct_images2coco"]

# Those of upstream's download_dataset.py, which ends without an error for other names.
_DATA_SETS = (
    *("coco2017", "coco2014", "lvis", "voc2007", "voc2012", "balloon", "objects365v2", "ade20k_2016"),
    "refcoco",
)


def correct_images2coco(program: ModuleType) -> None:
    """Accept ``--exclude-extensions``: upstream passes the list to `str.endswith`, which takes a tuple."""
    collect = program.collect_image_infos

    def collect_image_infos(path: str, exclude_extensions: Iterable[str] | None = None) -> Any:
        if not Path(path).is_dir():
            raise SettingsError(f"the folder {path} does not exist; name the folder with the pictures")
        wanted = None if exclude_extensions is None else tuple(name.lower() for name in exclude_extensions)
        return collect(path, wanted)

    program.__dict__["collect_image_infos"] = collect_image_infos


def correct_download(program: ModuleType) -> None:
    """End with an error if a file does not arrive: upstream's threads keep their exceptions to themselves."""
    start = program.main
    parse = program.parse_args

    def parse_args() -> Any:
        args = parse()
        if args.dataset_name not in _DATA_SETS:
            raise SettingsError(
                f"there is no data set '{args.dataset_name}'; there are {', '.join(_DATA_SETS)}"
            )
        return args

    def main() -> None:
        try:
            start()
        except OSError as error:  # also urllib's errors
            raise DownloadError(
                f"the data set was not downloaded completely: {error}; run the command again"
            ) from error

    program.__dict__.update(ThreadPool=_raising_pool(program.ThreadPool), parse_args=parse_args, main=main)


def _raising_pool(pool: Any) -> Any:
    """Subclass of a thread pool whose `imap` runs everything and raises the first exception."""

    class RaisingPool(pool):  # type: ignore[misc]
        def imap(
            self, function: Callable[[Any], Any], items: Iterable[Any], chunksize: int = 1
        ) -> Iterator[Any]:
            return iter(self.map(function, items, chunksize))

    return RaisingPool
