"""Training and testing by upstream's own programs, on data sets of a few frames."""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from tests.conftest import accept_ctrl_c
from tests.upstream.made_data import detector_config, write_coco
from tests.upstream.old_training import OLD_2D, OLD_3D
from tools.seed_rows.work_folder import SLURM

ROOT = Path(__file__).parents[2]


def command(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run ``mmdet3d-serve ARGUMENTS`` in `folder`."""
    return subprocess.run(
        [sys.executable, "-m", "serve", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
        capture_output=True,
        text=True,
        timeout=280,
    )


def passed(ran: subprocess.CompletedProcess[str]) -> str:
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-3000:]
    return ran.stdout + ran.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Folder with data, a config, and a checkpoint of one epoch."""
    place = tmp_path_factory.mktemp("life")
    write_coco(place / "coco")
    detector_config(place, place / "coco")
    passed(command(place, "train", "tiny.py", "--no-validate", "--samples-per-gpu", "4"))
    return place


CHECKPOINT = "work_dirs/tiny/epoch_1.pth"


@pytest.mark.slow
def test_training_resumes_from_its_own_checkpoint(folder):
    shown = passed(
        command(folder, "train", "tiny.py", "--work-dir", "resumed", "--resume-from", CHECKPOINT, "--no-validate",
                "--options", "runner.max_epochs=2")
    )  # fmt: skip
    assert "resumed epoch: 1, iter: 1" in shown
    assert (folder / "resumed" / "epoch_2.pth").is_file()
    assert not (folder / "resumed" / "epoch_1.pth").exists()


@pytest.mark.slow
def test_former_flags_of_testing_give_classwise_figures_and_a_result_file(folder):
    shown = passed(
        command(
            folder,
            "test",
            "tiny.py",
            CHECKPOINT,
            "--eval",
            "bbox",
            "--options",
            "classwise=True",
            "--out",
            "r.pkl",
        )
    )
    assert "coco/square_precision" in shown and "coco/bbox_mAP" in shown
    assert (folder / "r.pkl").stat().st_size > 0


@pytest.mark.slow
def test_format_only_writes_the_file_for_the_evaluation_server(folder):
    passed(
        command(
            folder, "test", "tiny.py", CHECKPOINT, "--format-only", "--options", "jsonfile_prefix=./testdev"
        )
    )
    found = json.loads((folder / "testdev.bbox.json").read_text())
    assert all({"image_id", "bbox", "score", "category_id"} <= set(entry) for entry in found)


BAD_INPUT = {
    "checkpoint": (["missing.pth"], "missing.pth"),
    "root": ([CHECKPOINT, "--cfg-options", "test_dataloader.dataset.data_root=nowhere"], "nowhere"),
    "annotations": ([CHECKPOINT, "--cfg-options", "test_dataloader.dataset.ann_file=none.json"], "none.json"),
    "layout": ([CHECKPOINT, "--cfg-options", "test_dataloader.dataset.data_prefix.img=pictures"], "pictures"),
    "metric": ([CHECKPOINT, "--cfg-options", "test_evaluator.ann_file=none.json"], "none.json"),
    "classes": ([CHECKPOINT, "--cfg-options", "model.roi_head.bbox_head.num_classes=3"], "num_classes is 3"),
    "shape": ([CHECKPOINT, "--cfg-options", "model.roi_head.bbox_head.fc_out_channels=32"], "bbox_head"),
    "model": (
        [
            CHECKPOINT,
            "--cfg-options",
            "model.backbone.depth=50",
            "model.neck.in_channels=[256,512,1024,2048]",
        ],
        "another model",
    ),
    # Labels of the classes behind the missing one would shift.
    "category": (
        [CHECKPOINT, "--cfg-options", "test_dataloader.dataset.ann_file=fewer.json"],
        "1 of the 2 classes",
    ),
    "truncated": (
        [CHECKPOINT, "--cfg-options", "test_dataloader.dataset.ann_file=truncated.json"],
        "truncated.json: JSONDecodeError",
    ),
    "truncated metric": (
        [CHECKPOINT, "--cfg-options", "test_evaluator.ann_file=coco/truncated.json"],
        "metrics of the config",
    ),
    "no name for files": ([CHECKPOINT, "--format-only"], "outfile_prefix"),
    "predictions of another format": ([CHECKPOINT, "--out", "r.json"], ".pkl"),
    "no frames": (
        [CHECKPOINT, "--cfg-options", "test_dataloader.dataset.ann_file=no_frames.json"],
        "has no frames",
    ),
}
BAD_TRAINING = {
    "no load_from": (["--load-from", "missing.pth"], "missing.pth"),
    "load_from of another model": (["--load-from", "other.pth"], "0 of the"),
    "resume of another model": (
        ["--resume-from", CHECKPOINT, "--options", "model.roi_head.bbox_head.fc_out_channels=32"],
        "another model",
    ),
    "truncated": (
        ["--options", "train_dataloader.dataset.ann_file=truncated.json"],
        "truncated.json: JSONDecodeError",
    ),
    "truncated validation": (
        ["--options", "val_dataloader.dataset.ann_file=truncated.json"],
        "truncated.json: JSONDecodeError",
    ),
}


@pytest.mark.slow
def test_bad_input_is_one_sentence_and_leaves_nothing(folder):
    content = json.loads((folder / "coco" / "annotations.json").read_text())
    whole = content["categories"]
    content["categories"] = whole[1:]
    (folder / "coco" / "fewer.json").write_text(json.dumps(content))
    (folder / "coco" / "truncated.json").write_text(json.dumps(content)[:500])
    (folder / "coco" / "no_frames.json").write_text(
        json.dumps({**content, "images": [], "annotations": []} | {"categories": whole})
    )
    torch.save({"state_dict": {"other.weight": torch.ones(1)}}, folder / "other.pth")
    before = sorted(path for path in folder.rglob("*") if "__pycache__" not in path.parts)
    # All in one process, so that each also finds what the one before it has left there.
    lines = [["test", "tiny.py", *arguments, "--work-dir", "bad"] for arguments, _ in BAD_INPUT.values()]
    lines += [["train", "tiny.py", *arguments, "--work-dir", "bad"] for arguments, _ in BAD_TRAINING.values()]
    lines.append(["test", "tiny.py", CHECKPOINT, "--work-dir", "good"])
    code = "import json, sys; from serve.cli.main import main; print([main(line) for line in json.loads(sys.argv[1])])"
    ran = subprocess.run(
        [sys.executable, "-c", code, json.dumps(lines)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    bad = {**BAD_INPUT, **{f"training: {name}": case for name, case in BAD_TRAINING.items()}}
    assert ran.stdout.splitlines()[-1] == str([2] * len(bad) + [0]), ran.stderr[-3000:]
    assert "Traceback" not in ran.stderr
    errors = [line for line in ran.stderr.splitlines() if line.startswith("error: ")]
    for error, (name, (_, named)) in zip(errors, bad.items(), strict=True):
        assert named in error, (name, error)
    after = (path for path in folder.rglob("*") if "__pycache__" not in path.parts)
    assert sorted(path for path in after if "good" not in path.relative_to(folder).parts) == before


@pytest.mark.slow
def test_two_processes_train_on_the_cpu(folder):
    # A port in the config is Slurm's.
    port = ["--cfg-options", "env_cfg.dist_cfg.port=29500"]
    shown = passed(
        command(
            folder,
            "tools",
            "dist_train",
            "tiny.py",
            "2",
            "--work-dir",
            "two",
            "--no-validate",
            *port,
            PORT="",
        )
    )
    assert "Epoch(train) [1][1/1]" in shown  # four pictures, two a process
    assert (folder / "two" / "epoch_1.pth").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT], ids=lambda ending: ending.name)
def test_no_process_outlives_a_training_that_is_ended(folder, ending):
    training = subprocess.Popen(
        [sys.executable, "-m", "serve", "train", "tiny.py", "--gpus", "2", "--no-validate",
         "--work-dir", f"ended-{ending.name}", "--options", "runner.max_epochs=1000"],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, preexec_fn=accept_ctrl_c, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    with training:
        assert any("Epoch(train)" in line for line in training.stdout)
        started = psutil.Process(training.pid).children(recursive=True)
        assert len(started) >= 3  # torchrun and its two processes
        training.send_signal(ending)
        gone, alive = psutil.wait_procs(started, timeout=100)
        for process in alive:
            process.kill()
        assert (len(gone), alive) == (len(started), [])
    assert training.returncode == (-signal.SIGKILL if ending == signal.SIGKILL else 130)
    assert not list((folder / f"ended-{ending.name}").glob("*.unfinished"))


@pytest.mark.slow
def test_tasks_of_slurm_meet_at_the_port_of_old_options(folder, tmp_path, free_ports):
    (port,) = free_ports(1)
    for name, text in SLURM.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    shown = passed(
        command(folder, "tools", "slurm_train", "dev", "job", "tiny.py", "slurm", "--no-validate",
                "--options", f"dist_params.port={port}", GPUS="2", GPUS_PER_NODE="2",
                PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    )  # fmt: skip
    assert "Epoch(train) [1][1/1]" in shown  # four pictures, two a task
    assert (folder / "slurm" / "epoch_1.pth").is_file()
    assert f"port={port}" in (folder / "slurm" / "tiny.py").read_text()


@pytest.mark.slow
def test_a_checkpoint_that_does_not_fit_on_the_disk_leaves_nothing_and_a_former_one_stays(folder):
    limited = (
        "import resource, sys; from serve.cli.main import main; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY)); sys.exit(main(sys.argv[1:]))"
    )
    former = folder / "full" / "epoch_1.pth"
    former.parent.mkdir()
    former.write_bytes(b"former")
    ran = subprocess.run(
        [sys.executable, "-c", limited, "train", "tiny.py", "--no-validate", "--work-dir", "full"],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert ran.returncode == 2, ran.stderr[-3000:]
    assert ran.stderr.splitlines()[-1].startswith("error: ") and "Traceback" not in ran.stderr
    assert former.read_bytes() == b"former"
    assert not list((folder / "full").glob("*.unfinished"))


@pytest.mark.slow
def test_published_weights_are_named_by_their_hash_and_test_alike(folder):
    from serve.storage.hashes import sha256_of

    passed(command(folder, "tools", "publish_model", CHECKPOINT, "depth.pth"))
    (made,) = folder.glob("depth-*.pth")
    assert made.stem == f"depth-{sha256_of(made)[:8]}"
    assert made.stat().st_size < (folder / CHECKPOINT).stat().st_size
    passed(command(folder, "test", "tiny.py", made.name, "--work-dir", "published"))


@pytest.mark.slow
def test_a_config_of_2x_trains_and_what_it_wrote_becomes_an_archive(tmp_path):
    passed(command(tmp_path, "sample-data", "coco", "coco", "--train", "4", "--val", "2"))
    (tmp_path / "old.py").write_text(OLD_2D)
    shown = passed(command(tmp_path, "train", "old.py", "--work-dir", "run"))
    # Four pictures twice, two a batch; the warm-up ends after three iterations.
    assert "Epoch(train) [1][4/4]" in shown and "coco/bbox_mAP" in shown
    assert list((tmp_path / "run").glob("best_coco_bbox_mAP_epoch_1.pth"))
    # Exit code 3: so short a training finds nothing that could prove the archive.
    made = command(tmp_path, "archive", "run", "--output-folder", "store")
    assert made.returncode in (0, 3), made.stderr[-2000:]
    assert "best_coco_bbox_mAP_epoch_1.pth (the best of the training)" in made.stderr
    assert (tmp_path / "store" / "old.mar").is_file()


@pytest.mark.slow
def test_a_config_of_0x_trains(tmp_path):
    passed(command(tmp_path, "sample-data", "kitti", "kitti", "--train", "2", "--val", "1"))
    (tmp_path / "old3d.py").write_text(OLD_3D)
    shown = passed(command(tmp_path, "train", "old3d.py", "--work-dir", "run"))
    assert "Epoch(train) [2][2/2]" in shown and "KITTI/Car_3D_AP40_moderate_strict" in shown
    assert (tmp_path / "run" / "epoch_2.pth").is_file()


@pytest.mark.slow
def test_two_processes_test_on_the_cpu_as_one_does(folder):
    alone = passed(command(folder, "test", "tiny.py", CHECKPOINT, "--work-dir", "one"))
    shared = passed(command(folder, "test", "tiny.py", CHECKPOINT, "--work-dir", "two-test", "--gpus", "2"))
    figures = [re.findall(r"coco/bbox_mAP: (-?\d\.\d+)", shown)[-1] for shown in (alone, shared)]
    assert figures[0] == figures[1]
    assert "Epoch(test) [2/2]" in shared  # four pictures, two a process


@pytest.mark.slow
def test_one_of_two_processes_that_fails_ends_the_other(folder):
    ran = command(folder, "test", "tiny.py", "missing.pth", "--work-dir", "none", "--gpus", "2")
    assert ran.returncode == 2
    assert "missing.pth" in ran.stderr
    assert not (folder / "none").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("images2coco nowhere classes.txt out.json", "nowhere"),
        ("publish_model missing.pth out.pth", "missing.pth"),
        ("download_dataset --dataset-name coco2017 --save-dir downloads", "not downloaded"),
    ],
)
def test_tools_name_what_is_missing_and_leave_nothing(folder, tmp_path, line, named):
    # A proxy where nothing listens, so that no download starts.
    ran = command(
        tmp_path, "tools", *line.split(), http_proxy="http://127.0.0.1:9", https_proxy="http://127.0.0.1:9"
    )
    assert ran.returncode == 2 and "Traceback" not in ran.stderr
    assert named in ran.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_test_on_clouds_writes_pictures_and_predictions(tmp_path):
    passed(command(tmp_path, "sample-data", "kitti", "kitti", "--train", "1", "--val", "2"))
    # The config has neither a hook nor a visualizer for drawings; open3d is not installed.
    shown = passed(
        command(
            tmp_path, "test", "kitti/second_sample.py", "kitti/second_demo.pth", "--work-dir", "run",
            "--show-dir", "seen", "--out", "found.pkl",
        )
    )  # fmt: skip
    assert "KITTI/Car_3D_AP40_moderate_strict" in shown
    pictures = sorted(path.name for path in (tmp_path / "run").glob("*/seen/*.png"))
    assert pictures == ["000001.png", "000002.png"]
    with (tmp_path / "found.pkl").open("rb") as stream:
        found = pickle.load(stream)
    assert len(found) == 2 and all(len(one["pred_instances_3d"]["scores_3d"]) for one in found)
