"""Call a gateway by gRPC with Triton's client, and print what it answers: the transcript of docs/grpc.md.

    python -m tools.grpc_calls --address 127.0.0.1:8001 --model second --cloud serve/assets/sample.bin

Needs the package tritonclient[grpc].
"""

from __future__ import annotations

import argparse
import queue
import time
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException


def main() -> None:
    """Print the transcript."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", default="127.0.0.1:8001", metavar="HOST:PORT")
    parser.add_argument("--model", default="second", metavar="NAME")
    parser.add_argument("--cloud", type=Path, default=Path("serve/assets/sample.bin"), metavar="FILE")
    args = parser.parse_args()
    points = np.fromfile(args.cloud, np.float32).reshape(-1, 4)
    with triton.InferenceServerClient(args.address) as client:
        _show("is_server_ready()", client.is_server_ready())
        _show("get_server_metadata()", client.get_server_metadata(as_json=True))
        _show(f"get_model_metadata({args.model!r})", client.get_model_metadata(args.model, as_json=True))
        config = client.get_model_config(args.model, as_json=True)["config"]
        _show(f"get_model_config({args.model!r})", {key: config[key] for key in ("name", "input")})
        index = client.get_model_repository_index(as_json=True)
        _show("get_model_repository_index()", index)
        frame = triton.InferInput("points", list(points.shape), "FP32")
        frame.set_data_from_numpy(points)
        result = client.infer(args.model, [frame], request_id="one", parameters={"score_thr": "0.3"})
        _show(f"infer({args.model!r}, points {list(points.shape)})", result.get_response().id)
        for name in ("num_detections", "scores_3d", "labels_3d", "bboxes_3d"):
            print(f"  {name} {np.array2string(result.as_numpy(name)[:3], precision=3, separator=', ')}")
        _stream(client, args.model, frame, points)
        try:
            client.infer("nobody", [frame])
        except InferenceServerException as error:
            _show("infer('nobody', …)", f"{error.status()} {error.message()}")
        (found,) = client.get_inference_statistics(args.model).model_stats
        counts = (found.inference_count, found.execution_count, found.inference_stats.fail.count)
        _show("get_inference_statistics: frames, batches, failed", counts)


def _stream(client: Any, model: str, frame: Any, points: Any) -> None:
    """Send frames of falling size and a wrong one on one stream, and print what comes back, in order."""
    results: queue.Queue[tuple[Any, Any]] = queue.Queue()
    began = time.perf_counter()
    client.start_stream(lambda result, error: results.put((result, error)))
    for number, share in enumerate((1, 2, 4)):
        part = triton.InferInput("points", [len(points) // share, 4], "FP32")
        part.set_data_from_numpy(np.ascontiguousarray(points[: len(points) // share]))
        client.async_stream_infer(model, [part], request_id=f"frame-{number}")
    wrong = triton.InferInput("points", [1, 5], "FP32")
    wrong.set_data_from_numpy(np.zeros((1, 5), np.float32))
    client.async_stream_infer(model, [wrong], request_id="wrong")
    client.async_stream_infer(model, [frame], request_id="last")
    print(">>> start_stream, 5 times async_stream_infer")
    for _ in range(5):
        result, error = results.get(timeout=60)
        after_s = time.perf_counter() - began
        if error is not None:
            print(f"  {after_s:.2f} s error: {error.message()}")
        else:
            print(
                f"  {after_s:.2f} s {result.get_response().id}: {result.as_numpy('num_detections')[0]} detections"
            )
    client.stop_stream()


def _show(call: str, found: object) -> None:
    print(f">>> {call}\n{found}")


if __name__ == "__main__":
    main()
