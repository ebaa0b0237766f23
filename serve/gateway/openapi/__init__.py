"""The API document at ``/openapi.json``: every request and answer, with examples."""

from serve.gateway.openapi.document import DESCRIPTION, complete, errors

__all__ = ["DESCRIPTION", "complete", "errors"]
