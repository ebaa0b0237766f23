"""Peer servers of the benchmark, each with the same model, batches of up to 16 and one worker.

The Python of `make bench-env`, which has those servers, runs these modules; no other module imports them.
"""
