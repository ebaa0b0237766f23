"""The commands around storage: fetch a store of archives, pack a folder of frames. Knows arguments and words only."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from serve import model_store
from serve.storage.packed_folder import pack_folder

__all__ = ["bench_storage", "fetch_models", "pack"]


def fetch_models(argv: Sequence[str] | None) -> int:
    """``fetch-models --from s3://bucket/models --to DIR``: bring archives into a folder, hashes checked."""
    parser = argparse.ArgumentParser(
        description="Bring the archives (.mar) of a bucket into a folder for TorchServe. Each is checked against the "
        "sha256 that it was uploaded with and against the hashes inside it before it takes its place; one that is "
        "there already is not fetched again. Credentials: the environment, `aws configure` or the machine's role.",
    )
    parser.add_argument("--from", dest="source", required=True, metavar="URI", help="s3://bucket/models")
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="model store; made if missing")
    parser.add_argument(
        "--models", nargs="+", default=[], metavar="NAME", help="only these, without .mar (default: all)"
    )
    args = parser.parse_args(argv)
    for one in model_store.fetch(args.source, args.to, args.models, report=_tell_fetched):
        if not one.carried_hash:
            print(
                f"note: the store does not say what {one.path.name} should hash to; only the hashes inside it were "
                "compared. Archives uploaded by `make archive STORE=s3://…` carry theirs",
                file=sys.stderr,
            )
    return 0


def _tell_fetched(one: model_store.Fetched) -> None:
    what = "there already" if one.was_there else f"fetched, {one.path.stat().st_size / 1e6:.1f} MB"
    print(f"{one.path} ({what})  sha256 {one.sha256}", flush=True)


def pack(argv: Sequence[str] | None) -> int:
    """``pack FOLDER OUT.ffr``: many small files into one."""
    parser = argparse.ArgumentParser(
        description="Pack a folder, with all folders in it, into one FFRecord file, which ffrecord.PackedFolder, "
        "backend='ffrecord' in configs and ffrecord://OUT.ffr#name in our commands read."
    )
    parser.add_argument("folder", type=Path, help="what to pack; links are followed")
    parser.add_argument("out", type=Path, help="the file to make (.ffr), outside of the folder")
    parser.add_argument("-f", "--force", action="store_true", help="replace an existing file")
    args = parser.parse_args(argv)
    if args.out.exists() and not args.force:
        parser.error(f"{args.out} exists; replace it with --force")
    bar: tqdm[Any]
    with tqdm(unit="file", desc="packing", disable=None, leave=False) as bar:
        count = pack_folder(args.folder, args.out, progress=lambda done, total: _tick(bar, done, total))
    print(f"packed {count} files into {args.out} ({args.out.stat().st_size / 1e6:.1f} MB)")
    return 0


def _tick(bar: tqdm[Any], done: int, total: int) -> None:
    bar.total = total
    bar.update(done - bar.n)


def bench_storage(argv: Sequence[str] | None) -> int:
    """``bench-storage``: measure, print a table and then one line of JSON."""
    parser = argparse.ArgumentParser(
        description="Time reads of s3:// beside boto3's own, random reads of FFRecord beside pread, and packing. "
        "Everything happens on this machine; prints a table and then one line of JSON."
    )
    parser.add_argument(
        "--object-mb",
        type=int,
        default=1000,
        help="size of the object, MB of 10^6 bytes (default: %(default)s)",
    )
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds (default: %(default)s)")
    parser.add_argument(
        "--pack",
        nargs="+",
        type=int,
        default=[1000, 3000, 10000],
        metavar="N",
        help="files to pack (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    from serve.benchmark import storage

    result = storage.run(object_bytes=args.object_mb * 10**6, rounds=args.rounds, pack_counts=args.pack)
    print(result.table())
    print(result.json_line(), flush=True)
    return 0
