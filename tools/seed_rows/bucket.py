"""The rows' data sets and checkpoints in a bucket of an S3 server on this machine."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.storage.servers import moto
from tools.seed_rows.work_folder import environment

__all__ = ["filled_bucket"]


@contextmanager
def filled_bucket(folder: Path) -> Iterator[dict[str, str]]:
    """Serve the rows' files as ``s3://bucket`` within the block; yields the variables by which clients find them.

    Args:
        folder: of the rows, prepared.
    """
    with moto() as endpoint:
        variables = {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "AKIAOFTHEROWS",
            "AWS_SECRET_ACCESS_KEY": "a-secret-of-the-rows",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        subprocess.run(
            ["bash", "-c", "python -m tools.seed_rows.checks upload"],
            cwd=folder,
            env={**environment(folder), **variables},
            check=True,
        )
        yield variables
