"""Formats of a bulk run: each says what the records say, appears whole, and is made again when something ended it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from serve.bulk.destination import Destination
from serve.bulk.formats import Outputs, check_outputs
from serve.bulk.listing import list_frames
from serve.bulk.parts import manifest_line
from serve.compare.labels import encode_labels
from serve.errors import BadRequest, MissingPackage
from serve.formats.coco import CocoIds
from serve.formats.parquet import write_parquet
from serve.predict.writers import CocoWriter
from tests.bulk import fake
from tests.bulk.test_run import lines, run
from tests.conftest import ROOT
from tests.gateway.running import eventually
from tests.predict.test_kitti import KITTI

SIZE = (1242, 375)
COCO_FORMAT = Outputs(("jsonl", "coco"))
KITTI_FORMAT = Outputs(("jsonl", "kitti"), image_size=SIZE)
LIDAR: dict[str, Any] = {"bboxes_3d": [], "box_type_3d": "LiDAR"}
IMAGE: dict[str, Any] = {"bboxes": []}


@pytest.fixture
def drive(tmp_path: Path) -> Callable[..., Path]:
    """`drive(b"x", b"xx")`: clouds of such bytes in KITTI's folders; gives the folder of the clouds."""

    def make(*bodies: bytes, calibrated: bool = True) -> Path:
        for k, body in enumerate(bodies):
            for folder, name, content in (
                ("velodyne", f"{k:06d}.bin", body),
                ("calib", f"{k:06d}.txt", KITTI.encode()),
            ):
                if calibrated or folder != "calib":
                    (tmp_path / folder).mkdir(exist_ok=True)
                    (tmp_path / folder / name).write_bytes(content)
        return tmp_path / "velodyne"

    return make


def check(
    outputs: Outputs, answer: Any, manifest: Path, out: Path, *, classes: Sequence[str] = ("Car",)
) -> None:
    check_outputs(outputs, classes, answer, manifest, Destination(str(out)))


def lidar(source: Path, out: Path, outputs: Outputs, **options: Any) -> Any:
    return run(
        source,
        out,
        outputs=outputs,
        **{"open_model": fake.open_lidar, "engine": fake.OneProcess(), **options},
    )


def images(source: Path, out: Path, outputs: Outputs = COCO_FORMAT) -> Any:
    options: dict[str, Any] = {"modality": "image", "part_frames": 2, "engine": fake.OneProcess()}
    return run(source, out, outputs=outputs, open_model=fake.open_image, **options)


def labels(out: Path) -> dict[str, str]:
    found = {}
    for path in sorted((out / "kitti").glob("*.tar")):
        with tarfile.open(path) as file:
            for entry in file:
                content = file.extractfile(entry)
                assert content is not None and entry.name not in found
                found[entry.name] = content.read().decode()
    return found


def files(out: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()
    }


def test_every_answered_frame_has_one_label_file(drive: Any, tmp_path: Path) -> None:
    source, out = drive(b"1", b"bad", b"333", b"4444", b"55555"), tmp_path / "out"
    (tmp_path / "calib" / "000003.txt").unlink()
    (source / "000004.bin").write_bytes(b"")
    summary = lidar(source, out, KITTI_FORMAT, part_frames=2)
    assert {name: text.count("Car ") for name, text in labels(out).items()} == {
        "000000.txt": 1,
        "000002.txt": 3,
        "000004.txt": 0,
    }
    (missing,) = json.loads((out / "kitti" / "00000001.errors.json").read_bytes())
    assert (missing["frame"], missing["error"]["code"]) == ("000003.bin", "bad_request")
    assert summary.unwritten == {"kitti": Counter(bad_request=1)} and summary.counts.failed.total() == 1
    assert json.loads((out / "summary.json").read_text())["unwritten"] == {"kitti": {"bad_request": 1}}


def test_frames_that_differ_in_suffix_or_case_have_a_label_file_each(drive: Any, tmp_path: Path) -> None:
    source, out = drive(b"1"), tmp_path / "out"
    for name, body in (("a.bin", b"1"), ("a.pcd", b"22"), ("A.bin", b"333"), ("a.bin.pcd", b"4444")):
        (source / name).write_bytes(body)
    for name in ("a.txt", "A.txt", "a.bin.txt"):
        (tmp_path / "calib" / name).write_text(KITTI)
    assert not lidar(source, out, KITTI_FORMAT, part_frames=2).unwritten["kitti"]
    found = labels(out)
    assert len({name.casefold() for name in found}) == 5
    assert sorted(text.count("Car ") for text in found.values()) == [1, 1, 2, 3, 4]


