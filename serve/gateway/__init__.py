"""The gateway: FastAPI in front of TorchServe, with dynamic batching and no batching delay.

Path of a request: middleware (id, API key, log, metrics) → request (bytes to frames) → dispatch (deadline, disconnect)
→ models and batcher → backend → response (outcomes to bytes). Does not import torch.
"""
