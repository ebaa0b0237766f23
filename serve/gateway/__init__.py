"""The gateway: FastAPI in front of TorchServe, with batching that makes nobody wait.

A request is a straight line: middleware (id, key, log) → receiving (bytes to frames) → served model (batcher) →
backend → answering (outcomes to bytes). Imports no torch.
"""
