"""Parts of an archive, TorchServe's own archiver, and what the check of archives accepts of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import orjson
import pytest

import handlers
from serve import archive
from serve.archive.bounds import HANDLER_FILE
from serve.errors import ArchiveError, BackendStartError
from serve.runtime.custom_code import import_archived_code
from serve.torchserve import ServedModel, TorchServe, TorchServeOptions
from tests.attacks.archives.small_archive import add_declared, entries_of, pack, small_archive
from tests.conftest import pick_free_ports

ARCHIVER = Path(sys.executable).with_name("torch-model-archiver")


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The archiver works in a folder of the model's name in the system's temporary folder."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))


def run_archiver(words: list[str], folder: Path) -> Path:
    """Run TorchServe's archiver; return the archive that it made in `folder`."""
    assert words[0] == "torch-model-archiver"
    command = [str(ARCHIVER), *words[1:], "--export-path", str(folder)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
    assert ran.returncode == 0, ran.stderr
    return folder / f"{words[words.index('--model-name') + 1]}.mar"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """Write the parts of a small archive; the archiver's command line for them."""
    return archive.write_parts(small_archive(tmp_path), tmp_path / "parts")


@pytest.mark.parametrize(
    "more", [[], ["--archive-format", "default"], ["--serialized-file", "weights.safetensors"]]
)
def test_archive_of_the_stock_archiver_is_accepted_as_ours(
    words: list[str], tmp_path: Path, out: Path, more: list[str]
) -> None:
    more = [str(tmp_path / "parts" / word) if word == "weights.safetensors" else word for word in more]
    made = run_archiver([*words, *more], out)
    assert archive.verify(made) == archive.verify(tmp_path / "small.mar")
    opened = archive.extract(made, out / "opened")
    assert opened.config() == {"model": {"type": "VoxelNet"}} and opened.golden_frame() == b"frame"
    with zipfile.ZipFile(made) as file:
        assert (
            orjson.loads(file.read("MAR-INF/MANIFEST.json"))["model"]["handler"] == "handlers.mmdet3d_handler"
        )


def test_stock_archive_of_an_altered_part_is_refused(words: list[str], tmp_path: Path, out: Path) -> None:
    (tmp_path / "parts" / "golden" / "frame.bin").write_bytes(b"other")
    with pytest.raises(ArchiveError, match=r"golden/frame\.bin was altered"):
        archive.verify(run_archiver(words, out))


@pytest.mark.parametrize("name", ["handlers.mmdet3d_handler.py", "handlers.mmdet_handler.py"])
def test_file_of_the_handler_holds_one_line_and_nothing_else(tmp_path: Path, name: str) -> None:
    path = small_archive(tmp_path)
    for content, accepted in ((HANDLER_FILE, True), (b"import os\n", False)):
        changed = pack(tmp_path / "changed.mar", {**entries_of(path), name: content})
        if accepted:
            archive.verify(changed)
            continue
        with pytest.raises(ArchiveError, match="was altered"):
            archive.verify(changed)
        # Nor if the author of the archive declares it.
        with pytest.raises(ArchiveError, match="was altered"):
            archive.verify(add_declared(changed, {name: content}))
        unpacked = tmp_path / "unpacked"
        shutil.unpack_archive(changed, unpacked, "zip")
        with pytest.raises(ArchiveError, match="was altered"):
            archive.open_directory(unpacked)


def test_copy_of_a_handler_is_refused_with_the_option_that_works(words: list[str], out: Path) -> None:
    words[words.index("--handler") + 1] = str(Path(handlers.__file__).parent / "mmdet3d_handler.py")
    with pytest.raises(ArchiveError, match=r"--handler \S+/handlers\.mmdet3d_handler"):
        archive.verify(run_archiver(words, out))


@pytest.mark.parametrize("option", ["--model-file", "--requirements-file", "--config-file"])
def test_files_that_torchserve_would_run_or_install_are_refused(
    words: list[str], tmp_path: Path, out: Path, option: str
) -> None:
    # Under a name that an archive may have: the manifest alone makes the difference.
    with pytest.raises(ArchiveError, match="the manifest has"):
        archive.verify(run_archiver([*words, option, str(tmp_path / "parts" / "config.json")], out))


def test_another_name_than_the_model_has_is_refused(words: list[str], out: Path) -> None:
    words[words.index("small")] = "other"
    with pytest.raises(ArchiveError, match="'modelName': 'other'"):
        archive.verify(run_archiver(words, out))


def test_unpacked_archive_gives_two_manifests_and_is_refused(
    words: list[str], tmp_path: Path, out: Path
) -> None:
    unpacked = tmp_path / "unpacked"
    shutil.unpack_archive(tmp_path / "small.mar", unpacked, "zip")
    words[words.index("--extra-files") + 1] = f"{unpacked}/"
    with pytest.raises(ArchiveError, match=r"several entries 'MAR-INF/MANIFEST\.json'"):
        archive.verify(run_archiver(words, out))
    shutil.rmtree(unpacked / "MAR-INF")
    archive.verify(run_archiver([*words, "--force"], out))


def test_code_among_the_parts_runs_only_if_it_is_trusted(tmp_path: Path, out: Path) -> None:
    path = add_declared(
        small_archive(tmp_path), {"code/own_module_of_parts.py": b"raise SystemExit('ran')\n"}
    )
    made = run_archiver(archive.write_parts(path, tmp_path / "parts"), out)
    opened = archive.extract(made, out / "opened")
    with pytest.raises(ArchiveError, match="MMDET3D_SERVE_TRUST_ARCHIVE_CODE"):
        import_archived_code(opened, opened.config(), trust_code=False)
    assert "own_module_of_parts" not in sys.modules


def test_folder_of_parts_is_neither_full_nor_the_one_that_the_archiver_empties(tmp_path: Path) -> None:
    archive.check_parts_folder(tmp_path / "new", "small")
    with pytest.raises(ArchiveError, match="not an empty folder"):
        archive.check_parts_folder(tmp_path, "small")
    with pytest.raises(ArchiveError, match="torch-model-archiver removes"):
        archive.check_parts_folder(Path(tempfile.gettempdir(), "small"), "small")


@pytest.fixture
def server(out: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchServe]:
    inference, management, metrics = pick_free_ports(3)
    options = TorchServeOptions(
        model_store=out, inference_port=inference, management_port=management, metrics_port=metrics,
        run_root=tmp_path_factory.mktemp("t"), system_metrics=False,
    )  # fmt: skip
    with TorchServe(options) as running:
        yield running


@pytest.mark.torchserve
@pytest.mark.timeout(300)
def test_archive_of_the_stock_archiver_is_served_and_proves_itself(
    demo_mar: Path, tmp_path: Path, out: Path, server: TorchServe, street: np.ndarray
) -> None:
    made = run_archiver(archive.write_parts(demo_mar, tmp_path / "parts"), out)
    shutil.copy(demo_mar, out / "written_by_us.mar")
    for model in (f"stock={made.name}", "ours=written_by_us.mar"):
        server.register(ServedModel.parse(model))
    stock, ours = (
        httpx.post(f"{server.inference_url}/predictions/{name}", content=street.tobytes(), timeout=60)
        for name in ("stock", "ours")
    )
    assert stock.status_code == 200 and len(stock.json()["scores_3d"]) > 2
    assert stock.content == ours.content
    server.unregister("stock")

    # An archive whose proof fails is not served: the recorded answer is another one, its hash is right.
    expected_path = tmp_path / "parts" / "golden" / "expected.json"
    record = orjson.loads(expected_path.read_bytes())
    record["scores_3d"] = [score / 2 for score in record["scores_3d"]]
    made.unlink()
    entries = {**entries_of(demo_mar), "golden/expected.json": orjson.dumps(record)}
    wrong = add_declared(
        pack(tmp_path / "wrong.mar", entries), {"golden/expected.json": orjson.dumps(record)}
    )
    run_archiver(archive.write_parts(wrong, tmp_path / "wrong-parts"), out)
    with pytest.raises(BackendStartError, match="golden frame"):
        server.register(ServedModel(made.name))
