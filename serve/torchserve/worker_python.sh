#!/bin/sh
# Python as TorchServe starts it for a worker, with the search path of `serve.torchserve.java.worker_python`.
export PYTHONPATH="$_MMDET3D_SERVE_PYTHONPATH"
exec "$_MMDET3D_SERVE_PYTHON" "$@"
