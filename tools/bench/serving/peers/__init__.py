"""The servers we compare ourselves with, each around the same model: batches of 16 at the most, one worker.

Every module here is run by the Python of `make bench-env`, which has those servers; none is imported by the rest.
"""
