"""``python -m tools.demo NAME``: train, evaluate and track with the demo SECOND, write synthetic scenes."""

from __future__ import annotations

from tools.commands import dispatch

COMMANDS = {
    "train": ("tools.demo.train_command", "train the demo SECOND on synthetic scenes"),
    "evaluate": ("tools.demo.evaluate_command", "average precision on held-out synthetic scenes"),
    "picture": ("tools.demo.picture_command", "draw a scene as a camera and from above, with its detections"),
    "tracks": ("tools.demo.tracks_command", "CLEAR MOT of its tracks over a synthetic sequence"),
    "scene": ("tools.demo.scene_command", "write one synthetic LiDAR frame"),
}

if __name__ == "__main__":
    raise SystemExit(dispatch("python -m tools.demo", COMMANDS))
