"""Archives whose config makes a registered class, or mmengine's registry, do more than build a network.

Each case would leave a trace: a file, or a connection. None may, and the archive is refused; with trust it may.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from serve import archive
from serve.errors import ArchiveError, InferenceFailed
from serve.protocol.options import FrameOptions
from serve.runtime import load_detector
from serve.runtime.build_guard import BuildGuard
from serve.runtime.selftest import self_test
from serve.settings import Limits


class Touch:
    """Pickled, it makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def touch(trace: Path) -> str:
    return f"open({str(trace)!r}, 'w')"


def as_step(config: Any, step: dict[str, Any]) -> None:
    config["test_dataloader"]["dataset"]["pipeline"].insert(1, step)


def as_coder(config: Any, part: dict[str, Any]) -> None:
    config["model"]["bbox_head"]["bbox_coder"] = part


def camera_motion(config: Any, trace: Path, url: str) -> None:
    as_coder(
        config,
        {"type": "mmdet.CameraMotionCompensation", "warp_mode": f"{touch(trace)} and cv2.MOTION_EUCLIDEAN"},
    )


def database_sampler(config: Any, trace: Path, url: str) -> None:
    info = trace.parent / "infos.pkl"
    info.write_bytes(pickle.dumps({"Car": [Touch(trace)]}))
    sampler = {
        "type": "DataBaseSampler",
        "data_root": str(trace.parent),
        "info_path": str(info),
        "rate": 1.0,
        "prepare": {},
        "sample_groups": {"Car": 1},
        "classes": ["Car"],
    }
    as_step(config, {"type": "ObjectSample", "db_sampler": sampler})


def teacher_file(config: Any, trace: Path, url: str) -> None:
    file = trace.parent / "teacher.py"
    file.write_text(f"model = dict(type='FPN')\n{touch(trace)}\n")
    config["model"] = {
        "type": "mmdet.KnowledgeDistillationSingleStageDetector",
        "_scope_": "mmdet",
        "teacher_config": str(file),
        "backbone": {"type": "mmdet.ResNet", "depth": 18},
        "neck": {"type": "mmdet.FPN", "in_channels": [64, 128, 256, 512], "out_channels": 8, "num_outs": 5},
        "bbox_head": {"type": "mmdet.RetinaHead", "num_classes": 1, "in_channels": 8, "feat_channels": 8},
    }


def checkpoint_by_url(config: Any, trace: Path, url: str) -> None:
    as_coder(config, {"type": "mmdet.AppearanceFreeLink", "checkpoint": f"{url}/linker.pth"})


def runner(config: Any, trace: Path, url: str) -> None:
    as_coder(
        config, {"type": "mmengine.runner.Runner", "model": {"type": "ToyModel"}, "work_dir": str(trace)}
    )


ATTACKS: dict[str, Callable[[Any, Path, str], None]] = {
    attack.__name__: attack
    for attack in (
        camera_motion,
        database_sampler,
        teacher_file,
        checkpoint_by_url,
        runner,
    )
}


def hostile_archive(folder: Path, demo: Any, change: Callable[[Any], object]) -> archive.Archive:
    """Write the demo model with a changed config, as its author would, and open it."""
    config = demo.config()
    change(config)
    archive.write(
        folder / "hostile.mar",
        replace(demo.metadata, files={}),
        config=config,
        weights=demo.weights,
        golden_frame=demo.golden_frame(),
        golden_expected=demo.golden_expected(),
    )
    return archive.extract(folder / "hostile.mar", folder / "opened")


