"""Worker that runs upstream's mmdet / mmdet3d in a Python of its own, controlled by lines of JSON.

`tools.bench.reference.process` runs it by path: its Python need not have this project. It reads one JSON object per
line from standard input and answers with one line; between lines it blocks, so that it uses no CPU while another
process is measured. Output of libraries goes to standard error.

Commands (``do``): ``load`` (config, checkpoint, device), ``run`` (frame: path), ``layers`` (frame, file: outputs of
all sparse convolutions, sorted by voxel, as ``.npz``). A failed command answers with ``error``, a message. End of
input ends the process.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

BOX_TYPES = {
    "LiDARInstance3DBoxes": "LiDAR",
    "CameraInstance3DBoxes": "Camera",
    "DepthInstance3DBoxes": "Depth",
}


def main() -> int:
    """Answer lines until the end of input."""
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        warnings.simplefilter("ignore")
        side = ReferenceWorker()
        for line in sys.stdin:
            asked = json.loads(line)
            try:
                answer = getattr(side, asked.pop("do"))(**asked)
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
    return 0


class ReferenceWorker:
    """One model and the commands on it."""

    def __init__(self) -> None:
        """Import nothing before the first `load`, so that failed imports become answers."""
        self.stages = _load_stages()
        self.network: Any = None
        self.detect: Any = None
        self.device = "cpu"

    def load(self, config: str, checkpoint: str, device: str) -> dict[str, Any]:
        """Build the model with upstream's own function; return kernels, threads and versions."""
        import torch

        kernels = _kernels()
        import mmdet
        from mmengine.config import Config

        parsed = Config.fromfile(config)
        if parsed.get("default_scope") == "mmdet3d":
            import mmdet3d
            from mmdet3d.apis import inference_detector, init_model

            self.network = init_model(parsed, checkpoint, device=device)
            self.detect = lambda frame: inference_detector(self.network, frame)[0].pred_instances_3d
            name, version = "mmdet3d", mmdet3d.__version__
        else:
            from mmdet.apis import inference_detector, init_detector

            self.network = init_detector(parsed, checkpoint, device=device)
            self.detect = lambda frame: inference_detector(self.network, frame).pred_instances
            name, version = "mmdet", mmdet.__version__
        self.device = device
        sparse = sorted({type(layer).__module__.split(".")[0] for layer in self._sparse_layers().values()})
        return {
            "kernels": kernels,
            "sparse": ", ".join(sparse) or None,
            "threads": torch.get_num_threads(),
            "versions": {"torch": torch.__version__, name: version},
        }

    def run(self, frame: str) -> dict[str, Any]:
        """Detect in a file; return seconds by stage and the detections."""
        import torch

        stopwatch = self.stages.Stopwatch(
            torch.cuda.synchronize if self.device.startswith("cuda") else lambda: None
        )
        with self.stages.time_stages(self.network, stopwatch):
            started = time.perf_counter()
            found = self.detect(frame)
            total = time.perf_counter() - started
        return {"seconds": {**stopwatch.seconds, "total": total}, "answer": _plain(found)}

    def layers(self, frame: str, file: str) -> dict[str, Any]:
        """Run a frame and write the output of each sparse convolution to `file`."""
        import numpy as np

        kept: dict[str, Any] = {}

        def keep(name: str) -> Any:
            def hook(layer: Any, inputs: Any, output: Any) -> None:
                # Copy: an in-place ReLU may follow.
                kept[name] = (output.indices.cpu().numpy().copy(), output.features.cpu().numpy().copy())

            return hook

        hooks = [layer.register_forward_hook(keep(name)) for name, layer in self._sparse_layers().items()]
        try:
            self.detect(frame)
        finally:
            for hook in hooks:
                hook.remove()
        written = {}
        for name, (places, features) in kept.items():
            order = np.lexsort(places.T[::-1])
            written[f"{name}/places"], written[f"{name}/features"] = places[order], features[order]
        np.savez(file, **written)
        return {"layers": list(kept)}

    def _sparse_layers(self) -> dict[str, Any]:
        """Find the sparse convolutions of spconv or mmcv, by name."""
        return {
            name: layer
            for name, layer in self.network.named_modules()
            if any(base.__name__ == "SparseConvolution" for base in type(layer).__mro__)
        }


def _kernels() -> str:
    """Import mmcv's extension, or install our kernels; return ``compiled`` or ``portable``."""
    try:
        import mmcv._ext as extension
    except ImportError:
        from serve import ops

        ops.install()
        import mmcv._ext as extension
    return "portable" if hasattr(extension, "PORTABLE") else "compiled"


def _plain(found: Any) -> dict[str, Any]:
    """Convert instances of mmdet or mmdet3d to lists."""
    if "bboxes_3d" in found:
        boxes = found.bboxes_3d
        return {
            "bboxes_3d": boxes.tensor.float().cpu().tolist(),
            "scores_3d": found.scores_3d.float().cpu().tolist(),
            "labels_3d": found.labels_3d.cpu().tolist(),
            "box_type_3d": BOX_TYPES.get(type(boxes).__name__, type(boxes).__name__),
        }
    return {
        "bboxes": getattr(found.bboxes, "tensor", found.bboxes).float().cpu().tolist(),
        "scores": found.scores.float().cpu().tolist(),
        "labels": found.labels.cpu().tolist(),
    }


def _load_stages() -> Any:
    """Load `serve.verify.stages` by path: this Python may not have the package."""
    spec = importlib.util.spec_from_file_location(
        "bench_stages", Path(__file__).parents[3] / "serve" / "verify" / "stages.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        raise SystemExit(main())
