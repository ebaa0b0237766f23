"""Code that runs in TorchServe's Python process: handler, socket server, watchdog."""