def test_a_name_that_is_no_uri_is_an_error_of_its_frame(drive: Any, tmp_path: Path) -> None:
    source, out = drive(b"1"), tmp_path / "out"
    (source / "0\n.bin").write_bytes(b"22")
    assert lidar(source, out, KITTI_FORMAT).unwritten == {"kitti": Counter(bad_uri=1)}
    assert list(labels(out)) == ["000000.txt"]
    check(KITTI_FORMAT, LIDAR, out / "manifest.jsonl", tmp_path / "other")


def test_a_run_without_any_calibration_ends_before_it_computes_and_goes_on_with_one(
    drive: Any, tmp_path: Path
) -> None:
    source, out = drive(b"1", b"22", b"333", calibrated=False), tmp_path / "out"
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_bytes(b"".join(manifest_line(frame) for frame in list_frames(str(source), "lidar")))
    with pytest.raises(BadRequest):
        check(KITTI_FORMAT, LIDAR, manifest, out)
    (tmp_path / "one.txt").write_text(KITTI)
    given = Outputs(("jsonl", "kitti"), str(tmp_path / "one.txt"), SIZE)
    check(given, LIDAR, manifest, out)
    assert lidar(source, out, KITTI_FORMAT, part_frames=2).unwritten == {"kitti": Counter(bad_request=3)}
    assert not labels(out)
    check(KITTI_FORMAT, LIDAR, manifest, out)  # there is nothing left to write
    summary = lidar(source, out, given, open_model=fake.open_broken)
    assert (summary.computed, len(labels(out)), summary.unwritten["kitti"].total()) == (0, 3, 0)


def test_one_calibration_among_many_frames_is_enough(drive: Any, tmp_path: Path) -> None:
    source = drive(*(b"x" * k for k in range(7)), calibrated=False)
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_bytes(b"".join(manifest_line(frame) for frame in list_frames(str(source), "lidar")))
    (tmp_path / "calib").mkdir()
    (tmp_path / "calib" / "000006.txt").write_text(KITTI)
    check(KITTI_FORMAT, LIDAR, manifest, tmp_path / "out")


def test_formats_that_come_later_need_no_model(drive: Any, tmp_path: Path) -> None:
    source, out = drive(*(b"x" * k for k in range(1, 9))), tmp_path / "out"
    lidar(source, out, Outputs())
    assert not labels(out)
    lidar(source, out, KITTI_FORMAT, open_model=fake.open_broken)
    lidar(source, tmp_path / "other", KITTI_FORMAT)
    assert labels(out) == labels(tmp_path / "other") and len(labels(out)) == 8


def test_other_options_of_a_format_make_its_files_anew(drive: Any, tmp_path: Path) -> None:
    source, out = drive(b"1", b"22"), tmp_path / "out"
    lidar(source, out, KITTI_FORMAT)
    former = labels(out)
    lidar(source, out, Outputs(("jsonl", "kitti"), image_size=(700, 375)), open_model=fake.open_broken)
    assert labels(out).keys() == former.keys() and labels(out) != former


def test_files_that_a_kill_left_out_are_made_of_the_record(drive: Any, tmp_path: Path) -> None:
    source, out = drive(*(b"x" * k for k in range(1, 9))), tmp_path / "out"
    lidar(source, out, KITTI_FORMAT, part_frames=2)
    whole = files(out)
    (out / "kitti" / "00000002.tar").unlink()
    assert lidar(source, out, KITTI_FORMAT, open_model=fake.open_broken).computed == 0
    assert files(out) == whole


def test_files_of_records_that_were_removed_are_not_kept(drive: Any, tmp_path: Path) -> None:
    source, out = drive(b"1", b"22"), tmp_path / "out"
    lidar(source, out, KITTI_FORMAT, part_frames=1)
    (out / "parts" / "00000001.jsonl").unlink()
    lidar(source, out, Outputs(), part_frames=1)
    assert sorted(path.name for path in (out / "kitti").iterdir()) == ["00000000.tar"]


def test_the_number_of_processes_changes_no_byte_of_any_format(drive: Any, tmp_path: Path) -> None:
    chosen = ("jsonl", "parquet", "kitti") if has_pyarrow() else ("jsonl", "kitti")
    source = drive(b"1", b"bad", *(b"x" * k for k in range(12)))
    for processes in (1, 3):
        lidar(
            source,
            tmp_path / str(processes),
            Outputs(chosen, image_size=SIZE),
            processes=processes,
            engine=None,
        )
    assert files(tmp_path / "1") == files(tmp_path / "3")


