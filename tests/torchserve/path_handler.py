"""Handler for a real TorchServe: answers where it runs, and which of its modules and folders lie there."""

import json
import os
import sys


class Handler:
    def initialize(self, context):
        import logging.handlers  # noqa: F401
        import uuid  # noqa: F401

    def handle(self, data, context):
        here = os.path.realpath(os.getcwd())
        files = [getattr(module, "__file__", None) for module in [*sys.modules.values()]]
        places = [os.path.realpath(place or os.curdir) for place in [*sys.path, *filter(None, files)]]
        inside = [place for place in places if place.startswith(here) and os.path.exists(place)]
        return [json.dumps({"here": here, "inside": inside}).encode() for _ in data]
