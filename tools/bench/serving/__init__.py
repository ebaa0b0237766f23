"""Serving measured from outside: one bounded load, several servers with the same model, in turns."""
