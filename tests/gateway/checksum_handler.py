"""Handler for a real TorchServe without a model: answers every frame with its checksum.

Reads and answers framed batches as ours do. A frame ``die once PATH`` ends its worker the first time it is
seen, ``die`` always, ``hang once PATH`` stops its interpreter for a minute the first time it is seen, ``too large``
is out of memory unless it is alone, ``too large alone`` even then.
"""

import ctypes
import hashlib
import json
import os
import threading

from serve.errors import BadRequest, OutOfMemory
from serve.protocol.batch import OUTCOMES_CONTENT_TYPE, Outcomes, pack_outcomes, unpack_frames
from serve.settings import Settings
from serve.worker.server import listen
from serve.worker.watchdog import watchdog

SPEC = {"modality": "lidar", "parts": ["points"], "load_dim": 4, "box_type_3d": "LiDAR", "classes": ["Car"]}


class Checksum:
    def initialize(self, context):
        """Nothing to load."""
        self.one_at_a_time = threading.Lock()
        listen(Settings.from_environment().worker_sockets, self.answer_batch)

    def handle(self, data, context):
        if context.get_request_header(0, "describe") == "True":
            return [json.dumps(SPEC).encode()]
        answers = []
        for i, row in enumerate(data):
            try:
                frames = [bytes(frame) for frame, _ in unpack_frames(row["body"])]
                status, body = self.answer(frames)
            except BadRequest as error:
                status, body = (
                    400,
                    json.dumps({"error": {"code": "bad_request", "message": str(error)}}).encode(),
                )
            context.set_response_status(status, "OK" if status == 200 else "Failed", i)
            context.set_response_header(
                i, "content-type", OUTCOMES_CONTENT_TYPE if status == 200 else "application/json"
            )
            answers.append(body)
        return answers

    def answer_batch(self, body, compute_s):
        """A batch that came directly."""
        with self.one_at_a_time, watchdog(compute_s):
            status, answer = self.answer([bytes(frame) for frame, _ in unpack_frames(body)])
        if status != 200:
            raise OutOfMemory("it does not fit")
        return answer

    def answer(self, frames):
        for frame in frames:
            if frame.startswith((b"die once ", b"hang once ")):
                flag = frame.decode().partition(" once ")[2]
                if not os.path.exists(flag):
                    with open(flag, "w"):
                        pass
                    if frame.startswith(b"die"):
                        os._exit(1)
                    ctypes.PyDLL(None).sleep(60)  # and no other thread of Python's runs
            elif frame == b"die":
                os._exit(1)
        if b"too large alone" in frames or (b"too large" in frames and len(frames) > 1):
            return 507, json.dumps(
                {"error": {"code": "out_of_memory", "message": "it does not fit"}}
            ).encode()
        items = [
            (200, checksum(frame))
            if len(frame) % 16 == 0 or frame.startswith((b"die once", b"hang once", b"too large"))
            else BAD
            for frame in frames
        ]
        return 200, pack_outcomes(Outcomes(items, {"decode": 0.0, "inference": 0.0}))


BAD = (422, b'{"error":{"code":"undecodable_frame","message":"not a whole number of points"}}')


def checksum(frame):
    return json.dumps({"frame": hashlib.sha256(frame).hexdigest(), "points": len(frame) // 16}).encode()
