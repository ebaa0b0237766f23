"""The page at ``/``, the API documentation at ``/docs``, and what they need of the server.

Sources in ``source/``, assets built of them by ``make ui`` in ``built/`` (docs/ui.md, docs/decisions/0027-page.md).
"""