@pytest.fixture
def web():
    """A server that notes whether anyone connected; yields (URL, event)."""
    connected = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.1)
        stop = threading.Event()

        def serve() -> None:
            while not stop.is_set():
                try:
                    peer, _ = listener.accept()
                except TimeoutError:
                    continue
                connected.set()
                peer.close()

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", connected
        stop.set()
        thread.join()


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())
def test_class_that_does_more_than_build_is_refused_with_event_and_key(tmp_path, demo_archive, web, attack):
    url, connected = web
    trace = tmp_path / "trace"
    opened = hostile_archive(tmp_path, demo_archive, lambda config: attack(config, trace, url))
    with pytest.raises(
        ArchiveError, match=r"(model|test_dataloader)\S* .*causes '[\w.]+'.*TRUST_ARCHIVE_CODE"
    ):
        load_detector(opened, torch.device("cpu"))
    assert not trace.exists() and not connected.is_set()


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())
def test_attack_works_on_a_trusted_archive(tmp_path, demo_archive, web, attack):
    """The cases are not refused for another reason: with trust, each leaves its trace."""
    url, connected = web
    trace = tmp_path / "trace"
    opened = hostile_archive(tmp_path, demo_archive, lambda config: attack(config, trace, url))
    try:
        load_detector(opened, torch.device("cpu"), trust_code=True)
    except Exception as error:  # what comes after the trace
        print(f"{type(error).__name__}: {error}")
    assert trace.exists() or connected.is_set()


SCOPES = {
    "scope of the model": lambda config, name: config["model"].update(_scope_=name),
    "scope of a part": lambda config, name: config["model"]["backbone"].update(_scope_=name),
    "type of a part": lambda config, name: config["model"]["backbone"].update(type=f"{name}.Net"),
    "module of a type": lambda config, name: config["model"]["backbone"].update(type=f"{name}.registry.Net"),
    "scope of a step": lambda config, name: config["test_dataloader"]["dataset"]["pipeline"][-1].update(
        _scope_=name
    ),
    "type of a step": lambda config, name: as_step(config, {"type": f"{name}.Step"}),
    "default scope": lambda config, name: config.update(default_scope=name),
    "custom_imports": lambda config, name: config.update(custom_imports={"imports": [f"{name}.registry"]}),
    "custom_imports that may fail": lambda config, name: config.update(
        custom_imports={"imports": f"{name}.registry", "allow_failed_imports": True}
    ),
}


@pytest.mark.parametrize("place", SCOPES.values(), ids=SCOPES.keys())
def test_config_does_not_import_a_module_by_name(tmp_path, demo_archive, monkeypatch, place):
    trace = tmp_path / "trace"
    name = "stranger"
    module = tmp_path / "installed" / name
    module.mkdir(parents=True)
    (module / "registry.py").write_text(touch(trace))
    monkeypatch.syspath_prepend(str(module.parent))
    opened = hostile_archive(tmp_path, demo_archive, lambda config: place(config, name))
    with contextlib.suppress(ArchiveError):  # a scope that is unknown means the present one
        load_detector(opened, torch.device("cpu"))
    assert not trace.exists()
    assert not [module for module in sys.modules if module.split(".")[0] == name]


def test_folder_of_an_archive_is_taken_off_the_search_path(tmp_path, demo_mar, monkeypatch):
    root = tmp_path / "opened"
    monkeypatch.setenv("PYTHONPATH", f"{root}:{tmp_path}")
    monkeypatch.setattr(sys, "path", ["", str(root), str(root / "golden"), *sys.path, f"{root}/extra/.."])
    root.mkdir()
    monkeypatch.chdir(root)  # as TorchServe's workers
    archive.extract(demo_mar, root)
    assert "" not in sys.path and not [place for place in sys.path if str(root) in place]
    assert os.environ["PYTHONPATH"] == str(tmp_path)
    with pytest.raises(ImportError):
        __import__("golden.registry")


def test_refusal_that_the_network_swallows_still_fails_the_build(tmp_path):
    guard = BuildGuard(tmp_path, {})
    with pytest.raises(ArchiveError, match="'open'"), guard, contextlib.suppress(Exception):
        (tmp_path / "x").write_text("")
    assert not (tmp_path / "x").exists()


