"""An S3 server, as for the tests of storage."""

from tests.storage.conftest import *  # noqa: F403
