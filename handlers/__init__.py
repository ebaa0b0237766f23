"""TorchServe handlers: thin adapters over `serve.worker.handler`. Archives name these modules as their handler."""