def test_a_converter_that_is_killed_costs_no_file(drive: Any, tmp_path: Path) -> None:
    source, out = drive(*(b"x" * k for k in range(1, 7))), tmp_path / "out"
    killed: list[int] = []

    def kill(frames: int) -> None:
        for child in psutil.Process().children() if not killed else []:
            if "spawn_main" in " ".join(child.cmdline()):
                killed.append(child.pid)
                child.kill()

    lidar(source, out, KITTI_FORMAT, part_frames=1, advance=kill)
    assert killed and sorted(labels(out)) == [f"{k:06d}.txt" for k in range(6)]


def test_coco_has_what_predict_writes(tmp_path: Path) -> None:
    source, out = tmp_path / "images", tmp_path / "out"
    source.mkdir()
    for number, body in ((139, b"1"), (285, b"bad"), (632, b"4444"), (724, b"")):
        (source / f"{number:012d}.jpg").write_bytes(body)
    images(source, out)
    CocoWriter(tmp_path / "predict.json").finish(lines(out))
    assert (out / "coco.json").read_bytes() == (tmp_path / "predict.json").read_bytes()
    ids = json.loads((out / "coco_ids.json").read_bytes())
    assert [image["id"] for image in ids["images"]] == [139, 285, 632, 724]
    assert ids["categories"] == [{"id": 1, "name": "donut"}]


def test_images_without_distinct_numbers_are_counted(tmp_path: Path) -> None:
    for names in (("a.jpg", "b.jpg", "7.jpg"), ("1.jpg", "01.jpg", "7.jpg")):
        source, out = tmp_path / names[0], tmp_path / f"out-{names[0]}"
        source.mkdir()
        for name in names:
            (source / name).write_bytes(b"22")
        images(source, out)
        assert [each["image_id"] for each in json.loads((out / "coco.json").read_bytes())] == [
            0,
            0,
            1,
            1,
            2,
            2,
        ]


def test_coco_takes_the_ids_of_an_annotation_file(tmp_path: Path) -> None:
    source, annotations = tmp_path / "images", tmp_path / "instances.json"
    source.mkdir()
    (source / "b.jpg").write_bytes(b"1")
    known = {"images": [{"file_name": "b.jpg", "id": 42}], "categories": [{"name": "donut", "id": 60}]}
    annotations.write_text(json.dumps(known))
    given = Outputs(("coco",), annotations=annotations)
    images(source, tmp_path / "out", given)
    (result,) = json.loads((tmp_path / "out" / "coco.json").read_bytes())
    assert (result["image_id"], result["category_id"]) == (42, 60)
    manifest = tmp_path / "out" / "manifest.jsonl"
    check(given, IMAGE, manifest, tmp_path / "out", classes=["donut"])
    both = tmp_path / "both.json"
    images_of_both = [{"file_name": "day/b.jpg", "id": 1}, {"file_name": "night/b.jpg", "id": 2}]
    both.write_text(json.dumps({"images": images_of_both, "categories": []}))
    assert [CocoIds(both).image(f"{folder}/b.jpg") for folder in ("night", "day")] == [2, 1]
    with pytest.raises(BadRequest):
        CocoIds(both).image("dusk/b.jpg")
    for classes, listed in (
        (["donut", "cake"], '{"frame": "b.jpg"}\n'),
        (["donut"], '{"frame": "c.jpg"}\n'),
        (["donut"], '{"frame": "day/b.jpg"}\n{"frame": "night/b.jpg"}\n'),
    ):
        manifest.write_text(listed)
        with pytest.raises(BadRequest):
            check(given, IMAGE, manifest, tmp_path / "out", classes=classes)


def test_boxes_that_a_format_cannot_hold_are_an_error_at_once(tmp_path: Path) -> None:
    (tmp_path / "m").write_text("")
    depth: dict[str, Any] = {"bboxes_3d": [], "box_type_3d": "Depth"}
    points: dict[str, Any] = {"pts_semantic_mask": {}}
    for name, answer in (("coco", LIDAR), ("coco", points), ("kitti", depth), ("kitti", points)):
        with pytest.raises(BadRequest):
            check(Outputs((name,)), answer, tmp_path / "m", tmp_path / "out")