HARMFUL = {
    "reading a file": lambda folder: open("/etc/passwd").close(),
    "reading a file of the archive": lambda folder: (folder / "model.json").read_bytes(),
    "writing": lambda folder: (folder / "x").write_text(""),
    "deleting": lambda folder: (folder / "model.json").unlink(),
    "a folder": lambda folder: (folder / "x").mkdir(),
    "eval": lambda folder: eval("1 + 1"),
    "exec": lambda folder: exec("x = 1"),
    "a program": lambda folder: __import__("subprocess").run(["true"], check=True),
    "system": lambda folder: os.system("true"),
    "a fork": lambda folder: os.fork() or os._exit(0),
    "a connection": lambda folder: socket.create_connection(("127.0.0.1", 9)),
    "a name server": lambda folder: socket.getaddrinfo("example.org", 80),
    "a library": lambda folder: __import__("ctypes").CDLL(None),
    "a thread": lambda folder: threading.Thread(target=print).start(),
    "a pickle": lambda folder: pickle.loads(pickle.dumps(Path("x"))),
    "a checkpoint": lambda folder: torch.load(folder / "model.json"),
    "the environment": lambda folder: os.putenv("X", "1"),
    "a signal": lambda folder: os.kill(0, 0),
}  # fmt: skip


@pytest.mark.parametrize("act", HARMFUL.values(), ids=HARMFUL.keys())
def test_guard_refuses_what_a_network_does_not_need(tmp_path, act):
    import ctypes  # noqa: F401  (imported before, so that its use is tried and not its import)
    import subprocess  # noqa: F401

    (tmp_path / "model.json").write_text("{}")
    with pytest.raises(ArchiveError, match="not trusted"), BuildGuard(tmp_path, {}):
        act(tmp_path)
    assert (tmp_path / "model.json").exists() and not (tmp_path / "x").exists()


def test_guard_watches_its_own_thread_only_and_until_it_ends(tmp_path):
    inside, done = threading.Event(), threading.Event()
    written: list[str] = []

    def beside() -> None:
        inside.wait()
        (tmp_path / "beside").write_text("x")
        written.append("beside")
        done.set()

    thread = threading.Thread(target=beside)
    thread.start()
    with BuildGuard(tmp_path, {}):
        inside.set()
        assert done.wait(10)
    thread.join()
    (tmp_path / "after").write_text("x")
    assert written == ["beside"] and (tmp_path / "after").exists()


def test_guarded_model_passes_its_self_test(demo_archive):
    detector = load_detector(demo_archive, torch.device("cpu"))
    assert self_test(detector, demo_archive) > 0


@pytest.fixture
def patient_step():
    """A registered step that leaves its golden frame alone, and writes a file for any other; yields its name."""
    from mmdet3d.registry import TRANSFORMS

    class PatientStep:
        def __init__(self, trace: str) -> None:
            self.trace = trace
            self.points: int | None = None

        def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
            points = len(results["points"])
            if self.points not in (None, points):
                Path(self.trace).write_text("x")
            self.points = self.points or points
            return results

    TRANSFORMS.register_module(module=PatientStep)
    yield "PatientStep"
    TRANSFORMS.module_dict.pop("PatientStep")


def test_step_that_waits_for_another_frame_than_the_golden_one_is_refused(
    tmp_path, demo_archive, patient_step
):
    trace = tmp_path / "trace"
    step = {"type": patient_step, "trace": str(trace)}
    opened = hostile_archive(tmp_path, demo_archive, lambda config: as_step(config, step))
    detector = load_detector(opened, torch.device("cpu"))
    self_test(detector, opened)
    golden = opened.golden_frame()
    frames = [
        detector.decode(body, FrameOptions(), Limits()) for body in (golden, golden[: len(golden) // 2])
    ]
    good, refused = detector.run(frames)
    assert isinstance(refused, InferenceFailed) and not trace.exists()
    assert isinstance(good, dict) and good["names"]
