"""Commands of ``python -m tools.simulation``."""