def test_coco_appears_when_every_part_is_there(drive: Any, tmp_path: Path) -> None:
    gate, source, out = tmp_path / "gate", tmp_path / "images", tmp_path / "out"
    source.mkdir()
    for k, body in enumerate((b"1", b"22", b"gate %b" % str(gate).encode(), b"4")):
        (source / f"{k}.jpg").write_bytes(body)
    script = (
        "from pathlib import Path; from tests.bulk.test_run import run; from tests.bulk import fake; "
        "from serve.bulk.formats import Outputs; "
        f"run(Path({str(source)!r}), Path({str(out)!r}), open_model=fake.open_image, modality='image', "
        "outputs=Outputs(('coco',)), part_frames=1)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env=environment) as process:
        eventually(lambda: (tmp_path / "gate.reached").exists(), 60)
        assert not (out / "coco.json").exists()
        process.send_signal(signal.SIGKILL)
    gate.touch()
    (out / "coco.json").write_text("of a run whose parts were removed")
    images(source, out)
    results = json.loads((out / "coco.json").read_bytes())
    assert Counter(each["image_id"] for each in results) == {
        k: (source / f"{k}.jpg").stat().st_size for k in range(4)
    }


def test_overwriting_removes_the_files_of_every_format(drive: Any, tmp_path: Path) -> None:
    source, out = drive(*(b"x" * k for k in range(1, 7))), tmp_path / "out"
    lidar(source, out, KITTI_FORMAT, part_frames=1)
    lidar(source, out, Outputs(), part_frames=6, overwrite=True)
    assert sorted(files(out)) == [
        "bulk.json",
        "manifest.jsonl",
        "parts/00000000.json",
        "parts/00000000.jsonl",
        "summary.json",
    ]


def test_parquet_without_pyarrow_is_an_error_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingPackage):
        check(Outputs(("parquet",)), LIDAR, tmp_path, tmp_path / "out")


def has_pyarrow() -> bool:
    try:
        import pyarrow
    except ImportError:
        return False
    return pyarrow is not None


def test_parquet_has_the_records(drive: Any, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="an extra: pip install 'mmdet3d-serve[parquet]'")
    source, out = drive(b"1", b"bad", b"333", b"bad", b"55555", b"bad"), tmp_path / "out"
    lidar(source, out, Outputs(("parquet",)), part_frames=1)
    tables = [parquet.read_table(path) for path in sorted((out / "parquet").glob("*.parquet"))]
    assert len({str(table.schema.remove_metadata()) for table in tables}) == 1
    rows = [row for table in tables for row in table.to_pylist()]
    assert len(rows) == 6
    for row, line in zip(rows, lines(out), strict=True):
        assert row["frame"] == line["frame"]
        if "error" in line:
            assert (row["error_code"], row["error_message"]) == (
                line["error"]["code"],
                line["error"]["message"],
            )
            assert row["bboxes_3d"] is None and row["names"] is None
            continue
        answer = line["answer"]
        for name in ("names", "labels_3d", "box_type_3d", "model"):
            assert row[name] == answer[name]
        for name in ("bboxes_3d", "scores_3d"):
            assert np.array_equal(np.float32(row[name]), np.float32(answer[name]))
        assert row["error_code"] is None and row["bboxes"] is None
        assert json.loads(row["other"]) == {"bytes": answer["bytes"]}
    metadata = parquet.ParquetFile(out / "parquet" / "00000000.parquet").metadata.metadata
    assert json.loads(metadata[b"classes"]) == ["Car"]


def test_row_groups_of_point_labels_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="an extra: pip install 'mmdet3d-serve[parquet]'")
    monkeypatch.setattr("serve.formats.parquet._LABELS", 250)
    labels = encode_labels(np.arange(100))
    clouds = [{"frame": f"{k}.bin", "answer": {"pts_semantic_mask": labels}} for k in range(7)]
    with (tmp_path / "labels.parquet").open("wb") as file:
        write_parquet(
            file, [*clouds, {"frame": "bad.bin", "error": {"code": "undecodable_frame", "message": ""}}]
        )
    found = parquet.ParquetFile(tmp_path / "labels.parquet")
    assert [found.metadata.row_group(k).num_rows for k in range(found.num_row_groups)] == [3, 3, 2]
    rows = found.read().to_pylist()
    assert [row["pts_semantic_mask"] for row in rows] == [[*range(100)]] * 7 + [None]
